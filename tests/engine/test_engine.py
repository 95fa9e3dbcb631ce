# SPDX-License-Identifier: Apache-2.0
"""The engine as Python sees it. Oracles: ONNX Runtime, the PyTorch module, and arithmetic by hand."""

import gc
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import featherweight as fw
import featherweight_engine as core
from featherweight.errors import ArtefactError, DataError, MissingExtra, OptionError
from featherweight.runtime import physical_cores
from tests.engine.nodes import model, node, onnxruntime

RNG = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def perceptron(batch: int | str = "batch", zeros: float = 0.9) -> onnx.ModelProto:
    weights = {"w": normal(64, 128), "v": normal(128, 10)}
    weights["w"][RNG.random((64, 128)) < zeros] = 0
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        node("Relu", ["a"], outputs=["b"]),
        node("MatMul", ["b", "v"]),
    ]
    made = model(nodes, {"x": normal(3, 64)}, ["y"], weights)
    for value in (*made.graph.input, *made.graph.output):
        dim = value.type.tensor_type.shape.dim[0]
        if isinstance(batch, str):
            dim.dim_param = batch
        else:
            dim.dim_value = batch
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    onnx.save(perceptron(), str(tmp_path / "model.onnx"))
    return tmp_path / "model.onnx"


def test_a_path_or_bytes_run_as_in_onnxruntime_at_any_batch(file: Path) -> None:
    made = onnx.load(file)
    for source in (file, str(file), file.read_bytes()):
        engine = fw.engine.load(source, threads=2)
        assert (engine.threads, engine.whole) == (2, True)
        assert str(engine.inputs[0]) == "x float32[batch, 64]"
        assert [(port.name, port.type) for port in engine.outputs] == [("y", "float32")]
        for batch in (1, 5, 0, 33, 5):
            x = normal(batch, 64)
            found = engine.run({"x": x})
            np.testing.assert_allclose(found["y"], onnxruntime(made, {"x": x})["y"], rtol=1e-5, atol=1e-4)


def test_inputs_may_lie_in_memory_as_they_like(file: Path) -> None:
    engine = fw.engine.load(file)
    x = normal(64, 6)
    expected = engine.run({"x": np.ascontiguousarray(x.T)})["y"]
    for same in (x.T, torch.from_numpy(x).T, np.ascontiguousarray(x.T).astype(">f4").view(">f4")):
        np.testing.assert_array_equal(engine.run({"x": same})["y"], expected)


def test_every_physical_core_is_used_where_nothing_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    ports = importlib.import_module("featherweight.runtime.ports")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(siblings))
    monkeypatch.setattr(ports, "_siblings", siblings.__getitem__)
    assert physical_cores() == 2
    assert fw.engine.load(file).threads == 2


def test_a_fixed_shape_is_planned_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core is told a shape at once where the file has one, so that the first run has nothing left to measure."""
    parts = importlib.import_module("featherweight.runtime.parts")
    planned: list[int] = []
    real = parts.CorePart.prepare
    monkeypatch.setattr(parts.CorePart, "prepare", lambda self, values: planned.append(real(self, values)))
    fw.engine.load(perceptron(batch=3).SerializeToString())
    assert len(planned) == 1 and planned[0] >= 4 * 3 * (64 + 128 + 10)
    fw.engine.load(perceptron().SerializeToString())
    assert len(planned) == 1


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"z": normal(1, 64)}, r"there is no input 'z'; it takes x float32\[batch, 64\]. Nearest:"),
        ({}, r"x is missing; it takes x float32\[batch, 64\]"),
        ({"x": np.zeros((1, 64))}, r"takes x float32\[batch, 64\], and float64 was given. Give x.astype\('float32'\)"),
        ({"x": normal(1, 63)}, r"takes x float32\[batch, 64\], and an array of shape \[1, 63\] was given"),
        ({"x": normal(64)}, r"an array of shape \[64\] was given"),
    ],
)
def test_inputs_that_do_not_fit_are_told(inputs: dict[str, Any], said: str, file: Path) -> None:
    with pytest.raises(DataError, match=said) as raised:
        fw.engine.load(file).run(inputs)
    assert "model.onnx" in str(raised.value)


def test_files_and_options_that_do_not_fit_are_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"none.onnx is not there"):
        fw.engine.load(tmp_path / "none.onnx")
    (tmp_path / "damaged.onnx").write_bytes(file.read_bytes()[:200])
    with pytest.raises(ArtefactError, match=r"damaged.onnx"):
        fw.engine.load(tmp_path / "damaged.onnx")
    with pytest.raises(OptionError, match="threads must be a whole number from 1 on; got 0"):
        fw.engine.load(file, threads=0)
    with pytest.raises(OptionError, match="instruction_set 'avx' is none of"):
        fw.engine.load(file, instruction_set="avx")
    made = perceptron()
    made.graph.node[1].CopyFrom(helper.make_node("Unheard", ["a"], ["b"], domain="of"))
    made.opset_import.append(helper.make_opsetid("of", 1))
    with pytest.raises(ArtefactError, match=r"the engine hands Unheard to ONNX Runtime, which refuses: .*Unheard"):
        fw.engine.load(made.SerializeToString())


def convolutions(batch: int | str = 1) -> onnx.ModelProto:
    """Large enough that there is something to measure."""
    weights = {"w": normal(48, 64, 3, 3), "v": normal(64, 48, 3, 3)}
    weights["w"][RNG.random(weights["w"].shape) < 0.8] = 0
    made = model(
        [node("Conv", ["x", "w"], outputs=["a"], pads=[1] * 4), node("Conv", ["a", "v"], pads=[1] * 4)],
        {"x": normal(1, 64, 12, 12)},
        ["y"],
        weights,
    )
    if isinstance(batch, str):
        for value in (*made.graph.input, *made.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = batch
    return made


def test_what_was_measured_is_kept_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = convolutions("batch").SerializeToString(), tmp_path / "new" / "decisions.json"
    x = {"x": normal(1, 64, 12, 12)}
    first = fw.engine.load(path, cache=cache)
    assert not cache.exists()  # nothing was measured yet
    expected = first.run(x)["y"]
    [(place, found)] = json.loads(cache.read_text()).items()
    assert len(found) == 2 and f"featherweight-engine {importlib.metadata.version('featherweight-engine')}" in place
    first.run(
        {"x": normal(3, 64, 12, 12)}
    )  # another shape, other decisions, in the same file: one more is for the batch
    assert len(json.loads(cache.read_text())[place]) == 5
    assert [each.name for each in cache.parent.iterdir()] == ["decisions.json"]

    # What the file says is done, be it slower; what it does not say is measured and added.
    [key] = [key for key in found if "/48x64x1," in key]
    other = ({"dense 3x189", "sparse 2x504"} - {found[key]}).pop()
    cache.write_text(json.dumps({place: found | {key: other}, "another": {"some": "thing"}}))
    second = fw.engine.load(path, cache=cache)
    [row] = [row for row in second.profile(x, runs=1).rows if row.op == "Conv" and row.node.endswith("w")]
    assert other in row.how
    np.testing.assert_allclose(second.run(x)["y"], expected, rtol=1e-4, atol=1e-4)
    assert json.loads(cache.read_text()) == {place: found | {key: other}, "another": {"some": "thing"}}
    second.run({"x": normal(2, 64, 12, 12)})
    after = json.loads(cache.read_text())
    assert after["another"] == {"some": "thing"} and after[place][key] == other and len(after[place]) == 5


@pytest.mark.parametrize("text", ["{", "[1]", '{"here": {"key": 3}}', '{"here": "there"}'])
def test_a_cache_that_is_none_is_refused_and_left_alone(text: str, file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "decisions.json"
    cache.write_text(text)
    with pytest.raises(ArtefactError, match=r"cache .*decisions.json"):
        fw.engine.load(file, cache=cache)
    assert cache.read_text() == text
    with pytest.raises(ArtefactError, match=r"cache .* cannot be"):
        fw.engine.load(convolutions().SerializeToString(), cache=file / "decisions.json")


def test_parts_know_what_was_measured_before_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(
        [node("MatMul", ["x", "w"], outputs=["a"]), node("MatMul", ["a", "t"])],
        {"x": normal(64, 256), "t": normal(256, 2)},
        ["y"],
        {"w": normal(256, 256)},
    )
    made.graph.input[1].type.tensor_type.ClearField("shape")
    made.graph.output[0].type.tensor_type.ClearField("shape")
    parts = importlib.import_module("featherweight.runtime.parts")
    given: list[int] = []
    real = parts.open_core

    def counted(source: Any, settings: Any, known: Any = ()) -> Any:
        given.append(len(settings.decisions()))
        return real(source, settings, known)

    monkeypatch.setattr(parts, "open_core", counted)
    monkeypatch.setattr(importlib.import_module("featherweight.runtime.engine"), "open_core", counted)
    engine = fw.engine.load(made.SerializeToString())
    engine.run({"x": normal(64, 256), "t": normal(256)})
    assert not engine.whole and given == [0, 1]


def test_an_instruction_set_can_be_asked_for(file: Path) -> None:
    x = normal(4, 64)
    for name in core.instruction_sets():
        engine = fw.engine.load(file, instruction_set=name)
        assert engine.instruction_set == name
        np.testing.assert_allclose(
            engine.run({"x": x})["y"], onnxruntime(onnx.load(file), {"x": x})["y"], rtol=1e-5, atol=1e-4
        )


def recurrent() -> onnx.ModelProto:
    constants = {"w": normal(8, 8), "lw": normal(1, 16, 8), "lr": normal(1, 16, 4), "v": normal(4, 3)}
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        node("LSTM", ["a", "lw", "lr"], outputs=["l", "h"], hidden_size=4),
        node("MatMul", ["h", "v"]),
    ]
    made = model(nodes, {"x": normal(5, 2, 8)}, ["y"], constants)
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "batch"
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "batch"
    return made


@pytest.mark.parametrize("make", [perceptron, recurrent])
def test_threads_may_call_one_engine_at_once(make: Callable[[], onnx.ModelProto]) -> None:
    """New shapes come from all sides, so that plans are made while others run."""
    made = make()
    engine = fw.engine.load(made.SerializeToString(), threads=2)
    shapes = [(b, 64) for b in range(1, 13)] if make is perceptron else [(5, b, 8) for b in range(1, 13)]
    inputs = [normal(*shape) for shape in shapes]
    expected = [onnxruntime(made, {"x": x})["y"] for x in inputs]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(len(inputs) * 3) % len(inputs):
            try:
                np.testing.assert_allclose(engine.run({"x": inputs[i]})["y"], expected[i], rtol=1e-4, atol=1e-4)
            except BaseException:
                wrong.append(int(i))
                raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_profile_tells_steps_work_and_zeros() -> None:
    """The first product: 2 x 4 x 64 x 128 flops, of which one in two is of a zero, whose place a sparse one skips."""
    made = perceptron(batch=4, zeros=0.5)
    weights = onnx.numpy_helper.to_array(made.graph.initializer[0])
    engine = fw.engine.load(made.SerializeToString())
    profile = engine.profile({"x": normal(4, 64)}, runs=3)
    products = [row for row in profile.rows if row.op == "MatMul" and row.flops]
    assert [row.node for row in products] == ["MatMul_of_x_w", "MatMul_of_b_v"]
    assert products[0].flops == pytest.approx(2 * 4 * np.count_nonzero(weights))
    percent = round(100 * (1 - np.count_nonzero(weights) / weights.size))
    assert f"{percent} % zeros" in products[0].how and "0 % zeros" in products[1].how
    assert profile.runs == 3 and all(row.seconds > 0 for row in products)
    table = str(profile)
    assert "GFLOP/s" in table and "MatMul_of_x_w" in table and "a run, median of 3" in table
    assert f"{len(profile.rows) - 1} more" in profile.table(top=1)
    assert profile.to_dict()["rows"][0]["op"]


def test_a_profile_of_a_cut_model_has_a_row_for_each_foreign_part() -> None:
    engine = fw.engine.load(recurrent().SerializeToString())
    rows = [row for row in engine.profile({"x": normal(5, 2, 8)}, runs=1).rows if row.how == "ONNX Runtime"]
    assert [row.op for row in rows] == ["LSTM"]
    assert rows[0].bytes == 4 * (5 * 2 * 8 + 1 * 2 * 4)


def test_a_closed_engine_says_so(file: Path) -> None:
    with fw.engine.load(file) as engine:
        engine.run({"x": normal(1, 64)})
    assert str(engine).endswith("closed")
    with pytest.raises(OptionError, match=r"was closed. load it again"):
        engine.run({"x": normal(1, 64)})


def refused_later(path: Path) -> onnx.ModelProto:
    """Planned as two products of matrices at first; a vector, which the core does not take, comes later."""
    made = model(
        [node("MatMul", ["x", "w"], outputs=["a"]), node("MatMul", ["a", "t"])],
        {"x": normal(8, 8), "t": normal(8, 2)},
        ["y"],
        {"w": normal(8, 8)},
    )
    made.graph.input[1].type.tensor_type.ClearField("shape")
    made.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(made, str(path))
    return made


def test_a_shape_that_comes_later_may_change_what_runs_where(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    made = refused_later(path)
    engine = fw.engine.load(path)
    for t, whole in ((normal(8, 2), True), (normal(8), False), (normal(8, 3), False)):
        inputs = {"x": normal(8, 8), "t": t}
        np.testing.assert_allclose(engine.run(inputs)["y"], onnxruntime(made, inputs)["y"], rtol=1e-4, atol=1e-4)
        assert engine.whole is whole


def test_threads_that_are_refused_together_hand_over_once(tmp_path: Path) -> None:
    """A refusal of a plan that another thread has mended already would take the rest of the graph along."""
    path = tmp_path / "model.onnx"
    refused_later(path)
    engine = fw.engine.load(path)
    together = threading.Barrier(4)
    real = engine._walk

    def walk(steps: Any, values: dict[str, Any]) -> dict[str, Any]:
        try:
            return real(steps, values)
        except Exception:
            together.wait(timeout=20)
            raise

    engine._walk = walk  # type: ignore[method-assign]
    work = [threading.Thread(target=engine.run, args=({"x": normal(8, 8), "t": normal(8)},)) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert "In the engine: MatMul. In ONNX Runtime: MatMul." in engine.describe()


def test_a_file_that_changed_meanwhile_is_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    refused_later(path)
    engine = fw.engine.load(path)
    path.write_bytes(path.read_bytes() + b"\x00" * 8)
    with pytest.raises(ArtefactError, match=r"has changed since it was loaded. load it again"):
        engine.run({"x": normal(8, 8), "t": normal(8)})


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = importlib.import_module

    def guarded(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", guarded)


def test_without_onnxruntime_what_the_core_runs_whole_still_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime", "onnx")
    assert fw.engine.load(file).run({"x": normal(2, 64)})["y"].shape == (2, 10)
    with pytest.raises(
        MissingExtra, match=r"the engine has no op LSTM.*ONNX Runtime.*pip install \"featherweight\[onnx\]\""
    ):
        fw.engine.load(recurrent().SerializeToString())


def test_without_the_core_the_command_that_installs_it_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "featherweight_engine")
    with pytest.raises(MissingExtra, match=r"pip install \"featherweight\[engine\]\""):
        fw.engine.load(file)


@pytest.mark.parametrize(
    ("opening", "without"),
    [
        (
            "import featherweight_engine\nrun = featherweight_engine.Engine(path).run",
            "torch onnx onnxruntime featherweight",
        ),
        ("import featherweight as fw\nrun = lambda x: fw.engine.load(path).run({'x': x[0]})", "torch onnx onnxruntime"),
    ],
)
def test_neither_torch_nor_onnxruntime_is_imported_for_a_model_of_the_cores_own(
    opening: str, without: str, file: Path
) -> None:
    program = (
        f"import sys\nimport numpy as np\npath = {str(file)!r}\n{opening}\nrun([np.zeros((1, 64), np.float32)])\n"
        f"print([name for name in {without.split()} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Any]:
        x = torch.relu(self.norm(self.conv(image)))
        x = nn.functional.max_pool2d(x, 2)
        return {"logits": self.head(x.mean((2, 3))) * scale, "maps": [x, None]}


def test_compile_stands_in_for_a_cnn_at_any_batch_by_place_and_by_name() -> None:
    small = Small().eval()
    fast = fw.engine.compile(small, (torch.randn(2, 3, 16, 16), torch.ones(2, 1)), threads=1)
    gc.collect()
    for batch in (2, 1, 5):
        image, scale = torch.randn(batch, 3, 16, 16), torch.rand(batch, 1)
        expected = small(image, scale)
        for found in (fast(image, scale), fast(image, scale=scale), fast(scale=scale, image=image)):
            assert list(found) == ["logits", "maps"] and found["maps"][1] is None
            torch.testing.assert_close(found["logits"], expected["logits"].detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["maps"][0], expected["maps"][0].detach(), rtol=1e-4, atol=1e-5)
    assert isinstance(fast, nn.Module) and not list(fast.parameters()) and fast.engine.threads == 1
    with pytest.raises(DataError, match="'picture' is none of them"):
        fast(picture=image, scale=scale)
    with pytest.raises(OptionError, match=r"give a tuple, for one tensor: \(x,\)"):
        fw.engine.compile(small, torch.zeros(1, 3, 16, 16))  # type: ignore[arg-type]


def test_compile_stands_in_for_a_transformer() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    fast = fw.engine.compile(encoder, (torch.randn(2, 12, 32),))
    for batch in (2, 3):
        x = torch.randn(batch, 12, 32)
        torch.testing.assert_close(fast(x), encoder(x).detach(), rtol=1e-4, atol=1e-5)
