# SPDX-License-Identifier: Apache-2.0
"""Which groups may be cut and which stay, each with the reason; and the lines that a report shows of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping

import numpy as np
from torch import nn

from featherweight.errors import NothingToCompress
from featherweight.graph import Frozen, Group, Trace
from featherweight.layers import Selected, matches, select
from featherweight.prune.channels.options import ChannelOptions

__all__ = ["choose_groups", "is_told", "least_of", "lines", "refuse_nothing", "structure", "why"]


def choose_groups(
    model: nn.Module, trace: Trace, options: ChannelOptions, masked: bool
) -> tuple[list[Group], dict[str, str]]:
    """The groups that may be cut, and the reasons of those that may not, by name.

    `masked` says that what is cut is held at zero before, which needs its tensors to be parameters or buffers. Raises
    `NothingToCompress` for a glob that matches nothing.
    """
    tensors = {member.tensor for group in trace.groups for member in group.members}
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    held |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    globs = list(options.least) if isinstance(options.least, Mapping) else []
    for option, patterns in (("layers", options.layers), ("least", globs)):
        select(sorted(tensors), [glob for glob in patterns if glob != "*"], option=option)
    for option, patterns in (("keep", options.keep), ("freeze", options.freeze)):
        select(sorted(tensors | held), patterns, option=option)
    chosen, kept = [], {}
    for group in trace.groups:
        reason = _reason(group, options, held if masked else None)
        if reason is None:
            chosen.append(group)
        else:
            kept[group.name] = reason
    return chosen, kept


def _reason(group: Group, options: ChannelOptions, held: set[str] | None) -> str | None:
    """Why a group stays whole; None where it may be cut."""
    made = [member.tensor for member in group.members if member.role != "input"]
    every = [member.tensor for member in group.members]
    if not any(matches(name, options.layers) for name in [*(made or every), group.name]):
        return "no glob of layers names it"
    for option, names in (("keep", made), ("freeze", every)):
        for glob in getattr(options, option):
            named = next((name for name in names if matches(name, [glob])), None)
            if named is not None:
                return f"{option}={glob!r} names {named}"
    if options.exact and group.statistics:
        return f"exact=True, and the statistics of {group.statistics[0]} would change"
    computed = [name for name in every if held is not None and name not in held]
    if computed:
        return f"{computed[0]} is computed by a parametrization, whose zeros cannot be held while others move"
    if least_of(group, options) >= group.size:
        return f"it has {group.size} {group.kind}, and least={least_of(group, options)} stay"
    if options.multiple >= group.size:
        return f"it has {group.size} {group.kind}, no more than multiple={options.multiple}"
    return None


def least_of(group: Group, options: ChannelOptions) -> int:
    """How many couplings of a group stay at least; never none."""
    least = options.least
    if isinstance(least, Mapping):
        names = [member.tensor for member in group.members if member.role != "input"]
        named = [value for glob, value in least.items() if any(matches(name, [glob]) for name in [*names, group.name])]
        least = named[-1] if named else 1
    return max(1, int(least) if least >= 1 else math.ceil(least * group.size - 1e-9))


def structure(group: Group, trace: Trace) -> Hashable:
    """What two groups must have in common to be of one structure: ops, roles, axes and sizes of all members."""
    ops = {op.weight: op.op for op in trace.ops if op.weight is not None}
    members = sorted(
        (
            member.role,
            ops.get(member.tensor, ""),
            member.axis,
            member.positions.shape[1],
            trace.shapes.get(member.tensor, ()),
        )
        for member in group.members
    )
    return group.kind, group.size, tuple(members)


def refuse_nothing(groups: list[Group], trace: Trace, kept: Mapping[str, str]) -> None:
    """Raises `NothingToCompress`, with reasons, where no group may be cut."""
    if groups:
        return
    reasons = [f"{name}: {reason}" for name, reason in kept.items()]
    reasons += [
        f"{frozen.tensor} axis {frozen.axis}: {why(frozen)}" for frozen in trace.frozen if is_told(frozen, trace)
    ]
    shown = "; ".join(reasons[:5]) or "the model has no layers with channels between its input and its output"
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    notes = "".join(f" {note.rstrip('.')}." for note in trace.notes[:3])
    raise NothingToCompress(f"Nothing to cut. {shown.rstrip('.')}{more}.{notes}")


def lines(trace: Trace, keeps: Mapping[str, np.ndarray], kept: Mapping[str, str]) -> Iterator[Selected]:
    """A line for each group (how many couplings of how many are kept, or why all) and for each frozen axis (why)."""
    whole = trace.parameters()
    for group in trace.groups:
        made = [member.tensor for member in group.members if member.role == "output"]
        name = made[0] if made else group.name
        left = int(keeps[group.name].sum()) if group.name in keeps else group.size
        others = sorted({tensor.rpartition(".")[0] for tensor in made} - {name.rpartition(".")[0]})
        with_ = (
            f", with {', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}"
            if others
            else ""
        )
        reason = kept.get(group.name, f"{left} of {group.size} {group.kind} kept{with_}")
        bound = whole - trace.parameters({group.name: 0})
        action = "kept" if left == group.size else "pruned"
        yield Selected(name, group.kind, (group.size,), bound, action, 1 - left / group.size, reason)
    for frozen in trace.frozen:
        if is_told(frozen, trace):
            name = f"{frozen.tensor} axis {frozen.axis}"
            yield Selected(name, "frozen", (frozen.positions,), 0, "kept", 0.0, why(frozen))


def is_told(frozen: Frozen, trace: Trace) -> bool:
    """Whether it is worth a line: single positions, biases that go with weights, and kernels are nobody's channels."""
    kernel = frozen.axis > 1 and frozen.op.startswith("conv")
    return frozen.positions > 1 and len(trace.shapes.get(frozen.tensor, ())) > 1 and not kernel


def why(frozen: Frozen) -> str:
    """The reason, with the operation and the line that it stands in."""
    return f"{frozen.reason} ({frozen.op} at {frozen.source})" if frozen.source else frozen.reason
