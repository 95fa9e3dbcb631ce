# SPDX-License-Identifier: Apache-2.0
"""`featherweight inspect`: what a model consists of, what would be pruned or not, and which channels go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featherweight.cli import bits, groups, heads, sources
from featherweight.cli.console import Json, fail, say, table
from featherweight.errors import GraphError, OptionError
from featherweight.report import words

if TYPE_CHECKING:
    from torch import nn

    from featherweight.task import Task

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
    grain: Annotated[
        Literal["heads", "dims"],
        typer.Option(help="What is cut of attention: whole heads, or the same positions of all heads."),
    ] = "heads",
    trial: Annotated[
        bool,
        typer.Option("--try", help="Cut a coupling of each group out of a copy: does the model's own code bear that?"),
    ] = False,
    measure_heads: Annotated[
        bool,
        typer.Option("--heads", help="Measure the task's metric without each attention head, and with the best only."),
    ] = False,
    measure_bits: Annotated[
        bool,
        typer.Option("--bits", help="Measure what the task's model loses with each weight rounded to 8 to 2 bits."),
    ] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Lists each layer's kind, shape, parameters, MACs, bytes and zeros, and what would be pruned and what not and why.

    Changes nothing. "Would be pruned" is said of GradualPruning with its defaults. Without --input MACs are not known.
    With inputs, a second table has the groups of channels and heads that can only be cut together, and what is frozen
    by which line of code. --try takes ten forwards or so. --heads needs a task with a metric, and takes two evaluations
    for each head. --bits needs a task with a metric or data, and takes five evaluations for each weight.

    \b
    Example: featherweight inspect my_package.nets:make --input 1x3x32x32
    """
    if measure_heads and task is None:
        raise OptionError("--heads measures a metric: name what has one with --task package.module:function.")
    if measure_bits and task is None:
        raise OptionError("--bits measures on data: name what has them with --task package.module:function.")
    net, inputs, whole = _subject(model, task, input or (), measure_heads or measure_bits)
    from featherweight.preview import inspect

    found: dict[str, Any] = inspect(net, inputs)
    if not json:
        _show(found)
    if inputs is not None:
        found["trace"], found["heads"] = _comb(net, inputs, grain, trial, whole if measure_heads else None)
        if not json:
            _show_trace(found)
    if measure_bits and whole is not None:
        found["bits"] = bits.measured(whole)
        if not json:
            say()
            bits.show(found["bits"])
    return found


def _subject(
    model: str | None, task: str | None, shapes: Sequence[str], needs_task: bool
) -> tuple[nn.Module, tuple[Any, ...] | None, Task | None]:
    """The model and its inputs, and the task where it is needed; the user's function is called once."""
    if task is None or model is not None or not needs_task:
        return *sources.model_and_inputs(model, task, shapes), None
    whole = sources.make_task(task)
    return whole.model, sources.parse_inputs(shapes) if shapes else whole.example_inputs, whole


def _comb(
    net: nn.Module, inputs: Any, grain: Literal["heads", "dims"], trial: bool, task: Task | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a trace says, and the tables of heads for a task. A model that cannot be traced still has layers to show,
    and its trace is an error there; only where more of it was asked for, `GraphError` is raised."""
    from featherweight.edits import refusals
    from featherweight.graph import trace

    try:
        traced = trace(net, inputs, grain=grain)
    except GraphError as error:
        if trial or task is not None:
            raise
        return {"error": str(error)}, None
    told = groups.laid_out(traced, refusals(net, traced, inputs) if trial else None)
    return told, None if task is None else heads.measured(task, traced)


def _show_trace(found: Mapping[str, Any]) -> None:
    say()
    if "error" in found["trace"]:
        fail("Channels cannot be followed", found["trace"]["error"])
        return
    groups.show(found["trace"])
    if found["heads"] is not None:
        say()
        heads.show(found["heads"])


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
