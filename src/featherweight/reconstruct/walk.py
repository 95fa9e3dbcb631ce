# SPDX-License-Identifier: Apache-2.0
"""The walk over a model's layers: which statistics each problem is solved on, in which order, and how a walk goes on.

- independent: every layer as if all others were dense (the paper's). Layers share passes over the data, as many as the
  byte budget holds.
- sequential: each layer on the inputs that the compressed layers before it give, to answer as W would on those.
- corrected: on those inputs, to answer as the *dense* model does there; errors of earlier layers are made good.

Layers that read the very same input are solved in one pass. A problem too wide for its Hessian is cut along its input
channels, and each block is solved against what the others leave of the answer.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.layers import Problem, Statistics, call_steps, collect, hold, numbered, passes, problems
from featherweight.layers.calibration import Calibration
from featherweight.reconstruct.answer import Answer, Want, solve
from featherweight.reconstruct.shelf import Shelf
from featherweight.reconstruct.wide import most_columns, solve_wide
from featherweight.solvers import together

__all__ = ["TARGETS", "Solved", "Walk", "layer_facts", "walk"]

TARGETS = ("independent", "sequential", "corrected")
Forward = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Solved:
    """What is known of one solved problem: errors are shares of its output's energy, held out where samples were.

    `losses` and `energies` are what the errors come from, so that parts of a weight can be summed.
    """

    problem: str
    weight: str
    rows: int
    d: int
    solver: str
    loss: float
    energy: float
    held_out_loss: float
    held_out_energy: float
    simple_loss: float
    losses: Mapping[str, float]
    samples: int
    tokens: int
    damping: float
    ridge: float | None
    seconds: float
    peak_bytes: int
    notes: tuple[str, ...] = ()

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Solved:
        """What `dataclasses.asdict` wrote."""
        return Solved(**{**data, "notes": tuple(data["notes"])})


def layer_facts(parts: Sequence[Solved]) -> dict[str, Any]:
    """One weight's line in the report, summed over its parts: errors are shares of the energy of its outputs.

    `error`, `simple` (magnitude, or rounding to nearest) and `losses` are on held-out samples where there are any,
    `fit` on those that were solved on.
    """
    energy = sum(part.energy for part in parts) or 1.0
    judged = sum(part.held_out_energy for part in parts) or 1.0
    tried = {name for part in parts for name in part.losses if all(name in other.losses for other in parts)}
    solvers = list(dict.fromkeys(part.solver for part in parts))
    return {
        "name": parts[0].weight,
        "rows": sum(part.rows for part in parts),
        "d": parts[0].d,
        "solver": ", ".join(solvers[:3]) + (" ..." if len(solvers) > 3 else ""),
        "error": sum(part.held_out_loss for part in parts) / judged,
        "simple": sum(part.simple_loss for part in parts) / judged,
        "fit": sum(part.loss for part in parts) / energy,
        "losses": {name: sum(part.losses[name] for part in parts) / judged for name in sorted(tried)},
        "samples": parts[0].samples,
        "tokens": parts[0].tokens,
        "damping": max(part.damping for part in parts),
        "ridge": max((part.ridge for part in parts if part.ridge is not None), default=None),
        "seconds": sum(part.seconds for part in parts),
        "peak_bytes": max(part.peak_bytes for part in parts),
        "notes": list(dict.fromkeys(note for part in parts for note in part.notes))[:5],
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """One walk: the model that is compressed in place, its dense reference, and how."""

    model: nn.Module
    reference: nn.Module
    forward: Forward
    data: Calibration
    targets: str
    budget_bytes: int

    def steps(self, chosen: Sequence[Problem]) -> list[list[Problem]]:
        """Problems solved from one pass over the data, in order; a quarter of the budget is for held-out sums."""
        corrected, room = self.targets == "corrected", self.budget_bytes // 4
        if self.targets == "independent":
            return passes(chosen, room, reference=False)
        number, batch = next(numbered(self.data.fit))
        steps = call_steps(self.model, chosen, self.forward, batch, number)
        return [part for step in steps for part in passes(step, room, reference=corrected)]

    def collected(
        self, step: Sequence[Problem], model: nn.Module, reference: nn.Module | None
    ) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
        """Statistics to solve on and to judge by, each by problem."""
        fit = collect(model, step, self.data.fit, self.forward, reference=reference)
        held_out: dict[str, Statistics] = {}
        if self.data.held_out:
            held_out = collect(model, step, self.data.held_out, self.forward, reference=reference)
        return self.agreed(fit, held_out)

    def agreed(
        self, fit: dict[str, Statistics], held_out: dict[str, Statistics]
    ) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
        """The same sums in all processes, where these share rows."""
        if together.rows_are_shared():
            fit, held_out = ({name: _agreed(one) for name, one in part.items()} for part in (fit, held_out))
        return fit, held_out


def walk(
    run: Walk,
    wanted: Mapping[str, tuple[Problem, Want]],
    shelf: Shelf,
    tell: Callable[[dict[str, Any]], None],
) -> tuple[list[Solved], list[str]]:
    """Solves every wanted problem and writes the weights into the model. What was solved, and what was never reached.

    A step whose answers lie on the shelf is taken from there. Under torchrun each process solves its share of a step.
    """
    steps = run.steps([problem for problem, _ in wanted.values()])
    reached = {problem.name for step in steps for problem in step}
    dense = {problem.name: problem for problem in problems(run.reference)[0]}
    done: list[Solved] = []
    waiting = collections.Counter(problem.weight.name for step in steps for problem in step)
    total, count = waiting.total(), 0
    for number, step in enumerate(steps):
        found = shelf.take(number, [problem.name for problem in step])
        if found is None:
            found = _together(run, step, wanted, dense)
            shelf.put(number, [problem.name for problem in step], found)
        for problem in step:
            if problem.name in found:
                weights, solved = found[problem.name]
                problem.write(weights)
                done.append(solved)
            else:
                reached.discard(problem.name)
            waiting[problem.weight.name] -= 1
            parts = [solved for solved in done if solved.weight == problem.weight.name]
            if parts and not waiting[problem.weight.name]:
                tell({"kind": "layer", "layer": layer_facts(parts)})
        count += len(step)
        tell({"kind": "step", "step": count, "total": total})
    return done, [name for name in wanted if name not in reached]


def _together(
    run: Walk,
    step: Sequence[Problem],
    wanted: Mapping[str, tuple[Problem, Want]],
    dense: Mapping[str, Problem],
) -> dict[str, tuple[Tensor, Solved]]:
    """The answers to one step: this process's share of its problems, or of their rows, and then everybody's."""
    if len(step) < together.processes():
        with together.shared_rows():
            return dict(_solve_step(run, step, wanted, dense))
    owners = together.share({problem.name: float(problem.height) * problem.d**2 for problem in step})
    mine = [problem for problem in step if owners[problem.name] == together.rank()]
    answers = dict(_solve_step(run, mine, wanted, dense)) if mine else {}
    found = {}
    for problem in step:
        own = answers.get(problem.name)
        tensors, facts = (None, None) if own is None else ([own[0]], dataclasses.asdict(own[1]))
        tensors, facts = together.broadcast(tensors, facts, owners[problem.name])
        if tensors:
            found[problem.name] = (tensors[0], Solved.from_dict(facts))
    return found


def _solve_step(
    run: Walk,
    step: Sequence[Problem],
    wanted: Mapping[str, tuple[Problem, Want]],
    dense: Mapping[str, Problem],
) -> Iterator[tuple[str, tuple[Tensor, Solved]]]:
    most = most_columns(run.budget_bytes)
    narrow = [problem for problem in step if problem.d <= most]
    if narrow:
        if run.targets == "independent":
            fit, held_out = run.collected([dense[p.name] for p in narrow], run.reference, None)
        else:
            fit, held_out = run.collected(narrow, run.model, run.reference if run.targets == "corrected" else None)
        for problem in narrow:
            if problem.name not in fit:
                continue
            # A Hessian is let go as soon as its problem is solved.
            own, judge = fit.pop(problem.name), held_out.pop(problem.name, None)
            answer = solve(problem, dense[problem.name].matrix(), own, judge, wanted[problem.name][1], _zeros(problem))
            yield problem.name, (answer.weights, _solved(problem, answer, own.samples))
    for problem in step:
        if problem.d > most:
            wide = _wide(run, problem, dense[problem.name], wanted[problem.name][1], most)
            if wide is not None:
                yield problem.name, (wide.weights, _solved(problem, wide, run.data.samples))


def _agreed(statistics: Statistics) -> Statistics:
    """The first process's sums for all: a last bit that differs could part what they decide."""
    given = {name: getattr(statistics, name) for name in ("H", "T", "scale")}
    found: dict[str, Any] = {name: together.same(tensor) for name, tensor in given.items() if tensor is not None}
    energy = together.same(torch.tensor(statistics.energy, dtype=torch.float64, device=statistics.H.device))
    return dataclasses.replace(statistics, **found, energy=float(energy))


def _zeros(problem: Problem) -> Tensor:
    """What is pruned already. A weight of nothing but zeros is not: adapters start so."""
    zeros = problem.matrix() == 0
    return zeros & ~zeros.all()


def _wide(run: Walk, problem: Problem, dense: Problem, want: Want, most: int) -> Answer | None:
    """A problem in blocks: in the model as it is by now, or, for an independent walk, in a copy of the dense one."""
    if run.targets == "corrected":
        host, reference, whole = run.model, run.reference, problem
    else:
        reference = run.reference if run.targets == "independent" else run.model
        host = copy.deepcopy(reference)
        whole = next(other for other in problems(host)[0] if other.name == problem.name)
    return solve_wide(whole, dense.matrix(), most, _blocks_of(run, whole, host, reference), want, _zeros(problem))


def _blocks_of(
    run: Walk, whole: Problem, host: nn.Module, reference: nn.Module
) -> Callable[[Sequence[Problem]], tuple[dict[str, Statistics], dict[str, Statistics]]]:
    """Gives statistics of blocks: from the layer's inputs, where those fit in the byte budget, else run by run."""
    held = []
    # Unless targets are corrected the host begins as a copy of what it is to answer to: one run shows all.
    answers = reference if host is run.model else None
    for part in (run.data.fit, run.data.held_out):
        room = run.budget_bytes // 4
        kept = hold(host, whole, part, run.forward, reference=answers, most_bytes=room) if part else None
        if part and kept is None:
            return lambda blocks: run.collected(blocks, host, reference)
        held.append(kept)

    def look(blocks: Sequence[Problem]) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
        fit, held_out = ({} if part is None else part.statistics(blocks) for part in held)
        return run.agreed(fit, held_out)

    return look


def _solved(problem: Problem, answer: Answer, samples: int) -> Solved:
    judged = answer.held_out or answer.fit
    return Solved(
        problem=problem.name,
        weight=problem.weight.name,
        rows=problem.height,
        d=problem.d,
        solver=answer.solver,
        loss=answer.fit[0],
        energy=answer.fit[1],
        held_out_loss=judged[0],
        held_out_energy=judged[1],
        simple_loss=answer.simple,
        losses=dict(answer.losses),
        samples=samples,
        tokens=answer.tokens,
        damping=answer.damping,
        ridge=answer.ridge,
        seconds=answer.seconds,
        peak_bytes=peak_bytes(),
        notes=answer.notes,
    )


def peak_bytes() -> int:
    """The most memory that this process has held: on the GPU where one is used, else resident."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
