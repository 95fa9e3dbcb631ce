# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a model the core runs and which ONNX Runtime, as known so far, and the parts that follow from it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from featherweight.errors import require
from featherweight.runtime.cut import Graph, Piece, cut, foreign_ops
from featherweight.runtime.parts import HELD, CorePart, ForeignPart, Part, Refused, Settings, kinds

__all__ = ["Division", "Step"]

# So many nodes of one op are refused one by one, each by a plan that was made in vain; then the op goes as a whole.
_REFUSALS = 4


@dataclasses.dataclass(frozen=True)
class Step:
    """A part, and the values that nobody reads after it."""

    part: CorePart | ForeignPart | Part
    frees: tuple[str, ...] = ()


class Division:
    """Nodes go over to ONNX Runtime and stay there. `read` gives the graph, which is not kept: it holds the weights."""

    def __init__(self, read: Callable[[], Graph], settings: Settings, model: Path | bytes) -> None:
        self._read, self._settings, self._model = read, settings, model
        graph = read()
        self._ops = [node.op_type for node in graph.nodes]
        self._maker = dict(graph.maker)
        core = require("featherweight_engine", extra="engine")
        self._foreign = foreign_ops(graph, set(core.op_names()), set(HELD.values()))
        self._refusals: Counter[str] = Counter()
        self._pieces: tuple[Piece, ...] = ()
        self._parts: dict[Piece, Part] = {}
        self.constants = {name: _array(graph.constants[name]) for name in graph.outputs if name in graph.constants}

    def hand_over(self, refusal: Refused, pieces: Sequence[Piece] = ()) -> None:
        """Notes that the core refuses a node or, where it does not say which, all of its own nodes in `pieces`."""
        fresh = {self._maker[name] for name in refusal.makes if name in self._maker} - set(self._foreign)
        if not fresh:
            fresh = {i for piece in pieces or self._pieces if piece.own for i in piece.nodes}
        for i in fresh:
            op = self._ops[i]
            self._refusals[op] += 1
            whole = self._refusals[op] >= _REFUSALS
            same = [j for j, other in enumerate(self._ops) if other == op] if whole else [i]
            self._foreign |= {j: refusal.reason for j in same if j not in self._foreign}

    def steps(self) -> tuple[Step, ...]:
        """The parts in the order of running, cut until the core takes each of its own."""
        graph = self._read()
        while True:
            pieces = cut(graph, self._foreign)
            try:
                parts = {piece: self._parts.get(piece) or self._open(graph, piece, pieces) for piece in pieces}
            except _RefusedPiece as refused:
                self.hand_over(refused.refusal, (refused.piece,))
                continue
            self._pieces, self._parts = pieces, parts
            frees = _frees(pieces, graph.outputs)
            return tuple(Step(part, names) for part, names in zip(parts.values(), frees, strict=True))

    def _open(self, graph: Graph, piece: Piece, pieces: Sequence[Piece]) -> Part:
        whole = len(pieces) == 1 and not piece.own
        try:
            return Part(graph, piece, self._settings, self._model if whole else None)
        except Refused as refusal:
            raise _RefusedPiece(refusal, piece) from refusal

    def handed_over(self) -> dict[str, list[str]]:
        """The ops of the nodes that run in ONNX Runtime, by the reason why."""
        near = "it stands between such nodes, without a matrix product for the engine"
        if not any(piece.own for piece in self._pieces):
            near = "there is no matrix product for the engine"
        found: dict[str, list[str]] = {}
        for i in dict.fromkeys(i for piece in self._pieces if not piece.own for i in piece.nodes):
            found.setdefault(self._foreign.get(i, near), []).append(self._ops[i])
        return found

    def describe(self) -> list[str]:
        """In plain words, a line for each reason why something goes to ONNX Runtime."""
        own = [self._ops[i] for piece in self._pieces if piece.own for i in piece.nodes]
        why = self.handed_over()
        foreign = kinds(op for ops in why.values() for op in ops)
        lines = [f"all of it runs in ONNX Runtime: {foreign}."]
        if own:
            parts = f"{len(self._pieces)} parts that take turns"
            lines = [f"{parts}. In the engine: {kinds(own)}. In ONNX Runtime: {foreign}."]
        return [*lines, *(f"  {kinds(ops)} in ONNX Runtime: {reason}." for reason, ops in why.items())]


class _RefusedPiece(Exception):
    def __init__(self, refusal: Refused, piece: Piece) -> None:
        super().__init__(refusal.reason)
        self.refusal, self.piece = refusal, piece


def _frees(pieces: Sequence[Piece], outputs: Iterable[str]) -> list[tuple[str, ...]]:
    """By piece: what it is the last to read."""
    kept = set(outputs)
    frees: list[tuple[str, ...]] = []
    for piece in reversed(pieces):
        frees.append(tuple(name for name in piece.inputs if name not in kept))
        kept |= set(piece.inputs)
    return frees[::-1]


def _array(tensor: Any) -> Any:
    return require("onnx", extra="onnx").numpy_helper.to_array(tensor)
