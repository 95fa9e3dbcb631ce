# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown, for a terminal, an issue or a pull request: the same words and tables, no pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from featherweight.report import tables, words
from featherweight.report.compare import comparison
from featherweight.report.limits import LIMITS
from featherweight.report.tables import Table, part, strings, text

__all__ = [
    "bullets",
    "code",
    "compare_markdown",
    "escape",
    "export_words",
    "fence",
    "grid",
    "to_markdown",
    "verdict_table",
]

Row = Mapping[str, Any]
MOST_LAYERS = 200


def to_markdown(report: Row) -> str:
    """A report as Markdown (GitHub's dialect). Needs no extra; layer tables are cut at 200 rows, with the rest summed.

    >>> print(to_markdown({"title": "LeNet", "verdict": {"sentence": "8.6x smaller on disk."}}))
    # LeNet
    <BLANKLINE>
    8.6x smaller on disk.
    <BLANKLINE>
    ## Export and parity
    <BLANKLINE>
    Not exported.
    <BLANKLINE>
    """
    report = LIMITS[0].shorten(report)
    export = part(report, "export")
    sections = [
        ("", escape(text(part(report, "verdict").get("sentence"))) or "This run has no verdict."),
        ("", verdict_table(report)),
        ("Gained, and not gained", bullets(strings(report, "gains"))),
        ("Before and after each stage", grid(tables.stages(report))),
        ("Size on disk", grid(tables.sizes(report))),
        ("Latency", _latency(report)),
        ("Layer by layer", grid(_layers(report))),
        ("Export and parity", export_words(export)),
        (
            "Load and run",
            "\n\n".join(f"{what}\n\n{fence(body, lang)}" for what, lang, body in tables.load_snippets(report)),
        ),
        ("Reproduce", _reproduce(part(report, "reproduce"))),
        ("Warnings", bullets(strings(report, "warnings"))),
    ]
    blocks = [f"# {escape(text(report.get('title')) or 'featherweight report')}"]
    for heading, body in sections:
        if body:
            blocks += [f"## {heading}", body] if heading else [body]
    return "\n\n".join(blocks) + "\n"


def compare_markdown(reports: Sequence[Row]) -> str:
    """Several runs side by side as one Markdown table, a column a run.

    >>> print(compare_markdown([{"title": "A", "after": {"packed_bytes": 140_000}}, {"title": "B"}]))
    |  | 1 A | 2 B |
    | --- | ---: | ---: |
    | packed | 140 kB | – |
    | warnings | 0 | 0 |
    <BLANKLINE>
    """
    return grid(comparison([LIMITS[0].shorten(report) for report in reports])) + "\n"


def escape(value: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no table cell, no HTML comes of it."""
    value = re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(value.split()))
    return re.sub(r"^([-+]|\d+[.)])(\s)", r"\\\1\2", value)


def code(value: str) -> str:
    """A code span that holds any text, backticks and pipes included."""
    value = " ".join(value.split()).replace("|", "\\|")
    ticks = "`" * (max((len(run) for run in re.findall("`+", value)), default=0) + 1)
    pad = " " if value.startswith("`") or value.endswith("`") else ""
    return f"{ticks}{pad}{value}{pad}{ticks}" if value else ""


def fence(body: str, language: str = "") -> str:
    """A code block that no text can end early."""
    ticks = "`" * max(3, max((len(run) for run in re.findall("`+", body)), default=0) + 1)
    return f"{ticks}{language}\n{body.rstrip()}\n{ticks}"


def verdict_table(report: Row) -> str:
    """The five numbers of the verdict."""
    rows = [
        tuple(text(row.get(key)) for key in ("label", "before", "after", "change"))
        for row in tables.items(part(report, "verdict"), "numbers")
    ]
    return grid(Table(("", "before", "after", "change"), tuple(rows), frozenset({0, 3})))


def export_words(export: Row) -> str:
    """What was exported and how it answers beside the PyTorch model, in a few lines."""
    if not export:
        return "Not exported."
    if export.get("error"):
        return f"The export failed: {escape(text(export['error']))}"
    lines = [escape(words.sentence(text(part(export, "parity").get("words"))))]
    facts = [("file", code(text(export.get("path")))), ("opset", escape(text(export.get("opset"))))]
    facts += [(name, escape(value)) for name, value in tables.parity(export)]
    lines += ["\n".join(f"- {name}: {value}" for name, value in facts if value)]
    lines += [bullets(strings(export, "notes"))]
    return "\n\n".join(line for line in lines if line)


def bullets(lines: Sequence[str]) -> str:
    """One item a line, of any text."""
    return "\n".join(f"- {escape(line)}" for line in lines)


def grid(table: Table) -> str:
    """A table as Markdown, numbers to the right; nothing for an empty one."""
    if not table:
        return ""
    rule = ["---" if i in table.left else "---:" for i in range(len(table.head))]
    rows = [[escape(cell) for cell in table.head], rule, *([escape(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _latency(report: Row) -> str:
    said = [
        f"{tables.spoken(name)}: {text(part(report, 'comparisons', name).get('words'))}"
        for name in tables.runtimes(report)
        if part(report, "comparisons", name).get("words")
    ]
    return "\n\n".join(block for block in (bullets(said), grid(tables.latency(report))) if block)


def _layers(report: Row) -> Table:
    shown, rest, _ = tables.layers(report, MOST_LAYERS)
    total = tables.total_row(report)
    rows = [
        (row.name, row.kind, row.shape, row.parameters, row.zeros, row.macs, row.dense, row.packed, row.codec,
         f"{row.action}: {row.reason}" if row.action and row.reason else row.action or row.reason)
        for row in (*shown, rest, total)
        if row is not None
    ]  # fmt: skip
    head = ("layer", "kind", "shape", "parameters", "zeros", "MACs", "dense", "packed", "codec", "what was done")
    return Table(head, tuple(rows), frozenset({0, 1, 2, 8, 9}))


def _reproduce(found: Row) -> str:
    blocks = []
    if found.get("command"):
        blocks.append(fence(text(found["command"]), "sh"))
    if found.get("recipe"):
        blocks.append(fence(text(found["recipe"]), "toml"))
    lines = [f"- seed: {escape(text(found['seed']))}"] if found.get("seed") is not None else []
    for key in ("versions", "machine", "data"):
        facts = ", ".join(f"{name} {value}" for name, value in tables.facts(found.get(key)))
        if facts:
            lines.append(f"- {key}: {escape(facts)}")
    return "\n\n".join([*blocks, "\n".join(lines)] if lines else blocks)
