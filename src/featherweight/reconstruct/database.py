# SPDX-License-Identifier: Apache-2.0
"""The database: every layer at every level and pattern, with loss and cost of each entry, in one folder.

`index.json` has the facts, one safetensors file a weight has the masks and integers. A file is written under a
temporary name and renamed, and only then named in the index with its checksum, so that whatever the index names is
whole. The index also has a checksum of each dense weight: entries are answers about those weights and no others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featherweight.errors import ArtefactError, OptionError, nearest
from featherweight.files import write_atomically
from featherweight.pack.words import name_of, words
from featherweight.reconstruct.entries import Contents, Settled, settled

__all__ = ["Database", "Entry", "Layer", "fingerprint", "load_database", "read", "write_index", "write_tensors"]

FORMAT, VERSION = "featherweight database", 1
INDEX = "index.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One form of one problem's weights, what it loses and what it costs.

    - `kind`: `dense`, or one of `Contents.kinds`; `asked` is the level's sparsity where the kind has levels; `sparsity`
      the share of zeros that there are; `bits` of each weight where they are on a grid.
    - `loss`: ||(W - V) X||² / tokens on the samples it was solved on. `relative` and `held_out`: the same over ||W X||²
      of the whole weight, there and on held-out samples, so that the parts of a grouped or split layer add up to the
      layer's. `measured`: what the user's `evaluate` rose by with this problem alone replaced.
    - `macs`: multiply-adds of non-zero weights in one forward of the first batch. `bytes`: in the smallest exact form.
      `cost`: what the user's function gave.
    - `solver` and `damping`: how it was solved; `level`: its place among the levels of a nested kind.
    """

    problem: str
    kind: str
    asked: float | None = None
    sparsity: float = 0.0
    bits: int | None = None
    loss: float = 0.0
    relative: float = 0.0
    macs: float = 0.0
    bytes: int = 0
    held_out: float | None = None
    measured: float | None = None
    cost: float | None = None
    level: int | None = None
    solver: str = ""
    damping: float = 0.0

    @property
    def label(self) -> str:
        """What names it among the problem's entries: `weight 0.5`, `2:4`, `4 bit`, `dense`."""
        return self.kind if self.asked is None else f"{self.kind} {self.asked:.6g}"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One problem: which rows and columns of which weight, solved on how many samples, and its entries, dense first."""

    name: str
    weight: str
    rows: int
    d: int
    run: int
    macs: float
    energy: float
    samples: int
    tokens: int
    notes: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def parameters(self) -> int:
        return self.rows * self.d


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the index says of one weight: the checksum of its dense values, and its file's name and checksum."""

    print: str
    file: str = ""
    checksum: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Database:
    """What `build_database` made and `load_database` reads: problems, each with its entries, and what was left out.

    `layers` are by problem name. `macs` and `bytes` are the whole dense model's; `left` says what is not in it, and
    why. Tensors are read from the folder when they are asked for.
    """

    folder: Path
    contents: Contents
    layers: Mapping[str, Layer]
    weights: Mapping[str, Stored]
    macs: float
    bytes: int
    left: Mapping[str, str]
    about: Mapping[str, Any]
    complete: bool

    def entries(self, name: str) -> tuple[Entry, ...]:
        """The entries of a problem, dense first. Raises `OptionError` with the nearest names."""
        if name not in self.layers:
            why = f" It was left alone: {self.left[name]}." if name in self.left else ""
            raise OptionError(
                f"{name!r} is not in the database.{why} Nearest: {', '.join(nearest(name, self.layers))}."
            )
        return self.layers[name].entries

    def entry(self, name: str, label: str) -> Entry:
        """The entry of a problem by its label, `weight 0.5` say. Raises `OptionError` with the nearest labels."""
        found = {entry.label: entry for entry in self.entries(name)}
        if label not in found:
            raise OptionError(f"{name} has no entry {label!r}. Nearest: {', '.join(nearest(label, found))}.")
        return found[label]

    def settled(self, entry: Entry) -> Settled:
        """What of the problem (rows, d) the entry has at zero, or its integers and their grid; empty for dense."""
        layer = self.layers[entry.problem]
        if entry.kind == "dense":
            return Settled()
        path = self.folder / self.weights[layer.weight].file
        name = entry.kind if entry.level is not None else entry.label
        try:
            with safe_open(path, framework="pt") as file:
                return settled(
                    entry.kind,
                    entry.bits,
                    entry.level,
                    (layer.rows, layer.d),
                    layer.run,
                    self.contents,
                    lambda part: file.get_tensor(key(layer.name, name, part)),
                )
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{path} could not be read: {error}. {_REBUILD}") from error

    @property
    def stored_bytes(self) -> int:
        """What all files of the folder take."""
        files = [self.folder / INDEX, *(self.folder / stored.file for stored in self.weights.values() if stored.file)]
        return sum(path.stat().st_size for path in files)

    def check(self, dense: Mapping[str, Tensor]) -> None:
        """Raises `ArtefactError` unless these are the dense weights, by name, that the database was built of."""
        for name, stored in self.weights.items():
            if name not in dense:
                raise ArtefactError(f"{self.folder} is of another model: it has {name}, which this model has not.")
            if fingerprint([dense[name]]) != stored.print:
                raise ArtefactError(
                    f"{self.folder} is of another model: {name} {list(dense[name].shape)} has other values here. A "
                    "database is stitched into the dense weights that it was built of; load those, or build anew."
                )


_REBUILD = "Delete the folder or build with overwrite=True."


def key(problem: str, entry: str, part: str) -> str:
    """The name of a stored tensor in its weight's file."""
    return f"{problem}/{entry}/{part}"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A checksum of tensors: shapes, types and bits, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{name_of(tensor.dtype)} {list(tensor.shape)};".encode())
        digest.update(words(tensor).data)
    return digest.hexdigest()


def write_tensors(folder: Path, file: str, tensors: Mapping[str, Tensor]) -> str:
    """Writes one weight's file, whole or not at all; its checksum."""
    write_atomically(folder / file, lambda temporary: save_file(dict(tensors), temporary))
    return _checksum(folder / file)


def write_index(database: Database) -> None:
    """Writes `index.json`, whole or not at all."""
    by_weight: dict[str, list[dict[str, Any]]] = {}
    for layer in database.layers.values():
        by_weight.setdefault(layer.weight, []).append(dataclasses.asdict(layer))
    index = {
        "format": FORMAT,
        "version": VERSION,
        "complete": database.complete,
        "contents": dataclasses.asdict(database.contents),
        "about": dict(database.about),
        "macs": database.macs,
        "bytes": database.bytes,
        "left": dict(database.left),
        "weights": {
            name: {**dataclasses.asdict(stored), "layers": by_weight.get(name, [])}
            for name, stored in database.weights.items()
        },
    }
    index["checksum"] = _checksum_of(index)
    text = json.dumps(index, separators=(",", ":"), allow_nan=False)
    write_atomically(database.folder / INDEX, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_database(folder: str | Path) -> Database:
    """Reads a finished database and verifies every file's checksum; tensors stay on disk until they are asked for.

    Raises `ArtefactError` for a folder that is no database, is not finished, is damaged or of a later version.
    """
    database = read(Path(folder))
    if not database.complete:
        raise ArtefactError(
            f"{folder} is not finished: {len(database.weights)} weights are. Call build again with the same options; it goes on."
        )
    return database


def read(folder: Path) -> Database:
    """`load_database`, of a database that may be unfinished."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index.get("format") != FORMAT:
            raise ArtefactError(f"{path} is not the index of a database.")
        if index["version"] != VERSION:
            raise ArtefactError(
                f"{path} has version {index['version']}, this featherweight reads {VERSION}. Update it, or build anew."
            )
        if index.pop("checksum") != _checksum_of(index):
            raise ArtefactError(f"{path} is damaged: its checksum does not fit. {_REBUILD}")
        database = _parsed(folder, index)
    except FileNotFoundError as error:
        raise ArtefactError(f"{folder} holds no database: there is no {INDEX}. Make one with build.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArtefactError | OptionError):
            raise
        raise ArtefactError(f"{path} is damaged: {type(error).__name__}: {error}. {_REBUILD}") from error
    for name, stored in database.weights.items():
        if stored.file and not (folder / stored.file).is_file():
            raise ArtefactError(f"{folder / stored.file}, the entries of {name}, is missing. {_REBUILD}")
        if stored.file and _checksum(folder / stored.file) != stored.checksum:
            raise ArtefactError(f"{folder / stored.file}, the entries of {name}, is damaged. {_REBUILD}")
    return database


def _parsed(folder: Path, index: Mapping[str, Any]) -> Database:
    layers = [
        Layer(
            **{**layer, "notes": tuple(layer["notes"]), "entries": tuple(Entry(**entry) for entry in layer["entries"])}
        )
        for weight in index["weights"].values()
        for layer in weight["layers"]
    ]
    return Database(
        folder,
        _contents(index["contents"]),
        {layer.name: layer for layer in layers},
        {
            name: Stored(weight["print"], weight["file"], weight["checksum"])
            for name, weight in index["weights"].items()
        },
        index["macs"],
        index["bytes"],
        dict(index["left"]),
        dict(index["about"]),
        index["complete"],
    )


def _contents(fields: Mapping[str, Any]) -> Contents:
    def frozen(value: Any) -> Any:
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return Contents(**{name: frozen(value) for name, value in fields.items()})


def _checksum_of(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
