# SPDX-License-Identifier: Apache-2.0
"""From a report's dict to one self-contained page: no script, no network, no font, under 500 kB whatever the run.

The page shows what `report.json` holds and decides nothing. Long series, lists and texts are shortened step by step
until the page fits, and the page says what was shortened; `report.json` always has all. A content security policy
forbids the page to load or run anything, so that a hostile layer name would do no harm even if escaping failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from featherweight.errors import require
from featherweight.report import channels, charts, curves, tables, timings, words
from featherweight.report.limits import LIMITS, MAX_BYTES, Limits
from featherweight.report.tables import part, text

__all__ = ["fitted", "render"]


def render(report: Mapping[str, Any]) -> str:
    """A report as one HTML page, in light and dark, for wide and narrow screens and for paper.

    A pure function of the dict that `report.json` holds, of which any part may be missing. It saves nothing and reads
    nothing but its own template. The page is under `MAX_BYTES`, and texts in it are escaped.

    Raises `MissingExtra` where jinja2 is not installed.

    >>> page = render({"title": "LeNet at 90 %", "verdict": {"sentence": "8.6x smaller on disk."}})
    >>> page.startswith("<!doctype html>"), "8.6x smaller on disk." in page
    (True, True)
    """
    return fitted("page.html", lambda limits: _view(limits.shorten(report), limits))


def fitted(template: str, view: Callable[[Limits], dict[str, Any]]) -> str:
    """The page that this template makes of the first view that fits into `MAX_BYTES`."""
    page = ""
    for limits in LIMITS:
        page = _environment().get_template(template).render(view(limits))
        if len(page.encode()) < MAX_BYTES:
            break
    return page


@lru_cache(maxsize=1)
def _environment() -> Any:
    jinja2 = require("jinja2", extra="report")
    markupsafe = require("markupsafe", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("featherweight.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A long dotted name may be broken after a dot, and only there.
    break_after_dot = markupsafe.Markup(".<wbr>")
    environment.filters["breakable"] = lambda name: break_after_dot.join(name.split("."))
    return environment


def _view(report: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """All that the template shows, as words and pictures; each entry is there, perhaps empty."""
    layers, rest, n_layers = tables.layers(report, limits.rows)
    drawn = curves.curves(report, limits.points)
    export = part(report, "export")
    view: dict[str, Any] = {
        "title": text(report.get("title")) or "featherweight report",
        "byline": _byline(report),
        "verdict": verdict(report),
        "gains": tables.strings(report, "gains"),
        "stages": tables.stages(report),
        "stages_note": _stages_note(report),
        "details": [_stage(stage, limits.rows) for stage in tables.items(report, "stages")],
        "curves": drawn,
        "channels": channels.view(report, limits.rows),
        "layers": layers,
        "layers_rest": rest,
        "layers_total": tables.total_row(report),
        "n_layers": n_layers,
        "latency": [timings.strips(report, name, limits.samples) for name in tables.runtimes(report)],
        "latency_table": tables.latency(report),
        "sizes": _bars(report),
        "export": export,
        "export_facts": _export_facts(export),
        "parity": tables.parity(export),
        "parity_passed": part(export, "parity").get("passed"),
        "parity_words": words.sentence(text(part(export, "parity").get("words"))),
        "export_notes": tables.strings(export, "notes"),
        "snippets": tables.load_snippets(report),
        "reproduce": _reproduce(report),
        "warnings": tables.strings(report, "warnings"),
    }
    view["shortened"] = limits is not LIMITS[0]
    view["sections"] = _sections(view)
    return view


def _sections(view: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(id, heading) of the sections that have something to say."""
    found = (
        ("verdict", "Verdict", True),
        ("gains", "Gained, and not gained", view["gains"]),
        ("stages", "Before and after each stage", view["stages"]),
        ("curves", "Training curves", view["curves"]),
        ("channels", "The network before and after", view["channels"]),
        ("sizes", "Size on disk", view["sizes"]),
        ("latency", "Latency", view["latency"]),
        ("layers", "Layer by layer", view["layers"]),
        ("export", "Export and parity", True),
        ("load", "Load and run", view["snippets"]),
        ("reproduce", "Reproduce", view["reproduce"]),
        ("warnings", "Warnings", True),
    )
    return [(name, heading) for name, heading, there in found if there]


def _byline(report: Mapping[str, Any]) -> list[str]:
    tool, machine = part(report, "tool"), part(report, "reproduce", "machine")
    created = text(report.get("created")).replace("T", " ")
    found = [
        created[:16] if created[:4].isdigit() else created,
        " ".join(word for word in (text(tool.get("name")), text(tool.get("version"))) if word),
        text(machine.get("cpu") or machine.get("processor") or machine.get("name")),
    ]
    return [word for word in found if word]


def verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    numbers = [
        {key: text(row.get(key)) for key in ("label", "before", "after", "change")}
        | {"mood": words.mood(row.get("good"), "better", "worse", "no real change")}
        for row in tables.items(part(report, "verdict"), "numbers")
    ]
    return {"sentence": text(part(report, "verdict").get("sentence")), "numbers": numbers}


def _stages_note(report: Mapping[str, Any]) -> str:
    cards = [card for _, card, _ in tables.scorecards(report)]
    samples = [card["samples"] for card in cards if card.get("samples") is not None]
    notes = [f"{tables.metric_name(report)} on {words.count(samples[0])} examples"] if samples else []
    notes += ["MACs count zeros like any other number"] if any(card.get("macs") is not None for card in cards) else []
    return ". ".join(note[:1].upper() + note[1:] for note in notes) + "." if notes else ""


def _stage(stage: Mapping[str, Any], rows: int) -> dict[str, Any]:
    selection = [
        {key: text(row.get(key)) for key in ("name", "kind", "action", "reason")}
        | {"shape": tables.shape(row.get("shape")), "parameters": words.count(row.get("parameters"))}
        | {"target": words.percent(row.get("target", row.get("sparsity"))) if row.get("action") != "kept" else ""}
        for row in tables.items(stage, "selection")
    ]
    return {
        "name": text(stage.get("name")) or "stage",
        "method": text(stage.get("method")),
        "options": tables.facts(stage.get("options")),
        "messages": tables.strings(stage, "messages"),
        "solved": tables.solved(stage, rows),
        "selection": selection[:rows],
        "more": max(0, len(selection) - rows),
        "verb": "pruned" if all(row["action"] in ("pruned", "kept") for row in selection) else "changed",
        "changed": sum(row["action"] != "kept" for row in selection),
        "kept": sum(row["action"] == "kept" for row in selection),
    }


def _bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars of bytes, all to one scale: dense, packed, gzip; before above after; then the ONNX file."""
    before, after = part(report, "before"), part(report, "after")
    found = []
    for label, key in tables.SIZES:
        pair = [("before", before.get(key)), ("after", after.get(key))]
        there = [(kind, value) for kind, value in pair if words.number(value) is not None]
        if there:
            found.append((label, there, words.change(before.get(key), after.get(key))))
    onnx = part(report, "export").get("bytes")
    if found and words.number(onnx):
        found.append(("ONNX file", [("after", onnx)], ""))
    largest = max((words.number(value) or 0.0 for _, there, _ in found for _, value in there), default=0.0) or 1.0
    return [
        {
            "label": label,
            "change": change,
            "bars": [
                {
                    "kind": kind,
                    "name": kind,
                    "words": words.size(value),
                    "svg": charts.bar((words.number(value) or 0.0) / largest, kind),
                }
                for kind, value in there
            ],
        }
        for label, there, change in found
    ]


def _export_facts(export: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("file", text(export.get("path"))), ("opset", text(export.get("opset")))]
    if export.get("bytes") is not None:
        found.append(("size", words.size(export.get("bytes"))))
    if export.get("dynamic_batch") is not None:
        found.append(("dynamic batch", text(export.get("dynamic_batch"))))
    return [(name, value) for name, value in found if value]


def _reproduce(report: Mapping[str, Any]) -> dict[str, Any]:
    found = part(report, "reproduce")
    machine = {key: value for key, value in part(found, "machine").items() if key != "versions"}
    versions = {"seed": found.get("seed"), **part(found, "versions")}
    groups = (("Seed and versions", versions), ("Machine", machine), ("Data", found.get("data")))
    shown = {
        "command": text(found.get("command")),
        "recipe": text(found.get("recipe")),
        "groups": [(title, rows) for title, data in groups if (rows := tables.facts(data))],
    }
    return shown if any(shown.values()) else {}
