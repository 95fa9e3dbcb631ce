# SPDX-License-Identifier: Apache-2.0
"""Integer arithmetic as runtimes do it: exact sums of products, then one multiplication, one rounding, one saturation.

Accumulators are int32 in a runtime. Here they are kept in float64, which is exact below 2^53 and lets torch's
convolutions and matrix products do the work; a sum that int32 could not hold is an error, since a runtime would wrap
around without a word. Requantization is that of ONNX Runtime's kernels: the accumulator as float32, times a float32
multiplier (s_x s_w / s_y), rounded half to even, zero point added, saturated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from featherweight.errors import NumericalError

__all__ = ["along", "convolve", "dequantize", "filtered", "multiply", "quantize", "requantize"]

Integers = NDArray[Any]
Floats = NDArray[np.float32]


def along(values: NDArray[Any], axis: int, ndim: int) -> NDArray[Any]:
    """One value an index of `axis`, to be broadcast over `ndim` axes; a single value over all."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def dequantize(q: Integers, scale: Floats, zero_point: Integers, axis: int = 1, block: int = 0) -> Floats:
    """scale (q - zero_point), for one grid, one an index of `axis`, or one a block of that many along `axis`.

    >>> dequantize(np.array([3, 5], np.uint8), np.float32(0.5), np.uint8(1))
    array([1., 2.], dtype=float32)
    """
    scale, zero_point = np.asarray(scale), np.asarray(zero_point)
    if block:
        scale = np.repeat(scale, block, axis)
        zero_point = np.repeat(zero_point, block, axis) if zero_point.ndim else zero_point
    else:
        scale, zero_point = along(scale, axis, q.ndim), along(zero_point, axis, q.ndim)
    wide = q.astype(np.int64) - zero_point.astype(np.int64)
    values: Floats = wide.astype(np.float32) * scale.astype(np.float32)
    return values


def quantize(x: Floats, scale: Floats, zero_point: Integers, axis: int = 1) -> Integers:
    """The nearest integer on the grid, halves to even, saturated to the zero point's type; NaN is refused.

    >>> quantize(np.float32([-1, 0.25, 0.75, 999]), np.float32(0.5), np.uint8(1)).tolist()
    [0, 1, 3, 255]
    """
    if np.isnan(x).any():
        raise NumericalError("NaN has no place on a grid; runtimes make any integer of it.")
    zero_point = np.asarray(zero_point)
    steps = np.rint(x.astype(np.float32) / along(np.asarray(scale, np.float32), axis, x.ndim))
    return _saturated(steps.astype(np.float64) + along(zero_point, axis, x.ndim), zero_point.dtype)


def _saturated(values: NDArray[np.float64], dtype: Any) -> Integers:
    ends = np.iinfo(dtype)
    integers: Integers = np.clip(values, ends.min, ends.max).astype(dtype)
    return integers


def requantize(accumulator: NDArray[np.int64], multiplier: Floats, zero_point: Integers, axis: int = 1) -> Integers:
    """From sums of products to the output's grid; `multiplier` is one float32, or one an index of `axis`.

    >>> requantize(np.array([5, 15, -9]), np.float32(0.1), np.int8(0))
    array([ 0,  2, -1], dtype=int8)
    """
    factor = along(np.asarray(multiplier, np.float32), axis, accumulator.ndim)
    steps = np.rint(accumulator.astype(np.float32) * factor)
    return _saturated(steps.astype(np.float64) + np.asarray(zero_point), np.asarray(zero_point).dtype)


def _checked(total: torch.Tensor, what: str) -> NDArray[np.int64]:
    if total.numel() and float(total.abs().max()) >= 2**31:
        raise NumericalError(
            f"{what} sums to {float(total.abs().max()):.0f}, more than the int32 of a runtime can hold."
        )
    return total.to(torch.int64).numpy()


def multiply(x: Integers, zero_point: Integers, weight: Integers, bias: Integers | None = None) -> NDArray[np.int64]:
    """(x - zero_point) weight + bias, exactly. `x` (..., k), `weight` (k, n), `bias` (n,).

    >>> multiply(np.array([[2, 3]], np.uint8), np.uint8(1), np.array([[1], [-4]], np.int8))
    array([[-7]])
    """
    wide = torch.from_numpy(x.astype(np.float64) - float(np.asarray(zero_point)))
    total = wide @ torch.from_numpy(weight.astype(np.float64))
    if bias is not None:
        total = total + torch.from_numpy(bias.astype(np.float64))
    return _checked(total, "A matrix product")


def convolve(
    x: Integers, zero_point: Integers, weight: Integers, bias: Integers | None = None, **options: Any
) -> NDArray[np.int64]:
    """A convolution of x (n, c, ...) over one, two or three axes, exactly; what is padded is zero, that is zero_point.

    Options are those of `filtered`.

    >>> x, kernel = np.array([[[3, 5, 9]]], np.uint8), np.array([[[1, -2]]], np.int8)
    >>> convolve(x, np.uint8(1), kernel, stride=[1], pads=[1, 0], dilation=[1], groups=1)
    array([[[ -4,  -6, -12]]])
    """
    wide = x.astype(np.float64) - float(np.asarray(zero_point))
    return _checked(filtered(wide, weight.astype(np.float64), bias, **options), "A convolution")


def filtered(
    x: NDArray[Any],
    kernel: NDArray[Any],
    bias: NDArray[Any] | None,
    *,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    groups: int,
    output_padding: list[int] | None = None,
) -> torch.Tensor:
    """ONNX's Conv, or its ConvTranspose where `output_padding` is given, in the floating-point type of x.

    `pads` are as ONNX has them: all beginnings, then all ends. A transposed convolution spreads each value's multiple
    of the kernel, and `pads` are cut off.
    """
    axes = x.ndim - 2
    wide, weight = torch.from_numpy(x), torch.from_numpy(kernel)
    offset = None if bias is None else torch.from_numpy(bias.astype(x.dtype))
    if output_padding is None:
        around = [end for axis in reversed(range(axes)) for end in (pads[axis], pads[axes + axis])]
        function: Any = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        answer: torch.Tensor = function(F.pad(wide, around), weight, offset, stride, 0, dilation, groups)
        return answer
    spread: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    total: torch.Tensor = spread(wide, weight, None, stride, 0, 0, groups, dilation)
    total = F.pad(total, [end for extra in reversed(output_padding) for end in (0, extra)])
    for axis in range(axes):
        first, last = pads[axis], total.shape[2 + axis] - pads[axes + axis]
        total = total.narrow(2 + axis, first, last - first)
    return total if offset is None else total + offset.reshape(-1, *[1] * axes)
