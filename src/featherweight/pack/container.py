# SPDX-License-Identifier: Apache-2.0
"""Files of coded tensors: written and read one tensor at a time, and never half.

A save works in a file beside the target and renames it when all is on the disk, so the target is the old file or the
new one at any moment. The parts are gathered in a nameless scratch file first: their sizes and order are known only
when the last tensor is coded, and the header, which stands before them, tells both. So a save needs free disk space
for twice the packed size, and memory for a few times the largest tensor, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import ArtefactError, nearest
from featherweight.pack import header
from featherweight.pack.codecs import CODECS, NO_HINTS, Coded, encode, part_names
from featherweight.pack.header import Entry, Header, Part
from featherweight.pack.words import Spec, typed, words

__all__ = ["load_file", "read_header", "save_file"]

_COPY = 1 << 20


def save_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    hints: Mapping[str, str] = NO_HINTS,
    ties: Mapping[str, str] = NO_HINTS,
) -> dict[str, Coded]:
    """Writes each tensor in its smallest exact form, and says which form and how many bytes that is.

    Saves disk space and nothing else: loading gives the dense tensors back, equal to the last bit. A codec is chosen
    only after its parts were decoded again and compared. `hints` adds a codec to those that are tried ("nm:2:4:1":
    keeps 2 of 4 along axis 1; Zhu & Gupta's CSR(C), bitmask and dense need none). `ties` maps further names of a tensor
    to the name under which it is in `tensors`. The file is an ordinary safetensors file; tensors on a GPU come over one
    by one.

    Raises `ArtefactError`, with an older file at `path` left as it was, for a path that cannot be written, a full disk,
    a tensor without plain values, or names that contradict each other.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     coded = save_file(f"{folder}/model.safetensors", {"w": torch.eye(64) * 0.1}, ties={"v": "w"})
    ...     tensors, ties = load_file(f"{folder}/model.safetensors")
    >>> coded["w"].codec.partition(":")[0], coded["w"].dense_bytes, coded["w"].coded_bytes < 100
    ('entropy', 16384, True)
    >>> torch.equal(tensors["w"], torch.eye(64) * 0.1), ties
    (True, {'v': 'w'})
    """
    path = Path(path)
    _check_names(path, tensors, ties)
    with _replacing(path) as (file, scratch):
        try:
            entries = [
                _write_parts(scratch, name, tensor, hints.get(name, ""), tensors) for name, tensor in tensors.items()
            ]
            placed = _place(entries)
            file.write(header.build(placed, ties))
        except ArtefactError as error:
            raise ArtefactError(f"{path} was not written: {error}") from None
        at_scratch = {name: part for entry in entries for name, part in entry.parts.items()}
        for name in _in_order(placed):
            _copy(scratch, file, at_scratch[name])
    return {entry.coded.name: entry.coded for entry in entries}


def load_file(
    path: str | os.PathLike[str], expect: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what `save_file` wrote: the tensors, on the CPU, contiguous, equal to the last bit, and the ties.

    `expect` maps the names that the caller has a place for to shape and type; aliases may be among them. A file that
    claims anything else is refused before memory is taken for it. Without `expect`, a file can make this allocate up to
    some 65,000 times its own size, as a tensor of nothing but zeros does.

    Raises `ArtefactError` for a file that is missing, foreign, truncated or altered in any byte, or not as expected.
    Nothing is ever unpickled. Memory beyond the result: a few times the largest tensor's parts.
    """
    path = Path(path)
    with _reading(path) as file:
        about = header.read(file, os.fstat(file.fileno()).st_size)
        if expect is not None:
            _check_expected(about, expect)
        tensors = {name: _read_tensor(file, about.start, entry) for name, entry in about.entries.items()}
    return tensors, dict(about.ties)


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Coded], dict[str, str]]:
    """How each tensor of a file is coded, and the ties, without reading any value; claims are checked as in loading.

    Raises `ArtefactError` as `load_file` does, except that damage inside the values is not looked for.
    """
    path = Path(path)
    with _reading(path) as file:
        about = header.read(file, os.fstat(file.fileno()).st_size)
    return {name: entry.coded for name, entry in about.entries.items()}, dict(about.ties)


def _check_names(path: Path, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    for name in (*tensors, *ties):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise ArtefactError(f"{path} was not written: the name {name!r} is not valid Unicode.") from None
        if name == "__metadata__":
            raise ArtefactError(f"{path} was not written: safetensors files reserve the name '__metadata__'.")
    for alias, canonical in ties.items():
        if alias in tensors or canonical not in tensors:
            raise ArtefactError(
                f"{path} was not written: the tie {alias!r} -> {canonical!r} needs {canonical!r} among the tensors and "
                f"{alias!r} not among them."
            )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file that takes the place of `path` when the block ends well, and a scratch file; both gone if it does not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as scratch, open(temporary, "xb") as file:
            yield file, scratch
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ArtefactError(
            f"{path} could not be written: {error.strerror or error}. What was there before is unchanged. "
            "Free disk space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself survive a power cut, on systems that let a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_parts(scratch: BinaryIO, name: str, tensor: Tensor, hint: str, taken: Collection[str]) -> Entry:
    """Codes one tensor and appends its parts to the scratch file. The entry's places are places there."""
    if tensor.dim() > header.MOST_AXES:
        raise ArtefactError(f"{name} has {tensor.dim()} axes; at most {header.MOST_AXES} can be read back.")
    coded, values = encode(name, tensor, hint, taken)
    names, parts, crc32 = part_names(name, coded.codec), {}, 0
    for suffix, key in names.items():
        start, data = scratch.tell(), words(values[suffix]).view(np.uint8).data
        crc32 = zlib.crc32(data, crc32)
        scratch.write(data)
        parts[key] = Part(Spec(tuple(values[suffix].shape), values[suffix].dtype), start, scratch.tell())
    return Entry(coded, Spec(tuple(tensor.shape), tensor.dtype), parts, crc32)


def _in_order(entries: Iterable[Entry]) -> list[str]:
    """The parts' names in the order of the file: largest elements first, so that each part is aligned to its own."""
    parts = [(name, part.spec.dtype.itemsize) for entry in entries for name, part in entry.parts.items()]
    return [name for name, _ in sorted(parts, key=lambda part: -part[1])]


def _place(entries: list[Entry]) -> list[Entry]:
    """The entries with the places that their parts take in the file."""
    parts = {name: part for entry in entries for name, part in entry.parts.items()}
    placed, end = {}, 0
    for name in _in_order(entries):
        size = parts[name].stop - parts[name].start
        placed[name] = dataclasses.replace(parts[name], start=end, stop=end + size)
        end += size
    return [dataclasses.replace(entry, parts={name: placed[name] for name in entry.parts}) for entry in entries]


def _copy(source: BinaryIO, target: BinaryIO, part: Part) -> None:
    source.seek(part.start)
    for start in range(part.start, part.stop, _COPY):
        target.write(source.read(min(_COPY, part.stop - start)))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    """The open file; whatever is wrong with it leaves as an `ArtefactError` that names it."""
    try:
        with open(path, "rb") as file:
            yield file
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}. Nothing was loaded.") from None
    except OSError as error:
        raise ArtefactError(f"{path} could not be read: {error.strerror or error}.") from error


def _check_expected(about: Header, expect: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    specs = {name: entry.spec for name, entry in about.entries.items()}
    specs.update({alias: specs[canonical] for alias, canonical in about.ties.items()})
    for name in about.entries:
        if name not in expect:
            close = ", ".join(nearest(name, expect)) or "none"
            raise ArtefactError(f"it has a tensor {name!r} that the model has not; nearest of the model: {close}")
    for name, (shape, dtype) in expect.items():
        if name not in specs:
            close = ", ".join(nearest(name, specs)) or "none"
            raise ArtefactError(f"the model's tensor {name!r} is not in it; nearest in the file: {close}")
        if specs[name] != (tuple(shape), dtype):
            wanted = Spec(tuple(shape), dtype)
            raise ArtefactError(f"tensor {name!r} is {specs[name]}, and the model's is {wanted}")


def _read_tensor(file: BufferedReader, start: int, entry: Entry) -> Tensor:
    name, codec = entry.coded.name, entry.coded.codec
    kind, *params = codec.split(":")
    try:
        parts, crc32 = {}, 0
        for suffix, key in part_names(name, codec).items():
            part = entry.parts[key]
            parts[suffix] = torch.empty(part.spec.shape, dtype=part.spec.dtype)
            data = words(parts[suffix]).view(np.uint8).data
            file.seek(start + part.start)
            if file.readinto(data) != len(data):
                raise ArtefactError("the file ends inside it: it was cut while it was being read")
            crc32 = zlib.crc32(data, crc32)
        if crc32 != entry.crc32:
            raise ArtefactError("its checksum is wrong, the file is damaged: copy or save it again")
        return typed(CODECS[kind].decode(entry.spec, tuple(params), parts), entry.spec.dtype, entry.spec.shape)
    except ArtefactError as error:
        raise ArtefactError(f"tensor {name!r}: {error}") from None
    except MemoryError:
        raise ArtefactError(f"tensor {name!r}: no memory for {entry.spec.nbytes} bytes") from None
