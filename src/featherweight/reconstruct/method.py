# SPDX-License-Identifier: Apache-2.0
"""`Reconstruct`: prunes or quantizes a trained model layer by layer, without training, from a few hundred samples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from featherweight.correct import CORRECTIONS, correct
from featherweight.errors import NothingToCompress, OptionError, check_strings, check_whole, check_word, is_number
from featherweight.grids import GridSpec
from featherweight.layers import (
    RULES,
    Problem,
    Selected,
    Weight,
    check_globs,
    existing_grids,
    is_named,
    keep_by_name,
    keep_by_rule,
    last_match,
    problems,
    refuse_nothing,
    selected,
    unwrap,
    weights,
)
from featherweight.layers.calibration import Calibration, draw
from featherweight.patterns import Pattern, parse_pattern
from featherweight.plan import Plan
from featherweight.reconstruct.answer import Want
from featherweight.reconstruct.shelf import Shelf
from featherweight.reconstruct.walk import TARGETS, Solved, Walk, walk
from featherweight.sizes import parse_bytes
from featherweight.solvers import together
from featherweight.solvers.pruning import PRUNERS
from featherweight.solvers.quantizing import QUANTIZERS
from featherweight.task import Stage, Task

__all__ = ["Reconstruct"]

UNREACHED = "since no calibration sample reached them"
_KINDS = ("weight", "n:m", "tile", "column")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Zeros, a grid, or both, in each layer where its outputs change least; all other weights make up for it.

    Needs no labels and no training: a few hundred samples of the task's calibration data. Saves bytes on disk where a
    codec skips zeros; saves no memory, and time only in runtimes that skip zeros or compute with integers.

    - sparsity: the share of zeros to reach in each layer, or `{glob: share}` (a later glob overrides an earlier one).
      N:M patterns say it themselves.
    - pattern: weight, N:M (`2:4` keeps 2 of 4 along the input channels), tiles (`1x4`), or column (an input channel).
    - bits: 2 to 8, or `{glob: bits}`: weights on a grid of so many bits, per channel or per `chunk` of its columns,
      `symmetric` or not. With sparsity too, both are decided together. With neither, the weights around the zeros that
      are there are refitted to the task's own model.
    - solver: `best` tries what `work` (1e9 multiply-adds a layer) pays for and keeps what is best on held-out samples;
      or a name of `featherweight.solvers.PRUNERS` or `QUANTIZERS`.
    - targets: `corrected` solves layers in the order of calls, each on the inputs that it now gets, to answer as the
      dense model does; `sequential` to answer as its own weights would; `independent` as if all others were dense, as
      Optimal Brain Compression does (arXiv 2208.11580).
    - correct: what is tried afterwards, and kept where held-out outputs come nearer: `batch_norm`, `moments`, `bias`,
      `outputs` (trains all remaining weights on the calibration samples' outputs: slow).
    - layers, keep: globs on qualified names. Embeddings are left alone unless a glob other than `*` names them.
    - dense: rules for what stays dense: `first` (if a convolution), `depthwise`, `output`. None by default.
    - samples: how many are drawn, and `held_out`, the share of them that is set apart to judge by.
    - damping: relative to the mean diagonal of a layer's Hessian. `memory`: bytes for Hessians and solvers ("2 GB").

    A layer is never delivered worse, on held-out samples, than magnitude or rounding to nearest would leave it.
    Raises `OptionError`, `DataError`, `NothingToCompress`, and `NumericalError` for activations that are not finite,
    which names layer and batch; the model is then as it was.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> task = Task(model, (torch.zeros(1, 8),), calibration=[torch.randn(32, 8) for _ in range(4)])
    >>> Reconstruct(0.5)(model, task, Stage())
    Plan(edits=(), formats={})
    >>> int((model[0].weight == 0).sum()), model[0].weight.numel()
    (64, 128)
    """

    sparsity: float | Mapping[str, float] | None = dataclasses.field(default=None, kw_only=False)
    pattern: str = "weight"
    bits: int | Mapping[str, int] | None = None
    symmetric: bool = False
    chunk: int | None = None
    solver: str = "best"
    targets: str = "corrected"
    correct: Sequence[str] = ("batch_norm", "moments", "bias")
    layers: Sequence[str] = ("*",)
    keep: Sequence[str] = ()
    dense: Sequence[str] = ()
    samples: int = 1024
    held_out: float = 0.2
    damping: float = 1e-4
    memory: str | int = "2 GB"
    work: float = 300.0

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("layers", "keep", "dense", "correct"):
            object.__setattr__(self, name, check_strings(me, name, getattr(self, name)))
        check_word(me, "targets", self.targets, TARGETS)
        for rule in self.dense:
            check_word(me, "dense", rule, RULES)
        for step in self.correct:
            check_word(me, "correct", step, CORRECTIONS)
        check_whole(me, "samples", self.samples, least=2)
        if not is_number(self.held_out) or not 0 <= self.held_out < 1:
            raise OptionError(
                f"{me}: held_out is the share of samples that only judge, 0 to below 1; got {self.held_out!r}."
            )
        self._check_pattern(me)
        self._check_bits(me)
        known = ("best", *(QUANTIZERS if self.bits is not None else PRUNERS))
        check_word(me, "solver", self.solver, known)
        self.budget_bytes  # noqa: B018

    def _check_pattern(self, me: str) -> None:
        pattern = self.parsed
        if pattern.kind not in _KINDS:
            raise OptionError(
                f"{me}: pattern={self.pattern!r} takes whole outputs, which a layer's own error does not choose; give "
                "weight, N:M, RxC or column."
            )
        shares = self.sparsity.items() if isinstance(self.sparsity, Mapping) else [("", self.sparsity)]
        if isinstance(self.sparsity, Mapping) and not self.sparsity:
            raise OptionError(f"{me}: sparsity is an empty mapping; give {{glob: share}}, {{'conv*': 0.5}} say.")
        for where, share in shares:
            name = f"sparsity of {where!r}" if where else "sparsity"
            if share is not None and (not is_number(share) or not 0 <= share < 1):
                raise OptionError(f"{me}: {name} must be at least 0 and below 1; got {share!r}. 0.9 leaves a tenth.")
            if share is not None and pattern.kind == "n:m":
                raise OptionError(
                    f"{me}: pattern={self.pattern!r} says itself how many weights go; leave sparsity out."
                )
        if self.sparsity is None and pattern.kind in ("tile", "column"):
            raise OptionError(f"{me}: sparsity is missing, the share of zeros to reach: sparsity=0.5 say.")

    def _check_bits(self, me: str) -> None:
        for where, bits in self.bits.items() if isinstance(self.bits, Mapping) else [("", self.bits)]:
            if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
                name = f"bits of {where!r}" if where else "bits"
                raise OptionError(f"{me}: {name} must be a whole number from 2 to 8; got {bits!r}.")
        if self.chunk is not None:
            check_whole(me, "chunk", self.chunk, least=1)
        if self.bits is None and (self.symmetric or self.chunk is not None):
            raise OptionError(f"{me}: symmetric and chunk say which grid; give bits too, bits=4 say.")

    @property
    def parsed(self) -> Pattern:
        """The pattern as data."""
        return parse_pattern(self.pattern)

    @property
    def budget_bytes(self) -> int:
        """`memory` in bytes."""
        return parse_bytes(self.memory, "memory")

    def select(self, model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> tuple[Selected, ...]:
        """What would be solved and what kept, and why, for every weight. Changes nothing."""
        return self._choose(model, example_inputs)[1]

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        together.join()
        chosen, selected = self._choose(model, task.example_inputs)
        refuse_nothing(selected, "reconstruct")
        _refuse_grids(model, chosen)
        data = draw(task, self.samples, self.held_out, stage.seed)
        for note in data.notes:
            stage.report({"kind": "message", "text": note})
        before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        try:
            unreached = self._walk(model, task, stage, data, chosen)
        except BaseException:
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    tensor.copy_(before[name])
            raise
        for line in selected:
            if line.name in unreached:
                line = dataclasses.replace(line, action="kept", sparsity=0.0, reason=UNREACHED)
            stage.report({"kind": "selection", "weight": dataclasses.asdict(line)})
        return Plan(formats=self._chunks(chosen.values()) | self._formats(problem for problem, _ in chosen.values()))

    def _walk(
        self, model: nn.Module, task: Task, stage: Stage, data: Calibration, chosen: Mapping[str, tuple[Problem, Want]]
    ) -> set[str]:
        """Solves the layers, corrects what is left of the error, and gives the weights that no sample reached."""
        source = model if self._changes else task.model
        reference = copy.deepcopy(unwrap(source)).eval().to(next(model.parameters()).device)
        _check_same_layers(chosen, reference)
        for text in _short_groups(self.parsed, (problem for problem, _ in chosen.values())):
            stage.report({"kind": "message", "text": text})
        shelf = Shelf.at(stage.folder, stage.name, stage.resume, Solved.from_dict)
        run = Walk(model, reference, task.forward, data, self.targets, self.budget_bytes)
        done, missed = walk(run, chosen, shelf, stage.report)
        if not done:
            raise NothingToCompress(
                f"Nothing to reconstruct: no sample reached any of {', '.join(missed[:5])}. Does Task.forward call the model?"
            )
        unreached = {chosen[name][0].weight.name for name in missed} - {solved.weight for solved in done}
        if unreached:
            shown = ", ".join(sorted(unreached)[:5]) + (" ..." if len(unreached) > 5 else "")
            stage.report(
                {"kind": "message", "text": f"{len(unreached)} weights stay as they are, {UNREACHED}: {shown}."}
            )
        self._correct(model, reference, task, stage, data, chosen)
        shelf.clear()
        return unreached

    @property
    def _changes(self) -> bool:
        """Whether zeros or a grid are asked for, and not only a refit."""
        return self.sparsity is not None or self.bits is not None or self.parsed.kind == "n:m"

    def _correct(
        self,
        model: nn.Module,
        reference: nn.Module,
        task: Task,
        stage: Stage,
        data: Calibration,
        chosen: Mapping[str, tuple[Problem, Want]],
    ) -> None:
        if not self.correct:
            return
        if not data.held_out:
            text = "nothing is held out, so that no correction could be judged, and none was made"
            stage.report({"kind": "message", "text": text})
            return
        on_grid = {problem.weight.name for problem, want in chosen.values() if want.grid is not None}
        found = correct(
            model, reference, data.fit, data.held_out, task.forward, self.correct, frozen=on_grid, seed=stage.seed
        )
        for one in found:
            stage.report({"kind": "message", "text": one.words})

    def _choose(
        self, model: nn.Module, example_inputs: tuple[Any, ...] | None
    ) -> tuple[dict[str, tuple[Problem, Want]], tuple[Selected, ...]]:
        """The problems with what is wanted of each, and a line for every weight of the model."""
        model = unwrap(model)
        found, left = weights(model)
        cut, alone = problems(model)
        given = {"sparsity": self.sparsity, "bits": self.bits}
        targets = {option: list(value) for option, value in given.items() if isinstance(value, Mapping)}
        check_globs(found, left, {"layers": self.layers, "keep": self.keep, **targets})
        kept = {**left, **alone}
        free = [weight for weight in found if weight.name not in kept]
        keep_by_name(free, self.layers, self.keep, targets if len(targets) == 1 else {}, kept)
        for weight in free:
            named = [
                glob for glob in (*self.layers, *(g for globs in targets.values() for g in globs)) if glob.strip("*")
            ]
            if weight.name not in kept and weight.kind == "embedding" and not is_named(weight, named):
                kept[weight.name] = f"an embedding, left alone unless named: layers=['*', '{weight.name}']"
        if self.dense:
            keep_by_rule(model, free, self.dense, example_inputs, kept)
        wants = {weight.name: self._want(weight) for weight in free}
        chosen = {p.name: (p, wants[p.weight.name]) for p in cut if p.weight.name not in kept}
        return chosen, tuple(selected(model, found, kept, lambda weight: _told(wants[weight.name])))

    def _want(self, weight: Weight) -> Want:
        share, bits = (last_match(weight, value) for value in (self.sparsity, self.bits))
        grid = None if bits is None else GridSpec(int(bits), self.symmetric, self.chunk)
        return Want(self.pattern, share, grid, self.solver, self.damping, self.budget_bytes // 2, self.work)

    def _chunks(self, solved: Iterable[tuple[Problem, Want]]) -> dict[str, str]:
        """Hints `int:BITS:CHUNK` where columns share a scale by the chunk: how many, values alone do not say."""
        if self.chunk is None:
            return {}
        on_grid = [(problem, want.grid) for problem, want in solved if want.grid is not None]
        return {problem.weight.name: f"int:{grid.bits}:{min(self.chunk, problem.d)}" for problem, grid in on_grid}

    def _formats(self, solved: Iterable[Problem]) -> dict[str, str]:
        """Hints for the codecs: `nm:N:M:AXIS` for weights all of whose groups are whole. Zeros need no hint."""
        if self.parsed.kind != "n:m":
            return {}
        whole = {p.weight.name: p.weight for p in solved if p.run % self.parsed.m == 0}
        return {
            name: f"nm:{self.parsed.n}:{self.parsed.m}:{0 if weight.kind == 'transposed conv' else 1}"
            for name, weight in whole.items()
            if weight.kind != "transposed linear"
        }


def _refuse_grids(model: nn.Module, chosen: Mapping[str, tuple[Problem, Want]]) -> None:
    """What lies on a grid would leave it: solving moves every weight that is left."""
    wants = {problem.weight.name: want for problem, want in chosen.values()}
    for weight, grid in existing_grids(model):
        want = wants.get(weight.name)
        if want is not None and (want.grid is None or want.grid.bits > grid.bits):
            raise OptionError(
                f"reconstruct: {weight.name} lies on a grid of {grid.bits} bits, which it would leave. Reconstruct before "
                f"quantizing, or by bits={grid.bits} too, or leave it out: keep=[{weight.name!r}]."
            )


def _check_same_layers(chosen: Mapping[str, tuple[Problem, Want]], reference: nn.Module) -> None:
    there = {problem.name: (problem.height, problem.d) for problem in problems(reference)[0]}
    for name, (problem, _) in chosen.items():
        if there.get(name) != (problem.height, problem.d):
            raise OptionError(
                f"{name} is {problem.height} x {problem.d} here and not in the task's own model, which a refit answers to: "
                f"an earlier stage changed the structure. Reconstruct before it, or keep={[problem.weight.name]}."
            )


def _told(want: Want) -> tuple[str, float, str]:
    """What a line says of a weight that is solved for: what is done to it, its sparsity, and to how many bits."""
    acts = ["pruned"] if want.prunes else []
    acts += ["quantized"] if want.grid is not None else []
    pattern = parse_pattern(want.pattern)
    share = (1 - pattern.n / pattern.m if pattern.kind == "n:m" else want.sparsity) or 0.0
    return ", ".join(acts) or "refitted", share, "" if want.grid is None else f"{want.grid.bits} bits"


def _short_groups(pattern: Pattern, chosen: Iterable[Problem]) -> Iterator[str]:
    """N:M on layers whose input channels are no multiple of M: what is done is said, never skipped in silence."""
    if pattern.kind != "n:m":
        return
    odd = {p.weight.name: p.run for p in chosen if p.run % pattern.m}
    for name, run in list(odd.items())[:5]:
        rest = run % pattern.m
        kept = min(rest, pattern.n)
        yield (
            f"{name}: {run} input channels are no multiple of {pattern.m}; the last {rest} at each kernel position keep "
            f"{kept}, and no runtime's {pattern} kernel will take this layer."
        )
    if len(odd) > 5:
        yield f"... and {len(odd) - 5} more layers like these."
