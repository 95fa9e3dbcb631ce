# SPDX-License-Identifier: Apache-2.0
"""`MixedQuantize`: a scan of what each weight bears, bits for each within a budget, and `Quantize` with these bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from featherweight.errors import OptionError, check_whole, check_word
from featherweight.layers import refuse_nothing
from featherweight.plan import Plan
from featherweight.quantize.method import Quantize
from featherweight.quantize.sensitivity import BY, mixed_bits, sensitivity
from featherweight.task import Stage, Task

__all__ = ["MixedQuantize"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedQuantize:
    """Rounds each weight to as few bits as it bears, so that all together meet a budget, after training.

    Saves bytes on disk as `Quantize` does, with less lost than the same bits everywhere would cost; integer runtimes
    take 8 bits (some 4), so that it saves no time beyond theirs. Each weight is rounded alone to each of `bits`
    (`sensitivity`), and `mixed_bits` shares out the budget: an average of bits (4.5), bytes of these weights ("200
    kB"), or the share of their floats ("15 %").

    `by` is output (the model's answers on `samples` of calibration data: no labels, and no tuning on what the metric is
    measured on) or metric. `quantize` holds further options of `Quantize`: `{"activations": "static"}` say.

    Raises `OptionError` where even the fewest bits do not meet the budget, and what `Quantize` raises; the model is
    then as it was.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> task = Task(model, (torch.zeros(1, 8),), calibration=[torch.randn(32, 8) for _ in range(4)])
    >>> said = []
    >>> plan = MixedQuantize(4)(model, task, Stage(report=lambda event: said.append(event.get("text", ""))))
    >>> sorted(plan.formats)
    ['0.weight', '2.weight']
    """

    budget: str | float = dataclasses.field(kw_only=False)
    bits: Sequence[int] = (8, 6, 5, 4, 3, 2)
    by: str = "output"
    samples: int = 256
    quantize: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        me = type(self).__name__
        object.__setattr__(self, "bits", tuple(self.bits))
        check_word(me, "by", self.by, BY)
        check_whole(me, "samples", self.samples, least=1)
        if "bits" in self.quantize:
            raise OptionError(f"{me}: bits are what this finds out; leave them out of quantize={{...}}.")
        try:
            self._quantize({"*": 8})
        except TypeError as error:
            raise OptionError(f"{me}: quantize={dict(self.quantize)!r} are not options of Quantize: {error}") from error

    def _quantize(self, bits: Mapping[str, int]) -> Quantize:
        return Quantize(bits, **self.quantize)

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        options = self._quantize({"*": 8})
        lines = options.select(model, task.example_inputs)
        refuse_nothing(lines, "quantize")
        table = sensitivity(
            model,
            task,
            self.bits,
            by=self.by,
            layers=[line.name for line in lines if line.action == "quantized"],
            symmetric=options.symmetric,
            chunk=options.chunk,
            samples=self.samples,
            report=stage.report,
        )
        chosen = mixed_bits(table, self.budget)
        sizes = {line.name: line.parameters for line in table.lines}
        mean = sum(chosen[name] * size for name, size in sizes.items()) / sum(sizes.values())
        counts = {b: sum(one == b for one in chosen.values()) for b in sorted(set(chosen.values()), reverse=True)}
        shown = ", ".join(f"{count} weight{'s' * (count > 1)} at {b}" for b, count in counts.items())
        stage.report({"kind": "message", "text": f"{mean:.2f} bits on average, by {table.of}: {shown}."})
        return self._quantize(chosen)(model, task, stage)
