# SPDX-License-Identifier: Apache-2.0
"""Our exact reference of a QDQ file: what an integer runtime is to compute, in NumPy, and how far runtimes are from it.

Products are summed in integers (`arithmetic`) wherever a layer's input and weight are: "DQ, op, Q" becomes one exact
sum, one multiplication and one rounding. Sums, products of two tensors, concatenations and pooling follow the
definition of QDQ: dequantize, compute, quantize. Everything else is floating point, by ONNX's own reference
implementation. Slow: for checking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.deploy import arithmetic
from featherweight.deploy.forms import INTEGER_RUNTIMES
from featherweight.deploy.nodes import affine_of, attribute, constant, evaluate, ir, is_standard
from featherweight.deploy.sessions import available_runtimes, flatten_inputs, session
from featherweight.errors import ArtefactError, DataError
from featherweight.task import describe

__all__ = ["Agreement", "IntegerReference", "NodeAgreement", "agreement", "agreement_by_node"]

Array = NDArray[Any]
_ACCUMULATING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CLAMPS = ("Relu", "Clip")


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A layer on integers: its node, Relu and Clip behind it, and the QuantizeLinear at the end (None: floats out)."""

    node: Any
    clamps: tuple[Any, ...]
    end: Any


class IntegerReference:
    """A QDQ file, called as the model is: `reference(x)` gives NumPy arrays. `saturated` counts what was out of range.

    `saturated[name] = (values outside the grid's range, all values)` of each QuantizeLinear, by the name of what it
    reads, added up over calls. Raises `ArtefactError` for a file that is not there or has branches and loops.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise ArtefactError(f"{path} is not there. featherweight.deploy.export_onnx writes it.")
        self.graph = ir().load(str(path)).graph
        if any(attribute(node, name) is not None for node in self.graph for name in ("then_branch", "body")):
            raise ArtefactError(f"{path} has branches or loops, which the integer reference does not follow.")
        self.input_names = tuple(value.name for value in self.graph.inputs)
        self.output_names = tuple(value.name for value in self.graph.outputs)
        self.saturated: dict[str, tuple[int, int]] = {}
        self._units = _units(self.graph)

    def __call__(self, *inputs: Any) -> tuple[Array, ...]:
        values = self.values(inputs)
        return tuple(values[name] for name in self.output_names)

    def values(self, inputs: tuple[Any, ...], forced: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """All values by name. A value in `forced` is computed and kept, and read by other nodes as it is there."""
        leaves = [np.asarray(leaf) for leaf in flatten_inputs(inputs)]
        if len(leaves) != len(self.input_names):
            raise DataError(
                f"the file takes {len(self.input_names)} inputs ({', '.join(self.input_names)}), got {describe(inputs)}."
            )
        found: dict[str, Array] = dict(zip(self.input_names, leaves, strict=True))
        read = dict(found)
        inner = {unit.node for unit in self._units.values()} | {n for u in self._units.values() for n in u.clamps}
        for node in self.graph:
            unit = self._units.get(node)
            if node in inner and unit is None:
                continue  # computed where its unit ends
            answers = self._unit(unit, read) if unit is not None else self._node(node, read)
            for value, answer in zip(node.outputs, answers, strict=False):
                if value.name:
                    found[value.name] = answer
                    read[value.name] = answer if forced is None else forced.get(value.name, answer)
        return found

    def _get(self, value: Any, read: Mapping[str, Array]) -> Array | None:
        if value is None:
            return None
        return read[value.name] if value.name in read else constant(value)

    def _node(self, node: Any, read: dict[str, Array]) -> list[Array]:
        inputs = [self._get(value, read) for value in node.inputs]
        given: Any = inputs
        zero_point: Any
        if is_standard(node, "QuantizeLinear") and "block_size" not in node.attributes:
            zero_point = given[2] if len(inputs) > 2 else np.uint8(0)
            self._count(node, given[0], given[1], zero_point)
            return [arithmetic.quantize(given[0], given[1], zero_point, attribute(node, "axis", 1))]
        if is_standard(node, "DequantizeLinear"):
            zero_point = given[2] if len(inputs) > 2 and given[2] is not None else np.int8(0)
            block = attribute(node, "block_size", 0)
            return [arithmetic.dequantize(given[0], given[1], zero_point, attribute(node, "axis", 1), block)]
        if is_standard(node, "MatMulInteger"):
            zero_point = given[2] if len(inputs) > 2 else np.uint8(0)
            return [arithmetic.multiply(given[0], zero_point, given[1]).astype(np.int32)]
        if is_standard(node, "Conv", "ConvTranspose") and attribute(node, "auto_pad", "NOTSET") == "NOTSET":
            bias = given[2] if len(inputs) > 2 else None  # ONNX's own reference fails at grouped transposed ones
            return [arithmetic.filtered(given[0], given[1], bias, **_options(node, given[0].ndim - 2)).numpy()]
        if is_standard(node, "Constant"):
            return [np.asarray(constant(node.outputs[0]))]
        return evaluate(node, inputs)

    def _count(self, node: Any, x: Array, scale: Array, zero_point: Array) -> None:
        ends = np.iinfo(np.asarray(zero_point).dtype)
        if np.size(scale) == 1:
            steps = np.rint(x / scale) + int(zero_point)
            outside, total = self.saturated.get(node.inputs[0].name, (0, 0))
            outside += int(((steps < ends.min) | (steps > ends.max)).sum())
            self.saturated[node.inputs[0].name] = (outside, total + x.size)

    def _unit(self, unit: _Unit, read: dict[str, Array]) -> list[Array]:
        node = unit.node
        source, weight = node.inputs[0].producer(), node.inputs[1].producer()
        step: Any = self._get(source.inputs[1], read)
        scale = np.float32(step.reshape(())) * np.asarray(constant(weight.inputs[1]), np.float32)
        bias = node.inputs[2].producer() if len(node.inputs) > 2 and node.inputs[2] is not None else None
        q: Any = self._get(source.inputs[0], read)
        zero_point: Any = self._get(source.inputs[2], read)
        table, offset = np.asarray(constant(weight.inputs[0])), None if bias is None else constant(bias.inputs[0])
        axis = q.ndim - 1 if is_standard(node, "Gemm", "MatMul") else 1
        total = _accumulate(node, q, zero_point, table, offset)
        if unit.end is None:
            return [total.astype(np.float32) * arithmetic.along(scale, axis, total.ndim)]
        grid: Any = affine_of(unit.end)
        kind = np.int8(grid.zero_point) if grid.signed else np.uint8(grid.zero_point)
        steps = total.astype(np.float32) * arithmetic.along(scale / np.float32(grid.scale), axis, total.ndim)
        for clamp in unit.clamps:
            low, high = _bounds(clamp) or (-np.inf, np.inf)
            steps = np.clip(steps, low / grid.scale, high / grid.scale)
        whole = np.rint(steps).astype(np.float64) + grid.zero_point
        ends = np.iinfo(kind.dtype)
        outside, seen = self.saturated.get(unit.end.inputs[0].name, (0, 0))
        outside += int(((whole < ends.min) | (whole > ends.max)).sum())
        self.saturated[unit.end.inputs[0].name] = (outside, seen + whole.size)
        return [np.clip(whole, ends.min, ends.max).astype(kind.dtype)]


def _units(graph: Any) -> dict[Any, _Unit]:
    """Layers on integers by the node that ends them: the QuantizeLinear, or the layer itself where floats come out."""
    found: dict[Any, _Unit] = {}
    for node in graph:
        if not (is_standard(node, *_ACCUMULATING) and _takes_integers(node)):
            continue
        clamps: list[Any] = []
        value = node.outputs[0]
        while True:
            users = [user for user, _ in value.uses()]
            last = len(users) == 1 and not value.is_graph_output()
            if last and is_standard(users[0], *_CLAMPS) and _bounds(users[0]) is not None:
                clamps.append(users[0])
                value = users[0].outputs[0]
                continue
            end = users[0] if last and is_standard(users[0], "QuantizeLinear") and affine_of(users[0]) else None
            break
        if end is not None:
            found[end] = _Unit(node, tuple(clamps), end)
        else:
            found[node] = _Unit(node, (), None)
    return found


def _takes_integers(node: Any) -> bool:
    """Whether input, weight and bias all come out of DequantizeLinear with grids that one multiplier can hold."""
    source, weight = node.inputs[0].producer(), node.inputs[1].producer()
    if not is_standard(source, "DequantizeLinear") or len(source.inputs) < 3:
        return False
    if affine_of(source) is None and not is_standard(source.inputs[0].producer(), "DynamicQuantizeLinear"):
        return False
    if not is_standard(weight, "DequantizeLinear") or constant(weight.inputs[0]) is None or len(weight.inputs) > 2:
        return False
    if "block_size" in weight.attributes or attribute(node, "transA", 0):
        return False
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return False
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or (
        is_standard(bias.producer(), "DequantizeLinear") and constant(bias.producer().inputs[0]) is not None
    )


def _bounds(clamp: Any) -> tuple[float, float] | None:
    if clamp.op_type == "Relu":
        return 0.0, np.inf
    ends = [None if len(clamp.inputs) <= i or clamp.inputs[i] is None else constant(clamp.inputs[i]) for i in (1, 2)]
    if any(
        end is None and len(clamp.inputs) > i and clamp.inputs[i] is not None
        for i, end in zip((1, 2), ends, strict=True)
    ):
        return None
    low, high = ends
    return (-np.inf if low is None else float(low)), (np.inf if high is None else float(high))


def _accumulate(node: Any, q: Array, zero_point: Array, table: Array, bias: Array | None) -> NDArray[np.int64]:
    if is_standard(node, "MatMul", "Gemm"):
        return arithmetic.multiply(q, zero_point, table.T if attribute(node, "transB", 0) else table, bias)
    return arithmetic.convolve(q, zero_point, table, bias, **_options(node, q.ndim - 2))


def _options(node: Any, axes: int) -> dict[str, Any]:
    transposed = is_standard(node, "ConvTranspose")
    return {
        "stride": attribute(node, "strides", [1] * axes),
        "pads": attribute(node, "pads", [0] * 2 * axes),
        "dilation": attribute(node, "dilations", [1] * axes),
        "groups": attribute(node, "group", 1),
        "output_padding": attribute(node, "output_padding", [0] * axes) if transposed else None,
    }


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a runtime's answers compare with the integer reference's, in steps of each output's grid.

    A step is the grid's where the output has one, else a 255th of the output's range in the reference. `exact` and
    `within` are the shares of values that are equal and that differ by one step or less, `largest` the largest
    difference, `saturated` the share of activations that were outside their grids' ranges.
    """

    runtime: str
    n: int
    exact: float
    within: float
    largest: float
    saturated: float

    @property
    def words(self) -> str:
        return (
            f"{self.runtime}: {100 * self.exact:.4g} % of values equal the integer reference's, {100 * self.within:.4g} % are "
            f"within one step of the output grid, {self.largest:.2g} steps at most, on {self.n} inputs; "
            f"{100 * self.saturated:.2g} % of activations saturate"
        )


def agreement(
    path: str | Path, inputs: Sequence[tuple[Any, ...]], runtimes: Iterable[str] | None = None
) -> tuple[Agreement, ...]:
    """Runs a QDQ file in each runtime that has integers and in the integer reference.

    Differences add up over layers: see `agreement_by_node`.

    Raises `ArtefactError` for a file that cannot be read, `MissingExtra` for a runtime that is not installed.
    """
    reference = IntegerReference(path)
    expected = [[np.asarray(answer, np.float64) for answer in reference(*example)] for example in inputs]
    outside, total = (
        (sum(column) for column in zip(*reference.saturated.values(), strict=True)) if reference.saturated else (0, 0)
    )
    steps = [_step(value, [answers[i] for answers in expected]) for i, value in enumerate(reference.graph.outputs)]
    found = []
    there = [name for name in available_runtimes() if name in INTEGER_RUNTIMES]
    for runtime in there if runtimes is None else runtimes:
        engine = session(path, runtime, exact=True)
        parts = []
        for example, answers in zip(inputs, expected, strict=True):
            got = engine(*example)
            for step, want, have in zip(steps, answers, got if isinstance(got, tuple) else (got,), strict=True):
                parts.append(np.abs(want - have.double().numpy()).ravel() / step)
        far = np.concatenate(parts)
        # Scales are float32: a whole number of steps comes out a hair off.
        share = (float((far < 1e-3).mean()), float((far < 1 + 1e-3).mean()), float(far.max()))
        found.append(Agreement(runtime, len(inputs), *share, outside / max(total, 1)))
    return tuple(found)


def _step(value: Any, answers: list[Array]) -> float:
    node = value.producer()
    grid = affine_of(node) if is_standard(node, "DequantizeLinear") else None
    if grid is not None:
        return grid.scale
    low, high = min(0.0, *(float(a.min()) for a in answers)), max(0.0, *(float(a.max()) for a in answers))
    return (high - low) / 255 or 1.0


@dataclasses.dataclass(frozen=True)
class NodeAgreement:
    """One QuantizeLinear's integers in a runtime and in the reference, both given the runtime's inputs of that node."""

    name: str
    op: str
    exact: float
    largest: int
    values: int


def agreement_by_node(path: str | Path, inputs: tuple[Any, ...], scratch: Path) -> tuple[NodeAgreement, ...]:
    """ONNX Runtime against the reference at each grid in turn: nothing adds up, so that 1 is the most that is in order.

    All integers of the file become outputs, and each node of the reference is given what ONNX Runtime computed before
    it.
    """
    reference = IntegerReference(path)
    tools = ir()
    model = tools.load(str(path))
    marked = [node.outputs[0] for node in model.graph if is_standard(node, "QuantizeLinear")]
    outputs = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(value for value in marked if value.name not in outputs)
    probe = scratch / "integers.onnx"
    tools.save(model, str(probe))
    engine = session(probe, exact=True)
    answers = engine(*inputs)
    forced = (
        {n: a.numpy() for n, a in zip(engine.output_names, answers, strict=True)} if isinstance(answers, tuple) else {}
    )
    found = reference.values(inputs, forced)
    rows = []
    for node in reference.graph:
        if is_standard(node, "QuantizeLinear"):
            name = node.outputs[0].name
            apart = np.abs(found[name].astype(np.int64) - forced[name].astype(np.int64))
            source = node.inputs[0].producer()
            kind = "input" if source is None else source.op_type
            rows.append(
                NodeAgreement(
                    node.inputs[0].name, kind, float((apart == 0).mean()), int(apart.max(initial=0)), apart.size
                )
            )
    return tuple(rows)
