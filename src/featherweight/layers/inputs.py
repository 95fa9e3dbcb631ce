# SPDX-License-Identifier: Apache-2.0
"""What a layer's weights read in one call: its input as x, so that the layer is a linear map or plain convolution of x.

Padding of every mode is carried out, a transposed convolution's zeros are inserted, an attention's context and a
recurrent layer's hidden states are computed with the module's own arithmetic. What remains is one form for all kinds:
a kernel (none for a linear map) that slides over x, whose patches are the columns of the weight's matrix. Patches are
made a few at a time and never held whole: a 3 x 3 convolution's are nine times its input.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Call", "Input", "attention", "conv", "linear", "lookup", "transposed", "wide"]

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a module as its forward hook sees it, and the batch's mask of real tokens (B, T), if it has one."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    mask: Tensor | None = None

    def argument(self, position: int, name: str) -> Any:
        """An argument by position or by name; an only keyword argument counts under any name."""
        if position < len(self.args):
            return self.args[position]
        if name not in self.kwargs and position == 0 and len(self.kwargs) == 1:
            return next(iter(self.kwargs.values()))
        return self.kwargs.get(name)


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """What one weight read in one call: x is (tokens, channels), or (n, channels, *space) under a kernel.

    `origin` is the tensor that was read and `view` all that turned it into x: where both agree, so do the patches.
    `step` joins what is solved together though it reads different tensors (a recurrent layer's two weights). `given` is
    what the module answered, bias apart, where that is seen.
    """

    x: Tensor
    origin: Tensor
    view: tuple[Any, ...] = ()
    step: str | None = None
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    flipped: bool = False
    given: Callable[[], Tensor] | None = None

    @property
    def positions(self) -> tuple[int, ...]:
        """Where the kernel comes to stand, by axis."""
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        return tuple((size - span) // s + 1 for size, span, s in zip(self.x.shape[2:], spans, self.stride, strict=True))

    @property
    def tokens(self) -> int:
        return self.x.shape[0] * prod(self.positions)

    def patches(self, groups: Sequence[int], channels: slice | None, most: int) -> Iterator[Tensor]:
        """The columns that some conv groups read, as (groups, tokens, d) in chunks of about `most` numbers each.

        `channels` are those of each group's input channels that are wanted; channels run fastest along d, as in
        `to_matrix`. Chunks follow one another in the order of the rows of `outputs`.
        """
        x = self.x.reshape(len(self.x), self.groups, -1, *self.x.shape[2:])
        if list(groups) != list(range(self.groups)):
            x = x[:, list(groups)]
        x = x[:, :, channels or slice(None)].movedim(0, 1).movedim(2, -1)  # (groups, n, *space, channels)
        axes, d = len(self.kernel), prod(self.kernel) * x.shape[-1]
        # Copied in the longer runs: those of channels and taps, or (depthwise, say) those of positions.
        by_columns = axes > 0 and self.positions[-1] > self.kernel[-1] * x.shape[-1]
        if not by_columns:
            x = x.contiguous()
        for part in _parts(self._windows(x), 1 + axes, most):
            if self.flipped:
                part = part.flip(tuple(range(part.ndim - 1 - axes, part.ndim - 1)))
            if by_columns:
                taps = tuple(range(part.ndim - 1 - axes, part.ndim))
                yield part.movedim(taps, tuple(range(1, axes + 2))).reshape(len(groups), d, -1).mT
            else:
                yield part.reshape(len(groups), -1, d)

    def _windows(self, x: Tensor) -> Tensor:
        """A view (groups, n, *positions, *kernel, channels) of x (groups, n, *space, channels)."""
        axes = len(self.kernel)
        over = x.stride()[2 : 2 + axes]
        moves = [length * step for length, step in zip(over, self.stride, strict=True)]
        spreads = [length * step for length, step in zip(over, self.dilation, strict=True)]
        shape = (*x.shape[:2], *self.positions, *self.kernel, x.shape[-1])
        return x.as_strided(shape, (*x.stride()[:2], *moves, *spreads, x.stride(-1)), x.storage_offset())

    def outputs(self, matrix: Tensor) -> Tensor:
        """What a matrix (rows of all groups, d) answers, bias apart: (groups, tokens, rows of one group)."""
        if not self.kernel:
            return self._by_groups(F.linear(self.x, matrix), len(matrix))
        axes = len(self.kernel)
        weight = matrix.reshape(len(matrix), *self.kernel, -1)
        if self.flipped:
            weight = weight.flip(tuple(range(1, 1 + axes)))
        y = _CONVOLVE[axes](self.x, weight.movedim(-1, 1), None, self.stride, 0, self.dilation, self.groups)
        return self._by_groups(y, len(matrix))

    def own_outputs(self, matrix: Tensor) -> Tensor:
        """The same for the matrix that the module itself has: taken from what it answered, where that is seen."""
        return self.outputs(matrix) if self.given is None else self._by_groups(self.given(), len(matrix))

    def _by_groups(self, y: Tensor, rows: int) -> Tensor:
        y = y.reshape(len(self.x), self.groups, rows // self.groups, *self.positions)
        return y.movedim(0, 1).movedim(2, -1).reshape(self.groups, self.tokens, rows // self.groups)


def _parts(windows: Tensor, free: int, most: int) -> Iterator[Tensor]:
    """Slices along the `free` axes after the first, in order, of at most `most` numbers or one position each."""
    each = windows[:, :1].numel()
    if each <= most or free == 1:
        yield from torch.split(windows, max(1, most // max(1, each)), dim=1)
        return
    for i in range(windows.shape[1]):
        yield from _parts(windows[:, i], free - 1, most)


def wide(x: Tensor) -> Tensor:
    """Half precision and the like as float32; float64 as it is."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The real tokens of x (B, T, ...), if the mask is of its (B, T); otherwise x as it is."""
    return x if mask is None or x.shape[:2] != mask.shape else x[mask.to(x.device)]


def _tokens(x: Tensor, mask: Tensor | None, **more: Any) -> Input:
    """Input of a linear map from a tensor with channels last; masked tokens of (B, T, channels) are left out."""
    if x.ndim < 3:
        mask = None
    flat = _masked(x, mask).reshape(-1, x.shape[-1])
    return Input(wide(flat), x, ("tokens", mask is not None), **more)


def linear(call: Call) -> dict[str, list[Input]]:
    """Linear, and transformers' Conv1D: the last axis is channels, all others are tokens."""
    read = _tokens(call.argument(0, "input"), call.mask)
    if _is_seen(call, read.x):
        mask = call.mask if read.origin.ndim >= 3 else None
        read = dataclasses.replace(read, given=lambda: _masked(_without_bias(call, -1), mask))
    return {"weight": [read]}


def _is_seen(call: Call, x: Tensor) -> bool:
    """Whether a module's answer is W x and bias as they are: not rounded to fewer bits nor changed by other hooks."""
    return call.output.dtype == x.dtype and len(call.module._forward_hooks) == 1


def _without_bias(call: Call, axis: int) -> Tensor:
    y, bias = cast(Tensor, call.output), cast(Tensor | None, call.module.bias)
    return y if bias is None else y - bias.reshape(-1, *[1] * (-1 - axis))


def lookup(call: Call) -> dict[str, list[Input]]:
    """The rows that an embedding was asked for, (tokens, 1)."""
    rows = call.argument(0, "input")
    return {"weight": [Input(_masked(rows, call.mask).reshape(-1, 1), rows)]}


def conv(call: Call) -> dict[str, list[Input]]:
    module = cast(nn.Conv2d, call.module)
    origin = call.argument(0, "input")
    kernel, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
    x = wide(origin if origin.ndim == len(kernel) + 2 else origin[None])
    sides = _padding(module)
    if any(sides):
        # F.pad names sides from the last axis to the first.
        ordered = [side for axis in range(len(kernel) - 1, -1, -1) for side in sides[2 * axis : 2 * axis + 2]]
        x = F.pad(x, ordered, "constant" if module.padding_mode == "zeros" else module.padding_mode)
    view = ("conv", sides, module.padding_mode, kernel, stride, dilation, module.groups)
    read = Input(x, origin, view, None, kernel, stride, dilation, module.groups)
    if _is_seen(call, x):
        read = dataclasses.replace(read, given=lambda: _without_bias(call, -1 - len(kernel)))
    return {"weight": [read]}


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    """Cells before and after, axis by axis."""
    if not isinstance(module.padding, str):
        return tuple(side for cells in module.padding for side in (cells, cells))
    if module.padding == "valid":
        return (0, 0) * len(module.kernel_size)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return tuple(side for cells in total for side in (cells // 2, cells - cells // 2))


def transposed(call: Call) -> dict[str, list[Input]]:
    """y is a plain convolution, of stride 1 and with taps reversed, of x with stride - 1 zeros between its cells."""
    module = cast(nn.ConvTranspose2d, call.module)
    origin, axes = call.argument(0, "input"), len(module.kernel_size)
    x = wide(origin if origin.ndim == axes + 2 else origin[None])
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    cells = (slice(None), slice(None), *(slice(None, None, step) for step in module.stride))
    spread[cells] = x
    sides: list[int] = []
    out = tuple(call.output.shape[-axes:])  # says what output_padding or output_size came to
    for axis in reversed(range(axes)):
        reach = dilation[axis] * (kernel[axis] - 1)
        before = reach - cast(int, module.padding[axis])
        sides += [before, out[axis] + reach - before - sizes[axis]]
    view = ("transposed", tuple(sides), tuple(module.stride), kernel, dilation, module.groups)
    return {
        "weight": [Input(F.pad(spread, sides), origin, view, None, kernel, (1,) * axes, dilation, module.groups, True)]
    }


def attention(call: Call, leaves: Collection[str]) -> dict[str, list[Input]]:
    module = cast(nn.MultiheadAttention, call.module)
    mask = call.mask if module.batch_first else None
    read = [
        _tokens(call.argument(i, name), mask, step="projections") for i, name in enumerate(("query", "key", "value"))
    ]
    found = {"in_proj_weight": read}
    found |= {f"{letter}_proj_weight": [one] for letter, one in zip("qkv", read, strict=True)}
    if "out_proj.weight" in leaves:
        found["out_proj.weight"] = [_tokens(_context(module, call), mask)]
    return found


def _context(module: nn.MultiheadAttention, call: Call) -> Tensor:
    """What the heads answer before the output projection: the module run again with the identity in its place."""
    weight = module.out_proj.weight
    identity = nn.Linear(module.embed_dim, module.embed_dim, device="meta")
    identity.weight = nn.Parameter(torch.eye(module.embed_dim, dtype=weight.dtype, device=weight.device), False)
    identity.bias = nn.Parameter(weight.new_zeros(module.embed_dim), False)
    twin = copy.copy(module)  # shares all but the children; its own forward runs no hooks
    twin._modules = {**module._modules, "out_proj": identity}
    return twin.forward(*call.args, **call.kwargs)[0]
