# SPDX-License-Identifier: Apache-2.0
"""Which weights bear fewer bits: each rounded alone, and the answers compared; then the bits of each within a budget.

The sum of what weights cost alone stands for what they cost together. That is right where costs are small, and it errs
where errors meet: judge the choice by the metric of the whole. One scan takes weights x bits passes over the data.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featherweight.edits import apply
from featherweight.errors import NothingToCompress, NumericalError, OptionError, check_whole, check_word, is_number
from featherweight.grids import GridSpec
from featherweight.layers import Weight, check_globs, draw, keep_by_name, to_matrix, unwrap, weights
from featherweight.layers.calls import quiet
from featherweight.plan import FakeQuant
from featherweight.quantize.chosen import reading_layers
from featherweight.quantize.rounding import Rounding, round_weight
from featherweight.sizes import parse_bytes, split_unit
from featherweight.solvers.allocate import allocate, ascending
from featherweight.task import Task

__all__ = ["Sensitivity", "Tried", "mixed_bits", "sensitivity"]

BY = ("metric", "output")
Report = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Tried:
    """One weight (or, of kind `input`, what one layer reads), and by bits how much worse the model is with it rounded.

    `scales` is how many scales go with the integers; an input has no parameters of its own.
    """

    name: str
    kind: str
    parameters: int
    scales: int
    losses: Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found: a line for each weight, by how much the model loses at each number of bits.

    `of` is what was measured: the metric's name (how far it fell: below zero where it rose), or `output error`, the
    squared change of the model's answers over their square. `whole` is the model's own metric.

    >>> tried = Sensitivity("output error", None, (8, 4), ())
    >>> tried.to_dict()
    {'of': 'output error', 'whole': None, 'bits': [8, 4], 'lines': []}
    """

    of: str
    whole: float | None
    bits: tuple[int, ...]
    lines: tuple[Tried, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able data; bits become text there, as JSON wants of keys."""
        lines = [
            {**dataclasses.asdict(one), "losses": {str(b): v for b, v in one.losses.items()}} for one in self.lines
        ]
        return {"of": self.of, "whole": self.whole, "bits": list(self.bits), "lines": lines}


def sensitivity(
    model: nn.Module,
    task: Task,
    bits: Sequence[int] = (8, 6, 4, 3, 2),
    *,
    activations: bool = False,
    by: str | None = None,
    layers: Sequence[str] = ("*",),
    keep: Sequence[str] = (),
    symmetric: bool = True,
    chunk: int | None = None,
    samples: int = 256,
    report: Report = lambda event: None,
) -> Sensitivity:
    """Rounds one weight at a time to each number of bits, everything else as it is, and measures what the model loses.

    `by` is metric (the task's own, on its own data) or output (of `samples` of the task's calibration data, else its
    training data; needs no labels); the metric where the task has one, if not given. With `activations` what each layer
    reads is tried too, on the grid of each batch's range. Your model is not changed: a copy is, one tensor at a time.
    `report` is told each step.

    Raises `OptionError` for bits out of range and a metric that is not there, `NothingToCompress` for a glob that
    matches nothing, `NumericalError` for a metric or an answer that is not finite.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> task = Task(model, (torch.zeros(1, 4),), calibration=[torch.randn(16, 4)])
    >>> found = sensitivity(model, task, bits=(8, 2))
    >>> [line.name for line in found.lines], found.of
    (['0.weight', '2.weight'], 'output error')
    >>> found.lines[0].losses[8] < found.lines[0].losses[2]
    True
    """
    bits = _checked(bits, chunk)
    by = by or ("output" if task.evaluate is None else "metric")
    check_word("sensitivity", "by", by, BY)
    twin = copy.deepcopy(unwrap(model)).eval()
    chosen = _chosen(twin, layers, keep)
    reads = list(reading_layers(twin, chosen, "static")[0]) if activations else []
    total, done = (len(chosen) + len(reads)) * len(bits) + 1, itertools.count(1)

    def told(value: float) -> float:
        report({"kind": "step", "step": next(done), "total": total})
        return value

    score, of, whole = _scorer(twin, task, by, samples)
    told(0.0)
    lines = []
    for weight in chosen:
        specs = [GridSpec(b, symmetric, chunk) for b in bits]
        losses = [told(_with_weight(weight, spec, lambda: score(twin), twin)) for spec in specs]
        rows, d = to_matrix(weight, weight.parameter).shape
        scales = rows * -(-d // min(chunk or d, d))
        lines.append(Tried(weight.name, weight.kind, rows * d, scales, dict(zip(bits, losses, strict=True))))
    for layer in reads:
        losses = [told(_with_input(twin, layer, b, score)) for b in bits]
        lines.append(Tried(layer, "input", 0, 0, dict(zip(bits, losses, strict=True))))
    return Sensitivity(of, whole, bits, tuple(lines))


def _checked(bits: Iterable[int], chunk: int | None) -> tuple[int, ...]:
    found = tuple(sorted(set(bits), reverse=True))
    if not found:
        raise OptionError("sensitivity: bits is empty; give those to try, (8, 4, 2) say.")
    for one in found:
        if type(one) is not int or not 2 <= one <= 8:
            raise OptionError(f"sensitivity: bits are whole numbers from 2 to 8; got {one!r}.")
    if chunk is not None:
        check_whole("sensitivity", "chunk", chunk, least=1)
    return found


def _chosen(model: nn.Module, layers: Sequence[str], keep: Sequence[str]) -> list[Weight]:
    found, left = weights(model)
    if not found and not left:
        raise NothingToCompress("Nothing to quantize: the model has no weights (parameters of two axes or more).")
    check_globs(found, left, {"layers": layers, "keep": keep})
    kept = dict(left)
    keep_by_name(found, layers, keep, {}, kept)
    chosen = [weight for weight in found if weight.name not in kept and weight.parameter.numel()]
    if not chosen:
        raise NothingToCompress(f"Nothing to quantize: layers={list(layers)} and keep={list(keep)} leave no weight.")
    return chosen


def _scorer(
    model: nn.Module, task: Task, by: str, samples: int
) -> tuple[Callable[[nn.Module], float], str, float | None]:
    """A function of a changed model to what it loses, what that is called, and the metric of the model as it is."""
    if by == "metric":
        if task.evaluate is None:
            raise OptionError("sensitivity: by='metric' needs Task(evaluate=...); by='output' needs data alone.")
        evaluate, sign = task.evaluate, 1 if task.higher_is_better else -1

        def metric(changed: nn.Module) -> float:
            with torch.no_grad():
                return _finite(float(evaluate(changed)), f"{task.metric} of the model")

        whole = metric(model)
        return lambda changed: sign * (whole - metric(changed)), task.metric, whole
    check_whole("sensitivity", "samples", samples, least=1)
    batches = draw(task, samples, 0.0, 0).fit
    with quiet(model):
        answers = [_floats(task.forward(model, batch)) for batch in batches]
    size = sum(float(y.square().sum()) for answer in answers for y in answer)
    if not size > 0:
        raise NumericalError(
            "The model answers nothing but zeros on the calibration data, so that no change can be seen."
        )

    def error(changed: nn.Module) -> float:
        with quiet(changed):
            change = 0.0
            for batch, answer in zip(batches, answers, strict=True):
                now = _floats(task.forward(changed, batch))
                change += sum(float((a - b).square().sum()) for a, b in zip(now, answer, strict=True))
        return _finite(change / size, "What the model answers")

    return error, "output error", None


def _floats(answer: Any) -> list[Tensor]:
    return [
        leaf.detach().double() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def _finite(value: float, what: str) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise NumericalError(
            f"{what} became {value}, so that sensitivities cannot be told. Look at its data and weights."
        )
    return value


def _with_weight(weight: Weight, spec: GridSpec, score: Callable[[], float], model: nn.Module) -> float:
    """The score with one weight rounded, which is put back to the last bit."""
    before = weight.parameter.data
    try:
        round_weight(weight, Rounding(spec))
        return score()
    finally:
        weight.parameter.data = before


def _with_input(model: nn.Module, layer: str, bits: int, score: Callable[[nn.Module], float]) -> float:
    twin = copy.deepcopy(model)
    apply(twin, FakeQuant(layer, bits, symmetric=False, dynamic=True))
    return score(twin)


def mixed_bits(table: Sensitivity, budget: str | float) -> dict[str, int]:
    """Bits for each weight, `{name: bits}` as `Quantize(bits=...)` takes it, that lose least in sum within a budget.

    `budget` is an average of bits over all weights (4.5), bytes ("200 kB", the scales of rows counted), or the share of
    32-bit floats that is kept ("15 %"). A loss never falls as bits do, and is never below nothing: what is better with
    fewer bits is better by chance. Steps down go cheapest first, by loss per bit saved along the convex minorant of
    each weight's losses (`solvers.allocate`), which is the best choice but for the last step; what is left of the
    budget then buys back what helps most.

    Raises `OptionError` where even the fewest bits of all do not meet the budget, and says what they take.

    >>> lines = [Tried("a", "linear", 100, 10, {8: 0.0, 4: 0.1, 2: 5.0}), Tried("b", "linear", 100, 10, {8: 0.0, 4: 0.0, 2: 0.2})]
    >>> mixed_bits(Sensitivity("output error", None, (8, 4, 2), tuple(lines)), budget=3)
    {'a': 4, 'b': 2}
    """
    lines = [line for line in table.lines if line.kind != "input"]
    bits = sorted(table.bits, reverse=True)
    losses = [list(itertools.accumulate((max(0.0, line.losses[b]) for b in bits), max)) for line in lines]
    allowed = _allowed(budget, lines)
    taken = [0] * len(lines)
    spent = sum(line.parameters * bits[0] for line in lines)
    least = sum(line.parameters * bits[-1] for line in lines)
    if least > allowed:
        raise OptionError(
            f"mixed_bits: {bits[-1]} bits everywhere, the fewest that were tried, take {least / 8:.0f} bytes of the {allowed / 8:.0f} "
            f"that budget={budget!r} allows before scales. Try fewer bits, or allow more."
        )
    if spent > allowed and len(bits) > 1:
        sizes = torch.tensor(
            [[line.parameters * (a - b) for a, b in itertools.pairwise(bits)] for line in lines]
        ).double()
        steps = torch.tensor([[b - a for a, b in itertools.pairwise(row)] for row in losses]).double()
        taken = allocate(ascending(steps / sizes, sizes), round(spent - allowed), sizes).tolist()
    _buy_back(taken, lines, losses, bits, allowed)
    return {line.name: bits[t] for line, t in zip(lines, taken, strict=True)}


def _allowed(budget: str | float, lines: Sequence[Tried]) -> float:
    """Bits that weights may take, scales apart."""
    parameters = sum(line.parameters for line in lines)
    if is_number(budget) and budget > 0:
        return float(budget) * parameters
    number, unit = split_unit(budget)
    size = parameters * 4 * number / 100 if unit == "%" else float(parse_bytes(str(budget), "mixed_bits: budget"))
    return 8 * size - 32 * sum(line.scales for line in lines)


def _buy_back(
    taken: list[int], lines: Sequence[Tried], losses: Sequence[Sequence[float]], bits: Sequence[int], allowed: float
) -> None:
    """Spends what is left on the single step up that lowers the loss most, until none fits."""
    while True:
        slack = allowed - sum(line.parameters * bits[t] for line, t in zip(lines, taken, strict=True))
        best, change = 0.0, None
        for i, line in enumerate(lines):
            for t in range(taken[i]):
                if line.parameters * (bits[t] - bits[taken[i]]) <= slack and losses[i][taken[i]] - losses[i][t] > best:
                    best, change = losses[i][taken[i]] - losses[i][t], (i, t)
        if change is None:
            return
        taken[change[0]] = change[1]
