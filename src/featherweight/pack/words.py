# SPDX-License-Identifier: Apache-2.0
"""Tensors as words: the bit patterns of their elements, flat, in C order, as unsigned integers.

Codecs work on words because "equal to the last bit" is a statement on bits: NaN payloads and -0.0 are ordinary words,
and the only zero is the word 0. NumPy has no bfloat16 and no float8, but it has every word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.errors import ArtefactError

__all__ = ["CODES", "DTYPES", "Spec", "Words", "blank", "code_of", "name_of", "slices", "storable", "typed", "words"]

Words = NDArray[np.unsignedinteger[Any]]

# The element types that torch and the safetensors format both know, by their name in the format.
CODES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_CODE_OF = {dtype: code for code, dtype in CODES.items()}
# These are stored as their words: the safetensors library of some or all frameworks cannot name them.
_UNNAMED = (torch.complex32, torch.complex128, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


DTYPES: dict[str, torch.dtype] = {name_of(dtype): dtype for dtype in (*CODES.values(), *_UNNAMED)}


class Spec(NamedTuple):
    """Shape and element type of a tensor: what can be claimed of it without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{name_of(self.dtype)} {list(self.shape)}"

    @property
    def word(self) -> int:
        """Bytes in a word: the element's, but 8 for complex128, which counts as two words."""
        return min(self.dtype.itemsize, 8)

    @property
    def length(self) -> int:
        """Number of words, the N of the size formulas."""
        return self.nbytes // self.word

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def storable(dtype: torch.dtype) -> torch.dtype:
    """The type under which words of `dtype` stand in the file: itself, or the unsigned integer of a word's size.

    >>> storable(torch.float32), storable(torch.complex128)
    (torch.float32, torch.uint64)
    """
    return dtype if dtype in _CODE_OF else _UNSIGNED[min(dtype.itemsize, 8)]


def code_of(dtype: torch.dtype) -> str:
    """The format's name of a storable type: `F32`."""
    return _CODE_OF[dtype]


def words(tensor: Tensor) -> Words:
    """The words of a tensor, wherever it lives and however it is strided; a view where it is contiguous on the CPU.

    Raises `ArtefactError` for a tensor that has no plain storage of a known type: meta, sparse, quantized.

    >>> [hex(word) for word in words(torch.tensor([1.0, -0.0]))]
    ['0x3f800000', '0x80000000']
    """
    if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
        what = "a meta tensor, which has no values" if tensor.is_meta else f"{tensor.layout} of {tensor.dtype}"
        raise ArtefactError(f"{what}: only strided tensors of torch's ordinary types can be packed.")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # One element may be contiguous at any stride, which no view of its bytes can have.
    flat: Words = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
    return flat.view(f"<u{min(tensor.dtype.itemsize, 8)}")


def typed(flat: Words, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor whose words these are, sharing the memory of more than one; flat where no shape is given."""
    flat = flat.reshape(-1)
    if flat.strides != (
        flat.itemsize,
    ):  # one word may be contiguous at any stride, which no view of its bytes can have
        flat = flat.copy()
    tensor = torch.from_numpy(flat.view(np.uint8)).view(dtype)
    return tensor if shape is None else tensor.reshape(shape)


def blank(count: int, size: int) -> Words:
    """`count` zero words of `size` bytes, in memory aligned as torch's is (NumPy aligns to 16 bytes only).

    Raises `MemoryError` where there is not so much.
    """
    try:
        flat: Words = torch.zeros(count * size, dtype=torch.uint8).numpy()
    except RuntimeError:
        raise MemoryError(f"no memory for {count * size} bytes") from None
    return flat.view(f"<u{size}")


def slices(count: int, step: int = 1 << 17) -> Iterator[slice]:
    """Consecutive slices over `count` items: temporaries of one slice stay in the cache, and memory stays flat."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
