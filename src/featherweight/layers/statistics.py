# SPDX-License-Identifier: Apache-2.0
"""Second moments of what layers read, streamed over calibration batches: H, and T for the answers of a reference.

A layer's loss of V in W's place, ||Y - V X||² / tokens, needs nothing of the data but H = 2 X Xᵀ / tokens,
T = 2 Y Xᵀ / tokens and 2 ||Y||² / tokens: it is energy/2 - <V, T> + ½ <V, V H>. Activations are seen by hooks and let
go; patches are made a few megabytes at a time.

T is accumulated as
W H + 2 (Y - W X) Xᵀ / tokens, so that it agrees with H to the last digit and what the layer still lacks is not lost in
the rounding of what it has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import DataError, OptionError
from featherweight.layers.calibration import numbered
from featherweight.layers.calls import Identities, Take, Use, mask_of, quiet, uses, watch
from featherweight.layers.inputs import Input
from featherweight.layers.problems import Problem
from featherweight.layers.sums import Counts, Sums
from featherweight.layers.weights import Weight, to_matrix
from featherweight.layers.zeros import unwrap

__all__ = ["Statistics", "bytes_of", "call_steps", "collect", "passes"]

Forward = Callable[[Any, Any], Any]
Answers = dict[tuple[str, str, int], list[Tensor]]  # by a use's name and leaf, and the call


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What a problem's solver needs to know of its data; sums are in float64, on the weight's device.

    `H` (d, d) is 2 X Xᵀ / tokens. `T` (rows, d) is 2 Y Xᵀ / tokens and `energy` 2 ||Y||² / tokens, where Y is what the
    rows should answer: the reference's outputs, bias apart, less what the model's other input channels give. Without a
    reference `T` is None: Y = W X. `tokens` counts positions, patches or time steps, `samples` the items of the batches
    that reached the layer. `scale` (rows,) is for an embedding: the root of each row's share of the tokens, 0 for rows
    never seen; H being 2 I, solve `scale * W` and divide. `unpaired` counts calls that the reference did not make alike
    (an expert that was sent other tokens); there Y is what the reference's weights make of the model's input.
    """

    H: Tensor
    T: Tensor | None
    energy: float
    samples: int
    tokens: int
    scale: Tensor | None = None
    unpaired: int = 0


def collect(
    model: nn.Module,
    problems: Sequence[Problem],
    batches: Iterable[Any],
    forward: Forward,
    *,
    reference: nn.Module | None = None,
) -> dict[str, Statistics]:
    """Runs the model over calibration batches and returns each problem's statistics by its name.

    Layers that were never reached are absent. With a `reference` (a model of the same structure by name, on the same
    batches) the k-th call of a layer is paired with the reference's k-th. A weight that is used by several modules or
    calls gathers all of them. Problems that read the very same input share one H. Both models run in evaluation mode
    and are left as they were; a forward ends early once every wanted layer was called, if the first batch called each
    exactly once.

    If a batch is a mapping with an `attention_mask` (B, T), masked tokens are left out wherever a layer reads
    (B, T, ...). Half-precision inputs are widened.

    Raises `DataError` for no batch and `NumericalError` for activations that are NaN or infinite.

    >>> from featherweight.layers import problems
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> found, _ = problems(layer)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> collect(layer, found, [x], lambda model, batch: model(batch))["weight"].H
    tensor([[2., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    model, reference = unwrap(model), None if reference is None else unwrap(reference)
    if isinstance(batches, Iterator):
        batches = list(batches)
    with quiet(*(one for one in (model, reference) if one is not None)):
        run = prepare(model, reference, problems, share=True)
        try:
            stream(run, batches, forward)
        except _Unshared:
            run = prepare(model, reference, problems, share=False)
            stream(run, batches, forward)
    return {name: found for fed in run.sums.values() for one in fed for name, found in statistics_of(one, model)}


class _Unshared(Exception):
    """Problems that read the same input at first read different ones later: each needs sums of its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """What one pass watches and fills: uses in both models (twins share name and leaf), weights and sums."""

    model: nn.Module
    reference: nn.Module | None
    uses: list[Use]
    twins: list[Use]
    weights: dict[tuple[str, str], Weight]  # by a use's name and leaf
    sums: dict[str, list[Sums | Counts]]  # by a weight's name
    share: bool


def prepare(model: nn.Module, reference: nn.Module | None, problems: Sequence[Problem], share: bool) -> _Run:
    wanted = _wanted(model, problems)
    twins = [] if reference is None else [_twin(use, reference) for use, _ in wanted if use.kind != "embedding"]
    weights = {(use.name, use.leaf): weight for use, weight in wanted}
    return _Run(model, reference, [use for use, _ in wanted], twins, weights, _sums(problems), share)


def _wanted(model: nn.Module, problems: Sequence[Problem]) -> list[tuple[Use, Weight]]:
    """Every use of the problems' weights in the model, in definition order; an embedding's only if solved as one."""
    weights = {problem.weight.name: problem.weight for problem in problems}
    own = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in weights if name not in own]:
        raise OptionError(f"The model has no parameter {unknown[0]!r}; give problems(model) of this very model.")
    by_parameter = {id(own[name]): weight for name, weight in weights.items()}
    return [
        (use, by_parameter[key])
        for key, found in uses(model).items()
        for use in found
        if key in by_parameter and (use.kind == "embedding") == (by_parameter[key].kind == "embedding")
    ]


def _twin(use: Use, reference: nn.Module) -> Use:
    """The same use in the reference. Raises `OptionError` where there is none of the same shape."""
    module = dict(reference.named_modules(remove_duplicate=False)).get(use.name)
    if module is None or type(module) is not type(use.module):
        raise OptionError(f"The reference has no {type(use.module).__name__} {use.name!r}, as the model has.")
    twin = dataclasses.replace(use, module=module)
    if twin.parameter.shape != use.parameter.shape:
        raise OptionError(
            f"{use.name}.{use.leaf} is {tuple(use.parameter.shape)} in the model and {tuple(twin.parameter.shape)} in the "
            "reference; give the dense model that this one was copied from."
        )
    return twin


def _sums(problems: Sequence[Problem]) -> dict[str, list[Sums | Counts]]:
    """Empty sums by weight: one for the conv groups of each block, one for each part of an attention."""
    together: dict[tuple[Any, ...], list[Problem]] = {}
    for problem in problems:
        block = problem.channels and (problem.channels.start, problem.channels.stop)
        part = problem.part if problem.weight.kind == "attention" else 0
        together.setdefault((problem.weight.name, part, block), []).append(problem)
    found: dict[str, list[Sums | Counts]] = {}
    for (name, *_), members in together.items():
        embedding = members[0].weight.kind == "embedding"
        found.setdefault(name, []).append(Counts(members[0]) if embedding else Sums(members))
    return found


def stream(run: _Run, batches: Iterable[Any], forward: Forward) -> None:
    # A forward may end once all that is wanted was seen: known only where the first batch used each weight just once.
    once = once_in_reference = False
    first = True
    for number, batch in numbered(batches):
        mask = mask_of(batch)
        answers: Answers = {}
        if run.reference is not None and run.twins:
            seen = functools.partial(forward, run.reference, batch)
            where = f"batch {number} of the reference"
            calls = watch(run.twins, _answer(run, answers), seen, where, mask, once_in_reference)
            once_in_reference = all(calls[use] == 1 for use in run.twins) if first else once_in_reference
        seen = functools.partial(forward, run.model, batch)
        calls = watch(run.uses, _gather(run, answers), seen, f"batch {number}", mask, once)
        once = all(calls[use] == 1 for use in run.uses) if first else once
        _end_of_batch(run, batch)
        first = False
    if first:
        raise DataError("The calibration data yielded no batch. Check the data set and drop_last.")


def _answer(run: _Run, answers: Answers) -> Take:
    """Keeps what the reference's weights answer: outputs, since an input may change in place before the model runs."""

    def take(use: Use, call: int, read: list[Input]) -> None:
        answers[use.name, use.leaf, call] = _outputs(run.weights[use.name, use.leaf], use.parameter, read, own=True)

    return take


def _outputs(weight: Weight, parameter: Tensor, read: list[Input], own: bool) -> list[Tensor]:
    """What a weight with these values, its `own` or others, answers to each input of a call: (groups, tokens, rows)."""
    matrix = to_matrix(weight, parameter.detach())
    parts = torch.split(matrix, len(matrix) // len(read))
    return [
        (one.own_outputs if own else one.outputs)(part.to(one.x.dtype)) for one, part in zip(read, parts, strict=True)
    ]


def _gather(run: _Run, answers: Answers) -> Take:
    """Feeds a call in the model to all sums of its weight."""
    leaders: dict[tuple[Any, ...], Sums] = {}
    identities = Identities()

    def take(use: Use, call: int, read: list[Input]) -> None:
        weight = run.weights[use.name, use.leaf]
        fed = run.sums[weight.name]
        gaps: Sequence[Tensor | None] = [None] * len(read)
        if run.reference is not None and use.kind != "embedding":
            own = _outputs(weight, use.parameter, read, own=True)
            answer = answers.pop((use.name, use.leaf, call), None)
            if answer is None or any(a.shape != o.shape for a, o in zip(answer, own, strict=True)):
                twin = next(twin for twin in run.twins if (twin.name, twin.leaf) == (use.name, use.leaf))
                answer = _outputs(weight, twin.parameter.to(use.parameter.device), read, own=False)
                for one in fed:
                    one.unpaired += 1
            gaps = [a.to(o.device) - o for a, o in zip(answer, own, strict=True)]
        for one in fed:
            one.calls += 1
            if isinstance(one, Sums) and run.share:
                # The same call of both, on the same live and unchanged tensor, cut in the same way.
                source = read[one.slot]
                _follow(one, leaders.setdefault((identities.of(source.origin), source.view, one.block, one.calls), one))
            one.add(read[one.slot], gaps[one.slot])

    return take


def _follow(one: Sums, leader: Sums) -> None:
    """Lets sums that begin with another's input share its X Xᵀ, and notices when their inputs part."""
    if one.calls == 1 and leader is not one:
        one.leader = leader
    elif one.leader is not None and one.leader is not leader:
        raise _Unshared


def _end_of_batch(run: _Run, batch: Any) -> None:
    size = _items(batch)
    for one in (one for fed in run.sums.values() for one in fed):
        if isinstance(one, Sums) and one.leader is not None and one.leader.calls != one.calls:
            raise _Unshared
        if one.calls > one.calls_before:
            one.samples += size
            one.calls_before = one.calls


def _items(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((_items(part) for part in parts if isinstance(part, Tensor)), 1)


def statistics_of(one: Sums | Counts, model: nn.Module) -> Iterator[tuple[str, Statistics]]:
    if one.tokens == 0:
        return
    if isinstance(one, Counts):
        H, scale = one.hessian_and_scale()
        yield one.problem.name, Statistics(H, None, 0.0, one.samples, one.tokens, scale)
        return
    parameter = model.get_parameter(one.weight.name)
    for problem, H, gap, rest in zip(one.problems, one.hessians(), one.gaps(), one.gap_energy.tolist(), strict=True):
        T, energy = None, 0.0
        if gap is not None:
            W = problem.matrix(parameter).to(torch.float64)
            T = W @ H
            energy = float((W * (T + 2 * gap)).sum()) + 2 * rest / one.tokens
            T += gap
        yield problem.name, Statistics(H, T, energy, one.samples, one.tokens, unpaired=one.unpaired)


def call_steps(
    model: nn.Module, problems: Sequence[Problem], forward: Forward, batch: Any, number: int = 0
) -> list[list[Problem]]:
    """The problems in the order in which one forward first reaches them; those never reached are left out.

    Problems that read the very same input are one step, at the place of the first: query, key and value, all groups of
    a convolution, a block's shortcut and its first convolution. So are both weights and directions of one layer of a
    recurrent module. An attention's projections are one step, its output projection the next. `number` is the batch's in
    its loader, which an error names.

    >>> from featherweight.layers import problems
    >>> model = nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 3))
    >>> steps = call_steps(model, problems(model)[0], lambda model, batch: model(batch), torch.zeros(1, 2, 1, 1))
    >>> [[problem.name for problem in step] for step in steps]
    [['0.weight[0]', '0.weight[1]'], ['2.weight']]
    """
    model = unwrap(model)
    wanted = _wanted(model, problems)
    weights = {(use.name, use.leaf): weight.name for use, weight in wanted}
    of_weight: dict[str, list[Problem]] = {}
    for problem in problems:
        of_weight.setdefault(problem.weight.name, []).append(problem)
    identities = Identities()
    steps: dict[Any, list[Problem]] = {}
    placed: set[str] = set()

    def take(use: Use, call: int, read: list[Input]) -> None:
        for problem in of_weight[weights[use.name, use.leaf]]:
            if problem.name not in placed:
                source = read[problem.part if len(read) > 1 else 0]
                key = identities.of(source.origin) if source.step is None else (use.name, source.step)
                steps.setdefault(key, []).append(problem)
                placed.add(problem.name)

    with quiet(model):
        watch([use for use, _ in wanted], take, lambda: forward(model, batch), f"batch {number}", mask_of(batch), False)
    return list(steps.values())


def bytes_of(problem: Problem, reference: bool) -> int:
    """Memory that `collect` holds for a problem until its end: H, and T where there is a reference.

    >>> from featherweight.layers import problems
    >>> [problem], _ = problems(nn.Linear(10, 3))
    >>> bytes_of(problem, reference=False), bytes_of(problem, reference=True)
    (800, 1040)
    """
    rows = problem.height if problem.weight.kind == "embedding" else problem.height * problem.d if reference else 0
    return 8 * (problem.d**2 + rows)


def passes(problems: Sequence[Problem], budget_bytes: int, reference: bool) -> list[list[Problem]]:
    """The problems in their order, cut into passes over the data whose sums fit a budget of bytes.

    A problem that is larger than the budget has a pass to itself: `split` it to stay within. What problems share is
    counted as if they did not, so that a pass may take less than the budget.

    Raises `OptionError` for a budget that is not positive.

    >>> from featherweight.layers import problems
    >>> found, _ = problems(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)))
    >>> [len(each) for each in passes(found, 2000, reference=False)]
    [2, 1]
    """
    if budget_bytes <= 0:
        raise OptionError(f"budget_bytes must be positive; got {budget_bytes!r}.")
    found: list[list[Problem]] = []
    room = 0
    for problem in problems:
        size = bytes_of(problem, reference)
        if not found or size > room:
            found.append([])
            room = budget_bytes
        found[-1].append(problem)
        room -= size
    return found
