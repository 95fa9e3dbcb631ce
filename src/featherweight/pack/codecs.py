# SPDX-License-Identifier: Apache-2.0
"""The codecs, and the choice among them: the smallest whose decoding is equal to the last bit.

Sizes are counted, not guessed, before anything is encoded; only the winner is encoded and decoded again. A hint adds a
candidate and takes none away, so a stale one costs bytes at most. To add a codec: one module with the functions of
`Codec`, one entry in `CODECS`, one section in docs/file-format.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack import bitmask, codebook, csr, dense, entropy, integers, nm
from featherweight.pack.source import Source, look
from featherweight.pack.words import Spec, Words, name_of

__all__ = ["CODECS", "NO_HINTS", "Codec", "Coded", "code", "encode", "part_names"]

NO_HINTS: Mapping[str, str] = MappingProxyType({})
PART_BYTES = 80  # what a part's entry in the header costs, about; so that a bias is not split to save four bytes


class Codec(Protocol):
    """One exact form of a tensor; a module is one. `params` is what stands behind the name: ("2", "4", "1") for nm."""

    PARTS: tuple[str, ...]
    """Suffixes of the parts' names, in the order of the checksum; "" is a part with the tensor's own name."""

    def propose(self, source: Source, hint: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        """Parameters, joined by colons, with the bytes that all parts would take; none where the codec does not fit."""
        ...

    def encode(self, source: Source, params: tuple[str, ...]) -> dict[str, Tensor]:
        """The parts, of types that `words.CODES` names."""
        ...

    def check(self, spec: Spec, params: tuple[str, ...], parts: Mapping[str, Spec]) -> None:
        """Raises `ArtefactError` where parts of these shapes cannot stand for such a tensor. Allocates nothing."""
        ...

    def decode(self, spec: Spec, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> Words:
        """The words. Raises `ArtefactError` for parts that `check` let pass and whose contents contradict them."""
        ...


CODECS: dict[str, Codec] = {
    "dense": dense,
    "bitmask": bitmask,
    "csr": csr,
    "nm": nm,
    "int": integers,
    "codebook": codebook,
    "entropy": entropy,
}


@dataclasses.dataclass(frozen=True)
class Coded:
    """How a tensor is, or would be, stored. `coded_bytes` counts all its parts, and nothing of the header."""

    name: str
    codec: str
    shape: tuple[int, ...]
    dtype: str
    dense_bytes: int
    coded_bytes: int


def part_names(name: str, codec: str) -> dict[str, str]:
    """Suffix of a part -> its name in the file: {"mask": "fc.weight:mask", ...}."""
    return {suffix: f"{name}:{suffix}" if suffix else name for suffix in CODECS[codec.partition(":")[0]].PARTS}


def _choices(source: Source, hint: str, name: str, taken: Collection[str]) -> list[tuple[int, str]]:
    """Coded bytes and codec, best first; dense is always among them. Parts must not be named as a tensor is."""
    hinted, *params = hint.split(":")
    found = []
    for kind, codec in CODECS.items():
        if any(part != name and part in taken for part in part_names(name, kind).values()):
            continue
        for text, size in codec.propose(source, tuple(params) if kind == hinted else ()):
            found.append((size + PART_BYTES * len(codec.PARTS), size, f"{kind}:{text}" if text else kind))
    return [(size, text) for _, size, text in sorted(found, key=lambda choice: choice[0])]


def _coded(name: str, source: Source, codec: str, size: int) -> Coded:
    return Coded(name, codec, source.spec.shape, name_of(source.spec.dtype), source.spec.nbytes, size)


def code(tensors: Mapping[str, Tensor], hints: Mapping[str, str] = NO_HINTS) -> dict[str, Coded]:
    """What `save_file` would make of these tensors, without writing or encoding. One tensor is in work at a time.

    Saves nothing; tells what packing would. `hints` maps names to codecs that a method has good reason to propose, as
    "nm:2:4:1" (keeps 2 of 4 along axis 1). Raises `ArtefactError` for a tensor without plain values (meta, sparse).

    >>> import torch
    >>> weight = torch.zeros(64, 64)
    >>> weight[:, ::16] = torch.rand(64, 4)
    >>> code({"fc.weight": weight})["fc.weight"].codec
    'csr:4'
    """
    return {name: _code(name, tensor, hints.get(name, ""), tensors) for name, tensor in tensors.items()}


def _code(name: str, tensor: Tensor, hint: str, taken: Collection[str]) -> Coded:
    source = _look(name, tensor, hint)
    size, codec = _choices(source, hint, name, taken)[0]
    return _coded(name, source, codec, size)


def encode(name: str, tensor: Tensor, hint: str, taken: Collection[str]) -> tuple[Coded, dict[str, Tensor]]:
    """The smallest form of a tensor that decodes to the same bits, and its parts. `taken` are other tensors' names."""
    source = _look(name, tensor, hint)
    for size, text in _choices(source, hint, name, taken):
        kind, *params = text.split(":")
        parts = CODECS[kind].encode(source, tuple(params))
        if _gives_back(CODECS[kind], source, tuple(params), parts):
            return _coded(name, source, text, size), parts
    raise ArtefactError(f"{name}: no codec gives back its bits. The memory was changed while it was being packed.")


def _gives_back(codec: Codec, source: Source, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> bool:
    try:
        return np.array_equal(codec.decode(source.spec, params, parts), source.words)
    except ArtefactError:
        return False


def _look(name: str, tensor: Tensor, hint: str) -> Source:
    try:
        return look(tensor, hint)
    except ArtefactError as error:
        raise ArtefactError(f"{name} is {error}") from None
