# SPDX-License-Identifier: Apache-2.0
"""Pieces of a model, opened in their runtimes and called alike: arrays by name in, arrays by name out."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from featherweight.errors import ArtefactError, DataError, require
from featherweight.runtime.cut import Graph, Piece, model_of
from featherweight.runtime.decisions import Decisions
from featherweight.runtime.foreign import first_line, open_onnxruntime
from featherweight.runtime.profile import Row

__all__ = ["HELD", "CorePart", "ForeignPart", "Part", "Refused", "Settings", "kinds", "open_core"]

# ONNX's numbers of the types that the core holds and NumPy has, by NumPy's names.
HELD = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip
_INTEGERS = {HELD["int32"], HELD["int64"]}
# A protobuf message holds less than 2 GiB; beyond, weights go to files beside the graph while it is read.
_MESSAGE_BYTES = 2**31 - 2**25


class Refused(Exception):
    """The core refuses a node: the values that it makes (none where it is not known which), and why."""

    def __init__(self, makes: Collection[str], reason: str) -> None:
        super().__init__(reason)
        self.makes, self.reason = tuple(makes), reason


@dataclasses.dataclass(frozen=True)
class Settings:
    """How every part is opened. `name` is the model's, for messages; all parts share what is measured."""

    name: str
    threads: int
    instruction_set: str
    exact: bool = False
    decisions: Decisions = dataclasses.field(default_factory=Decisions)


def open_core(model: str | Path | bytes, settings: Settings, known: Iterable[str] = ()) -> Any:
    """The core's Engine; raises `Refused` for what it does not do, and `ArtefactError` for what is no model."""
    core = require("featherweight_engine", extra="engine")
    try:
        return core.Engine(
            model,
            threads=settings.threads,
            instruction_set=settings.instruction_set,
            known=list(known),
            decisions=settings.decisions(),
        )
    except core.Unsupported as refusal:
        raise Refused(refusal.makes, str(refusal)) from refusal
    except core.Error as error:
        raise ArtefactError(_named(settings.name, error)) from error


class CorePart:
    """A graph, or a piece of one, in the core."""

    def __init__(self, settings: Settings, session: Any) -> None:
        self.settings, self.session = settings, session
        self._decided: int = session.decided
        self.inputs = tuple(name for name, _, _ in session.inputs)
        self.outputs = tuple(name for name, _, _ in session.outputs)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = self._ask(self.session.run, values)
        return dict(zip(self.outputs, found, strict=True))

    def prepare(self, values: Mapping[str, Any]) -> int:
        """Plans for arrays of these shapes, with what is measured for a plan; gives the bytes of its activations."""
        return int(self._ask(self.session.arena_bytes, values))

    def profile(self, values: Mapping[str, Any]) -> list[Row]:
        """What each step took."""
        rows = self._ask(self.session.profile, values)
        return [
            Row(
                row["node"],
                row["op"],
                row["what"].removeprefix(row["op"]).strip(),
                row["seconds"],
                row["flops"],
                row["bytes"],
            )
            for row in rows
        ]

    def _ask(self, call: Callable[[list[Any]], Any], values: Mapping[str, Any]) -> Any:
        core = require("featherweight_engine", extra="engine")
        try:
            return call([values[name] for name in self.inputs])
        except core.Unsupported as refusal:
            raise Refused(refusal.makes, str(refusal)) from refusal
        except core.Error as error:
            raise DataError(_named(self.settings.name, error)) from error
        finally:
            if (decided := self.session.decided) != self._decided:
                self._decided = decided
                self.settings.decisions.keep(self.session.decisions)


class ForeignPart:
    """A graph, or a piece of one, in ONNX Runtime. `kinds` are its ops, for the profile."""

    def __init__(self, settings: Settings, model: str | Path | bytes, kinds: str) -> None:
        self.settings, self.kinds = settings, kinds
        try:
            self.session = open_onnxruntime(model, settings.threads, exact=settings.exact)
        except Exception as error:
            if isinstance(error, ImportError):
                raise
            raise ArtefactError(
                f"{settings.name}: the engine hands {kinds} to ONNX Runtime, which refuses: {first_line(error)}"
            ) from error
        self.inputs = tuple(port.name for port in self.session.get_inputs())
        self.outputs = tuple(port.name for port in self.session.get_outputs())

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = self.session.run(list(self.outputs), {name: values[name] for name in self.inputs})
        except Exception as error:
            raise DataError(f"{self.settings.name}: {self.kinds} in ONNX Runtime: {first_line(error)}") from error
        return dict(zip(self.outputs, found, strict=True))


class Part:
    """A piece that is opened as soon as the types of what it reads are known: at once, or when it is first run.

    `stored` is the model's file or bytes where the piece is all of it.
    """

    def __init__(self, graph: Graph, piece: Piece, settings: Settings, stored: Path | bytes | None = None) -> None:
        self.piece, self.settings = piece, settings
        self._kinds = kinds(graph.nodes[i].op_type for i in piece.nodes)
        self._lock = threading.Lock()
        self._opened: CorePart | ForeignPart | None = None
        self._graph: Graph | None = graph  # until it is opened: it holds the weights
        if stored is not None:
            self._opened, self._graph = ForeignPart(settings, stored, self._kinds), None
        elif all(name in graph.types for name in piece.inputs):
            self.open({})

    def open(self, values: Mapping[str, Any]) -> CorePart | ForeignPart:
        """The part itself, opened with what `values` tell of types that the file does not."""
        with self._lock:
            if self._opened is None and self._graph is not None:
                lacking = [name for name in self.piece.inputs if name not in self._graph.types]
                types = {**self._graph.types, **{name: _type_of(values[name]) for name in lacking}}
                self._opened, self._graph = self._open(self._graph, types), None
            return cast(CorePart | ForeignPart, self._opened)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self.open(values)(values)

    def _open(self, graph: Graph, types: Mapping[str, Any]) -> CorePart | ForeignPart:
        model = model_of(graph, self.piece, types)
        with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
            stored = _stored(model, Path(folder))
            if not self.piece.own:
                return ForeignPart(self.settings, stored, self._kinds)
            known = [name for name in self.piece.of_shapes if _is_small(types[name])]
            return CorePart(self.settings, open_core(stored, self.settings, known))


def kinds(ops: Iterable[str]) -> str:
    """The commonest first: `Conv 53, Relu 49, MaxPool`."""
    counts = Counter(op for op in ops if op != "Constant").most_common()
    listed = [op if n == 1 else f"{op} {n}" for op, n in counts[:8]]
    more = sum(n for _, n in counts[8:])
    return ", ".join([*listed, *([f"{more} others"] if more else [])])


def _stored(model: Any, folder: Path) -> bytes | Path:
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size < _MESSAGE_BYTES:
        return bytes(model.SerializeToString())
    path = folder / "part.onnx"
    onnx = require("onnx", extra="onnx")
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights")
    return path


def _is_small(value: Any) -> bool:
    """A shape, or a number of one: integers along one axis at most."""
    tensor = value.tensor_type
    return tensor.elem_type in _INTEGERS and (not tensor.HasField("shape") or len(tensor.shape.dim) <= 1)


def _type_of(value: Any) -> Any:
    onnx = require("onnx", extra="onnx")
    if isinstance(value, list):
        inner = _type_of(value[0] if value else np.zeros(0, np.float32))
        return onnx.helper.make_sequence_type_proto(inner)
    number = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_type_proto(number, value.shape if value.ndim > 1 else None)


def _named(name: str, error: Exception) -> str:
    """The core names the file by its path where it was given one."""
    text = str(error)
    return text if text.startswith(f"'{name}'") else f"{name}: {text}"
