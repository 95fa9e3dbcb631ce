# SPDX-License-Identifier: Apache-2.0
"""Every word as it is; float32 in fp16 or bf16 where each value allows it. Size: N * v bytes.

The part has the tensor's own name, shape and type, so any reader of safetensors files can use it as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack.narrow import check_values, narrow, widen
from featherweight.pack.source import Source
from featherweight.pack.words import DTYPES, Spec, Words, name_of, storable

__all__ = ["PARTS", "check", "decode", "encode", "propose"]

PARTS: tuple[str, ...] = ("",)

_SHORT = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TYPES = {_SHORT.get(name, name): dtype for name, dtype in DTYPES.items()}


def _short(dtype: torch.dtype) -> str:
    return _SHORT.get(name_of(dtype), name_of(dtype))


def propose(source: Source, hint: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The narrowed form where there is one, and always the raw one: the form that nothing can fail to fit."""
    if source.stored != storable(source.spec.dtype):
        yield _short(source.stored), source.spec.length * source.stored.itemsize
    yield _short(source.spec.dtype), source.spec.nbytes


def encode(source: Source, params: tuple[str, ...]) -> dict[str, Tensor]:
    stored = _TYPES[params[0]]
    values = narrow(source.words, stored if stored != source.spec.dtype else storable(stored))
    return {"": values.reshape(_shape(source.spec))}


def check(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Spec]) -> None:
    part = parts[""]
    check_values(spec, part.dtype)
    stored = spec.dtype if part.dtype == storable(spec.dtype) else part.dtype
    if params != (_short(stored),):
        raise ArtefactError(f"the part's type {name_of(part.dtype)} does not go with the codec's name")
    if part.shape != _shape(spec):
        raise ArtefactError(f"the part's shape {list(part.shape)} is not {list(_shape(spec))}")


def decode(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> Words:
    return widen(parts[""], spec.dtype)


def _shape(spec: Spec) -> tuple[int, ...]:
    """The part's shape: the tensor's, with a last axis of two words for complex128."""
    return spec.shape if spec.dtype.itemsize == spec.word else (*spec.shape, spec.dtype.itemsize // spec.word)
