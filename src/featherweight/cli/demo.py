# SPDX-License-Identifier: Apache-2.0
"""`featherweight demo`: one command, one table, one report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.cli import console
from featherweight.cli.compress import exit_code, show_failures, show_warnings
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
    """Trains a small network on real handwritten digits, prunes it to 90 % zeros meanwhile, and proves the result.

    About a minute, without network: trains, prunes, packs, exports to ONNX, checks that the export answers as PyTorch
    does, measures, and prints one table and the path of the report.

    \b
    Example: featherweight demo --quick --out first-try
    """
    began = time.perf_counter()
    if not json:
        say("featherweight demo: real handwritten digits, 1,197 to train on and 400 to test on, 8 x 8 pixels", "bold")
    from featherweight.demo import DENSE_STEPS, demo

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
        _show(result.report, out, seconds, DENSE_STEPS[quick])
    show_failures(result.report, result.unmet)
    return {"folder": str(out), "seconds": seconds, "exit_code": code, "report": result.report}


def _show(report: Mapping[str, Any], out: Path, seconds: float, dense_steps: int) -> None:
    say()
    table(("", "dense", "pruned", ""), _rows(report, dense_steps), right=(1, 2))
    say()
    say(report["gains"][0] + ".", "bold")
    show_warnings(report)
    say(f"report  {out / 'report.html'}   ({words.seconds(seconds)} in all)")
    say("next    featherweight compress --help")


def _rows(report: Mapping[str, Any], dense_steps: int) -> list[list[str]]:
    """The dense network beside the pruned one: what changed, and in words what that is worth."""
    before, after = report["before"], report["after"]
    n = after["samples"]
    right = [round(card["metric"] * n) for card in (before, after)]
    zeros = [words.percent(words.zeros(card["nonzeros"], card["parameters"])) for card in (before, after)]
    options = report["stages"][0]["options"]
    target, pruned_in = words.percent(options["hooks"][0]["sparsity"]), options["hooks"][0]["end"]
    layers = sum(line["action"] == "pruned" for line in report["stages"][0]["selection"])
    shown = [
        [
            "training steps",
            str(dense_steps),
            f"+ {options['steps']}",
            f"pruned little by little during {pruned_in} of them",
        ],
        [
            "accuracy",
            *_pair(before["metric"], after["metric"], words.metric),
            f"{right[0]} and {right[1]} right of {n} test digits",
        ],
        ["zeros", *zeros, f"{target} of each of {layers} layers; the first layer and norms are kept"],
        ["on disk", *_pair(before["dense_bytes"], after["packed_bytes"], words.size), _change(before, after)],
        ["MACs", *_pair(before["macs"], after["macs"], words.count), "a zero is multiplied like any number"],
    ]
    for name, comparison in report["comparisons"].items():
        pair = [words.milliseconds(card["latency"][name]["median_ms"]) for card in (before, after)]
        shown.append([f"{tables.spoken(name)}, median", *pair, comparison["words"]])
    export = report["export"]
    passed = bool(export.get("path")) and export["parity"]["passed"]
    words_of_it = export["parity"]["words"] if export.get("path") else export["error"]
    shown.append(["ONNX file as PyTorch", "", "yes" if passed else "no", words_of_it])
    return shown


def _pair(before: float, after: float, spell: Any) -> tuple[str, str]:
    return spell(before), spell(after)


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    gzip = f"; gzip makes {words.size(after['gzip_bytes'])} of it" if after["gzip_bytes"] else ""
    return f"{words.change(before['dense_bytes'], after['packed_bytes'])}, equal to the last bit when loaded{gzip}"
