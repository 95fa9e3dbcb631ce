# SPDX-License-Identifier: Apache-2.0
"""The engine's reader of ONNX files, against onnx's own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

import featherweight_engine as core

DTYPES = ["f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"]


def values(dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Both ends of the type's range and what lies between."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape))
    if kind.kind == "f":
        return np.random.default_rng(0).standard_normal(size).astype(kind).reshape(shape)
    if kind.kind == "b":
        return (np.arange(size) % 3 == 0).reshape(shape)
    info = np.iinfo(kind)
    return np.resize(np.array([info.min, info.max, 0, 1, info.max // 3], kind), shape)


def graph_of(tensors: list[TensorProto], nodes: list[onnx.NodeProto] | None = None, **facts: Any) -> onnx.ModelProto:
    """A model that gives these tensors back."""
    outputs = [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
    graph = helper.make_graph(nodes or [], "test", facts.pop("inputs", []), facts.pop("outputs", outputs), tensors)
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return made


def read(model: onnx.ModelProto | bytes | Path, folder: str = "") -> dict[str, NDArray[Any]]:
    if isinstance(model, Path):
        engine = core.Engine(model)
    else:
        engine = core.Engine(model if isinstance(model, bytes) else model.SerializeToString(), folder=folder)
    return dict(zip((name for name, _, _ in engine.outputs), engine.run([]), strict=True))


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("raw", [True, False])
def test_an_initializer_of_any_type_comes_out_as_it_went_in(dtype: str, shape: tuple[int, ...], raw: bool) -> None:
    array = values(dtype, shape)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = numpy_helper.from_array(array, "x") if raw else helper.make_tensor("x", kind, shape, array.flatten())
    assert np.array_equal(numpy_helper.to_array(tensor), array)
    found = read(graph_of([tensor]))["x"]
    assert found.dtype == array.dtype and found.shape == array.shape
    assert np.array_equal(found, array)


def field(number: int, kind: int, payload: bytes) -> bytes:
    def varint(value: int) -> bytes:
        made = b""
        while value > 127:
            made, value = made + bytes([value & 127 | 128]), value >> 7
        return made + bytes([value])

    return varint(number << 3 | kind) + (varint(len(payload)) if kind == 2 else b"") + payload


def test_numbers_that_are_not_packed_are_read_too() -> None:
    # protobuf's rule: a reader takes both, and official writers write packed ones only.
    tensor = b"".join([field(1, 0, b"\x03"), field(2, 0, b"\x01"), field(8, 2, b"x")])
    tensor += b"".join(field(4, 5, np.float32(v).tobytes()) for v in (1.5, -2, 3))
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]).SerializeToString()
    graph = field(5, 2, tensor) + field(12, 2, info)
    model = field(1, 0, b"\x08") + field(8, 2, field(2, 0, b"\x0d")) + field(7, 2, graph)
    assert onnx.load_from_string(model).graph.initializer[0].float_data[:] == [1.5, -2, 3]
    assert read(model)["x"].tolist() == [1.5, -2, 3]


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        ("value", numpy_helper.from_array(np.arange(6, dtype=np.int64).reshape(2, 3)), np.arange(6).reshape(2, 3)),
        ("value_float", 2.5, np.float32(2.5)),
        ("value_floats", [1.5, 2.0], np.array([1.5, 2.0], np.float32)),
        ("value_int", -7, np.int64(-7)),
        ("value_ints", [3, -1, 1 << 40], np.array([3, -1, 1 << 40])),
    ],
)
def test_a_constant_node_is_a_constant(form: str, value: Any, expected: Any) -> None:
    node = helper.make_node("Constant", [], ["c"], **{form: value})
    info = helper.make_tensor_value_info("c", helper.np_dtype_to_tensor_dtype(expected.dtype), expected.shape)
    found = read(graph_of([], [node], outputs=[info]))["c"]
    assert found.dtype == expected.dtype and np.array_equal(found, expected)


def test_inputs_outputs_and_names() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, None])
    w = helper.make_tensor_value_info("w", TensorProto.INT64, [2])
    model = graph_of([numpy_helper.from_array(np.array([4, 5]), "w")], inputs=[x, w], outputs=[x, w, x])
    engine = core.Engine(model.SerializeToString())
    assert engine.inputs == [("x", "float", ["batch", 3, None])]  # an initializer is no input
    given = np.ones((2, 3, 1), np.float32)
    found = engine.run([given])
    assert [f.tolist() for f in found] == [given.tolist(), [4, 5], given.tolist()]
    with pytest.raises(core.Error, match="batchx3x"):
        engine.run([np.ones((2, 4, 1), np.float32)])


def external(folder: Path, array: NDArray[Any], location: str = "weights.bin") -> onnx.ModelProto:
    model = graph_of([numpy_helper.from_array(array, "x"), numpy_helper.from_array(array + 1, "y")])
    external_data_helper.convert_model_to_external_data(model, location=location, size_threshold=0)
    onnx.save(model, folder / "model.onnx")
    return onnx.load(folder / "model.onnx", load_external_data=False)


def test_external_data(tmp_path: Path) -> None:
    array = values("f4", (5, 7))
    model = external(tmp_path, array)
    for found in (read(tmp_path / "model.onnx"), read(model, str(tmp_path))):
        assert np.array_equal(found["x"], array) and np.array_equal(found["y"], array + 1)
    with pytest.raises(core.Error, match="no folder to look in"):
        read(model)


def entry(model: onnx.ModelProto, key: str, value: str) -> None:
    for each in model.graph.initializer[1].external_data:
        if each.key == key:
            each.value = value


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("location", "../secret", "no path below"),
        ("location", "inner/../../secret", "no path below"),
        ("location", "/etc/passwd", "no path below"),
        ("location", "", "no path below"),
        ("location", "link", "leads out of"),
        ("location", "linked/secret", "leads out of"),
        ("location", "nothing", "not there"),
        ("location", "inner", "no regular file"),
        ("offset", "4096000", "ends before"),
        ("offset", "18446744073709551615", "ends before"),
        ("offset", "-4", "no number"),
        ("offset", "18446744073709551616", "no number"),
        ("length", "139", "length of its external data"),
    ],
)
def test_external_data_stays_in_its_folder_and_file(tmp_path: Path, key: str, value: str, text: str) -> None:
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"x" * 4096)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    model = external(folder, values("f4", (5, 7)))
    entry(model, key, value)
    with pytest.raises(core.Error, match=text):
        read(model, str(folder))


def test_external_data_may_lie_deeper_and_behind_a_link_that_stays(tmp_path: Path) -> None:
    array = values("f4", (5, 7))
    (tmp_path / "inner").mkdir()
    model = external(tmp_path, array, "inner/weights.bin")
    (tmp_path / "link").symlink_to(tmp_path / "inner" / "weights.bin")
    entry(model, "location", "link")
    assert np.array_equal(read(model, str(tmp_path))["y"], array + 1)


def changed(**facts: Any) -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros((2, 3), np.float32), "x")
    for key, value in facts.items():
        if isinstance(value, list):
            del getattr(tensor, key)[:]
            getattr(tensor, key).extend(value)
        else:
            setattr(tensor, key, value)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (changed(dims=[2, 4]), "24 bytes are held"),
        (changed(dims=[1 << 50]), "24 bytes are held"),
        (changed(dims=[1 << 40, 1 << 40]), "too large"),
        (changed(dims=[1 << 32, 1 << 32, 0]), "too large"),
        (changed(dims=[-2, -3]), "negative"),
        (changed(dims=[1] * 65), "more than 64 axes"),
        (changed(data_type=TensorProto.DOUBLE), "24 bytes are held"),
        (changed(data_type=TensorProto.INT4), "type int4"),
        (changed(data_type=TensorProto.FLOAT8E4M3FN), "type float8e4m3fn"),
        (changed(data_type=TensorProto.STRING), "type string"),
        (changed(data_type=99), "99"),
        (changed(float_data=[0.0] * 6), "24 bytes are held"),
        (changed(name=""), "has no name"),
    ],
)
def test_an_initializer_that_is_not_what_it_says(tensor: TensorProto, text: str) -> None:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    with pytest.raises(core.Error, match=text):
        read(graph_of([tensor], outputs=[info]))


def test_an_initializer_that_nothing_reads_may_be_of_any_type() -> None:
    x = numpy_helper.from_array(np.zeros(2, np.float32), "x")
    rest = [changed(data_type=TensorProto.INT4, name="y"), helper.make_tensor("z", TensorProto.STRING, [1], [b"text"])]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    assert read(graph_of([x, *rest], outputs=[info]))["x"].tolist() == [0, 0]


def node(inputs: list[str], outputs: list[str], name: str) -> onnx.NodeProto:
    return helper.make_node("Identity", inputs, outputs, name=name)


X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
TEXTS = helper.make_tensor_value_info("s", TensorProto.STRING, [2])
SEQUENCE = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])


@pytest.mark.parametrize(
    ("nodes", "facts", "text"),
    [
        (
            [node(["x"], ["y"], "a"), node(["x"], ["y"], "b")],
            {},
            "'y' is made twice: by Identity 'b' and by Identity 'a'",
        ),
        ([node(["x"], ["y", "y"], "a")], {}, "'y' is made twice"),
        ([node(["x"], ["x"], "a")], {}, "'x' is made twice: by Identity 'a' and by the graph's input"),
        ([node(["z"], ["y"], "a")], {}, "Identity 'a' reads 'z', which nothing makes"),
        ([], {}, "output 'y' is made by nothing"),
        ([node(["b"], ["y"], "a"), node(["y"], ["b"], "b")], {}, "cycle: Identity 'a'"),
        ([node(["x"], ["y"], "a")], {"inputs": [X, X]}, "two inputs 'x'"),
        ([node(["s"], ["y"], "a")], {"inputs": [TEXTS]}, "input 's'"),
        ([node(["s"], ["y"], "a")], {"inputs": [SEQUENCE]}, "input 's': it is no tensor"),
        ([helper.make_node("", ["x"], ["y"])], {}, "does not say what op"),
    ],
)
def test_a_graph_that_is_none(nodes: list[onnx.NodeProto], facts: dict[str, Any], text: str) -> None:
    model = graph_of([], nodes, **({"inputs": [X], "outputs": [Y]} | facts))
    with pytest.raises(core.Error, match=text):
        core.Engine(model.SerializeToString())


def test_two_initializers_of_one_name() -> None:
    x = numpy_helper.from_array(np.zeros(2, np.float32), "x")
    with pytest.raises(core.Error, match="two initializers 'x'"):
        read(graph_of([x, x]))


def test_an_initializer_of_an_unknown_type_is_named_with_its_reader() -> None:
    model = graph_of(
        [changed(data_type=TensorProto.INT4, name="w")], [node(["w"], ["y"], "a")], inputs=[X], outputs=[Y]
    )
    with pytest.raises(core.Unsupported, match=r"Identity 'a': its initializer 'w': .*int4"):
        core.Engine(model.SerializeToString())


@pytest.mark.parametrize(
    ("version", "kind", "text"),
    [(0, core.Error, "does not exist"), (1 << 40, core.Unsupported, "opset 1099511627776")],
)
def test_opsets(version: int, kind: type[Exception], text: str) -> None:
    model = graph_of([])
    model.opset_import[0].version = version
    with pytest.raises(kind, match=text):
        core.Engine(model.SerializeToString())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html></html>", "no ONNX file, or it is damaged"),
        (b"PK\x03\x04\x14\x00\x00\x08\x08\x00", "no ONNX file, or it is damaged"),
        (b"\x08\x08", "it has no graph"),
        (b"\x3a\x00", "it has no version"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "beyond the end"),
        (b"\x0b\x0c", "group"),
    ],
)
def test_what_is_no_model(tmp_path: Path, data: bytes, text: str) -> None:
    with pytest.raises(core.Error, match=text):
        core.Engine(data)
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(core.Error, match=rf"^'.*model.onnx': .*{text}"):
        core.Engine(tmp_path / "model.onnx")


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(core.Error, match=r"nothing.onnx' cannot be opened: No such file"):
        core.Engine(str(tmp_path / "nothing.onnx"))
    with pytest.raises(core.Error, match="is no regular file"):
        core.Engine(str(tmp_path))


@pytest.mark.skipif("FEATHERWEIGHT_SANITIZED" in os.environ, reason="a sanitizer keeps a shadow of all memory")
def test_a_file_takes_little_more_memory_than_its_constants(tmp_path: Path) -> None:
    # In a process of its own, whose peak is not that of the tests before.
    arrays = [np.random.default_rng(i).standard_normal(4 << 20).astype(np.float32) for i in range(6)]
    onnx.save(graph_of([numpy_helper.from_array(a, f"x{i}") for i, a in enumerate(arrays)]), tmp_path / "model.onnx")
    script = (
        "import re, sys, featherweight_engine as core\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10\n"
        "before = peak()\n"
        "engine = core.Engine(sys.argv[1])\n"
        "print(peak() - before)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=True
    )
    assert 90 <= int(found.stdout) < 96 + 16, found.stdout
