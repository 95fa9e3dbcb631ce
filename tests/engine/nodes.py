# SPDX-License-Identifier: Apache-2.0
"""Small ONNX models for tests of the engine, and their answers in ONNX Runtime."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import featherweight_engine as core

Arrays = Mapping[str, NDArray[Any]]


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Arrays,
    outputs: Sequence[str],
    constants: Arrays | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    """A model of these nodes, its inputs of these arrays' types and shapes; outputs' types are inferred."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in (constants or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(made)
    types = {value.name: value for value in [*inferred.graph.output, *inferred.graph.value_info]}
    for value in made.graph.output:
        value.CopyFrom(types[value.name])
    return made


def node(op: str, inputs: Sequence[str], *, outputs: Sequence[str] = ("y",), **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), name=f"{op}_of_{'_'.join(inputs)}", **attributes)


def engine(
    made: onnx.ModelProto, inputs: Arrays, threads: int = 2, instruction_set: str = ""
) -> dict[str, NDArray[Any]]:
    session = core.Engine(made.SerializeToString(), threads=threads, instruction_set=instruction_set)
    order = [name for name, _, _ in session.inputs]
    values = session.run([np.asarray(inputs[name], order="C") for name in order])
    return {name: value for (name, _, _), value in zip(session.outputs, values, strict=True)}


def onnxruntime(made: onnx.ModelProto, inputs: Arrays) -> dict[str, NDArray[Any]]:
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, dict(inputs)), strict=True))


def record(folder: Path, made: onnx.ModelProto, inputs: Arrays, expected: Arrays, tolerance: float) -> None:
    """A case, laid out as ONNX lays out its own, for where there is no Python: engine/tests/replay.cpp."""
    files = {"model.onnx": made.SerializeToString(), "tolerance": str(tolerance).encode()}
    for stem, values, arrays in (("input", made.graph.input, inputs), ("output", made.graph.output, expected)):
        for i, value in enumerate(values):
            files[f"{stem}_{i}.pb"] = numpy_helper.from_array(
                np.asarray(arrays[value.name], order="C")
            ).SerializeToString()
    case = folder / hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
    case.mkdir(exist_ok=True)
    for name, data in files.items():
        (case / name).write_bytes(data)


def check(made: onnx.ModelProto, inputs: Arrays, tolerance: float = 1e-5, instruction_sets: Sequence[str] = ()) -> None:
    """The engine answers as ONNX Runtime does, in every instruction set, by one thread and by three."""
    expected = onnxruntime(made, inputs)
    if "FEATHERWEIGHT_RECORD" in os.environ:
        record(Path(os.environ["FEATHERWEIGHT_RECORD"]), made, inputs, expected, tolerance)
    for name in instruction_sets or core.instruction_sets():
        for threads in (1, 3):
            found = engine(made, inputs, threads, name)
            assert set(found) == set(expected)
            for key, value in expected.items():
                assert found[key].shape == value.shape, (name, threads, key)
                assert found[key].dtype == value.dtype, (name, threads, key)
                np.testing.assert_allclose(
                    found[key],
                    value,
                    rtol=tolerance,
                    atol=tolerance * max(1.0, float(np.abs(value).max(initial=0))) if value.dtype.kind == "f" else 0,
                )
