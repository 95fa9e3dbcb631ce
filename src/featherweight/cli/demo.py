# SPDX-License-Identifier: Apache-2.0
"""`featherweight demo`: one command, one table, one report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.cli import console
from featherweight.cli.compress import exit_code
from featherweight.cli.console import Json, say, table
from featherweight.report import tables, words

__all__ = ["command"]


def command(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The folder to write; an earlier demo in it is replaced.")
    ] = Path("featherweight-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Train less: a quarter of the time, a little accuracy.")
    ] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Trains a small network on real handwritten digits, prunes it to 90 % zeros while it trains, and proves the result.

    About a minute, without network: trains, prunes, packs, exports to ONNX, checks that the export answers as PyTorch
    does, measures, and prints one table and the path of the report.

    \b
    Example: featherweight demo --quick --out first-try
    """
    began = time.perf_counter()
    if not json:
        say("featherweight demo: real handwritten digits, 1,197 to train on and 400 to test on, 8 x 8 pixels", "bold")
    from featherweight.demo import demo

    result = demo(
        out,
        quick=quick,
        progress=console.progress(),
        command=ctx.meta.get("featherweight.command"),
        tell=(lambda text: None) if json else say,
    )
    seconds = time.perf_counter() - began
    code = exit_code(result.report, result.unmet)
    if not json:
        _show(result.report, out, seconds)
    return {"folder": str(out), "seconds": seconds, "exit_code": code, "report": result.report}


def _show(report: Mapping[str, Any], out: Path, seconds: float) -> None:
    say()
    table(("", "dense", "90 % zeros", ""), _rows(report), right=(1, 2))
    say()
    say(report["gains"][0] + ".", "bold")
    for text in report["warnings"]:
        say(f"Warning: {text}", "yellow")
    say(f"report  {out / 'report.html'}   ({words.seconds(seconds)} in all)")
    say("next    featherweight compress --help")


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The dense network beside the pruned one: what changed, and in words what that is worth."""
    before, after = report["before"], report["after"]
    n = after["samples"]
    right = [round(card["metric"] * n) for card in (before, after)]
    zeros = [words.percent(words.zeros(card["nonzeros"], card["parameters"])) for card in (before, after)]
    pruned = [line for line in report["stages"][0]["selection"] if line["action"] == "pruned"]
    shown = [
        [f"test digits read right, of {n}", *map(str, right), f"one digit is {words.percent(1 / n)}"],
        [
            "zeros among all parameters",
            *zeros,
            f"90.0 % in each of {len(pruned)} layers; first layer and norms are kept",
        ],
        ["on disk", *_pair(before["dense_bytes"], after["packed_bytes"], words.size), _change(before, after)],
        ["MACs", *_pair(before["macs"], after["macs"], words.count), "a zero is multiplied like any number"],
    ]
    for name, comparison in report["comparisons"].items():
        pair = [words.milliseconds(card["latency"][name]["median_ms"]) for card in (before, after)]
        shown.append([f"{tables.spoken(name)}, median of {after['latency'][name]['n']}", *pair, comparison["words"]])
    export = report["export"]
    parity = export["parity"]["words"] if export.get("path") else "not exported"
    shown.append(["model.onnx answers as PyTorch does", "", "yes" if export.get("path") else "no", parity])
    return shown


def _pair(before: float, after: float, spell: Any) -> tuple[str, str]:
    return spell(before), spell(after)


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    gzip = f"; gzip makes {words.size(after['gzip_bytes'])} of it" if after["gzip_bytes"] else ""
    return f"{words.change(before['dense_bytes'], after['packed_bytes'])}, equal to the last bit when loaded{gzip}"
