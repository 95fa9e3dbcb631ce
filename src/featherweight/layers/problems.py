# SPDX-License-Identifier: Apache-2.0
"""Layers as problems (W, H): which rows of which weight are one regression on an input, and the way back to the tensor.

A weight whose rows all read one input is one problem. Conv groups read channels of their own and a fused attention
projection reads query, key and value, so that these are several, named `weight[0]`, `weight[1]`... Where d is too large
for a (d, d) Hessian, `split` cuts a problem along its input channels; blocks are then solved one after the other, each
against what the others leave.
"""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import OptionError
from featherweight.layers.calls import Use, quiet, uses
from featherweight.layers.weights import CONV, TRANSPOSED, Weight, from_matrix, to_matrix, weights
from featherweight.layers.zeros import unwrap

__all__ = ["Problem", "problems", "split"]

# Blocks of whole N:M groups and tiles, where the limit leaves room for them.
_CHANNEL_STEP = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One (W, H) problem: some rows of one weight's matrix with all its columns, or with one block of input channels.

    `rows` are rows of `to_matrix(weight, .)`. `run` is the number of input channels at one kernel position: the columns
    are taps x `run`, channels fastest. `channels` is the block of input channels, None for all. `part` counts the
    problems of one weight: the conv group, or query, key and value.
    """

    name: str
    weight: Weight
    rows: slice
    run: int
    channels: slice | None = None
    part: int = 0

    @property
    def height(self) -> int:
        """Rows of W."""
        return int(self.rows.stop - self.rows.start)

    @property
    def d(self) -> int:
        """Columns of W: the size of H."""
        return self.taps * self.run

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return prod(self.weight.parameter.shape[2:])

    def matrix(self, tensor: Tensor | None = None) -> Tensor:
        """W (rows, d): the weight's values now, or of a tensor of its shape; detached, a copy, in its own dtype."""
        tensor = self.weight.parameter if tensor is None else tensor
        return self._block(to_matrix(self.weight, tensor.detach())).reshape(self.height, self.d).clone()

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Puts W (rows, d) back into the weight in place, in its dtype, on its device; other entries stay, bit by bit.

        Raises `OptionError` for a matrix of another shape.
        """
        if matrix.shape != (self.height, self.d):
            raise OptionError(
                f"{self.name} is {self.height} x {self.d}; got {tuple(matrix.shape)}. Give a matrix as matrix() does."
            )
        parameter = self.weight.parameter
        whole = to_matrix(self.weight, parameter.detach()).clone()
        block = self._block(whole)
        block.copy_(matrix.reshape(block.shape))
        parameter.copy_(from_matrix(self.weight, whole))

    def _block(self, matrix: Tensor) -> Tensor:
        """The entries of the whole matrix that are this problem's, (rows, taps, run): a view."""
        taps = matrix[self.rows].view(self.height, self.taps, self.weight.columns_per_tap)
        return taps[:, :, self.channels or slice(None)]


def problems(model: nn.Module) -> tuple[list[Problem], dict[str, str]]:
    """A model's (W, H) problems in definition order, and the weights that are left alone, each with the reason.

    A tied weight appears once under its canonical name; one that is an embedding and an output layer too is solved as
    the output layer. An embedding's rows are its entries.

    >>> found, left = problems(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 2)))
    >>> [(p.name, p.matrix().shape, p.run) for p in found], left
    ([('0.weight[0]', torch.Size([4, 18]), 2), ('0.weight[1]', torch.Size([4, 18]), 2), ('1.weight', torch.Size([2, 8]), 8)], {})
    """
    model = unwrap(model)
    found, left = weights(model)
    ways = uses(model)
    cut = []
    for weight in found:
        chosen = _solved_as(weight, ways.get(id(weight.parameter), []))
        if isinstance(chosen, str):
            left[weight.name] = chosen
        else:
            cut += _parts(chosen)
    return cut, left


def _solved_as(weight: Weight, ways: list[Use]) -> Weight | str:
    """The weight as the layer that is solved, or the reason to leave it alone."""
    if weight.parameter.numel() == 0:
        return "it is empty"
    if weight.kind == "bare" or not ways:
        return (
            f"a bare parameter of {type(weight.module).__name__}, whose arithmetic is not known: hooks cannot see what it "
            "reads. Put it into a layer, such as nn.Linear"
        )
    if isinstance(weight.module, nn.EmbeddingBag) or any(isinstance(way.module, nn.EmbeddingBag) for way in ways):
        return "its rows are summed in bags, so that none of them is a problem of its own"
    if strange := next((way.module for way in ways if not _answers_as_usual(way.module)), None):
        return (
            f"{type(strange).__name__} has a forward of its own, which does not answer as torch's layer does: what it makes "
            "of the weight is not known"
        )
    solved = [way for way in ways if way.kind != "embedding"] or ways
    first = solved[0]
    if getattr(first.module, "max_norm", None) is not None:
        return "max_norm rescales its rows at every call; build the Embedding without it"
    if any(way.form != first.form for way in ways):
        kinds = " and a ".join(dict.fromkeys(type(way.module).__name__ for way in ways))
        return f"it is tied between a {kinds}, which read it along different axes"
    if weight.kind == "embedding" and first.kind != "embedding":
        return dataclasses.replace(weight, layer=first.name, module=first.module, kind=first.kind)
    return weight


def _answers_as_usual(module: nn.Module) -> bool:
    """Whether a known layer's forward is torch's own, or gives what torch's gives on random input.

    Subclasses may standardize the weight, pad, or apply an activation; others only cast, and are welcome.
    """
    bases: tuple[Any, ...] = type(module).__mro__
    own = next((base for base in bases if base.__module__.startswith("torch.nn.modules.")), nn.Module)
    if own is nn.Module or bases[0].forward is own.forward:  # the first is Conv1D, known by its looks
        return True
    if not isinstance(module, (nn.Linear, *CONV, *TRANSPOSED)) or module.weight.is_meta:
        return False
    if isinstance(module, nn.Linear):
        sizes = [2, module.in_features]
    else:
        # Several positions, and one cell over: what pads or strides otherwise answers in another shape.
        spans = zip(module.dilation, module.kernel_size, module.stride, strict=True)
        sizes = [2, module.in_channels, *(d * (k - 1) + 2 * s + 2 for d, k, s in spans)]
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(module.weight)
    with quiet(module):
        try:
            y, usual = module(x), own.forward(module, x)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
    if not isinstance(y, Tensor) or y.shape != usual.shape:
        return False
    return float((y - usual).float().norm()) <= 0.01 * float(usual.float().norm())


def _parts(weight: Weight) -> list[Problem]:
    rows = len(to_matrix(weight, weight.parameter))
    parts = 3 if weight.kind == "attention" and weight.name.rpartition(".")[2] == "in_proj_weight" else weight.groups
    each = rows // parts
    return [
        Problem(
            f"{weight.name}[{part}]" if parts > 1 else weight.name,
            weight,
            slice(part * each, (part + 1) * each),
            weight.columns_per_tap,
            part=part,
        )
        for part in range(parts)
    ]


def split(problem: Problem, most: int) -> list[Problem]:
    """Blocks of the problem's input channels with d <= `most` each, or of one channel where its taps alone are more.

    Blocks hold a multiple of 16 channels where `most` leaves room, so that N:M groups and tiles stay whole. A problem
    that fits comes back as it is. Raises `OptionError` for a limit below 1, or a problem that is a block already.

    >>> [problem], _ = problems(nn.Conv2d(6, 4, 3, bias=False))
    >>> [(p.name, p.d) for p in split(problem, 36)]
    [('weight[:, 0:4]', 36), ('weight[:, 4:6]', 18)]
    """
    if most < 1:
        raise OptionError(f"split: most is the largest d, at least 1; got {most!r}.")
    if problem.d <= most:
        return [problem]
    if problem.channels is not None:
        raise OptionError(f"split: {problem.name} is a block already; split the whole problem at {most}.")
    width = max(1, most // problem.taps)
    if width > _CHANNEL_STEP:
        width -= width % _CHANNEL_STEP
    starts = range(0, problem.run, width)
    spans = [(start, min(start + width, problem.run)) for start in starts]
    return [
        dataclasses.replace(
            problem, name=f"{problem.name}[:, {start}:{stop}]", run=stop - start, channels=slice(start, stop)
        )
        for start, stop in spans
    ]
