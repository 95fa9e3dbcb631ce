# SPDX-License-Identifier: Apache-2.0
"""The C interface: built, installed and used as a C program would, against the Python binding's answers."""

import ctypes as c
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import featherweight_engine as core
from tests.engine.builds import ENGINE, QUICKLY, build, call, locked, sanitized, tool

COMPILER = shutil.which("cc")
SANITIZER = os.environ.get("FEATHERWEIGHT_SANITIZED")  # what this process was made ready for by `make sanitize`
FOLDER = SANITIZER or "c"  # of the build
pytestmark = pytest.mark.skipif(COMPILER is None or shutil.which("cmake") is None, reason="no C compiler or no CMake")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built and installed."""
    prefix = tmp_path_factory.mktemp("prefix")
    library = ("-DCMAKE_INSTALL_LIBDIR=lib",)
    if SANITIZER is None:
        build("c", *QUICKLY, "-DFEATHERWEIGHT_PYTHON=OFF", *library, targets=("featherweight_engine",), install=prefix)
    else:
        sanitized(SANITIZER, *library, targets=("featherweight_engine",), install=prefix)
    return prefix


def flags(prefix: Path) -> list[str]:
    found = (prefix / "lib" / "pkgconfig" / "featherweight-engine.pc").read_text()
    known = dict(line.split("=", 1) for line in found.splitlines() if "=" in line)
    text = " ".join(line.split(":", 1)[1] for line in found.splitlines() if line.startswith(("Cflags:", "Libs:")))
    for key, value in known.items():
        text = text.replace(f"${{{key}}}", value)
    return text.split()


def small() -> onnx.ModelProto:
    """Two inputs, one of a size that is left open, and three outputs: a product, an input as it is, and a constant."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((5, 7)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["p"], name="matmul"),
            helper.make_node("Relu", ["p"], ["y"], name="relu"),
        ],
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["größe", 3, 5]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [2]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["größe", 3, 7]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [2]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [5, 7]),
        ],
        [numpy_helper.from_array(weights, "w")],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model


def ramp(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return ((np.arange(np.prod(shape)) % 17 - 8) / 8).astype(np.float32).reshape(shape)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_example_answers_as_python_does(installed: Path, tmp_path: Path, threads: int) -> None:
    assert COMPILER is not None
    onnx.save(small(), tmp_path / "model.onnx")
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    source = ENGINE / "examples" / "run.c"
    tool(COMPILER, *strict, source, *flags(installed), f"-Wl,-rpath,{installed / 'lib'}", "-o", tmp_path / "run")
    printed = call(tmp_path / "run", tmp_path / "model.onnx", str(threads)).splitlines()

    engine = core.Engine(tmp_path / "model.onnx", threads=threads)
    expected = engine.run([ramp((1, 3, 5)), np.array([0, 1])])
    assert len(printed) == len(expected)
    for line, (name, _, _), value in zip(printed, engine.outputs, expected, strict=True):
        words = line.split()
        assert words[0] == name
        assert [int(word) for word in words[1:-2]] == list(value.shape)
        total = float(value.sum(dtype=np.float64)) if value.dtype == np.float32 else 0
        assert float(words[-1]) == pytest.approx(total, rel=1e-5, abs=1e-6)


PAGE = (ENGINE.parent / "docs" / "engine-c.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_program_of_the_docs_runs(installed: Path, tmp_path: Path) -> None:
    assert COMPILER is not None
    onnx.save(small(), tmp_path / "model.onnx")
    [program] = blocks("c")
    (tmp_path / "program.c").write_text(program)
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    run_path = f"-Wl,-rpath,{installed / 'lib'}"
    tool(COMPILER, *strict, tmp_path / "program.c", *flags(installed), run_path, "-o", tmp_path / "program")
    printed = call(tmp_path / "program", tmp_path / "model.onnx")
    x = np.array([1, 2, 3, *[0] * 12], np.float32).reshape(1, 3, 5)
    y = np.maximum(x[0, 0] @ numpy_helper.to_array(small().graph.initializer[0]), 0)
    assert printed == f"y: {3 * 7 * 4} bytes, the first is {y[0]:g}\n"


@pytest.mark.skipif(SANITIZER is not None, reason="a shell, a compiler and the program in one go")
def test_the_commands_of_the_docs_work(installed: Path, tmp_path: Path) -> None:
    """In the folder of the build that is there, and with a model that is there."""
    building, using = (each.replace("$HOME/.local", str(installed)) for each in blocks("sh"))
    with locked(FOLDER) as folder:
        for command in (
            building.replace("-B build", f"-B {folder}")
            .replace("--build build", f"--build {folder}")
            .replace("--install build", f"--install {folder}")
            .splitlines()
        ):
            tool("sh", "-euc", f"cd {ENGINE.parent}; {command}")
    if shutil.which("pkg-config") is None:
        found = " ".join(flags(installed))
        using = using.replace("$(pkg-config --cflags --libs featherweight-engine)", found)
    onnx.save(small(), tmp_path / "model.onnx")
    (tmp_path / "engine").symlink_to(ENGINE)
    printed = call("sh", "-euc", f"cd {tmp_path}; {using}")
    assert [line.split()[0] for line in printed.splitlines()] == ["y", "i", "w"]


def test_the_header_is_cxx_too(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "uses.cpp").write_text(
        "#include <featherweight/engine.h>\nint main() { fw_options o = FW_OPTIONS; return o.threads - 1; }\n"
    )
    tool(
        compiler,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{ENGINE / 'include'}",
        tmp_path / "uses.cpp",
    )


class Options(c.Structure):
    _fields_ = (("size", c.c_size_t), ("threads", c.c_int32), ("instruction_set", c.c_char_p), ("folder", c.c_char_p))


class Tensor(c.Structure):
    _fields_ = (
        ("type", c.c_int32),
        ("rank", c.c_int32),
        ("dims", c.POINTER(c.c_int64)),
        ("data", c.c_void_p),
        ("bytes", c.c_size_t),
    )


class Value(c.Structure):
    _fields_ = (
        ("name", c.c_char_p),
        ("type", c.c_int32),
        ("rank", c.c_int32),
        ("dims", c.POINTER(c.c_int64)),
        ("symbols", c.POINTER(c.c_char_p)),
    )


class Step(c.Structure):
    _fields_ = (
        ("node", c.c_char_p),
        ("op", c.c_char_p),
        ("what", c.c_char_p),
        ("seconds", c.c_double),
        ("flops", c.c_double),
        ("bytes", c.c_double),
    )


OK, ERROR, UNSUPPORTED = 0, 1, 2


@pytest.fixture(scope="module")
def library(installed: Path) -> c.CDLL:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    made = c.CDLL(str(installed / "lib" / f"libfeatherweight_engine.{suffix}"))
    for name, kind in (("input", Value), ("output", Value)):
        getattr(made, f"fw_engine_{name}").restype = c.POINTER(kind)
    made.fw_result_output.restype = c.POINTER(Tensor)
    made.fw_result_step.restype = c.POINTER(Step)
    for name in (
        "fw_engine_input_count",
        "fw_engine_output_count",
        "fw_result_count",
        "fw_result_step_count",
        "fw_type_size",
    ):
        getattr(made, name).restype = c.c_size_t
    for name in ("fw_version", "fw_type_name", "fw_engine_instruction_set"):
        getattr(made, name).restype = c.c_char_p
    return made


class Session:
    """One call's worth of ctypes: what it said is kept in `text`."""

    def __init__(self, library: c.CDLL, room: int = 512) -> None:
        self.library, self.engine, self.result = library, c.c_void_p(), c.c_void_p()
        self.buffer, self.room = c.create_string_buffer(b"?" * 511, 512), room

    @property
    def text(self) -> str:
        return self.buffer.value.decode()

    def load(self, model: bytes, options: Options | None = None) -> int:
        given = None if options is None else c.byref(options)
        return int(
            self.library.fw_engine_load_bytes(
                model, c.c_size_t(len(model)), given, c.byref(self.engine), self.buffer, c.c_size_t(self.room)
            )
        )

    def run(self, *arrays: Any, profile: bool = False, less: int = 0) -> int:
        kept = [np.ascontiguousarray(array) for array in arrays]
        tensors = (Tensor * len(kept))()
        for tensor, array in zip(tensors, kept, strict=True):
            dims = (c.c_int64 * max(array.ndim, 1))(*array.shape)
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.type, tensor.rank, tensor.dims, tensor.data, tensor.bytes = (
                kind,
                array.ndim,
                dims,
                array.ctypes.data,
                array.nbytes - less,
            )
        call = self.library.fw_engine_profile if profile else self.library.fw_engine_run
        return int(
            call(self.engine, tensors, c.c_size_t(len(kept)), c.byref(self.result), self.buffer, c.c_size_t(self.room))
        )

    def outputs(self) -> list[Any]:
        made = []
        for i in range(self.library.fw_result_count(self.result)):
            tensor = self.library.fw_result_output(self.result, c.c_size_t(i)).contents
            dtype = helper.tensor_dtype_to_np_dtype(tensor.type)
            data = c.string_at(tensor.data, tensor.bytes)
            made.append(np.frombuffer(data, dtype).reshape(tensor.dims[: tensor.rank]))
        return made

    def close(self) -> None:
        self.library.fw_result_free(self.result)
        self.library.fw_engine_free(self.engine)


def test_what_an_engine_says_of_itself(library: c.CDLL) -> None:
    session = Session(library)
    assert session.load(small().SerializeToString()) == OK
    assert session.text == ""
    engine = session.engine
    assert library.fw_engine_input_count(engine) == 2 and library.fw_engine_output_count(engine) == 3
    x = library.fw_engine_input(engine, c.c_size_t(0)).contents
    assert (x.name, x.type, x.rank, x.dims[:3]) == (b"x", TensorProto.FLOAT, 3, [-1, 3, 5])
    assert x.symbols[0].decode() == "größe" and x.symbols[1] == b""
    i = library.fw_engine_output(engine, c.c_size_t(1)).contents
    assert (i.name, i.type, i.rank, i.dims[0]) == (b"i", TensorProto.INT64, 1, 2)
    assert not library.fw_engine_input(engine, c.c_size_t(2)) and not library.fw_engine_output(engine, c.c_size_t(3))
    assert library.fw_engine_threads(engine) == 1
    assert library.fw_engine_instruction_set(engine).decode() == core.instruction_sets()[0]
    assert library.fw_version() == b"0.1.0"
    for number, name, size in (
        (1, b"float", 4),
        (7, b"int64", 8),
        (9, b"bool", 1),
        (16, b"bfloat16", 2),
        (8, None, 0),
        (99, None, 0),
    ):
        assert library.fw_type_name(number) == name and library.fw_type_size(number) == size
    session.close()


def test_runs_and_profiles(library: c.CDLL) -> None:
    session = Session(library)
    model = small()
    assert session.load(model.SerializeToString(), Options(c.sizeof(Options), 2, None, None)) == OK
    given = (ramp((4, 3, 5)), np.array([7, 8]))
    assert session.run(*given, profile=True) == OK, session.text
    weights = numpy_helper.to_array(model.graph.initializer[0])
    found = session.outputs()
    np.testing.assert_allclose(found[0], np.maximum(given[0] @ weights, 0), rtol=1e-5, atol=1e-5)
    assert np.array_equal(found[1], given[1]) and np.array_equal(found[2], weights)
    steps = [
        library.fw_result_step(session.result, c.c_size_t(i)).contents
        for i in range(library.fw_result_step_count(session.result))
    ]
    assert b"MatMul" in {step.op for step in steps} and all(step.seconds >= 0 for step in steps)
    assert not library.fw_result_step(session.result, c.c_size_t(len(steps)))
    assert not library.fw_result_output(session.result, c.c_size_t(3))
    library.fw_engine_free(session.engine)  # a result outlives its engine
    session.engine = c.c_void_p()
    assert np.array_equal(session.outputs()[2], weights)
    session.close()


def test_prepare_tells_the_arena(library: c.CDLL) -> None:
    session, arena = Session(library), c.c_size_t(0)
    assert session.load(small().SerializeToString()) == OK
    tensors = (Tensor * 2)(
        Tensor(TensorProto.FLOAT, 3, (c.c_int64 * 3)(4, 3, 5), None, 0),
        Tensor(TensorProto.INT64, 1, (c.c_int64 * 1)(2), None, 0),
    )
    assert (
        library.fw_engine_prepare(
            session.engine, tensors, c.c_size_t(2), c.byref(arena), session.buffer, c.c_size_t(512)
        )
        == OK
    )
    engine = core.Engine(small().SerializeToString())
    assert arena.value == engine.arena_bytes([ramp((4, 3, 5)), np.array([0, 0])]) > 4 * 3 * 5 * 4
    session.close()


def test_wrong_calls_are_refused_in_words(library: c.CDLL, tmp_path: Path) -> None:
    session = Session(library)
    model = small().SerializeToString()
    x, i = ramp((4, 3, 5)), np.array([7, 8])
    size = c.sizeof(Options)
    for options, text in (
        (Options(0, 1, None, None), "FW_OPTIONS"),
        (Options(size, 0, None, None), "threads"),
        (Options(size, 1, b"mmx", None), "no instruction set 'mmx'"),
    ):
        assert session.load(model, options) == ERROR
        assert text in session.text and not session.engine
    assert session.load(b"no model") == ERROR and "no ONNX file" in session.text
    assert library.fw_engine_load(None, None, c.byref(session.engine), session.buffer, c.c_size_t(512)) == ERROR
    assert library.fw_engine_load(b"/nothing", None, c.byref(session.engine), session.buffer, c.c_size_t(512)) == ERROR
    assert "'/nothing' cannot be opened" in session.text
    assert library.fw_engine_load(b"/nothing", None, None, None, c.c_size_t(0)) == ERROR
    assert session.load(model) == OK
    assert session.run(x) == ERROR and "2 inputs, and 1 were given" in session.text and not session.result
    assert session.run(x, i, less=4) == ERROR and "bytes" in session.text
    assert session.run(x[:, :2], i) == ERROR and "größex3x5" in session.text
    assert session.run(x.astype(np.float64), i) == ERROR and "float" in session.text
    assert (
        library.fw_engine_run(session.engine, None, c.c_size_t(2), c.byref(session.result), None, c.c_size_t(0))
        == ERROR
    )
    tensor = (Tensor * 1)(Tensor(99, 1, (c.c_int64 * 1)(2), None, 0))
    assert (
        library.fw_engine_run(session.engine, tensor, c.c_size_t(1), c.byref(session.result), None, c.c_size_t(0))
        == UNSUPPORTED
    )
    session.close()


def test_what_is_not_supported_is_told_apart(library: c.CDLL) -> None:
    model = small()
    model.graph.node[1].op_type = "NoSuchOp"
    session = Session(library)
    assert session.load(model.SerializeToString()) == OK
    assert session.run(ramp((4, 3, 5)), np.array([7, 8])) == UNSUPPORTED
    assert "NoSuchOp 'relu'" in session.text
    session.close()


def test_options_of_another_version(library: c.CDLL) -> None:
    class Newer(c.Structure):
        _fields_ = (*Options._fields_, ("news", c.c_int64))

    model = small().SerializeToString()
    session = Session(library)
    older = Options(16, 3, c.c_char_p(b"a pointer that the older program did not have"), None)
    assert session.load(model, older) == OK and library.fw_engine_threads(session.engine) == 3
    session.close()
    session = Session(library)
    newer = Newer(c.sizeof(Newer), 2, None, None, 0)
    assert session.load(model, newer) == OK and library.fw_engine_threads(session.engine) == 2  # type: ignore[arg-type]
    session.close()
    newer.news = 1
    session = Session(library)
    assert session.load(model, newer) == ERROR and "newer version" in session.text  # type: ignore[arg-type]
    session.close()


def test_text_that_is_too_long_is_cut_between_characters(library: c.CDLL) -> None:
    model = small()
    model.graph.node[1].op_type = "ö" * 300
    model.opset_import[0].version = 20
    for room in (40, 41, 1):
        session = Session(library, room)
        session.load(model.SerializeToString())
        assert session.run(ramp((1, 3, 5)), np.array([7, 8])) == UNSUPPORTED
        assert len(session.buffer.value) in (room - 1, room - 2) or room == 1
        assert session.text == ("ö" * 20)[: (room - 1) // 2]
        assert session.buffer.raw[room : room + 1] == b"?"
        session.close()
