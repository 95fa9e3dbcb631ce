# SPDX-License-Identifier: Apache-2.0
"""Float32 values that were fp16 or bf16 all along are stored so: half the bytes, to the last bit.

Whether a type is wide enough is read from every value, never from the tensor's history. A NaN is only ever narrowed to
bf16, which cuts bits off: what converting a NaN to fp16 and back gives is up to the processor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack.words import Spec, Words, slices, storable, typed, words

__all__ = ["check_values", "narrow", "narrowest", "widen"]

_LOW_HALF = np.uint32(0xFFFF)


def narrowest(flat: Words, dtype: torch.dtype) -> torch.dtype:
    """The type in which these words of `dtype` are stored: for float32 the first of fp16, bf16, fp32 that is exact.

    >>> narrowest(words(torch.tensor([0.1, 1.0])), torch.float32), narrowest(words(torch.ones(3)), torch.float32)
    (torch.float32, torch.float16)
    """
    if dtype != torch.float32:
        return storable(dtype)
    open_types = [torch.float16, torch.bfloat16]
    first = min(len(flat), 4096)  # nearly every trained tensor is decided here
    for part in (slice(0, first), *(slice(first + s.start, first + s.stop) for s in slices(len(flat) - first))):
        open_types = [narrow_type for narrow_type in open_types if _is_exact(flat[part], narrow_type)]
        if not open_types:
            return torch.float32
    return open_types[0]


def _is_exact(flat: Words, stored: torch.dtype) -> bool:
    if stored == torch.bfloat16:
        return not (flat & _LOW_HALF).any()
    value = typed(flat, torch.float32)
    return not bool(value.isnan().any()) and np.array_equal(words(value.half().float()), flat)


def narrow(flat: Words, stored: torch.dtype) -> Tensor:
    """Words as the stored part's flat tensor, of the type that `narrowest` gave."""
    if stored == torch.bfloat16 and flat.itemsize == 4:
        return typed((flat >> np.uint32(16)).astype("<u2"), stored)
    if stored == torch.float16 and flat.itemsize == 4:
        return typed(flat, torch.float32).half()
    return typed(flat, stored)


def widen(values: Tensor, dtype: torch.dtype) -> Words:
    """The words that `narrow` was given, flat; no copy where nothing was narrowed."""
    if dtype == torch.float32 and values.dtype == torch.bfloat16:
        return words(values).astype("<u4") << np.uint32(16)
    if dtype == torch.float32 and values.dtype == torch.float16:
        return words(values.float())
    return words(values)


def check_values(spec: Spec, stored: torch.dtype) -> None:
    """Raises `ArtefactError` where words of `spec.dtype` are never stored as `stored`."""
    narrowed = spec.dtype == torch.float32 and stored in (torch.float16, torch.bfloat16)
    if stored != storable(spec.dtype) and not narrowed:
        raise ArtefactError(f"a {spec.dtype} is not stored as {stored}")
