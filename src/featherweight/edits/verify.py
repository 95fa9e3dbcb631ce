# SPDX-License-Identifier: Apache-2.0
"""`verify`: a cut model answers as the uncut one does with the cut positions set to zero, or it is no cut.

In float64, on two sets of weights: those that the model has, and random ones, since a network fresh from its
constructor hides much behind zeros and equal numbers (a layer scale of 1e-6 hides its whole branch). Zeros are set
everywhere, and once more in a part only (where channels are made, or where they are read), so that a wrong pairing
cannot prove itself. Norms over channels see other statistics after a cut, in any method: theirs are held at the
uncut model's in all runs, and listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight.edits.apply import replay
from featherweight.edits.effective import behind, find_effective, is_computed, put, value_of
from featherweight.edits.exact import Exact, Statistic, double, run
from featherweight.edits.whereabouts import first_difference, whereabouts
from featherweight.edits.zeroed import Lost, parts, prepare, zeros
from featherweight.errors import EditError, FeatherweightError, VerifyError
from featherweight.plan import Edit, Plan, Slice, Swap
from featherweight.task import describe

if TYPE_CHECKING:
    from featherweight.edits.cut import Cut

__all__ = ["Inputs", "Oracle", "Verified", "generic", "prove", "verify"]

Inputs = tuple[Any, ...] | Mapping[str, Any]
_TRIALS = 32  # parts that are looked for axis by axis


@dataclass(frozen=True)
class Verified:
    """A proof: the largest difference from the masked model, relative to the largest entry of that output.

    `held` are norms and means over cut channels, with operation and line: their statistics change with the cut, and
    were held for the proof. `unseen` are cut tensors that these inputs' outputs do not depend on. `parts` says which
    part of the zeros agreed besides all of them, on random weights and on the model's own.

    >>> Verified(2e-16, "the output", 1e-9, ("native_layer_norm in norm",), (), ("where read",) * 2, ()).held
    ('native_layer_norm in norm',)
    """

    error: float
    output: str
    tolerance: float
    held: tuple[str, ...]
    unseen: tuple[str, ...]
    parts: tuple[str, ...]
    notes: tuple[str, ...]


def verify(
    before: nn.Module,
    after: nn.Module,
    cut: Cut | Plan,
    inputs: Inputs,
    *,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> Verified:
    """Proves that `after` is `before` with what the plan cuts set to zero. Changes neither; saves nothing.

    `inputs` are a tuple of positional arguments or a dict of keyword arguments. Takes some ten forwards and one
    backward in float64, on copies. It does not say that the model is as good as it was: that is for your metric.
    Raises `VerifyError` with the layer and the error where the two differ, where an answer has another shape than
    before, is not finite, or does not depend on anything that was cut (which would prove nothing).

    >>> import copy
    >>> from featherweight.edits import replay
    >>> from featherweight.plan import Slice
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> plan = Plan(tuple(Slice(name, axis, (0, 2)) for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))))
    >>> small = copy.deepcopy(model)
    >>> replay(small, plan.edits)
    >>> verify(model, small, plan, (torch.randn(8, 3),)).error < 1e-12
    True
    """
    if isinstance(cut, Plan):
        return prove(before, after, cut, inputs, (), tolerance, seed)
    return prove(before, after, cut.plan, inputs, cut.read, tolerance, seed)


def prove(
    before: nn.Module,
    after: nn.Module,
    plan: Plan,
    inputs: Inputs,
    read: Collection[tuple[str, int]],
    tolerance: float,
    seed: int,
    ready: tuple[Oracle, float] | None = None,
) -> Verified:
    """What `verify` does. `ready` is an oracle of `generic` for this cut, where one is at hand."""
    notes: list[str] = []
    proofs = []
    for attempt in range(3):  # random weights may happen to switch off all that was cut, behind a ReLU
        oracle, scale = ready or generic(before, plan.edits, inputs, seed + attempt, read)
        ready = None
        twin = double(oracle.before)
        replay(twin, plan.edits)
        _same_structure(twin, after)
        if scale:
            proofs.append(oracle.prove(twin, tolerance))
        else:
            notes.append("random weights give answers that are not finite; proved on the model's own weights only")
        seen = oracle.seen(twin)
        if any(seen.values()) or not seen or not scale:
            break
    del oracle, twin  # a copy of the model in float64 each
    own = Oracle(double(before), plan.edits, inputs, seed, read)
    proofs.append(own.prove(_carried(double(after), own.lost), tolerance))
    if seen and not any(seen.values()):
        raise VerifyError(
            f"the answers to these inputs do not depend on anything that was cut ({', '.join(list(seen)[:3])}, ...), "
            "which proves nothing; pass inputs that use it."
        )
    unseen = tuple(name for name, is_seen in seen.items() if not is_seen)
    error, output = max((proof.error, proof.output) for proof in proofs)
    held = tuple(dict.fromkeys(line for proof in proofs for line in proof.held))
    return Verified(error, output, tolerance, held, unseen, tuple(proof.part for proof in proofs), tuple(notes))


@dataclass(frozen=True)
class _Proof:
    error: float
    output: str
    held: tuple[str, ...]
    part: str


class Oracle:
    """The uncut model on one set of weights: what it answers, and what it answers with parts set to zero.

    Takes over `before`, a copy in float64. Its answers are kept, since a search for attributes asks many times.
    """

    def __init__(
        self,
        before: nn.Module,
        edits: Sequence[Edit],
        inputs: Inputs,
        seed: int,
        read: Collection[tuple[str, int]] = (),
    ) -> None:
        self.before, self.inputs, self.seed = before, inputs, seed
        apart = any(isinstance(edit, Swap) or _computes(before, edit) for edit in edits)
        self.base = double(before) if apart else before
        self.lost = prepare(self.base, edits, read)
        exact = Exact()
        try:
            self.answers = _answers(self.base, inputs, exact, seed)
        except FeatherweightError:
            raise
        except Exception as stopped:  # whatever the user's forward raises
            raise EditError(
                f"the uncut model does not run on the inputs {describe(inputs)}, in float64: "
                f"{whereabouts(stopped, self.base)}. Nothing was cut; pass inputs as the model was traced on."
            ) from stopped
        self.record: list[Statistic] = exact.statistics
        if self.finite and any(isinstance(edit, Swap) for edit in edits):
            error, output = _difference(_answers(before, inputs, Exact(), seed), self.answers, "the swapped layers")
            if error > 1e-9:
                raise VerifyError(f"after the swaps of the plan, {output} differs by {error:.1e} with nothing cut.")
        self._masked: dict[tuple[frozenset[int], frozenset[int]], dict[str, Tensor]] = {}

    @property
    def finite(self) -> bool:
        return all(bool(t.isfinite().any()) and not bool(t.isnan().any()) for t in self.answers.values())

    def masked(self, chosen: Iterable[Lost], hold: frozenset[int]) -> dict[str, Tensor]:
        """What the uncut model answers with these positions at zero, and these statistics held."""
        chosen = list(chosen)
        key = (frozenset(map(id, chosen)), hold)
        if key not in self._masked:
            with zeros(chosen):
                self._masked[key] = _answers(self.base, self.inputs, Exact(self.record, hold), self.seed)
        return self._masked[key]

    def answer(self, after: nn.Module, sums: bool = False) -> tuple[dict[str, Tensor], Exact]:
        """What the cut model answers, and the run. Raises what the forward raises, and `VerifyError` where it takes
        another way through its code."""
        exact = Exact(self.record, sums=sums)
        answers = _answers(after, self.inputs, exact, self.seed)
        if len(exact.statistics) != len(self.record):
            raise VerifyError(
                f"the cut model takes another way: {len(exact.statistics)} means and norms were computed, where the "
                f"uncut one computes {len(self.record)}."
            )
        return answers, exact

    def compare(self, after: nn.Module, sums: bool = False) -> tuple[float, str]:
        """The largest relative difference between the cut model and the masked one, and in which output."""
        answers, exact = self.answer(after, sums)
        return _difference(self.masked(self.lost, frozenset(exact.held)), answers, "the cut model")

    def prove(self, after: nn.Module, tolerance: float) -> _Proof:
        """All comparisons, sums held only where the proof needs it. Raises `VerifyError`."""
        if not self.finite:
            raise VerifyError("the uncut model's answers to these inputs are not finite, which proves nothing.")
        failure = ""
        for sums in (False, True):
            try:
                answers, exact = self.answer(after, sums)
            except VerifyError:
                raise
            except Exception as error:
                raise VerifyError(f"the cut model cannot run: {whereabouts(error, after)}.") from error
            hold = frozenset(exact.held)
            worst, output = _difference(self.masked(self.lost, hold), answers, "the cut model")
            if worst > tolerance:
                failure = failure or (
                    f"the cut model does not answer as the model with the cut positions set to zero: {output} differs by "
                    f"{worst:.1e} of its largest entry (at most {tolerance:.0e} is rounding)"
                    f"{first_difference(self, after, tolerance)}."
                )
                continue
            part = self._part(answers, hold, tolerance)
            if part is not None:
                return _Proof(worst, output, tuple(exact.held.values()), part)
            failure = failure or (
                "the cut model answers as with zeros at all cut positions, and unlike with zeros at any part of them "
                "(where channels are made, where they are read, in weights); a channel may be paired with another's weights."
            )
        raise VerifyError(failure)

    def _part(self, answers: Mapping[str, Tensor], hold: frozenset[int], tolerance: float) -> str | None:
        """A part of the zeros that makes the uncut model answer like that: by what it is, or else as few as will do."""

        def right(some: Iterable[Lost]) -> bool:
            return _difference(self.masked(some, hold), answers, "the cut model")[0] <= tolerance

        for name, some in parts(self.lost).items():
            if right(some):
                return name
        rest = list(self.lost)
        for one in self.lost[:_TRIALS]:
            less = [other for other in rest if other is not one]
            if less and right(less):
                rest = less
        return f"on {len(rest)} of {len(self.lost)} axes" if len(rest) < len(self.lost) else None

    def seen(self, after: nn.Module) -> dict[str, bool]:
        """Runs a backward pass through the cut model: whether anything flows back to each cut parameter.

        Empty where the model computes without gradients. Raises `VerifyError` where the backward pass fails.
        """
        for parameter in after.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        with torch.enable_grad():
            answers = _answers(after, self.inputs, Exact(), self.seed, gradients=True)
            generator = torch.Generator().manual_seed(self.seed)
            total: Any = 0.0
            for answer in answers.values():
                if answer.requires_grad:
                    towards = torch.randn(answer.shape, generator=generator, dtype=torch.float64).to(answer.device)
                    finite = torch.where(answer.isfinite(), answer, torch.zeros_like(answer))
                    total = total + (finite.abs() if answer.is_complex() else finite).mul(towards).sum()
        if not isinstance(total, Tensor):
            return {}
        try:
            torch.autograd.backward(total)
        except Exception as failure:
            raise VerifyError(f"the cut model has no backward pass: {whereabouts(failure, after)}.") from failure
        seen: dict[str, bool] = {}
        for one in self.lost:
            module, leaf, _ = find_effective(after, one.name)
            tensors = [t for t in behind(module, leaf) if isinstance(t, nn.Parameter)]
            if tensors:
                seen[one.name] = any(t.grad is not None and bool(t.grad.any()) for t in tensors)
        return seen


def _computes(model: nn.Module, edit: Edit) -> bool:
    if not isinstance(edit, Slice):
        return False
    layer, _, leaf = edit.tensor.rpartition(".")
    return is_computed(dict(model.named_modules()).get(layer), leaf)


def generic(
    before: nn.Module, edits: Sequence[Edit], inputs: Inputs, seed: int, read: Collection[tuple[str, int]] = ()
) -> tuple[Oracle, float]:
    """The oracle on random weights, and the size of the noise: less where answers are not finite, 0 where that is in
    vain (the weights are then the model's own)."""
    for scale in (0.5, 0.05, 0.0):
        model = double(before)
        _randomise(model, scale, {edit.tensor for edit in edits if hasattr(edit, "tensor")}, seed)
        oracle = Oracle(model, edits, inputs, seed, read)
        if oracle.finite:
            break
    return oracle, scale


@torch.no_grad()
def _randomise(model: nn.Module, scale: float, sliced: Collection[str], seed: int) -> None:
    """Noise on top of every parameter, in proportion to its size and to what its inputs add up to, so that nothing is
    zero or equal any more and activations stay in range; a little on buffers that are cut, which stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            usual = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            size = max(float(parameter.square().mean().sqrt()), usual)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.device), alpha=scale * size)
    for name, buffer in model.named_buffers():
        if name in sliced and buffer.is_floating_point():
            noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64).to(buffer.device)
            buffer.mul_(1 + scale * noise)


def _answers(model: nn.Module, inputs: Inputs, exact: Exact, seed: int, gradients: bool = False) -> dict[str, Tensor]:
    with torch.set_grad_enabled(gradients):
        found = dict(_tensors(run(model, inputs, exact, seed), "the output"))
    if not found:
        raise VerifyError(
            "the model answers with no tensor that could be compared; wrap it in a module that returns one."
        )
    return found


def _tensors(value: Any, path: str) -> list[tuple[str, Tensor]]:
    """Every tensor of nested outputs, under a name that shows where it is."""
    if isinstance(value, Tensor):
        return [(path, value)]
    if isinstance(value, Mapping):
        parts = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f"{path}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return []
    return [found for name, item in parts for found in _tensors(item, name)]


def _difference(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], who: str) -> tuple[float, str]:
    """The largest difference relative to the largest finite entry of its output, and that output's name."""
    if list(wanted) != list(got):
        missing = sorted(set(wanted) ^ set(got))
        raise VerifyError(f"{who} answers in another form: {', '.join(missing[:3])} is in one of the two only.")
    worst, where = 0.0, next(iter(wanted))
    for name, expected in wanted.items():
        actual = got[name]
        if actual.shape != expected.shape:
            raise VerifyError(f"{name} has shape {tuple(expected.shape)}, but {tuple(actual.shape)} from {who}.")
        error = _relative(expected, actual)
        if error > worst:
            worst, where = error, name
    return worst, where


def _relative(expected: Tensor, actual: Tensor) -> float:
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, actual) else float("inf")
    finite = expected.isfinite()
    if bool(expected.isnan().any()) or not torch.equal(expected[~finite], actual[~finite]):
        return float("inf")
    expected, actual = expected[finite], actual[finite]
    if expected.numel() == 0:
        return 0.0
    error, size = float((expected - actual).abs().amax()), float(expected.abs().amax())
    if not error < float("inf"):
        return float("inf")
    return error / size if size else (0.0 if error == 0 else float("inf"))


def _same_structure(replayed: nn.Module, after: nn.Module) -> None:
    """The plan makes of `before` what `after` is; otherwise a proof of one is none of the other."""
    ours, theirs = _shapes(replayed), _shapes(after)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise VerifyError(
                f"{name} has shape {theirs.get(name)} in the cut model, but {ours.get(name)} by its plan; was it cut again?"
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _carried(after: nn.Module, lost: Sequence[Lost]) -> nn.Module:
    """With computed tensors at their exact values: in float32 a parametrization returns them rounded."""
    wanted: dict[str, Tensor] = {}
    for one in lost:
        if one.computed:
            wanted[one.name] = wanted.get(one.name, one.tensor.detach()).index_select(one.axis, one.kept)
    for name, value in wanted.items():
        module, leaf, _ = find_effective(after, name)
        if _relative(value, value_of(module, leaf)) > 1e-2:
            raise EditError(f"{name} does not compute what was cut out of it.")
        put(module, leaf, value, name)
    return after
