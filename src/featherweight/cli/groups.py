# SPDX-License-Identifier: Apache-2.0
"""What `inspect` says of a trace: which channels and heads go together, what one costs, what is frozen where and why.

`laid_out` makes one dict of a trace, which is what --json prints; `show` draws tables of it. A network of a hundred
blocks is frozen at the same few lines of its code, so that frozen axes are told by line and not one by one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featherweight.cli.console import say, table
from featherweight.report import words

if TYPE_CHECKING:
    from featherweight.graph import Group, Trace

__all__ = ["laid_out", "show"]

_NAMED = 2  # layers of a cell that are named; the others are counted


def laid_out(trace: Trace, refused: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The trace as JSON-able data: groups with what one coupling frees, frozen axes by line, coverage, front and notes.

    `parameters` and `macs` of a group are what its next single coupling frees, with all others kept. `refused` are the
    groups that a trial could not cut, with the reason; None where nothing was tried.
    """
    return {
        "parameters": trace.parameters(),
        "macs": trace.macs(),
        "coverage": trace.coverage,
        "front": trace.front,
        "notes": list(trace.notes),
        "groups": [
            _group(trace, group) | ({} if refused is None else {"refused": refused.get(group.name)})
            for group in trace.groups
        ],
        "frozen": _frozen(trace),
    }


def _group(trace: Trace, group: Group) -> dict[str, Any]:
    fewer = {group.name: group.size - 1}
    members = [
        {"tensor": m.tensor, "axis": m.axis, "role": m.role, "positions": int(m.positions.shape[1])}
        for m in group.members
    ]
    return {
        "name": group.name,
        "kind": group.kind,
        "couplings": group.size,
        "parameters": trace.parameters() - trace.parameters(fewer),
        "macs": trace.macs() - trace.macs(fewer),
        "statistics": list(group.statistics),
        "members": members,
    }


def _frozen(trace: Trace) -> list[dict[str, Any]]:
    """Frozen axes by reason and line, those with the most positions first; kernels and axes of one position are
    nobody's channels, and are left out."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in trace.frozen:
        if one.positions > 1 and not one.reason.startswith("a kernel's"):
            axis = {"tensor": one.tensor, "axis": one.axis, "positions": one.positions}
            found.setdefault((one.reason, one.op, one.source), []).append(axis)
    lines = [
        {"reason": reason, "op": op, "source": source, "axes": axes} for (reason, op, source), axes in found.items()
    ]
    return sorted(lines, key=lambda line: -sum(axis["positions"] for axis in line["axes"]))


def show(found: Mapping[str, Any], lines: int = 20) -> None:
    """The groups as a table, then what is frozen (the first `lines` places), coverage, front and notes."""
    groups = found["groups"]
    if groups:
        rows = [
            (
                group["name"],
                f"{words.count(group['couplings'])} {group['kind']}",
                _layers(group, "output"),
                _layers(group, "input"),
                words.count(group["parameters"]),
                words.count(group["macs"]),
                "change" if group["statistics"] else "stay",
            )
            for group in groups
        ]
        heads = ("group", "couplings", "made by", "read by", "parameters", "MACs", "statistics")
        table(heads, rows, right=(4, 5))
        say()
        total = sum(group["couplings"] for group in groups)
        say(
            f"{words.count(total)} couplings in {len(groups)} group{'s' if len(groups) > 1 else ''}. Parameters and MACs "
            "are what one coupling of a group frees."
        )
    else:
        say("No group of channels can be cut.")
    _show_refused(groups)
    _show_statistics(groups)
    _show_frozen(found["frozen"], lines)
    share = words.percent(found["coverage"])
    say(f"{share} of the parameters of conv, linear, embedding and recurrent weights lie in a group.")
    say(_FRONTS[found["front"]])
    for note in found["notes"]:
        say(f"  {note}")


_FRONTS = {
    "export": "Traced by torch.export.",
    "recorded": "Recorded from one forward on these inputs: a branch that they do not take is not seen.",
}


def _layers(group: Mapping[str, Any], role: str) -> str:
    names = (m["tensor"].rpartition(".")[0] or m["tensor"] for m in group["members"] if m["role"] == role)
    return _shortened(dict.fromkeys(names))


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    shown = names if len(names) <= _NAMED + 1 else names[:_NAMED]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{', '.join(shown)}{more}"


def _show_refused(groups: Sequence[Mapping[str, Any]]) -> None:
    tried = [group for group in groups if "refused" in group]
    refused = [group for group in tried if group["refused"]]
    if tried:
        say(f"Tried on a copy: {len(tried) - len(refused)} of {len(tried)} groups can be cut in the model's own code.")
    for group in refused[:10]:
        say(f"  not {group['name']}: {group['refused']}")
    if len(refused) > 10:
        say(f"  nor {len(refused) - 10} more; --json has all")


def _show_statistics(groups: Sequence[Mapping[str, Any]]) -> None:
    """Which norms and means see other channels after a cut; a line of code that many layers share once."""
    places = Counter(place for group in groups for place in group["statistics"])
    if not places:
        return
    say(
        '"Change": a cut is not exact there, since these are taken over the channels that are cut; train or calibrate after.'
    )
    for place in list(places)[:5]:
        say(f"  {place}")
    if len(places) > 5:
        say(f"  and at {len(places) - 5} more lines")


def _show_frozen(frozen: Sequence[Mapping[str, Any]], lines: int) -> None:
    if not frozen:
        return
    say()
    rows = [
        (
            _shortened(dict.fromkeys(_axis(axis) for axis in line["axes"])),
            line["reason"],
            line["op"] if line["source"] else "",
            _place(line["source"]),
        )
        for line in frozen[:lines]
    ]
    table(("frozen", "why", "operation", "where"), rows)
    if len(frozen) > lines:
        say(f"and at {len(frozen) - lines} more places; --json has all.")
    say()


def _axis(axis: Mapping[str, Any]) -> str:
    """`fc.weight[:, 0:8]` is more than anybody wants to read; the tensor, the axis and how many positions will do."""
    return f"{axis['tensor']} axis {axis['axis']} ({axis['positions']})"


def _place(source: str) -> str:
    """`net.py:12 in forward: code`, the code cut to what a line holds."""
    match = re.match(r"(.+?:\d+) in \S+: (.*)", source)
    if match is None:
        return source
    code = match[2] if len(match[2]) <= 60 else f"{match[2][:57]}..."
    return f"{match[1]}: {code}"
