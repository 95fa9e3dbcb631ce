# SPDX-License-Identifier: Apache-2.0
"""The report's tables as rows of words, made once for the page, for Markdown and for the model card.

Everything here reads a report dict of which any part may be missing, and never fails on what it finds there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.report import words

__all__ = [
    "MEASURES",
    "SIZES",
    "Layer",
    "Table",
    "facts",
    "items",
    "latency",
    "layers",
    "load_snippets",
    "median",
    "metric_name",
    "parity",
    "part",
    "runtimes",
    "scorecards",
    "shape",
    "sizes",
    "solved",
    "spoken",
    "stages",
    "strings",
    "text",
    "total_row",
    "totals",
]

Row = Mapping[str, Any]

SIZES = (("dense", "dense_bytes"), ("packed", "packed_bytes"), ("gzip of dense", "gzip_bytes"))
MEASURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "parameters", words.count),
    ("bits of a weight", "bits", words.bits),
    ("bits of layers' inputs", "input_bits", words.bits),
    *((label, key, words.size) for label, key in SIZES),
    ("MACs", "macs", words.count),
    ("BOPs", "bops", words.count),
    ("peak memory", "peak_memory_bytes", words.size),
)


@dataclass(frozen=True)
class Table:
    """Head and rows of words; the first column names the row, and all others are numbers unless told otherwise."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})

    def __bool__(self) -> bool:
        return bool(self.rows)


def part(data: Any, *path: str) -> dict[str, Any]:
    """The dict at this path, or an empty one: a missing part reads as an empty part."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return dict(data) if isinstance(data, Mapping) else {}


def items(data: Any, key: str) -> list[dict[str, Any]]:
    """The dicts in the list at `key`."""
    found = data.get(key) if isinstance(data, Mapping) else None
    return [dict(item) for item in found if isinstance(item, Mapping)] if isinstance(found, list | tuple) else []


def strings(data: Any, key: str) -> list[str]:
    """The list at `key` as strings; one string counts as a list of one."""
    found = data.get(key) if isinstance(data, Mapping) else None
    if isinstance(found, str):
        return [found]
    return [text(item) for item in found if item is not None] if isinstance(found, list | tuple) else []


def text(value: Any) -> str:
    """Anything as one short line of text.

    >>> text([{"method": "gradual_pruning", "sparsity": 0.9, "keep": ["stem*", "head"]}, True])
    'gradual_pruning(sparsity=0.9, keep=[stem*, head]), yes'
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(text(item) for item in value)
    if isinstance(value, Mapping):
        rest = dict(value)
        name = text(rest.pop("method", ""))
        pairs = []
        for key, item in rest.items():
            shown = f"[{text(item)}]" if isinstance(item, list | tuple) else text(item)
            pairs += [f"{key}={shown}"] if shown not in ("", "[]") else []
        return f"{name}({', '.join(pairs)})" if name else ", ".join(pairs)
    return str(value)


def facts(data: Any) -> list[tuple[str, str]]:
    """A dict as (name, value) rows of words: a dict in it as rows of its own, empty values left out.

    >>> facts({"train": {"batches": 23, "sha256": "5f1c"}, "memory_bytes": 16_000_000_000, "gpu": None})
    [('train batches', '23'), ('train sha256', '5f1c'), ('memory', '16.0 GB')]
    """
    rows = []
    for key, value in part(data).items():
        name = str(key).replace("_", " ")
        if isinstance(value, Mapping) and "method" not in value:
            rows += [(f"{name} {inner}", shown) for inner, shown in facts(value)]
        elif name.endswith(" bytes") and words.number(value) is not None:
            rows.append((name.removesuffix(" bytes"), words.size(value)))
        elif text(value):
            rows.append((name, text(value)))
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = (0,)) -> Table:
    """A table without the columns in which nothing was measured."""
    rows = [tuple(row) for row in rows]
    keep = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", words.MISSING) for row in rows)]
    return Table(
        tuple(head[i] for i in keep),
        tuple(tuple(row[i] for i in keep) for row in rows),
        frozenset(keep.index(i) for i in left if i in keep),
    )


def scorecards(report: Row) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, scorecard, stage) before, after each stage, and after all; those that there are."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("before", part(report, "before"), {})]
    found += [
        (text(stage.get("name")) or "stage", part(stage, "scorecard"), stage) for stage in items(report, "stages")
    ]
    found.append(("after all", part(report, "after"), {}))
    return [(name, card, stage) for name, card, stage in found if card or stage]


def metric_name(report: Row) -> str:
    names = [text(card.get("metric_name")) for _, card, _ in scorecards(report)]
    return next((name for name in names if name), "metric")


def stages(report: Row) -> Table:
    """What was measured before, after each stage and after all, one column each; the user's metric comes first."""
    cards = scorecards(report)
    rows: list[tuple[str, ...]] = [
        (metric_name(report), *(words.metric(card.get("metric")) for _, card, _ in cards)),
        ("zeros", *(words.percent(words.zeros(card.get("nonzeros"), card.get("parameters"))) for _, card, _ in cards)),
    ]
    rows += [(label, *(say(card.get(key)) for _, card, _ in cards)) for label, key, say in MEASURES]
    rows += [(f"median, {spoken(name)}", *(median(card, name) for _, card, _ in cards)) for name in runtimes(report)]
    rows.append(("time taken", *(words.seconds(stage.get("seconds")) for _, _, stage in cards)))
    shown = tuple(row for row in rows if any(cell != words.MISSING for cell in row[1:]))
    return Table(("", *(name for name, _, _ in cards)), shown)


def spoken(runtime: str) -> str:
    """A runtime as people call it."""
    from featherweight.measure import spoken as name  # brings torch, which `featherweight --help` does without

    return name(runtime)


def median(card: Row, runtime: str) -> str:
    return words.milliseconds(part(card, "latency", runtime).get("median_ms"))


def runtimes(report: Row) -> list[str]:
    """Every runtime in which anything was timed, in the order met."""
    found: dict[str, None] = {}
    for _, card, _ in scorecards(report):
        found |= {str(name): None for name, timed in part(card, "latency").items() if isinstance(timed, Mapping)}
    return list(found)


def latency(report: Row) -> Table:
    """The timings in full, before and after, for each runtime."""
    head = ["", "median", "p90", "IQR", "runs", "threads", "batch", "first run", "throughput"]
    rows = []
    for runtime in runtimes(report):
        for when, name in (("before", "baseline"), ("after", "compressed")):
            timed = part(report, when, "latency", runtime)
            if not timed:
                continue
            row = [f"{spoken(runtime)}, {name}"]
            row += [words.milliseconds(timed.get(key)) for key in ("median_ms", "p90_ms", "iqr_ms")]
            row += [words.count(timed.get(key)) for key in ("n", "threads", "batch")]
            rate = timed.get("throughput_per_s")
            row += [words.milliseconds(timed.get("first_ms")), "" if rate is None else f"{words.count(rate)} /s"]
            rows.append(row)
    return _table(head, rows)


def sizes(report: Row) -> Table:
    """Bytes on disk in each form, before and after."""
    before, after = part(report, "before"), part(report, "after")
    rows = [
        (name, words.size(before.get(key)), words.size(after.get(key)), words.change(before.get(key), after.get(key)))
        for name, key in SIZES
        if before.get(key) is not None or after.get(key) is not None
    ]
    return _table(("", "before", "after", "change"), rows)


def parity(export: Row) -> list[tuple[str, str]]:
    """How the exported model answers beside the PyTorch model."""
    found = part(export, "parity")
    shown: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("largest absolute difference", "max_abs_diff", words.figure),
        ("largest relative difference", "max_rel_diff", words.figure),
        ("tolerance", "tolerance", words.figure),
        ("same argmax", "argmax_agreement", words.percent),
        ("examples compared", "n", words.count),
    )
    return [(name, say(found[key])) for name, key, say in shown if found.get(key) is not None]


@dataclass(frozen=True)
class Layer:
    """One row of the per-layer table; `share` is its share of zeros, for a bar."""

    name: str
    kind: str
    shape: str
    parameters: str
    zeros: str
    share: float | None
    macs: str
    dense: str
    packed: str
    codec: str
    action: str
    reason: str


def shape(value: Any) -> str:
    return " x ".join(text(item) for item in value) if isinstance(value, list | tuple) else text(value)


def _layer(row: Row) -> Layer:
    before, after = shape(row.get("shape_before")), shape(row.get("shape_after"))
    zeros, parameters = words.number(row.get("zeros")), words.number(row.get("parameters"))
    share = None if zeros is None or not parameters else min(max(zeros / parameters, 0.0), 1.0)
    return Layer(
        name=text(row.get("name")) or "(unnamed)",
        kind=text(row.get("kind")),
        shape=f"{before} → {after}" if before and after and before != after else after or before,
        parameters=words.count(row.get("parameters")),
        zeros=words.percent(share) if share is not None else words.count(row.get("zeros")),
        share=share,
        macs=words.count(row.get("macs")),
        dense=words.size(row.get("dense_bytes")),
        packed=words.size(row.get("packed_bytes")),
        codec=text(row.get("codec")),
        action=text(row.get("action")),
        reason=text(row.get("reason")),
    )


def layers(report: Row, limit: int) -> tuple[list[Layer], Layer | None, int]:
    """Rows of the per-layer table, in model order, of the `limit` layers with the most parameters.

    Gives the rows, one row that sums up those left out (or None), and how many layers there are.
    """
    found = items(report, "layers")
    if len(found) <= limit:
        return [_layer(row) for row in found], None, len(found)
    ranked = sorted(range(len(found)), key=lambda i: -(words.number(found[i].get("parameters")) or 0.0))
    shown = set(ranked[:limit])
    rest = totals([row for i, row in enumerate(found) if i not in shown])
    name = f"{len(found) - limit:,} smaller layers"
    return [_layer(found[i]) for i in sorted(shown)], _layer({**rest, "name": name}), len(found)


def totals(rows: Iterable[Row]) -> dict[str, Any]:
    """The sums over layers of what can be summed; a count that no layer has stays missing."""
    sums: dict[str, Any] = {}
    for row in rows:
        for key in ("parameters", "zeros", "macs", "dense_bytes", "packed_bytes"):
            value = words.number(row.get(key))
            if value is not None:
                sums[key] = sums.get(key, 0.0) + value
    return sums


def total_row(report: Row) -> Layer | None:
    """The sums over all layers as one row, or None where there are no layers."""
    found = items(report, "layers")
    return _layer({**totals(found), "name": f"all {len(found):,} layers"}) if found else None


def load_snippets(report: Row) -> list[tuple[str, str, str]]:
    """(what it does, language, code) to paste: with the user's class, and without it in ONNX Runtime."""
    load = part(report, "load")
    folder = text(load.get("folder"))
    if not folder:
        return []
    imported, made = _class(text(load.get("class_hint")))
    head = f"import featherweight as fw\n{imported}\n" if imported else "import featherweight as fw\n"
    found = [
        (
            "With your model's class: a fresh model, the same edits, the stored tensors, equal to the last bit.",
            "python",
            f"{head}\nmodel = fw.load({made}, {_literal(folder)})\nmodel.eval()\n",
        )
    ]
    path = text(part(report, "export").get("path"))
    if path and not part(report, "export").get("error"):
        where = path if "/" in path or "\\" in path else f"{folder.rstrip('/')}/{path}"
        found.append(
            (
                "Without the class, in ONNX Runtime: pip install onnxruntime; inputs is a list of NumPy arrays.",
                "python",
                f"import onnxruntime\n\nsession = onnxruntime.InferenceSession({_literal(where)})\n"
                "names = [entry.name for entry in session.get_inputs()]\n"
                "outputs = session.run(None, dict(zip(names, inputs)))\n",
            )
        )
    return found


def _class(hint: str) -> tuple[str, str]:
    """Import line and call for `package.module:name`, `package.module.Name` or `Name`; nothing else gets into code."""
    if not re.fullmatch(r"[^\W\d]\w*([.:][^\W\d]\w*)*", hint):
        return "", "make_model()"
    module, _, name = hint.rpartition(":" if ":" in hint else ".")
    if not module or module == "__main__" or ":" in module:
        return "", f"{name}()"
    outer = name.split(".")[0]
    return f"from {module} import {outer}", f"{name}()"


def _literal(value: str) -> str:
    """A string as a Python literal in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def solved(stage: Any, limit: int) -> Table:
    """What a stage solved layer by layer: errors as shares of the energy of a layer's outputs, and what they cost.

    Solvers have a column each; a solver that was tried at several dampings has one, of the first.
    """
    found = items(stage, "solved")
    tried = list(dict.fromkeys(name for row in found for name in part(row, "losses") if ", damping" not in name))
    head = (
        "layer",
        "rows",
        "inputs",
        "solver",
        "error",
        "simple",
        *tried,
        "samples",
        "tokens",
        "damping",
        "s",
        "memory",
    )
    rows = [
        (
            text(row.get("name")),
            words.count(row.get("rows")),
            words.count(row.get("d")),
            re.sub(r", damping [^,]+", "", text(row.get("solver"))),
            *(words.figure(row.get(key)) for key in ("error", "simple")),
            *(words.figure(part(row, "losses").get(name)) for name in tried),
            words.count(row.get("samples")),
            words.count(row.get("tokens")),
            words.figure(row.get("damping")),
            words.figure(row.get("seconds")),
            words.size(row.get("peak_bytes")),
        )
        for row in found[:limit]
    ]
    return _table(head, rows, left=(0, 3))
