# SPDX-License-Identifier: Apache-2.0
"""`cut`: couplings cut out of a model in place, in the first of three ways that is proved right.

Tensors are sliced, and sizes that follow from shapes with them. Where the model's code carries sizes as numbers of its
own, those are found by trial (`repair`). An attention that fuses what is to be cut apart is swapped for our plain one.
All of it is worked out on copies; the model is touched at the end, and put back exactly where the proof fails.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from featherweight.edits.apply import apply, replay
from featherweight.edits.effective import find_effective
from featherweight.edits.exact import double
from featherweight.edits.follow import apply_followed, followers
from featherweight.edits.repair import Finding, candidates, choose
from featherweight.edits.running import check_runs, modes_that_run
from featherweight.edits.self_attention import read_self_attention
from featherweight.edits.undo import remember
from featherweight.edits.verify import Inputs, Oracle, Verified, generic, prove
from featherweight.edits.whereabouts import layer_of, whereabouts
from featherweight.errors import EditError, OptionError, VerifyError
from featherweight.graph import Coupling, Trace
from featherweight.graph import trace as comb
from featherweight.plan import Attribute, Edit, Plan, Slice, Swap
from featherweight.task import describe

__all__ = ["Cut", "cut", "refusals"]

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Cut:
    """What was cut: `plan` does it again on a fresh model; `removed` and `kept` count couplings by group.

    `ways` are those of "slice", "attribute" and "swap" that it took. `verified` is the proof, `None` where none was
    asked for. `statistics` are norms and means over cut channels, whose results change. `read` are the sliced axes that
    layers contract.

    >>> done = Cut(Plan((Slice("fc.bias", 0, (0, 2)),)), {"fc": 1}, {"fc": 2}, ("slice",), None)
    >>> Plan.from_json(done.plan.to_json()) == done.plan
    True
    """

    plan: Plan
    removed: Mapping[str, int]
    kept: Mapping[str, int]
    ways: tuple[str, ...]
    verified: Verified | None
    statistics: tuple[str, ...] = ()
    read: tuple[tuple[str, int], ...] = ()


def cut(
    model: nn.Module,
    couplings: Iterable[Coupling],
    *,
    trace: Trace | None = None,
    inputs: Inputs | None = None,
    follow: Iterable[Any] = (),
    verify: bool = True,
    seed: int = 0,
) -> Cut:
    """Cuts couplings out of your model, in place, and proves it. Saves what they cost: bytes, memory, MACs, time.

    `couplings` come from a trace: pass it, or `inputs` for one to be made here. `inputs` (a tuple of positional
    arguments, or a dict of keyword arguments) are also what the proof runs on. Parameters keep identity, ties and
    hooks; `follow` names optimizers (SGD, Adam, AdamW) whose moments are cut along, and averaged copies of the model
    that get the same edits. With `verify=False` nothing is proved, though sizes in the model's code are still tried
    where there are inputs; without inputs they stay as they are.

    The trace is stale afterwards: make a new one for the next cut. Raises `OptionError` without inputs for a proof,
    `EditError` for couplings that are unknown or empty a layer, for a stale trace and for what cannot be carried out,
    naming layer, operation and line, and `VerifyError` for what does not hold; the model is then as it was.

    >>> from featherweight.graph import trace
    >>> import torch
    >>> model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(4, 3),)
    >>> found = trace(model, x)
    >>> done = cut(model, found["0"][:5], trace=found, inputs=x)
    >>> model
    Sequential(
      (0): Linear(in_features=3, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    >>> done.verified.error < 1e-9
    True
    """
    if inputs is None and (verify or trace is None):
        raise OptionError("cut: pass `inputs`, which the model is traced and the cut is proved on; or verify=False.")
    if inputs is not None and not isinstance(inputs, Mapping | tuple | list):
        raise OptionError(
            f"cut: inputs is {describe(inputs)}; give a tuple, for one tensor: (x,), or a dict by keyword."
        )
    if trace is None:
        trace = comb(model, inputs or ())
    _refuse_stale(model, trace)
    removed = _by_group(couplings, trace)
    following = followers(model, follow)
    kept = {group.name: group.size - len(removed.get(group.name, ())) for group in trace.groups}
    if not removed:
        return Cut(Plan(), {}, kept, (), None)
    before = double(model) if inputs is not None else None
    modes = modes_that_run(model, inputs) if inputs is not None and verify else ()
    edits, read = _slices(model, trace, removed)
    oracle: tuple[Oracle, float] | None = None
    if before is not None and inputs is not None:
        edits, oracle = _mended(before, trace, kept, edits, read, inputs, seed)
    plan = Plan(edits)
    undo = remember([model, *following.copies], following.optimizers)
    try:
        apply_followed(model, plan.edits, following)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()
        done = Cut(
            plan,
            {name: len(indices) for name, indices in removed.items()},
            kept,
            tuple(way for way in ("slice", "attribute", "swap") if any(edit.kind == way for edit in edits)),
            None,
            tuple(dict.fromkeys(line for group in trace.groups if group.name in removed for line in group.statistics)),
            tuple(read),
        )
        if verify and before is not None and inputs is not None:
            verified = prove(before, model, plan, inputs, read, _TOLERANCE, seed, oracle)
            done = dataclasses.replace(done, verified=verified)
            check_runs(model, inputs, modes)
    except BaseException:
        undo()
        raise
    return done


def refusals(model: nn.Module, trace: Trace, inputs: Inputs, *, seed: int = 0) -> dict[str, str]:
    """Groups of a trace that `cut` cannot carry out in your model's own code, each with the reason. Changes nothing.

    Tried on copies: one coupling of all groups at once, and by halves where that fails. Ask before you choose couplings
    of many groups, since `cut` carries out all of a choice or nothing.

    >>> import torch
    >>> from featherweight.graph import trace
    >>> class Fixed(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.a, self.b = nn.Linear(3, 7), nn.Linear(7, 2)
    ...     def forward(self, x):
    ...         return self.b(self.a(x).view(-1, 7))
    >>> model, x = Fixed(), (torch.randn(4, 3),)
    >>> list(refusals(model, trace(model, x), x))
    ['a']
    """
    _refuse_stale(model, trace)
    before, modes = double(model), modes_that_run(model, inputs)
    found: dict[str, str] = {}

    def look(names: Sequence[str]) -> None:
        removed = {name: np.array([0]) for name in names}
        kept = {name: size - (name in removed) for name, size in trace.sizes.items()}
        try:
            edits, read = _slices(model, trace, removed)
            edits, _ = _mended(before, trace, kept, edits, read, inputs, seed, 60)
            twin = copy.deepcopy(model)
            replay(twin, edits)
            check_runs(twin, inputs, modes)
        except EditError as error:
            if len(names) == 1:
                found[names[0]] = str(error)
            else:
                look(names[: len(names) // 2])
                look(names[len(names) // 2 :])

    several = [name for name, size in trace.sizes.items() if size > 1]
    if several:
        look(several)
    return found


def _refuse_stale(model: nn.Module, trace: Trace) -> None:
    for name, shape in trace.shapes.items():
        try:
            now = tuple(find_effective(model, name)[2].shape)
        except EditError:
            raise EditError(f"the trace knows a tensor {name!r} that the model does not have; trace it anew.") from None
        if now != tuple(shape):
            raise EditError(
                f"the trace is stale: {name} was {tuple(shape)} when it was made and is {now} now. Nothing was cut; trace "
                "the model anew and choose from that."
            )


def _by_group(couplings: Iterable[Coupling], trace: Trace) -> dict[str, np.ndarray]:
    chosen: dict[str, set[int]] = {}
    if isinstance(couplings, Coupling):
        raise OptionError("cut takes several couplings: a list, or a part of a group such as trace['fc'][:4].")
    for coupling in couplings:
        if not isinstance(coupling, Coupling):
            raise OptionError(f"cut takes couplings of a trace, such as trace['fc'][:4]; got {coupling!r}.")
        group = trace[coupling.group]
        if not 0 <= coupling.index < group.size:
            raise EditError(f"group {group.name} has {group.size} couplings; there is no number {coupling.index}.")
        chosen.setdefault(group.name, set()).add(coupling.index)
    for name, indices in chosen.items():
        if len(indices) == trace[name].size:
            raise EditError(
                f"all {len(indices)} couplings of {name} would be cut, which leaves nothing of it; keep one."
            )
    return {name: np.array(sorted(indices)) for name, indices in chosen.items()}


def _slices(
    model: nn.Module, trace: Trace, removed: Mapping[str, np.ndarray]
) -> tuple[tuple[Edit, ...], set[tuple[str, int]]]:
    """Swaps of torch's attention where it is cut, and a slice for each axis; and which of these axes are contracted."""
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    read: set[tuple[str, int]] = set()
    for name, indices in removed.items():
        for member in trace[name].members:
            gone.setdefault((member.tensor, member.axis), []).append(member.positions[indices].ravel())
            if member.role == "input":
                read.add((member.tensor, member.axis))
    swaps: dict[str, Swap] = {}
    slices: list[Slice] = []
    reads: set[tuple[str, int]] = set()
    for (tensor, axis), positions in gone.items():
        size = trace.shapes[tensor][axis]
        keep = np.setdiff1d(np.arange(size), np.concatenate(positions))
        if not keep.size:
            raise EditError(f"{tensor}: all {size} positions of axis {axis} would be cut; keep at least one.")
        layer, renamed = _in_attention(model, tensor, axis, keep, size)
        if layer is not None:
            swaps[layer] = Swap(layer, to="attention")
        for new, part in renamed:
            slices.append(Slice(new, axis, tuple(part.tolist())))
            if (tensor, axis) in read:
                reads.add((new, axis))
    return (*swaps.values(), *slices), reads


def _in_attention(
    model: nn.Module, tensor: str, axis: int, keep: np.ndarray, size: int
) -> tuple[str | None, list[tuple[str, np.ndarray]]]:
    """If a tensor is of torch's attention: that layer, and what is kept of the tensors of ours that hold its values."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layer, _, leaf = tensor.rpartition(".")
    if isinstance(modules.get(layer), nn.MultiheadAttention):
        kind = "weight" if leaf.endswith("weight") else "bias"
        if leaf in ("in_proj_weight", "in_proj_bias"):
            if axis == 1:
                return layer, [(f"{layer}.{part}.weight", keep) for part in "qkv"]
            third = size // 3
            parts = [keep[(keep >= i * third) & (keep < (i + 1) * third)] - i * third for i in range(3)]
            whole = [(f"{layer}.{name}.{kind}", part) for name, part in zip("qkv", parts, strict=True)]
            if any(not part.size for _, part in whole):
                raise EditError(f"{tensor}: all queries, keys or values would be cut; keep at least one of each.")
            return layer, [(name, part) for name, part in whole if part.size < third]
        return layer, [(f"{layer}.{leaf[0]}.weight", keep)]
    outer, _, child = layer.rpartition(".")
    if child == "out_proj" and isinstance(modules.get(outer), nn.MultiheadAttention):
        return outer, [(f"{outer}.out.{leaf}", keep)]
    return None, [(tensor, keep)]


def _mended(
    before: nn.Module,
    trace: Trace,
    kept: Mapping[str, int],
    edits: tuple[Edit, ...],
    read: set[tuple[str, int]],
    inputs: Inputs,
    seed: int,
    trials: int = 200,
) -> tuple[tuple[Edit, ...], tuple[Oracle, float]]:
    """The edits with what more they need to run and answer right, and what they were judged by. Raises `VerifyError`
    where nothing is found."""
    fused = _fused(before, edits)
    first = ""
    for swaps in ((), fused) if fused else ((),):
        plan = (*swaps, *edits)
        judge = _Judge(before, plan, inputs, seed, read)
        offered = candidates(judge.model, trace, kept, plan)
        found = choose(judge.model, offered, judge, 40 if fused and not swaps else trials)
        if not isinstance(found, Finding):
            return (*plan, *found), judge.ready
        first = first or judge.first
    raise VerifyError(
        f"the cut cannot be carried out in the model's own code: {first}. Nothing was changed. A size is written there as "
        "a number, or is computed from one that stays: read it from the tensor's shape or from an attribute of the "
        "layer, leave this group out (`refusals` lists all such), or take cut_exported, whose result is a program."
    )


def _fused(model: nn.Module, edits: Sequence[Edit]) -> tuple[Swap, ...]:
    """Layers with a sliced child of three equal parts that our plain self-attention can stand for."""
    found: dict[str, Swap] = {}
    for edit in edits:
        layer = edit.tensor.rpartition(".")[0].rpartition(".")[0] if isinstance(edit, Slice) and edit.axis == 0 else ""
        if not layer or layer in found:
            continue
        try:
            read_self_attention(model.get_submodule(layer))
        except (AttributeError, EditError):
            continue
        found[layer] = Swap(layer, to="self_attention")
    return tuple(found.values())


class _Judge:
    """Tries attributes on a sliced copy with random weights: does it answer as the masked one?"""

    def __init__(
        self, before: nn.Module, edits: Sequence[Edit], inputs: Inputs, seed: int, read: set[tuple[str, int]]
    ) -> None:
        self.ready = generic(before, edits, inputs, seed, read)
        self.oracle = self.ready[0]
        self.model = double(self.oracle.before)
        replay(self.model, edits)
        self.first = ""

    def __call__(self, attributes: Sequence[Attribute]) -> Finding:
        undo = remember([self.model])
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        handle = nn.modules.module.register_module_forward_pre_hook(count)
        text, layer, right = "", None, False
        try:
            for edit in attributes:
                apply(self.model, edit)
            for sums in (False, True):
                error, output = self.oracle.compare(self.model, sums)
                text = f"{output} differs by {error:.1e} from the model with the cut positions set to zero"
                right = error <= _TOLERANCE
                if right:
                    break
        except Exception as failure:
            text, layer = whereabouts(failure, self.model), layer_of(failure, self.model)
        finally:
            handle.remove()
            undo()
        self.first = self.first or text
        return Finding(right, calls, layer)
