# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training: the network learns on the grids it will be stored and run on, and learns their steps.

It costs a copy of the weights, a few passes over them an optimizer step, and one over each input that has a grid. What
it saves is bytes on disk, and time in a runtime that computes with integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from featherweight.errors import OptionError, check_strings, check_whole, check_word, is_number
from featherweight.layers import RULES, Selected, unwrap
from featherweight.quantize.learned import STARTS
from featherweight.quantize.quantizer import Quantizer
from featherweight.quantize.selecting import choose_weights

__all__ = ["QAT"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QAT:
    """Quantizes your model in place while it trains: weights and layers' inputs are rounded, with learned step sizes.

    Saves bytes on disk (weights on a grid are stored as integers) and time where a runtime computes with integers; no
    time and no memory in PyTorch. Steps learn by LSQ (arXiv 1902.08153, equations 1 to 5: the straight-through gradient
    within the range, the step's own gradient times 1/√(N·Qp)), zero points of inputs of both signs as in LSQ+ (arXiv
    2004.09576). `finalize()` leaves plain numbers on the grid; nothing is added to the model but what the plan's edits
    say. Zeros stay zero.

    - bits: 2 to 8, or `{glob: bits}` (a later glob overrides an earlier one), of the weights. Grids are symmetric.
    - per: a step for each output channel (`row`) or one for the whole `tensor`.
    - activation_bits: of the first inputs of layers whose weights are quantized, per tensor; None leaves them float.
      Not covered: additions, concatenations, pooling and outputs, whose grids are placed on the exported graph;
      recurrent states; and attention that torch fuses, unless `Apply([Swap(layer, to="attention")])` opened it. Static
      grids that are there already go on from their values.
    - fold: when BatchNorm goes into the layer before it: `last`, by `finalize()`, so that it steadies the training
      until then (a scale for each channel is multiplied, and the integers stay); `first`; or `never`. With one step for
      a tensor it is first, since its channels would part.
    - start: where steps begin: `mse` (least error), or `lsq`, 2 mean|v|/√Qp. A weight that is on a grid of as many bits
      begins there, so that training goes on from a `Quantize` or `Reconstruct` stage.
    - learn: False keeps steps where they begin. `step_lr` is their rate over the optimizer's.
    - freeze_norms: the step from which norms use their running statistics.
    - layers, keep: globs on qualified names. `dense`: rules for what stays float: `first`, `depthwise`, `output`.

    Raises `OptionError` for an option out of range.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    >>> hook = QAT(bits=4).attach(model, optimizer)
    >>> for step in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     facts = hook.step()
    >>> len(model[0].weight[0].unique()) <= 16, facts
    (True, {'bits': 4.0})
    >>> hook.finalize().edits[0]
    FakeQuant(layer='0', bits=8, symmetric=False, dynamic=False)
    """

    bits: int | Mapping[str, int] = dataclasses.field(default=8, kw_only=False)
    per: str = "row"
    activation_bits: int | None = 8
    activation_symmetric: bool = False
    fold: str = "last"
    start: str = "mse"
    learn: bool = True
    step_lr: float = 1.0
    freeze_norms: int | None = None
    layers: Sequence[str] = ("*",)
    keep: Sequence[str] = ()
    dense: Sequence[str] = ()

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("layers", "keep", "dense"):
            object.__setattr__(self, name, check_strings(me, name, getattr(self, name)))
        if isinstance(self.bits, Mapping) and not self.bits:
            raise OptionError(f"{me}: bits is an empty mapping; give {{glob: bits}}, {{'*': 4, 'head': 8}} say.")
        for where, bits in self.bits.items() if isinstance(self.bits, Mapping) else [("", self.bits)]:
            _check_bits(me, f"bits of {where!r}" if where else "bits", bits)
        if self.activation_bits is not None:
            _check_bits(me, "activation_bits", self.activation_bits)
        check_word(me, "per", self.per, ("row", "tensor"))
        check_word(me, "start", self.start, STARTS)
        check_word(me, "fold", self.fold, ("last", "first", "never"))
        for rule in self.dense:
            check_word(me, "dense", rule, RULES)
        if self.freeze_norms is not None:
            check_whole(me, "freeze_norms", self.freeze_norms)
        if not is_number(self.step_lr) or not self.step_lr > 0:
            raise OptionError(f"{me}: step_lr is a factor above 0 of the optimizer's rate; got {self.step_lr!r}.")

    @property
    def folds(self) -> str:
        """When norms are folded, with what `per` says taken in."""
        return "first" if self.fold == "last" and self.per == "tensor" else self.fold

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        example_inputs: tuple[Any, ...] | None = None,
    ) -> Quantizer:
        """Acts on your model from now on; call `step()` of what is returned after each optimizer step.

        Attach after hooks that prune, so that they see full-precision weights, and before you make a learning rate
        scheduler, as steps are a parameter group of their own. `model` may be compiled or wrapped in
        DistributedDataParallel (afterwards, where norms are folded first); `optimizer` may be wrapped by accelerate.
        `example_inputs` show which norms can be folded; without them none are.

        Raises `NothingToCompress` where all is kept, `NumericalError` for weights that are not finite, `OptionError`
        where options do not fit the model.
        """
        return Quantizer(self, model, optimizer, example_inputs)

    def select(self, model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> tuple[Selected, ...]:
        """What would be quantized and what kept, and why, for every weight. Changes nothing.

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> for line in QAT(bits=4, keep=["2"]).select(model):
        ...     print(line.name, line.action, line.reason, sep=" | ")
        0.weight | quantized | 4 bits
        2.weight | kept | keep='2' names it
        """
        return choose_weights(unwrap(model), self, example_inputs)[1]


def _check_bits(me: str, option: str, bits: object) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise OptionError(f"{me}: {option} must be a whole number from 2 to 8; got {bits!r}.")
