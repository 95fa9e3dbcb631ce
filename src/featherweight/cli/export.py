# SPDX-License-Identifier: Apache-2.0
"""`featherweight export`: a model as an ONNX file that answers as it does in PyTorch, checked before you get it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featherweight.cli import sources
from featherweight.cli.console import Json, say
from featherweight.errors import OptionError
from featherweight.report import words

if TYPE_CHECKING:
    from torch import nn

    from featherweight.task import Task

__all__ = ["command"]


class Format(StrEnum):
    """The formats that can be written."""

    onnx = "onnx"


def command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="A finished run, loaded into what --model makes.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="package.module:factory, called without arguments.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="package.module:function that returns a Task, in place of --model."),
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="SHAPE", help="An input's shape, 1x3x224x224; a task or folder knows its own."),
    ] = None,
    format: Annotated[Format, typer.Option(help="The format to write.")] = Format.onnx,
    opset: Annotated[int, typer.Option(min=18, help="The ONNX operator set.")] = 18,
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="Fix the batch size at the example's; by default it is left open.")
    ] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Exports a model to ONNX and checks in ONNX Runtime that the file answers as the PyTorch model does.

    A quantized model becomes a QDQ file of integers; with --task, grids between its layers take their ranges from the
    task's calibration data, and sequences whose lengths vary in it may have any length in the file.

    \b
    Example: featherweight export run --model my_package.nets:make -o model.onnx
    """
    if output is None:
        raise OptionError("Give -o FILE.onnx, the file to write.")
    net, inputs, found = _model_and_inputs(folder, model, task, input or ())
    from featherweight import deploy

    calibration = None if found is None else deploy.calibration_inputs(net, found)
    others = [] if found is None or static_batch else deploy.other_sizes(net, found)
    made = deploy.export_onnx(
        net, inputs, output, opset=opset, dynamic_batch=not static_batch, calibration=calibration, others=others
    )
    parity = deploy.check_parity(net, output, deploy.sample_inputs(net, inputs))
    if not json:
        batch = "any batch size" if made.dynamic_batch else "the example's batch size"
        say(f"{output}  {words.size(made.bytes)}, opset {made.opset}, {batch}")
        if made.integers.any:
            say(made.integers.words)
        say(parity.words)
        for note in made.notes:
            say(note)
    facts = {"opset": made.opset, "bytes": made.bytes, "dynamic_batch": made.dynamic_batch, "notes": list(made.notes)}
    facts["integers"] = dataclasses.asdict(made.integers)
    return {"path": str(output), "format": format.value, **facts, "parity": parity.to_dict()}


def _model_and_inputs(
    folder: Path | None, model: str | None, task: str | None, shapes: Sequence[str]
) -> tuple[nn.Module, tuple[Any, ...], Task | None]:
    if folder is not None and model is None and task is None:
        from featherweight.artefact import read_plan

        read_plan(folder)
        there = f" {folder / 'model.onnx'} is there already." if (folder / "model.onnx").is_file() else ""
        raise OptionError(
            f"{folder} holds weights and a plan, and needs the class: give --model package.module:factory, which makes "
            f"the model as it was before.{there}"
        )
    found = None if task is None or model is not None else sources.make_task(task)
    if found is None:
        net, inputs = sources.model_and_inputs(model, task, shapes)
    else:
        net, inputs = found.model, sources.parse_inputs(shapes) if shapes else found.example_inputs
    if folder is not None:
        from featherweight.artefact import load

        net = load(net, folder)
        if inputs is None and (folder / "model.onnx").is_file():
            inputs = sources.declared_inputs(folder / "model.onnx", batch=1)
    if inputs is None:
        raise OptionError("Give --input, the shape that the model takes: --input 1x3x224x224, say.")
    return net, inputs, found
