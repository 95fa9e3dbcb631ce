# SPDX-License-Identifier: Apache-2.0
"""ONNX by torch's torch.export-based exporter: one file, a batch of any size, and nothing written that is not checked.

Tried in this order until a file agrees with the model in ONNX Runtime: a dynamic batch, with lengths that are as free
as the data's if these vary, the example's batch, and all again with layers taken apart into plain ops (an LSTM with
projections, say, exports to a node that no runtime runs). torch's older tracing exporter is no fallback: a trace can be
wrong without a word.

Zeros stay zeros: the exporter folds a BatchNorm into its conv and reorders an LSTM's gates, which moves zeros, but
makes none of them anything else. What it notes of the machine, its paths and the model's source, is taken out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from featherweight.deploy.failures import explain, is_data_dependent, lacks_an_op, reason
from featherweight.deploy.markers import Marks, mark
from featherweight.deploy.parity import parity
from featherweight.deploy.qdq import Integers, edges_without_ranges, in_integers, with_edges
from featherweight.deploy.sessions import flatten_inputs, named_tensors, sort_keys
from featherweight.deploy.weights import on_grids
from featherweight.errors import ArtefactError, ExportError, FeatherweightError, OptionError, ParityError, require
from featherweight.layers import unwrap
from featherweight.measure import eval_copy, run_once
from featherweight.task import describe

__all__ = ["Export", "export_onnx"]

# One protobuf message holds less than 2 GiB; the graph itself needs some of it.
_ONE_FILE_BYTES = 2**31 - 2**25

# The first with int4, scales by blocks, and QuantizeLinear as ONNX's own reference has it.
_INTEGER_OPSET = 21

_PLAIN, _DECOMPOSED = "torch.export", "torch.export, decomposed"


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written. `files` is `path` alone, or with the weights beside it from 2 GB on; `bytes` is of all of them.

    `dynamic_batch` says whether axis 0 may have any size, `open_axes` which axes of each input may; `exporter` is
    "torch.export" or "torch.export, decomposed"; `notes` are sentences on what was asked for and not possible. Inputs
    are the example's tensors in order, those of a dict by key, under the names of the arguments that they are: a
    session takes them by these names too.
    """

    path: Path
    opset: int
    bytes: int
    files: tuple[Path, ...]
    dynamic_batch: bool
    exporter: str
    notes: tuple[str, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    integers: Integers
    open_axes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, paths as text."""
        return {**dataclasses.asdict(self), "path": str(self.path), "files": [str(file) for file in self.files]}


def export_onnx(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | Path,
    *,
    opset: int = 18,
    dynamic_batch: bool = True,
    calibration: Iterable[Any] | None = None,
    others: Sequence[tuple[Any, ...]] = (),
) -> Export:
    """Writes the model, in eval mode, as an ONNX file, checked in ONNX Runtime before it takes its name.

    Saves neither bytes nor time by itself: weights are stored dense, zeros and all. With `dynamic_batch` axis 0 is
    "batch" in every tensor whose axis 0 is as long as the first one's; a model that fixes it is exported with the
    example's batch, and `notes` says so. Other axes have the example's size, but for those on which `others`, calls of
    other sizes, differ from it (sequences of several lengths: `other_sizes` finds them in a task's data); the file is
    checked on these too, and where the model fixes such an axis, `notes` says so. What is not a tensor in the inputs
    becomes a constant. The model stays as it is.

    A quantized model becomes a QDQ file: weights that lie on a grid of 8 bits or fewer are stored as integers (int4
    where 4 bits hold them and nothing multiplies them as int8; opset 21 or later), grids on layers' inputs are
    QuantizeLinear and DequantizeLinear. With `calibration` (batches of the model's arguments, a target behind them or
    not) sums, concatenations, pooling and outputs of convolutions get grids as well, from the ranges that they take on
    it: without these, runtimes compute residual networks largely in floating point. See docs/integers.md.

    Raises `ExportError` with the cause and the line of the model's code, `ParityError` if no file could be made that
    answers as the model does, `ArtefactError` if the file cannot be written; in each case nothing is left behind.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> written = export_onnx(model, (torch.zeros(2, 4),), "model.onnx")
    >>> written.opset, written.dynamic_batch
    (18, True)
    """
    if not isinstance(example_inputs, tuple):
        raise OptionError(f"example_inputs is {describe(example_inputs)}; give a tuple, for one tensor: (x,).")
    if opset < 18:
        raise OptionError(
            f"opset={opset}: torch's exporter is written for opset 18 and converts up from it; give 18 or more."
        )
    for package in ("onnx", "onnxscript"):
        require(package, extra="onnx")
    path = Path(path)
    job = _job(unwrap(model), example_inputs, opset, calibration, others)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            return _publish(job, _first_that_agrees(job, Path(folder), path.name, dynamic_batch), path)
    except OSError as error:
        raise ArtefactError(
            f"{path} could not be written: {error.strerror or error}. Nothing was left behind; give a folder that is "
            "writable and has room for the weights."
        ) from error


@dataclasses.dataclass(frozen=True)
class _Job:
    """All that an attempt needs: the model to answer as, the copy to trace, its inputs, and the names to write."""

    model: nn.Module
    traced: nn.Module
    marks: Marks
    parameters: Mapping[str, Tensor]
    calibration: Iterable[Any] | None
    inputs: tuple[Any, ...]
    opset: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    sizes: tuple[_Sizes, ...]
    batched: tuple[bool, ...]
    others: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Which axes are left open, as torch.export has it (None: none), and that in words."""

    words: str
    shapes: dict[str, Any] | None
    lengths: bool = False


@dataclasses.dataclass(frozen=True)
class _Made:
    file: Path
    exporter: str
    notes: tuple[str, ...]
    integers: Integers


def _job(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    opset: int,
    calibration: Iterable[Any] | None,
    others: Sequence[tuple[Any, ...]],
) -> _Job:
    twin, traced = eval_copy(model), eval_copy(model)
    marks, parameters = mark(traced), dict(model.named_parameters())
    inputs = sort_keys(tree_map_only(Tensor, lambda t: t.detach().clone(), example_inputs))
    output = run_once(twin, inputs)
    arguments = dict(inspect.signature(twin.forward).bind(*inputs).arguments)
    input_names = _names(arguments, taken=set())
    output_names = _names(output if isinstance(output, dict) else {"output": output}, taken=set(input_names))
    if not output_names:
        raise ExportError(f"{type(model).__name__} gives {describe(output)}, no tensor: there is nothing to export.")
    if any(not isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
        twin, traced, arguments = _TensorsOnly(twin), _TensorsOnly(traced), {"inputs": inputs}
    sizes = [leaf.shape[0] if leaf.ndim else None for leaf in flatten_inputs(inputs)]
    batch = next((size for size in sizes if size is not None), None)
    notes = [
        f"Input {name} keeps its axis 0 of {size}: the batch of the example is {batch}."
        for name, size in zip(input_names, sizes, strict=True)
        if size is not None and size != batch
    ]
    batched = tuple(size is not None and size == batch for size in sizes)
    free = [{0: "batch"} if leads else {} for leads in batched]
    lengths = _lengths(inputs, others)
    both = [{**axes, **more} for axes, more in zip(free, lengths, strict=True)]
    forms = (
        *([_Sizes("a dynamic batch and length", _shapes(arguments, both), lengths=True)] if any(lengths) else []),
        _Sizes("a dynamic batch", _shapes(arguments, free)),
        _Sizes("a fixed batch", None),
    )
    return _Job(
        model=twin,
        traced=traced,
        marks=marks,
        parameters=parameters,
        calibration=calibration,
        inputs=inputs,
        opset=max(opset, _INTEGER_OPSET) if marks.any or on_grids(parameters.values()) else opset,
        input_names=input_names,
        output_names=output_names,
        sizes=forms,
        batched=batched,
        others=tuple(sort_keys(other) for other in others) if any(lengths) else (),
        notes=tuple(notes),
    )


def _shapes(arguments: Mapping[str, Any], free: Sequence[dict[int, str]]) -> dict[str, Any]:
    """The arguments with the open axes of each tensor in its place."""
    remaining = iter(free)
    return {
        name: tree_map(lambda leaf: (next(remaining) or None) if isinstance(leaf, Tensor) else None, value)
        for name, value in arguments.items()
    }


def _lengths(inputs: tuple[Any, ...], others: Sequence[tuple[Any, ...]]) -> list[dict[int, str]]:
    """By tensor: the axes behind the first whose size varies, named; those that vary together by one name."""
    calls = [flatten_inputs(call) for call in (inputs, *others)]
    for other in calls[1:]:
        if [leaf.ndim for leaf in other] != [leaf.ndim for leaf in calls[0]]:
            raise OptionError(f"others has {describe(tuple(other))}, and the example is {describe(tuple(calls[0]))}.")
    named: dict[tuple[int, ...], str] = {}
    found: list[dict[int, str]] = []
    for leaves in zip(*calls, strict=True):
        own: dict[int, str] = {}
        for axis in range(1, leaves[0].ndim):
            seen = tuple(int(leaf.shape[axis]) for leaf in leaves)
            if len(set(seen)) == 1:
                continue
            name = named.setdefault(seen, "length" if not named else f"length_{len(named) + 1}")
            # Height and width of squares vary together in the data, and need not.
            own[axis] = name if name not in own.values() else f"{name}_of_axis_{axis}"
        found.append(own)
    return found


class _TensorsOnly(nn.Module):
    """The model without what it gives beside tensors (None, numbers), for which ONNX has no place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in tree_leaves(self.model(*inputs)) if isinstance(leaf, Tensor))


def _names(values: dict[str, Any], taken: set[str]) -> tuple[str, ...]:
    """A name for each tensor: its argument, and its place in it where the argument is nested."""
    names = []
    for name, _ in named_tensors(values):
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return tuple(names)


def _first_that_agrees(job: _Job, folder: Path, name: str, dynamic_batch: bool) -> _Made:
    notes = list(job.notes) if dynamic_batch else []
    failures: dict[tuple[str, bool], FeatherweightError] = {}
    wrong: set[str] = set()  # exporters whose file was wrong on the example itself: a fixed batch would not mend it
    for number, (exporter, sizes) in enumerate(itertools.product((_PLAIN, _DECOMPOSED), job.sizes)):
        dynamic = sizes.shapes is not None
        if exporter in wrong or (dynamic and not dynamic_batch):
            continue
        file = folder / str(number) / name
        file.parent.mkdir()
        attempt = f"{exporter} with {sizes.words}"
        try:
            integers = _write(job, file, exporter, sizes.shapes)
        except OSError:
            raise
        except Exception as error:
            failures[exporter, dynamic] = ExportError(explain(error))
            notes.append(f"{attempt} failed: {reason(error)}.")
            if lacks_an_op(error) or (is_data_dependent(error) and not dynamic):
                break  # no further attempt can help
            continue
        if dynamic and not _any_batch(_facts(file)[1]):
            dynamic = False
            notes.append("The batch is fixed: the model's own code, a reshape to a constant say, sets it.")
        if importlib.util.find_spec("onnxruntime") is None:
            notes.append('Not checked: onnxruntime is not installed. Run: pip install "featherweight[onnx]"')
            return _Made(file, exporter, tuple(notes), integers)
        words = _disagreement(job, file, [job.inputs])
        if words:
            wrong.add(exporter)
        elif dynamic:
            words = _disagreement(job, file, [_larger_batch(job), *(job.others if sizes.lengths else ())])
        if not words:
            return _with_edges(job, _Made(file, exporter, tuple(notes), integers))
        failures[exporter, dynamic] = ParityError(words)
        notes.append(f"{attempt} was not kept: {words}.")
    # The plain attempt with the example's own batch asks for least, so its failure says most.
    failure = failures.get((_PLAIN, False)) or next(iter(failures.values()))
    if isinstance(failure, ParityError):
        raise ParityError(
            f"No ONNX file was written, since none that could be made answers as the model does: {failure}. If the model "
            "draws random numbers in eval mode no two runs agree; half precision may need model.float() first."
        )
    raise ExportError(f"No ONNX file was written: {failure}")


def _with_edges(job: _Job, made: _Made) -> _Made:
    """The same with grids between its layers, if there is data to take their ranges from."""
    if not job.marks.static:
        return made
    missing = edges_without_ranges(made.file) if job.calibration is None else 0
    if missing:
        note = (
            f"{missing} sums, concatenations, poolings and outputs of convolutions have no grid, so that runtimes compute "
            "them in floating point. Give calibration, some batches of data."
        )
        return dataclasses.replace(made, notes=(*made.notes, note))
    file, scratch = (made.file.parent.with_name(name) / made.file.name for name in ("edges", "ranges"))
    file.parent.mkdir()
    scratch.mkdir(parents=True)
    new = with_edges(made.file, () if job.calibration is None else job.calibration, file, scratch)
    words = _disagreement(job, file, [job.inputs])
    if words:
        note = f"Grids between layers were left out: with them, {words}."
        return dataclasses.replace(made, notes=(*made.notes, note))
    return dataclasses.replace(made, file=file, integers=dataclasses.replace(made.integers, edges=new))


def _write(job: _Job, file: Path, exporter: str, shapes: dict[str, Any] | None) -> Integers:
    onnx = require("onnx", extra="onnx")

    model: Any = job.traced
    with _quiet():
        if exporter == _DECOMPOSED:
            # Names of axes are given to the ONNX file below; torch.export finds by itself which can vary.
            free = tree_map(lambda axes: axes and dict.fromkeys(axes, torch.export.Dim.AUTO), shapes, is_leaf=_is_axes)
            model = torch.export.export(model, job.inputs, dynamic_shapes=free, strict=False)
            model = model.run_decompositions()
        program = torch.onnx.export(
            model,
            # A last dict would be taken for keyword arguments, were there not an empty one behind it.
            (*job.inputs, {}),
            dynamo=True,
            verbose=False,
            opset_version=job.opset,
            input_names=list(job.input_names),
            output_names=list(job.output_names),
            dynamic_shapes=shapes,
        )
        written = cast(Any, program).model
        _strip(written)
        integers = in_integers(written, job.parameters, int4=written.opset_imports[""] >= 21)
        weights = sum(value.const_value.nbytes for value in written.graph.initializers.values())
        cast(Any, program).save(str(file), external_data=weights > _ONE_FILE_BYTES)
        onnx.checker.check_model(str(file))
    return integers


def _is_axes(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and bool(value) and all(isinstance(axis, int) for axis in value))


def _strip(written: Any) -> None:
    """Takes out what the exporter notes beside the graph: traces with the model's source and this machine's paths."""
    graphs = (written.graph, *written.functions.values())
    nodes = [node for graph in graphs for node in graph.all_nodes()]
    values = [value for graph in graphs for value in graph.inputs] + [v for node in nodes for v in node.outputs]
    for noted in (written, *graphs, *nodes, *values, *written.graph.initializers.values()):
        noted.metadata_props.clear()
    for node in nodes:
        node.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's console: warnings, log lines, and graphs that it prints before it raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _disagreement(job: _Job, file: Path, inputs: list[tuple[Any, ...]]) -> str:
    result = parity(job.model, file, inputs)
    return "" if result.passed else result.words.replace(str(file), file.name)


def _larger_batch(job: _Job) -> tuple[Any, ...]:
    batched = iter(job.batched)
    larger: tuple[Any, ...] = tree_map_only(Tensor, lambda t: torch.cat([t, t[:1]]) if next(batched) else t, job.inputs)
    return larger


def _facts(file: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The file's graph without its weights, and the axes that each input leaves open."""
    onnx = require("onnx", extra="onnx")

    proto = onnx.load(str(file), load_external_data=False)
    axes = {i.name: enumerate(i.type.tensor_type.shape.dim) for i in proto.graph.input}
    return proto, {name: tuple(axis for axis, size in own if size.dim_param) for name, own in axes.items()}


def _any_batch(open_axes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(0 in axes for axes in open_axes.values())


def _publish(job: _Job, made: _Made, path: Path) -> Export:
    """Reads what was written, then gives the files their names: weights first, so that the graph never lacks them."""
    proto, open_axes = _facts(made.file)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    notes = [*made.notes, *made.integers.notes]
    if made.exporter == _DECOMPOSED:
        notes.append("Layers are written as plain ops, recurrent ones step by step: the length of sequences is fixed.")
    if opset != job.opset:
        notes.append(f"Written at opset {opset}: torch's exporter could not convert it to {job.opset}.")
    files = sorted(made.file.parent.iterdir(), key=lambda file: file == made.file)
    if len(files) > 1:
        notes.append(f"From 2 GB on, weights are kept beside the graph: deploy {len(files)} files together.")
    total = sum(file.stat().st_size for file in files)
    for file in files:
        os.replace(file, path.parent / file.name)
    return Export(
        path=path,
        opset=opset,
        bytes=total,
        files=tuple(path.parent / file.name for file in reversed(files)),
        dynamic_batch=_any_batch(open_axes),
        exporter=made.exporter,
        notes=tuple(notes),
        input_names=tuple(value.name for value in proto.graph.input),
        output_names=tuple(value.name for value in proto.graph.output),
        integers=made.integers,
        open_axes=open_axes,
    )
