# SPDX-License-Identifier: Apache-2.0
"""The header: an ordinary safetensors header whose metadata says how each tensor is coded, and a checksum of itself.

The safetensors library can read what is written here, but it neither writes tensor by tensor nor checks sums, so both
directions are spelled out. Everything that a header claims is checked against the file's size and against itself before
a byte is allocated for it; docs/file-format.md states the rules for other readers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NoReturn, TypeVar

from featherweight.errors import ArtefactError
from featherweight.pack.codecs import CODECS, Coded, part_names
from featherweight.pack.words import CODES, DTYPES, Spec, code_of

__all__ = ["MOST_AXES", "VERSION", "Entry", "Header", "Part", "build", "read"]

T = TypeVar("T")

VERSION = 1
MOST_BYTES = 100_000_000  # the safetensors library's own limit on a header
MOST_AXES = 64  # NumPy's limit
_MOST = 1 << 62

# Eight hexadecimal digits and the rest of the header follow. The fixed beginning is what tells our files from others.
_START = b'{"__metadata__":{"crc32":"'
_DIGITS = slice(len(_START), len(_START) + 8)


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of the safetensors file; `start` and `stop` count bytes from the first behind the header."""

    spec: Spec
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of ours: how it is coded, its parts by name in checksum order, and their CRC-32."""

    coded: Coded
    spec: Spec
    parts: Mapping[str, Part]
    crc32: int


@dataclasses.dataclass(frozen=True)
class Header:
    entries: Mapping[str, Entry]
    ties: Mapping[str, str]
    start: int
    """Where the data begin: the first byte behind the header."""


def build(entries: Sequence[Entry], ties: Mapping[str, str]) -> bytes:
    """Length prefix and header, padded so that the data begin at a multiple of 8."""
    # A list, not an object: with four keys for each tensor the header of a small network would be half keys.
    tensors = {
        entry.coded.name: [entry.coded.codec, entry.coded.dtype, entry.spec.shape, entry.crc32] for entry in entries
    }
    about = _dump({"version": VERSION, "tensors": tensors, "ties": dict(ties)})
    parts = {name: part for entry in entries for name, part in entry.parts.items()}
    outer: dict[str, Any] = {"__metadata__": {"crc32": "0" * 8, "featherweight": about}}
    for name, part in sorted(parts.items(), key=lambda item: (item[1].start, item[1].stop)):
        offsets = [part.start, part.stop]
        outer[name] = {"dtype": code_of(part.spec.dtype), "shape": part.spec.shape, "data_offsets": offsets}
    text = _dump(outer).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_BYTES:
        raise ArtefactError(
            f"the names and shapes of {len(entries)} tensors take {len(text)} bytes, over {MOST_BYTES}."
        )
    prefix = struct.pack("<Q", len(text))
    return prefix + text[: _DIGITS.start] + _checksum(prefix, text) + text[_DIGITS.stop :]


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _checksum(prefix: bytes, text: bytes) -> bytes:
    """CRC-32 over the length prefix and all that follows the digits; what precedes them is fixed and compared."""
    return b"%08x" % zlib.crc32(text[_DIGITS.stop :], zlib.crc32(prefix))


def read(file: BinaryIO, size: int) -> Header:
    """Reads and checks the header of a file of `size` bytes. Raises `ArtefactError` with the reason, not the path."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not len(_START) + 10 <= length <= MOST_BYTES:
        raise ArtefactError("this is no safetensors file (files of torch.save are never read: unpickling runs code)")
    if length > size - 8:
        raise ArtefactError(
            f"the header should have {length} bytes, but {size - 8} are there: it is cut short, or foreign"
        )
    text = file.read(length)
    if not text.startswith(_START):
        raise ArtefactError("this file was not written by featherweight, or its first bytes are damaged")
    if len(text) != length or text[_DIGITS] != _checksum(prefix, text):
        raise ArtefactError("the header's checksum is wrong, the file is damaged or was edited: copy or save it again")
    outer = _strict_json(text, "the header")
    metadata = outer.pop("__metadata__")
    _keys(metadata, {"crc32", "featherweight"}, "the metadata")
    about = _strict_json(_field(metadata, "featherweight", str, "the metadata"), "the metadata")
    version = about.get("version")
    if type(version) is not int or version != VERSION:
        raise ArtefactError(
            f"version {version!r} of the format is not {VERSION}, the one that this featherweight reads: "
            "install the release that wrote it"
        )
    _keys(about, {"version", "tensors", "ties"}, "the metadata")
    tensors, ties = _field(about, "tensors", dict, "the metadata"), _field(about, "ties", dict, "the metadata")
    parts = _parts(outer, size - 8 - length)
    entries = {name: _entry(name, claim, parts) for name, claim in tensors.items()}
    if parts:
        raise ArtefactError(f"part {next(iter(parts))!r} belongs to no tensor")
    _check_ties(ties, entries)
    return Header(entries, ties, 8 + length)


def _parts(claims: dict[str, Any], size: int) -> dict[str, Part]:
    """The parts by name, after making sure that they fill the `size` bytes of data without gap or overlap."""
    parts = {}
    for name, claim in claims.items():
        where = f"part {name!r}"
        _keys(claim, {"dtype", "shape", "data_offsets"}, where)
        if not isinstance(claim["dtype"], str) or claim["dtype"] not in CODES:
            raise ArtefactError(f"{where}: unknown type {claim['dtype']!r}")
        spec = Spec(_shape(claim["shape"], where), CODES[claim["dtype"]])
        offsets = _numbers(claim["data_offsets"], where)
        if len(offsets) != 2 or offsets[1] - offsets[0] != spec.nbytes:
            raise ArtefactError(f"{where}: bytes {list(offsets)} for {spec.nbytes} of data")
        parts[name] = Part(spec, *offsets)
    end = 0
    for name, part in sorted(parts.items(), key=lambda item: (item[1].start, item[1].stop)):
        if part.start != end:
            raise ArtefactError(f"part {name!r} begins at byte {part.start} of the data, not at {end}")
        end = part.stop
    if end != size:
        raise ArtefactError(f"the parts end at byte {end}, the data at {size}: the file was cut short or added to")
    return parts


def _entry(name: str, claim: Any, parts: dict[str, Part]) -> Entry:
    """Checks what is said of one tensor against its parts, and takes these out of `parts`."""
    where = f"tensor {name!r}"
    if not isinstance(claim, list) or len(claim) != 4:
        raise ArtefactError(f"{where} should be described by four items: codec, type, shape, checksum")
    codec, dtype, shape, crc32 = claim
    if not isinstance(codec, str) or codec.partition(":")[0] not in CODECS:
        raise ArtefactError(f"{where}: unknown codec {codec!r}; known: {', '.join(CODECS)}. Install a newer release")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtefactError(f"{where}: unknown type {dtype!r}")
    if type(crc32) is not int or not 0 <= crc32 < 1 << 32:
        raise ArtefactError(f"{where}: {crc32!r} is no checksum")
    spec = Spec(_shape(shape, where), DTYPES[dtype])
    names = part_names(name, codec)
    if missing := [part for part in names.values() if part not in parts]:
        raise ArtefactError(f"{where}: part {missing[0]!r} is missing")
    own = {part: parts.pop(part) for part in names.values()}
    kind, *params = codec.split(":")
    try:
        CODECS[kind].check(spec, tuple(params), {suffix: own[part].spec for suffix, part in names.items()})
    except ArtefactError as error:
        raise ArtefactError(f"{where}: {error}") from None
    size = sum(part.stop - part.start for part in own.values())
    return Entry(Coded(name, codec, spec.shape, dtype, spec.nbytes, size), spec, own, crc32)


def _check_ties(ties: dict[str, Any], entries: Mapping[str, Entry]) -> None:
    for alias, canonical in ties.items():
        if not isinstance(canonical, str) or canonical not in entries or alias in entries:
            raise ArtefactError(f"tie {alias!r} -> {canonical!r} does not lead from a new name to a tensor")


def _strict_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object of objects, lists, strings and integers of at most 19 digits, each key once."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_refuse, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{where} is not as JSON should be here: {error}") from None
    if not isinstance(value, dict):
        raise ArtefactError(f"{where} is {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"a number {text[:20]!r} that is no integer")


def _keys(claim: Any, keys: set[str], where: str) -> None:
    if not isinstance(claim, dict) or set(claim) != keys:
        raise ArtefactError(f"{where} should have {', '.join(sorted(keys))}, and nothing else")


def _field(claim: Any, key: str, kind: type[T], where: str) -> T:
    value = claim.get(key) if isinstance(claim, dict) else None
    if not isinstance(value, kind):
        raise ArtefactError(f"{where}: {key!r} should be a {kind.__name__}")
    return value


def _numbers(value: Any, where: str) -> tuple[int, ...]:
    # bool passes for int in Python, and True for 1 in a shape would be a second spelling of the same file
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < _MOST for number in value):
        raise ArtefactError(f"{where}: expected a list of integers from 0 on")
    return tuple(value)


def _shape(value: Any, where: str) -> tuple[int, ...]:
    shape = _numbers(value, where)
    # The product is bounded with zeros left out too: strides are products of the other axes.
    if len(shape) > MOST_AXES or math.prod(max(1, n) for n in shape) >= _MOST // 16:
        raise ArtefactError(f"{where}: no tensor has such a shape, of {len(shape)} axes")
    return shape
