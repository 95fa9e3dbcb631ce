# SPDX-License-Identifier: Apache-2.0
"""`build_database`: the database of a model, computed in one pass over its layers, and resumed where a run was killed.

Layer Hessians are taken of the dense model, in batches of layers that fit the byte budget, so that entries do not
depend on one another and can be combined at will. That is what makes a search cheap, and also what it misses: errors
that add up from layer to layer. A chosen profile is therefore better realised in a walk whose targets are corrected.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featherweight.errors import ArtefactError, DataError, NothingToCompress, NumericalError
from featherweight.layers import Problem, Statistics, collect, passes, problems, select, split, tensors_and_ties
from featherweight.reconstruct.costs import dense_macs
from featherweight.reconstruct.database import (
    INDEX,
    Database,
    Entry,
    Layer,
    Stored,
    fingerprint,
    key,
    read,
    write_index,
    write_tensors,
)
from featherweight.reconstruct.entries import Contents, Made, entries_of
from featherweight.solvers.hessian import layer_loss

__all__ = ["build_database", "named_problems", "row_scale"]

Forward = Callable[[Any, Any], Any]
Report = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class _Judges:
    """What the caller gave to judge entries with, and the dense model's value of `evaluate`."""

    held_out: Iterable[Any] | None
    evaluate: Callable[[nn.Module], float] | None
    dense: float
    cost: Callable[[Entry], float] | None


def build_database(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    folder: str | Path,
    contents: Contents | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    cost: Callable[[Entry], float] | None = None,
    budget_bytes: int = 2 << 30,
    overwrite: bool = False,
    report: Report = lambda event: None,
) -> Database:
    """Solves every layer of a model for all that `contents` asks for and writes the answers into a folder.

    Saves nothing by itself: it is what `within` chooses from and `stitch` writes. With `evaluate` each entry's weights
    stand in your model while it is called, and the dense ones are put back; nothing else of it is changed.

    - `batches`: calibration data, iterated once for each group of layers whose Hessians fit `budget_bytes`, of which
      half is for Hessians and half for solvers. `forward(model, batch)` is as in `Task`.
    - `held_out`: other batches; each entry then has its loss there too, and solvers that compare candidates choose by
      it.
    - `evaluate(model)`: a figure that rises as the model gets worse; an entry's `measured` is its rise with that entry
      alone in place. One call an entry: layers x entries x the time of a call.
    - `cost(entry)`: what an entry costs by your own figure, its measured time say.

    A killed run goes on after the last weight that it finished, given the same model, contents and first batch, and
    refuses others; `overwrite` begins anew. Layers that the data never reached are in `Database.left` with the reason.
    Raises `ArtefactError`, `DataError`, `OptionError`, `NothingToCompress` and `NumericalError`.

    >>> import tempfile
    >>> model, data = nn.Sequential(nn.Linear(8, 4)), [torch.randn(32, 8)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     database = build_database(model, data, lambda model, batch: model(batch), folder, Contents(levels=(0.5, 0.9)))
    >>> [entry.label for entry in database.entries("0.weight")]
    ['dense', 'weight 0.5', 'weight 0.9', '2:4', '1x4 0.5', '1x4 0.9', '4 bit', '3 bit', '2 bit', '2:4 + 4 bit']
    """
    contents = Contents() if contents is None else contents
    todo, left = named_problems(model, contents)
    first = _first(batches, held_out)
    weight_macs, all_macs = dense_macs(model, forward, first)
    size = sum(tensor.nbytes for tensor in tensors_and_ties(model)[0].values())
    given = {"held_out": held_out, "measured": evaluate, "cost": cost}
    about = {
        "first batch": fingerprint(leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)),
        "figures": [name for name, figure in given.items() if figure is not None],
    }
    fresh = Database(Path(folder), contents, {}, {}, all_macs, size, left, about, complete=False)
    database = _resumed(fresh, model, overwrite)
    todo = [problem for problem in todo if problem.weight.name not in database.weights]
    dense = _figure(model, evaluate) if evaluate is not None and todo else 0.0
    judges = _Judges(held_out, evaluate, dense, cost)
    total = len(database.weights) + len({problem.weight.name for problem in todo})
    for parts in _solved(model, todo, batches, forward, contents, judges, budget_bytes):
        database = _finished(database, parts, weight_macs, judges, report)
        report({"kind": "step", "step": len(database.weights), "total": total})
    if not database.layers:
        raise NothingToCompress(f"no layer was reached by the calibration data: {database.left}.")
    database = dataclasses.replace(database, complete=True)
    write_index(database)
    return database


def named_problems(model: nn.Module, contents: Contents) -> tuple[list[Problem], dict[str, str]]:
    """The problems of the layers that `contents` names, split where it says so; what is left alone, with reasons."""
    found, left = problems(model)
    names = list(dict.fromkeys(problem.weight.name for problem in found))
    if not names:
        raise NothingToCompress(f"the model has no layer to solve: {left}.")
    chosen = set(select(names, contents.layers))
    left = dict(left) | {name: "no glob of layers names it" for name in names if name not in chosen}
    found = [problem for problem in found if problem.weight.name in chosen]
    return [part for p in found for part in split(p, contents.widest(p.height, p.d))], left


def _first(batches: Iterable[Any], held_out: Iterable[Any] | None) -> Any:
    """The first batch, of data that can be gone through again."""
    for data in (batches, held_out):
        if isinstance(data, Iterator):
            raise DataError(
                "the data is a one-shot iterator, and layers take several passes: give a list or a DataLoader."
            )
    first = next(iter(batches), None)
    if first is None:
        raise DataError("the calibration data yields no batch: check the data set and drop_last.")
    return first


def row_scale(statistics: Statistics, rows: int) -> Tensor:
    """What to multiply the rows of W with before solving, and divide by after: (rows, 1), in float64, never zero.

    An embedding's rows weigh as often as they were looked up, those that never were as if it had been half a time.
    """
    if statistics.scale is None:
        return statistics.H.new_ones(rows, 1)
    return (
        (statistics.scale.double().square() + 0.5 / max(1, statistics.tokens)).sqrt()[:, None].to(statistics.H.device)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Solved:
    """One problem's entries, whose figures that depend on the weight's other parts are not filled in yet.

    `energy` and `elsewhere` are ||W X||² / tokens on the samples solved on and on those held out.
    """

    problem: Problem
    statistics: Statistics | None
    energy: float
    elsewhere: float
    entries: list[Entry]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    seconds: float = 0.0


def _solved(
    model: nn.Module,
    todo: Sequence[Problem],
    batches: Iterable[Any],
    forward: Forward,
    contents: Contents,
    judges: _Judges,
    budget_bytes: int,
) -> Iterator[list[_Solved]]:
    """All parts of a weight, weight after weight, as soon as the last of them is solved."""
    missing = Counter(problem.weight.name for problem in todo)
    pending: dict[str, list[_Solved]] = {}
    sums = budget_bytes // (2 if judges.held_out is None else 4)
    for group in passes(todo, max(1, sums), False):
        found = collect(model, group, batches, forward)
        judged = {} if judges.held_out is None else collect(model, group, judges.held_out, forward)
        for problem in group:
            name = problem.weight.name
            seen = found.pop(problem.name, None), judged.pop(problem.name, None)
            try:
                part = _solve(model, problem, *seen, contents, judges, max(1, budget_bytes // 2))
            except NumericalError as error:
                raise NumericalError(f"{problem.name}: {error}") from error
            pending.setdefault(name, []).append(part)
            missing[name] -= 1
            if not missing[name]:
                yield pending.pop(name)


def _solve(
    model: nn.Module,
    problem: Problem,
    statistics: Statistics | None,
    other: Statistics | None,
    contents: Contents,
    judges: _Judges,
    budget_bytes: int,
) -> _Solved:
    if statistics is None:
        return _Solved(problem, None, 0.0, 0.0, [], {}, ())
    began = time.monotonic()
    H, dense, name = statistics.H, problem.matrix(), problem.name
    scale = row_scale(statistics, problem.height)
    W = (dense.to(H.device) * scale).to(dense.dtype)
    error, energy = _error(dense.to(H.device), scale, statistics)
    judge, elsewhere = (None, 0.0) if other is None else _error(dense.to(H.device), scale, other)
    unjudged, unmeasured = None if judge is None else 0.0, None if judges.evaluate is None else 0.0
    entries = [Entry(problem=name, kind="dense", bytes=dense.nbytes, held_out=unjudged, measured=unmeasured)]
    tensors: dict[str, Tensor] = {}
    notes: dict[str, None] = {}
    for made in entries_of(W, H, contents, run=problem.run, budget_bytes=budget_bytes, judge=judge):
        entry = Entry(
            problem=name,
            kind=made.kind,
            asked=made.asked,
            sparsity=made.sparsity,
            bits=made.bits,
            loss=error(made.weights),
            bytes=made.bytes,
            held_out=None if judge is None else judge(made.weights),
            measured=_measured(model, problem, dense, made.weights / scale, judges),
            level=made.level,
            solver=made.solver,
            damping=made.damping,
        )
        entries.append(entry)
        stored = made.tensors if "scale" not in made.tensors else {**made.tensors, "scale": _unscaled(made, scale)}
        label = entry.kind if entry.level is not None else entry.label
        tensors |= {key(name, label, part): tensor for part, tensor in stored.items()}
        notes |= dict.fromkeys(made.notes)
    seconds = time.monotonic() - began
    return _Solved(problem, statistics, energy, elsewhere, entries, tensors, tuple(notes), seconds)


def _error(dense: Tensor, scale: Tensor, statistics: Statistics) -> tuple[Callable[[Tensor], float], float]:
    """||(W - V) X||² / tokens of weights V that come times `scale`, and ||W X||² / tokens."""
    share = torch.ones_like(scale) if statistics.scale is None else statistics.scale.to(scale)[:, None]
    W, change, H = dense * share, share / scale, statistics.H
    return lambda V: layer_loss(W, V * change, H), layer_loss(W, torch.zeros_like(W), H)


def _unscaled(made: Made, scale: Tensor) -> Tensor:
    return (made.tensors["scale"].double() / scale.double().cpu()).float()


def _measured(model: nn.Module, problem: Problem, dense: Tensor, V: Tensor, judges: _Judges) -> float | None:
    if judges.evaluate is None:
        return None
    try:
        problem.write(V.to(dense))
        return _figure(model, judges.evaluate) - judges.dense
    finally:
        problem.write(dense)


def _completed(
    entry: Entry, macs: float, energy: float, elsewhere: float, cost: Callable[[Entry], float] | None
) -> Entry:
    """The entry with its share of the weight's MACs, and its losses over the output energy of all the parts."""
    entry = dataclasses.replace(
        entry,
        macs=macs * (1 - entry.sparsity),
        relative=entry.loss / (energy or 1.0),
        held_out=None if entry.held_out is None else entry.held_out / (elsewhere or 1.0),
    )
    if cost is None:
        return entry
    value = float(cost(entry))
    if not math.isfinite(value):
        raise NumericalError(f"cost gave {value} for {entry.problem}, {entry.label}; it must be a finite number.")
    return dataclasses.replace(entry, cost=value)


def _figure(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    with torch.no_grad():
        value = float(evaluate(model))
    if not math.isfinite(value):
        raise NumericalError(
            f"evaluate gave {value}; it must be a finite number. The model has its dense weights again."
        )
    return value


def _finished(
    database: Database, parts: Sequence[_Solved], macs: Mapping[str, float], judges: _Judges, report: Report
) -> Database:
    """Writes one weight's file, then the index that names it; the database with it."""
    weight = parts[0].problem.weight
    left, layers, tensors = dict(database.left), dict(database.layers), dict[str, Tensor]()
    work = [part.statistics.tokens * part.problem.height * part.problem.d if part.statistics else 0 for part in parts]
    energy, elsewhere = sum(part.energy for part in parts), sum(part.elsewhere for part in parts)
    for part, share in zip(parts, work, strict=True):
        name, statistics = part.problem.name, part.statistics
        if statistics is None:
            left[name] = "no calibration batch reached it"
            report({"kind": "message", "text": f"{name}: no calibration batch reached it; it stays as it is."})
            continue
        own = macs.get(weight.name, 0.0) * share / (sum(work) or 1)
        entries = [_completed(entry, own, energy, elsewhere, judges.cost) for entry in part.entries]
        rows, d = part.problem.height, part.problem.d
        layers[name] = Layer(
            name,
            weight.name,
            rows,
            d,
            part.problem.run,
            own,
            part.energy,
            statistics.samples,
            statistics.tokens,
            part.notes,
            tuple(entries),
        )
        tensors |= part.tensors
        report(
            {
                "kind": "message",
                "text": f"{name} {rows} x {d}: {len(entries)} entries from {statistics.tokens} tokens of "
                f"{statistics.samples} samples in {part.seconds:.1f} s. {' '.join(part.notes)}".strip(),
            }
        )
    print_ = fingerprint([weight.parameter.detach()])
    stored = Stored(print_)
    if tensors:
        file = f"{len(database.weights):04d}.{re.sub(r'[^A-Za-z0-9._-]', '_', weight.name)[:180]}.safetensors"
        stored = Stored(print_, file, write_tensors(database.folder, file, tensors))
    database = dataclasses.replace(
        database, layers=layers, left=left, weights={**database.weights, weight.name: stored}
    )
    write_index(database)
    return database


def _resumed(fresh: Database, model: nn.Module, overwrite: bool) -> Database:
    """What an earlier run left in the folder, if it was the same task; otherwise `fresh`, its folder made."""
    folder = fresh.folder
    if overwrite and (folder / INDEX).is_file():
        (folder / INDEX).unlink()
        for path in folder.glob("*.safetensors"):
            path.unlink()
    if not (folder / INDEX).is_file():
        stray = [path.name for path in folder.iterdir()] if folder.exists() else []
        if any(not name.endswith((".safetensors", ".tmp")) for name in stray):
            raise ArtefactError(f"{folder} holds other files ({', '.join(sorted(stray)[:3])}); give an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_index(fresh)
        return fresh
    found = read(folder)
    for what, old, new in (
        ("other contents", found.contents, fresh.contents),
        ("other data", found.about["first batch"], fresh.about["first batch"]),
        ("other figures", found.about["figures"], fresh.about["figures"]),
    ):
        if old != new:
            detail = (
                f": {_difference(old, new)}"
                if what != "other data"
                else ": its first batch differs (a loader that shuffles? give a list of its batches)"
            )
            raise ArtefactError(f"{folder} was begun with {what}{detail}. Give another folder, or overwrite=True.")
    found.check(tensors_and_ties(model)[0])
    return found


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, Contents):
        return f"{old}, now {new}"
    pairs = zip(dataclasses.asdict(old).items(), dataclasses.asdict(new).values(), strict=True)
    return "; ".join(f"{name} was {a}, now {b}" for (name, a), b in pairs if a != b)
