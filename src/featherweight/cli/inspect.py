# SPDX-License-Identifier: Apache-2.0
"""`featherweight inspect`: what a model consists of, and what would and would not be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from featherweight.cli import sources
from featherweight.cli.console import Json, say, table
from featherweight.report import words

__all__ = ["command"]


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="package.module:factory, called without arguments.")
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="SHAPE", help="An input's shape: 1x3x224x224, 1x128:int64. One option an input."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="package.module:function that returns a featherweight.Task, in place of MODEL."
        ),
    ] = None,
    json: Json = False,
) -> dict[str, Any]:
    """Lists each layer's kind, shape, parameters, MACs, bytes and zeros, and what would be pruned and what not and why.

    Changes nothing. "Would be pruned" is said of GradualPruning with its defaults. Without --input MACs are not known.

    \b
    Example: featherweight inspect my_package.nets:make --input 1x3x32x32
    """
    net, inputs = sources.model_and_inputs(model, task, input or ())
    from featherweight.preview import inspect

    found = inspect(net, inputs)
    if not json:
        _show(found)
    return found


def _show(found: Mapping[str, Any]) -> None:
    rows = [
        [
            layer["name"] or "(the model itself)",
            layer["kind"],
            "x".join(map(str, layer["shape"] or ())),
            words.count(layer["parameters"]),
            words.percent(layer["zeros"] / layer["parameters"]) if layer["parameters"] else "",
            words.count(layer["macs"]),
            words.size(layer["bytes"]),
            "pruned" if layer["action"] == "pruned" else f"kept: {layer['reason']}",
        ]
        for layer in found["layers"]
    ]
    heads = ("layer", "kind", "shape", "parameters", "zeros", "MACs", "bytes", "by default")
    table(heads, rows, right=(3, 4, 5, 6))
    say()
    zeros = words.percent(words.zeros(found["nonzeros"], found["parameters"]))
    say(
        f"{found['model']}: {words.count(found['parameters'])} parameters ({zeros} zeros), {words.size(found['dense_bytes'])}, "
        f"{words.count(found['macs'])} MACs, {words.size(found['peak_memory_bytes'])} peak memory of one forward"
    )
    say(f"{found['pruned']} of {found['of']} weights would be pruned.")
    if found["macs"] is None:
        say("MACs, and which layer runs first and last, need an input: --input 1x3x224x224, say.")
    if found["uncounted"]:
        say(f"MACs are a lower bound: nothing counts {', '.join(found['uncounted'])}.")
