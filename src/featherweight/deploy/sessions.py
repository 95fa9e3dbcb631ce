# SPDX-License-Identifier: Apache-2.0
"""Runtimes as callables: torch, engine, ONNX Runtime, OpenVINO; called as the model is, by place or name, tensors out.

One precision (float32 stays float32: OpenVINO would take bfloat16 where the CPU has it), fixed threads, and no thread
that spins on when a call has ended, so that sessions can be timed against each other. No telemetry: OpenVINO's import
reports to Google Analytics, which `errors.require` prevents.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from featherweight.errors import ArtefactError, DataError, OptionError, nearest, require
from featherweight.measure import eval_copy
from featherweight.runtime import Engine, first_line, load, open_onnxruntime
from featherweight.task import describe

__all__ = [
    "RUNTIMES",
    "EngineSession",
    "Session",
    "available_runtimes",
    "flatten_inputs",
    "named_tensors",
    "openvino_core",
    "session",
    "torch_session",
]

# Takes a forward call's positional arguments, gives the output's tensors in their order. Arguments by name come only to
# a session that names no inputs of its own.
Run = Callable[..., Sequence[Tensor]]


class Session(nn.Module):
    """A model in some runtime, called as the model is: `session(x)`, `session(x, mask)`, `session(ids=ids, mask=mask)`.

    Inputs may be torch tensors or numpy arrays, nested as the model takes them; what is not one of these (a flag, None)
    was fixed when the model was exported and is skipped. A file's inputs have the names of the model's arguments, and
    what is given by name goes there; a name that the file has not, or lacks, is a `DataError`. The answer is the
    model's tensors in their order: one, or a tuple. With `like` (an output of the model) it has that structure, dicts
    and all.

    A module without parameters, so that `evaluate(session)` may call `.eval()` or `.to()` to no effect.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        *,
        threads: int | None = None,
        input_names: Sequence[str] = (),
        output_names: Sequence[str] = (),
        like: Any = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.threads = threads
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self._run = run
        self._like = None if like is None else tree_flatten(like)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named and self.input_names:
            inputs, named = self._in_order(inputs, named), {}
        outputs = self._run(inputs, **named)
        if self._like is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        leaves, structure = self._like
        remaining = iter(outputs)
        return tree_unflatten([next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    def _in_order(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The file's inputs in its order: what is given by place, then the rest by name."""
        first = flatten_inputs(inputs)
        by_name = dict(named_tensors(named))
        rest = self.input_names[len(first) :]
        takes = f"the file takes {len(self.input_names)} inputs ({', '.join(self.input_names)})"
        unknown = [name for name in by_name if name not in rest]
        if unknown:
            twice = unknown[0] in self.input_names
            raise DataError(
                f"{takes}, and {unknown[0]!r} is given by place and by name."
                if twice
                else f"{takes}, and {unknown[0]!r} is none of them. Nearest: {nearest(unknown[0], self.input_names)}."
            )
        missing = [name for name in rest if name not in by_name]
        if missing:
            raise DataError(
                f"{takes}, and {', '.join(missing)} is missing: got {describe(inputs)} and {describe(named)}."
            )
        return (*first, *(by_name[name] for name in rest))


def flatten_inputs(inputs: tuple[Any, ...]) -> list[Any]:
    """The tensors and arrays in a forward call's arguments, in the order of an exported file's inputs.

    Those of a dict come in the order of its sorted keys, whatever order they were put in.

    >>> [int(t) for t in flatten_inputs((torch.tensor(1), {"b": torch.tensor(3), "a": torch.tensor(2)}, None))]
    [1, 2, 3]
    """
    if all(type(value) is Tensor for value in inputs):  # the usual call, on the clock
        return list(inputs)
    return [leaf for leaf in tree_leaves(sort_keys(inputs)) if isinstance(leaf, Tensor | np.ndarray)]


def named_tensors(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Tensors and arrays in arguments by name, each with the name of its argument, and its place where that is nested.

    >>> [name for name, _ in named_tensors({"x": torch.tensor(1), "pair": [torch.tensor(2), {"mask": torch.tensor(3)}]})]
    ['x', 'pair_0', 'pair_1_mask']
    """
    found = []
    for path, leaf in tree_flatten_with_path(dict(values))[0]:
        if isinstance(leaf, Tensor | np.ndarray):
            keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
            found.append((re.sub(r"\W", "_", "_".join(keys)), leaf))
    return found


def sort_keys(value: Any) -> Any:
    """The same nested data with plain dicts in the order of their keys, as texts."""
    if type(value) is dict:
        return {key: sort_keys(value[key]) for key in sorted(value, key=str)}
    if type(value) in (tuple, list):
        return type(value)(map(sort_keys, value))
    return value


def session(
    path: str | Path,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    like: Any = None,
    *,
    exact: bool = False,
) -> Session:
    """Opens an ONNX file in a runtime, on the CPU. `threads` None leaves the number to the runtime.

    Stock runtimes round the inputs of layers with integer weights alone to 8 bits, unasked (differences of some 0.4 %,
    and up to 3x faster). `exact` has them keep float32, as the file says; what is timed and shipped is the default.

    Raises `OptionError` for an unknown runtime, `MissingExtra` for one that is not installed, and `ArtefactError` for a
    file that is missing or that the runtime refuses.
    """
    if runtime not in RUNTIMES:
        raise OptionError(
            f"runtime {runtime!r} is none of {', '.join(RUNTIMES)}. Nearest: {nearest(runtime, RUNTIMES)}."
        )
    if not Path(path).is_file():
        raise ArtefactError(
            f"{path} is not there. featherweight.deploy.export_onnx(model, example_inputs, path) writes it."
        )
    return RUNTIMES[runtime](Path(path), threads, like, exact)


def torch_session(model: nn.Module, threads: int | None = None, like: Any = None) -> Session:
    """The model itself in PyTorch, eager, as a session: a copy in eval mode that shares its parameters.

    A model made by `torch.compile` is run as it is (a copy would have to compile anew), and must be in eval mode.
    On CUDA a call returns when the device has done.

    >>> torch_session(nn.Linear(2, 1), threads=1)(torch.zeros(3, 2)).shape
    torch.Size([3, 1])
    """
    compiled = hasattr(model, "_orig_mod")
    if compiled and model.training:
        raise OptionError("the compiled model is in training mode; call model.eval() first.")
    inner = model if compiled else eval_copy(model)
    on_cuda = any(p.is_cuda for p in model.parameters())

    def run(inputs: tuple[Any, ...], /, **named: Any) -> list[Tensor]:
        before = torch.get_num_threads()
        try:
            if threads is not None and threads != before:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                output = inner(*inputs, **named)
            if on_cuda:
                torch.cuda.synchronize()
        finally:
            if threads is not None and threads != before:
                torch.set_num_threads(before)
        return [output] if type(output) is Tensor else [x for x in tree_leaves(output) if isinstance(x, Tensor)]

    return Session("torch", run, threads=threads, like=like)


def _onnxruntime(path: Path, threads: int | None, like: Any = None, exact: bool = False) -> Session:
    ort = require("onnxruntime", extra="onnx")
    try:
        engine = open_onnxruntime(path, threads, exact=exact)
    except Exception as error:
        raise ArtefactError(f"{path}: ONNX Runtime {ort.__version__} refuses it: {first_line(error)}") from error
    names = [i.name for i in engine.get_inputs()]
    outputs = [o.name for o in engine.get_outputs()]

    def run(inputs: tuple[Any, ...]) -> list[Tensor]:
        feeds = dict(zip(names, _arrays(inputs, names), strict=True))
        try:
            return [torch.from_numpy(output) for output in engine.run(outputs, feeds)]
        except Exception as error:
            raise DataError(f"{path.name} in ONNX Runtime: {first_line(error)}") from error

    return Session("onnxruntime", run, threads=threads, input_names=names, output_names=outputs, like=like)


@functools.cache
def openvino_core() -> Any:
    """One for the process, never let go: a core sets a stack for signals in its thread, frees it when it goes, and puts
    back the one that it found, which may be another core's and gone. The next signal would be a segmentation fault."""
    return require("openvino", extra="openvino").Core()  # and not `import`: see errors.require


def _openvino(path: Path, threads: int | None, like: Any = None, exact: bool = False) -> Session:
    openvino = require("openvino", extra="openvino")
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        # Pinned to a core, its threads wait for whoever else runs there: 8 ms instead of 0.7 on a busy machine.
        "ENABLE_CPU_PINNING": False,
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    if exact:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    try:
        core = openvino_core()
        compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    except Exception as error:
        raise ArtefactError(f"{path}: OpenVINO {openvino.__version__} refuses it: {_last_line(error)}") from error
    request = compiled.create_infer_request()
    names = [port.any_name for port in compiled.inputs]
    outputs = [port.any_name for port in compiled.outputs]

    def run(inputs: tuple[Any, ...]) -> list[Tensor]:
        arrays = _arrays(inputs, names)
        try:
            answer = request.infer(arrays, share_inputs=True)
        except Exception as error:
            raise DataError(f"{path.name} in OpenVINO: {_last_line(error)}") from error
        return [torch.from_numpy(answer[i]) for i in range(len(outputs))]

    return Session("openvino", run, threads=threads, input_names=names, output_names=outputs, like=like)


class EngineSession(Session):
    """The engine, called as the model is; `engine` tells what it runs itself, and where its time goes."""

    def __init__(self, engine: Engine, like: Any = None) -> None:
        names, outputs = ([port.name for port in side] for side in (engine.inputs, engine.outputs))

        def run(inputs: tuple[Any, ...]) -> list[Tensor]:
            answer = engine.run(dict(zip(names, _arrays(inputs, names), strict=True)))
            return [torch.from_numpy(answer[name]) for name in outputs]

        super().__init__("engine", run, threads=engine.threads, input_names=names, output_names=outputs, like=like)
        self.engine = engine


def _engine(path: Path, threads: int | None, like: Any = None, exact: bool = False) -> Session:
    return EngineSession(load(path, threads, exact=exact), like)


RUNTIMES: Mapping[str, Callable[..., Session]] = {
    "engine": _engine,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def available_runtimes() -> tuple[str, ...]:
    """The names of `RUNTIMES` whose packages are installed."""
    packages = {"engine": "featherweight_engine"}
    return tuple(name for name in RUNTIMES if importlib.util.find_spec(packages.get(name, name)) is not None)


def _arrays(inputs: tuple[Any, ...], names: Sequence[str]) -> list[np.ndarray]:
    leaves = flatten_inputs(inputs)
    if len(leaves) != len(names):
        raise DataError(f"the file takes {len(names)} inputs ({', '.join(names)}), got {describe(inputs)}.")
    try:
        return [leaf if isinstance(leaf, np.ndarray) else leaf.detach().cpu().numpy() for leaf in leaves]
    except TypeError as error:  # numpy has no bfloat16
        raise DataError(f"{describe(inputs)} cannot be passed as numpy arrays: {error}.") from error


def _last_line(error: Exception) -> str:
    """OpenVINO puts where in its sources first and what happened last."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
