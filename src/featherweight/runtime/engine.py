# SPDX-License-Identifier: Apache-2.0
"""A model that runs in the core as far as that can, and in ONNX Runtime beyond: `load`, `Engine`.

The core is asked first. What it refuses, by op when the file is read or by shape when it is first run, is handed over
and the graph is cut anew, so that any model that ONNX Runtime runs, runs.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from featherweight.errors import (
    ArtefactError,
    FeatherweightError,
    MissingExtra,
    OptionError,
    check_whole,
    check_word,
    require,
)
from featherweight.runtime.cut import Graph, read_graph
from featherweight.runtime.decisions import Decisions
from featherweight.runtime.divide import Division, Step
from featherweight.runtime.parts import HELD, CorePart, Part, Refused, Settings, kinds, open_core
from featherweight.runtime.ports import Port, checked, physical_cores, ports, proto_ports
from featherweight.runtime.profile import Profile, Row

__all__ = ["Engine", "load"]

T = TypeVar("T")


def load(
    model: str | Path | bytes,
    threads: int | None = None,
    *,
    cache: str | Path | None = None,
    instruction_set: str | None = None,
    exact: bool = False,
) -> Engine:
    """Opens an ONNX file (its path, or its bytes) in the engine. Saves time where weights are zeros.

    Zeros are found by themselves; how each layer is computed is measured when the model is planned for the shapes of
    its inputs: here, where the file fixes them, else when they first come. `cache` names a file in which what was
    measured is kept, for this model and all others, so that the next load need not measure again. `threads` None takes
    each physical core that the process may use; `instruction_set` None the best that the processor has. `exact` keeps
    ONNX Runtime, where it runs a part, from rounding the inputs of layers with integer weights.

    Raises `ArtefactError` for a file that is no model, or that ONNX Runtime refuses too, or for a cache that is none,
    `MissingExtra` where a part is to run in ONNX Runtime and that is not installed.
    """
    core = require("featherweight_engine", extra="engine")
    if threads is not None:
        check_whole("load", "threads", threads, least=1)
    if instruction_set is not None:
        check_word("load", "instruction_set", instruction_set, core.instruction_sets())
    if not isinstance(model, bytes):
        model = Path(model)
        if not model.is_file():
            raise ArtefactError(f"{model} is not there. featherweight export writes one.")
    name = "the model" if isinstance(model, bytes) else str(model)
    return Engine(model, Settings(name, threads or physical_cores(), instruction_set or "", exact, Decisions(cache)))


class Engine:
    """A loaded model: `engine.run({"x": x})`. Any number of threads may call it at once; `load` makes one."""

    def __init__(self, model: Path | bytes, settings: Settings) -> None:
        self._model, self._settings, self._stamp = model, settings, _stamp(model)
        self._lock = threading.Lock()
        self._division: Division | None = None
        self._steps: tuple[Step, ...] = ()
        self._closed = False
        self.inputs: tuple[Port, ...] = ()
        self.outputs: tuple[Port, ...] = ()
        core = require("featherweight_engine", extra="engine")
        self.instruction_set: str = settings.instruction_set or core.instruction_sets()[0]
        try:
            whole = open_core(model, settings)
            ops = set(core.op_names())
            for domain, op, _, makes in whole.nodes:
                if domain or op not in ops:
                    raise Refused(makes, f"the engine has no op {op}")
            self.inputs, self.outputs = ports(whole.inputs), ports(whole.outputs)
            for port in (*self.inputs, *self.outputs):
                if port.type is not None and port.type not in HELD:
                    raise Refused((), f"{port} cannot be held")
            self._steps = (Step(CorePart(settings, whole)),)
        except Refused as refusal:
            self._hand_over(refusal)
        self._prepare()

    @property
    def threads(self) -> int:
        """Of each part."""
        return self._settings.threads

    @property
    def whole(self) -> bool:
        """Whether nothing is handed to ONNX Runtime."""
        return self._division is None

    @property
    def handed_over(self) -> dict[str, list[str]]:
        """What runs in ONNX Runtime: the ops of its nodes, by the reason why. Empty where the engine is `whole`."""
        return {} if self._division is None else self._division.handed_over()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, for arrays by name: names, types and shapes are those of ONNX Runtime's session.

        Raises `DataError` for inputs that the model does not take.
        """
        values = self._checked(inputs)
        return self._planned(lambda steps: self._walk(steps, dict(values)))

    def profile(self, inputs: Mapping[str, Any], runs: int = 10) -> Profile:
        """Where the time goes: medians over so many runs, after one that does not count."""
        check_whole("profile", "runs", runs, least=1)
        self.run(inputs)
        seconds, taken = [], []
        for _ in range(runs):
            start = time.perf_counter()
            self.run(inputs)
            seconds.append(time.perf_counter() - start)
            taken.append(self._planned(lambda steps: _rows(steps, self._checked(inputs))))
        medians = [statistics.median(row.seconds for row in same) for same in zip(*taken, strict=True)]
        rows = [Row(r.node, r.op, r.how, s, r.flops, r.bytes) for r, s in zip(taken[0], medians, strict=True)]
        return Profile(tuple(rows), statistics.median(seconds), runs)

    def describe(self) -> str:
        """In plain words: what the engine runs itself, what it hands to ONNX Runtime, and why."""
        if self._division is not None:
            lines = self._division.describe()
        else:
            said = [
                kinds(op for _, op, _, _ in s.part.session.nodes) for s in self._steps if isinstance(s.part, CorePart)
            ]
            lines = [f"the engine runs all of it itself: {', '.join(said) or 'nothing to compute'}."]
        head = f"{self._settings.name} ({self.instruction_set}, {self.threads} threads): "
        if not self._fixed():
            lines.append("  Sizes that the file leaves open are planned for when they first come.")
        return head + "\n".join(lines)

    def close(self) -> None:
        """Gives memory and threads back once no call is in it; a later call raises `OptionError`."""
        with self._lock:
            self._closed, self._steps, self._division, self._model = True, (), None, b""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return f"{self._settings.name}: closed" if self._closed else self.describe()

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return checked(self._settings.name, self.inputs, inputs)

    def _walk(self, steps: Iterable[Step], values: dict[str, Any]) -> dict[str, Any]:
        given = {id(value) for value in values.values()}
        if self._division is not None:
            values |= self._division.constants
            given |= {id(value) for value in values.values()}
        for step in steps:
            values |= step.part(values)
            for name in step.frees:
                values.pop(name, None)
        found = {port.name: values[port.name] for port in self.outputs}
        return {name: value.copy() if id(value) in given else value for name, value in found.items()}

    def _planned(self, call: Callable[[tuple[Step, ...]], T]) -> T:
        """Calls with the parts until the core refuses nothing any more; it says so when it first sees some shapes."""
        while True:
            steps = self._steps
            if self._closed:
                raise OptionError(f"{self._settings.name} was closed. load it again.")
            try:
                return call(steps)
            except Refused as refusal:
                with self._lock:
                    if steps is self._steps:  # else another thread has handed it over meanwhile
                        self._hand_over(refusal)

    def _hand_over(self, refusal: Refused) -> None:
        if self._division is None:
            try:
                require("onnxruntime", extra="onnx")
                require("onnx", extra="onnx")
            except MissingExtra as missing:
                name = self._settings.name
                raise MissingExtra(f"{name}: {refusal.reason}. That is to run in ONNX Runtime. {missing}") from None
            division = Division(self._read, self._settings, self._model)
            if refusal.makes:
                division.hand_over(refusal)
        else:
            division = self._division
            division.hand_over(refusal)
        self._steps, self._division = division.steps(), division

    def _read(self) -> Graph:
        onnx = require("onnx", extra="onnx")
        if _stamp(self._model) != self._stamp:
            raise ArtefactError(f"{self._settings.name} has changed since it was loaded. load it again.")
        try:
            in_memory = isinstance(self._model, bytes)
            proto = onnx.load_model_from_string(self._model) if in_memory else onnx.load_model(str(self._model))
        except Exception as error:
            raise ArtefactError(f"{self._settings.name} cannot be read by onnx: {error}") from error
        graph = read_graph(proto)
        self.inputs, self.outputs = (proto_ports(proto, names) for names in (graph.inputs, graph.outputs))
        return graph

    def _fixed(self) -> bool:
        shapes = [port.shape for port in self.inputs]
        return all(shape is not None and all(isinstance(size, int) for size in shape) for shape in shapes)

    def _prepare(self) -> None:
        """Plans at once where the file fixes all shapes."""
        if not self._fixed() or any(port.type in (None, "string") for port in self.inputs):
            return
        values: dict[str, Any] = {p.name: np.zeros([int(n or 0) for n in p.shape or ()], p.type) for p in self.inputs}
        if self.whole:
            self._planned(lambda steps: [s.part.prepare(values) for s in steps if isinstance(s.part, CorePart)])
        if not self.whole:
            with contextlib.suppress(FeatherweightError):  # zeros may be no input for it; a run will tell
                self.run(values)


def _rows(steps: Iterable[Step], values: dict[str, Any]) -> list[Row]:
    rows = []
    for step in steps:
        part = step.part.open(values) if isinstance(step.part, Part) else step.part
        start = time.perf_counter()
        found = part(values)
        seconds = time.perf_counter() - start
        if isinstance(part, CorePart):
            rows += part.profile(values)
        else:
            crossing = [*(values[name] for name in part.inputs), *found.values()]
            moved = sum(value.nbytes for value in crossing if isinstance(value, np.ndarray))
            rows.append(Row("", part.kinds, "ONNX Runtime", seconds, 0.0, float(moved)))
        values |= found
    return rows


def _stamp(model: Path | bytes) -> tuple[int, int] | None:
    """By which a file is seen to be another."""
    if isinstance(model, bytes):
        return None
    try:
        facts = model.stat()
    except OSError:
        return (0, 0)
    return facts.st_size, facts.st_mtime_ns
