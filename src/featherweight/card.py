# SPDX-License-Identifier: Apache-2.0
"""The model card of an artefact: a README.md that model hubs read, made of what was measured and nothing else.

A card states what only the user knows as a line to fill in: under which licence the weights may be used, what they
were trained for, where they fail. It is written once; a user's own edits to it are never touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from featherweight.report import tables
from featherweight.report.limits import LIMITS
from featherweight.report.markdown import bullets, escape, export_words, fence, grid, verdict_table
from featherweight.report.tables import part, strings, text

__all__ = ["card"]

FILES = (
    ("model.safetensors", "the weights, each tensor in its smallest exact form"),
    ("plan.json", "structural changes to the model, replayed when it is loaded"),
    ("report.html", "what was done and measured, to read"),
    ("report.json", "the same numbers, for programs"),
)


def card(report: Mapping[str, Any]) -> str:
    """The model card of the run that this report tells of: Markdown with YAML front matter. Needs no extra.

    The licence is left to the user, for the weights are theirs. Whatever is missing in the report is left out.

    >>> print(card({"title": "LeNet at 90 %", "load": {"folder": "run", "class_hint": "nets:LeNet"}}))
    ---
    library_name: featherweight
    # license: fill in the licence of your weights, for example apache-2.0
    tags: ["featherweight", "model-compression"]
    ---
    <BLANKLINE>
    # LeNet at 90 %
    ...
    """
    report = LIMITS[0].shorten(report)
    sections = [
        ("Numbers", _numbers(report)),
        ("How to load it", _load(report)),
        ("Export", export_words(part(report, "export")) if part(report, "export") else ""),
        ("Gained, and not gained", bullets(strings(report, "gains"))),
        ("Limits", _limits(report)),
        ("How it was made", _made(report)),
        ("Files", "\n".join(f"- `{name}`: {what}" for name, what in _files(report))),
    ]
    sentence = escape(text(part(report, "verdict").get("sentence")))
    blocks = [_front_matter(report), f"# {escape(text(report.get('title')) or 'A compressed model')}"]
    blocks += [sentence] if sentence else []
    blocks += ["A PyTorch model compressed by featherweight. The figures below are of the artefact in this folder."]
    for heading, body in sections:
        if body:
            blocks += [f"## {heading}", body]
    return "\n\n".join(blocks) + "\n"


def _front_matter(report: Mapping[str, Any]) -> str:
    """YAML that any reader takes: JSON is YAML, so whatever comes from the run is written as JSON strings."""
    names = {text(row.get("method")) for row in tables.items(report, "stages")}
    options = json.dumps([row.get("options") for row in tables.items(report, "stages")], default=str)
    names |= set(re.findall(r'"method": "([^"\\]+)"', options))
    tags = ["featherweight", "model-compression", *sorted(name for name in names if name)]
    lines = ["library_name: featherweight"]
    lines.append("# license: fill in the licence of your weights, for example apache-2.0")
    lines.append(f"tags: {json.dumps(tags + (['onnx'] if _exported(report) else []))}")
    if part(report, "after").get("metric") is not None:
        lines.append(f"metrics: {json.dumps([tables.metric_name(report)])}")
    return "\n".join(["---", *lines, "---"])


def _numbers(report: Mapping[str, Any]) -> str:
    table = verdict_table(report) or grid(tables.stages(report))
    samples = part(report, "after").get("samples")
    note = f"{escape(tables.metric_name(report))} is measured on {text(samples)} examples." if samples else ""
    return "\n\n".join(block for block in (table, note[:1].upper() + note[1:]) if block)


def _load(report: Mapping[str, Any]) -> str:
    return "\n\n".join(f"{what}\n\n{fence(body, language)}" for what, language, body in tables.load_snippets(report))


def _limits(report: Mapping[str, Any]) -> str:
    lines = strings(report, "warnings")
    lines.append("Fill in: what the model is for, what it was trained on, and where it should not be used.")
    return bullets(lines)


def _made(report: Mapping[str, Any]) -> str:
    found = part(report, "reproduce")
    blocks = [fence(text(found["command"]), "sh")] if found.get("command") else []
    blocks += [fence(text(found["recipe"]), "toml")] if found.get("recipe") else []
    data = ", ".join(f"{name} {value}" for name, value in tables.facts(found.get("data")))
    facts = [("seed", text(found.get("seed"))), ("data", data), ("created", text(report.get("created")))]
    facts += [("versions", ", ".join(f"{name} {value}" for name, value in tables.facts(found.get("versions"))))]
    lines = [f"{name}: {value}" for name, value in facts if value]
    return "\n\n".join([*blocks, bullets(lines)] if lines else blocks)


def _exported(report: Mapping[str, Any]) -> bool:
    export = part(report, "export")
    return bool(export.get("path")) and not export.get("error")


def _files(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    onnx = [("model.onnx", "the same model for ONNX Runtime and others; zeros are stored in full")]
    return [*FILES, *(onnx if _exported(report) else [])]
