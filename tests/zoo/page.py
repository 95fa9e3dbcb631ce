# SPDX-License-Identifier: Apache-2.0
"""docs/zoo.md from the results: the goals, the pass table, and what is frozen in which network and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import put, table

__all__ = ["write"]

Facts = dict[str, Any]
ENOUGH = 0.6

_MARK = {"passed": "yes", "refused": "refused", "wrong": "**wrong**", "crashed": "**crash**", "hung": "**hang**"}


def write(results: Sequence[Facts], page: Path, speed: Sequence[Facts] = ()) -> None:
    """Puts each part between its marks; the words around them are written by hand."""
    parts = {"goals": _goals(results), "table": _table(results), "frozen": _frozen(results), "speed": _speed(speed)}
    for name, body in parts.items():
        put(name, body, page)


def _speed(rows: Sequence[Facts]) -> str:
    head = ["network", "operations", "groups", "torch.export", "combing beyond it", "goal"]
    cells = []
    for row in rows:
        goal = f"{row['goal']:.0f} s" if row["goal"] else ""
        export, beyond = f"{row['export_seconds']:.1f} s", f"{row['beyond_seconds']:.1f} s"
        cells.append([row["name"], str(row["operations"]), str(row["groups"]), export, beyond, goal])
    return table(head, cells)


def _goals(results: Sequence[Facts]) -> str:
    reached = [facts for facts in results if _coverage(facts) >= ENOUGH and _passed(facts)]
    in_code = [facts for facts in reached if facts["trace"].get("in_code", 0.0) >= ENOUGH]
    unsafe = [facts for facts in results if facts["outcome"] in ("wrong", "crashed", "hung")]
    groups = [group for facts in results for group in facts.get("groups", ())]
    cuts = [group[size]["outcome"] for group in groups for size in ("one", "share")]
    programs = sum(group.get("exported", {}).get("outcome") == "passed" for group in groups)
    seconds = sorted(facts["trace"]["seconds"] for facts in results if "trace" in facts)
    lines = [
        f"- {len(results)} architectures; {len(reached)} ({_percent(len(reached), len(results))}) prunable with at least "
        f"{ENOUGH:.0%} of their conv and linear parameters in cuttable groups (goal: 95 %), {len(in_code)} of them in the "
        "model's own code.",
        f"- {len(results) - len(unsafe)} ({_percent(len(results) - len(unsafe), len(results))}) without a wrong result, a "
        "crash or a hang (goal: 100 %).",
        f"- {len(cuts)} cuts of single groups in the model's own code: {cuts.count('passed')} proved, "
        f"{cuts.count('refused')} refused with the model left as it was. Of the groups that were refused, {programs} were "
        "cut on the exported program.",
    ]
    if seconds:
        lines.append(f"- Combing, torch.export included: median {seconds[len(seconds) // 2]:.1f} s.")
    return "\n".join(lines)


def _table(results: Sequence[Facts]) -> str:
    head = ["network", "front", "cuttable", "in its code", "groups", "cuts proved", "30 % at once", "parameters left"]
    head += ["trained", "loaded", "ONNX", "program"]
    return table(head, (_row(facts) for facts in results))


def _row(facts: Facts) -> list[str]:
    trace, everything = facts.get("trace", {}), facts.get("everything", {})
    cuts = [group[size]["outcome"] for group in facts.get("groups", ()) for size in ("one", "share")]
    left = f"{100 * everything['parameters'] / facts['parameters']:.0f} %" if "parameters" in everything else "–"
    return [
        facts["label"],
        trace.get("front", "none"),
        *(f"{100 * trace[key]:.0f} %" if key in trace else "–" for key in ("coverage", "in_code")),
        str(trace.get("groups", "–")),
        f"{cuts.count('passed')} of {len(cuts)}",
        _mark(facts, "everything"),
        left,
        *(_mark(facts, step) for step in ("training", "loaded", "onnx", "program")),
    ]


def _mark(facts: Facts, step: str) -> str:
    if "process" in facts and step == "everything":
        return _MARK[facts["process"]["outcome"]]
    if step not in facts:
        return "–"
    if facts.get(f"{step}_uncut", {}).get("outcome", "passed") != "passed":
        return "nor uncut"
    return _MARK[facts[step]["outcome"]]


def _frozen(results: Sequence[Facts]) -> str:
    """For each network below the goal what froze most of it, and each group that is refused, with the code's line."""
    lines = []
    for facts in results:
        frozen = [each for each in facts.get("trace", {}).get("frozen", ()) if not each[0].startswith("output")]
        if "trace" in facts and _coverage(facts) < ENOUGH and frozen:
            reason, positions = frozen[0]
            lines.append(
                f"- **{facts['label']}** ({100 * _coverage(facts):.0f} %): {_plain(reason)}, {positions} positions"
            )
        if facts["outcome"] != "passed":
            lines.append(f"- **{facts['label']}**, {facts['outcome']}: {_plain(facts['reason'])}")
        refused = [group for group in facts.get("groups", ()) if "exported" in group]
        if refused:
            one = next(refused[0][size]["reason"] for size in ("one", "share") if "reason" in refused[0][size])
            where = ", ".join(group["name"] for group in refused[:3]) + (", ..." if len(refused) > 3 else "")
            lines.append(f"- {facts['label']}, {len(refused)} groups not in its own code ({where}): {_plain(one)}")
    return "\n".join(lines) or "None."


def _plain(text: str) -> str:
    """One line of Markdown that says just this: no tags, no links, no tables."""
    return re.sub(r"\s+", " ", text).replace("|", "/").replace("<", "&lt;").replace("[", "\\[")[:300]


def _coverage(facts: Facts) -> float:
    return facts.get("trace", {}).get("coverage", 0.0)


def _passed(facts: Facts) -> bool:
    return any(facts.get(step, {}).get("outcome") == "passed" for step in ("everything", "program"))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"
