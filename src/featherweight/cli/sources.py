# SPDX-License-Identifier: Apache-2.0
"""What a user names on the command line, made into objects: `package.module:function`, and inputs by their shapes.

Naming a function runs it, and the module that it is in: the code that the command line runs is the code that you name.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.cli import failures
from featherweight.errors import ArtefactError, FeatherweightError, OptionError, nearest, require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from featherweight.task import Task

__all__ = ["declared_inputs", "make_model", "make_task", "model_and_inputs", "parse_inputs"]

_FORM = "give package.module:function, of an installed package or of the folder that you are in"


def make_task(name: str) -> Task:
    """The task that `package.module:function` returns. Raises `OptionError` that names what went wrong there."""
    from featherweight.task import Task

    task = _call(name)
    if not isinstance(task, Task):
        raise OptionError(
            f"{name} returned {type(task).__name__}, not a featherweight.Task(model, example_inputs, ...)."
        )
    return task


def make_model(name: str) -> nn.Module:
    """The module that `package.module:factory` returns. Raises `OptionError` that names what went wrong there."""
    from torch import nn

    model = _call(name)
    if not isinstance(model, nn.Module):
        raise OptionError(f"{name} returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def model_and_inputs(
    model: str | None, task: str | None, inputs: Sequence[str]
) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """What MODEL or --task names, with the inputs of --input, else the task's. Exactly one of the two must be given."""
    if (model is None) == (task is None):
        raise OptionError("Give either a model (package.module:factory) or --task package.module:function.")
    given = parse_inputs(inputs) if inputs else None
    if task is not None:
        found = make_task(task)
        return found.model, given or found.example_inputs
    return make_model(str(model)), given


def parse_inputs(texts: Sequence[str]) -> tuple[Tensor, ...]:
    """Tensors from shapes: `1x3x224x224` random normal numbers, `1x128:int64` zeros of that type; one text an input.

    >>> [tuple(x.shape) for x in parse_inputs(["1x3x8x8", "1x16:int64"])]
    [(1, 3, 8, 8), (1, 16)]
    """
    import torch

    chance = torch.Generator().manual_seed(0)
    tensors = []
    for text in texts:
        match = re.fullmatch(r"(\d+(?:[x,]\d+)*)(?::(\w+))?", text.strip())
        dtype = getattr(torch, match[2] or "float32", None) if match else None
        if match is None or not isinstance(dtype, torch.dtype):
            raise OptionError(
                f"--input {text!r}: give sizes joined by x, and a type unless float32: 1x3x224x224, 1x128:int64."
            )
        sizes = [int(size) for size in re.split("[x,]", match[1])]
        if dtype.is_floating_point:
            tensors.append(torch.randn(sizes, generator=chance).to(dtype))
        else:
            tensors.append(torch.zeros(sizes, dtype=dtype))
    return tuple(tensors)


def declared_inputs(file: Path, batch: int) -> tuple[Tensor, ...]:
    """Inputs of the shapes and types that an ONNX file declares; an open first size is the batch.

    Raises `OptionError` where another size is open: which one to take, only the user knows.
    """
    onnx = require("onnx", extra="onnx")
    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except Exception as error:  # whatever its parser raises for a file that is not ONNX
        raise ArtefactError(f"{file} could not be read as ONNX: {error}.") from error
    texts = []
    for entry in graph.input:
        kind = entry.type.tensor_type
        sizes = [size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim]
        if None in sizes[1:]:
            raise OptionError(f"{file} leaves more sizes of {entry.name} open than the batch; give --input.")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        texts.append(f"{'x'.join(str(batch if size is None else size) for size in sizes)}:{dtype}")
    return parse_inputs(texts)


def _call(name: str) -> Any:
    function = _find(name)
    if not callable(function):
        raise OptionError(f"{name} is {type(function).__name__}, not a function. Write one that returns it.")
    with _blamed(f"{name}() failed"):
        return function()


def _find(name: str) -> Callable[..., Any]:
    module, colon, path = name.partition(":")
    if not colon or not path or module.endswith(".py") or not re.fullmatch(r"[A-Za-z_][\w.]*", module):
        hint = ""
        if module.endswith(".py") or "/" in module:
            dotted = module.removesuffix(".py").strip("./").replace("/", ".")
            hint = f" For that file: {dotted}:{path or 'function'}."
        raise OptionError(f"{name!r} names no function: {_FORM}.{hint}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    found: Any = _import(module)
    for part in path.split("."):
        if not hasattr(found, part):
            close = ", ".join(nearest(part, [key for key in vars(found) if not key.startswith("_")])) or "none"
            raise OptionError(f"{module} has no {part!r}. Nearest names: {close}.")
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _import(module: str) -> Any:
    try:
        with _blamed(f"{module} could not be imported"):
            return importlib.import_module(module)
    except OptionError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and f"{module}.".startswith(f"{missing.name}."):
            raise OptionError(
                f"There is no module {missing.name!r} in {os.getcwd()}, nor is one installed; {_FORM}."
            ) from None
        raise


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Whatever the user's code raises, as an error that names the line of theirs that raised it."""
    try:
        yield
    except FeatherweightError:
        raise
    except (Exception, SystemExit) as error:
        theirs = [frame for frame in failures.frames(error.__traceback__) if not failures.is_ours(frame)]
        place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
        if isinstance(error, SyntaxError):  # its text names file and line
            place = ""
        raise OptionError(f"{what}: {type(error).__name__}: {error}{place}. --debug shows the traceback.") from error
