# SPDX-License-Identifier: Apache-2.0
"""The commands that look, time, export and report: `doctor`, `inspect`, `bench`, `export`, `report`."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import featherweight as fw
from featherweight import doctor
from tests.report.sample import sample_report

from .conftest import Run
from .user_tasks import net


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `compress` leaves it: weights (those of `tasks.net`, pruned), plan, and the ONNX file."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = net()
    torch.nn.init.zeros_(model[2].weight[8:].detach())
    fw.save(model, fw.Plan(), folder)
    fw.export_onnx(model, (torch.randn(2, 16),), folder / "model.onnx")
    return folder


def test_doctor_tells_of_extras_runtimes_and_the_processor(run: Run) -> None:
    answer = run("doctor", "--json").answer
    assert answer["featherweight"] == fw.__version__
    assert answer["extras"]["onnx"]["packages"]["onnxruntime"] == onnxruntime.__version__
    assert {"data", "onnx", "openvino", "report", "train"} <= set(answer["extras"])
    assert answer["runtimes"]["torch"] == {"works": True, "facts": answer["runtimes"]["torch"]["facts"]}
    assert torch.__version__ in answer["runtimes"]["torch"]["facts"]
    assert {"gradual_pruning", "train"} <= set(answer["methods"])
    told = run("doctor").stdout
    assert "only the engine skips them" in told and "onnxruntime" in told


def test_doctor_leaves_no_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("doctor", "--json").answer["writable"]["works"]
    assert list(tmp_path.iterdir()) == []
    assert not doctor.diagnose(tmp_path / "nowhere")["writable"]["works"]


def test_a_missing_extra_ends_in_5_with_its_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"jinja2": None, "onnx": "1.2.0"}  # one that is missing, one that is too old
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    assert run("doctor", "--extra", "train").exit_code == 0
    result = run("doctor", "--extra", "report", "--extra", "onnx")
    assert result.exit_code == 5
    assert 'jinja2>=3.1, onnx>=1.23 not installed. Run: pip install "featherweight[report,onnx]"' in result.stderr
    assert 'pip install "featherweight[report]"' in result.stdout
    monkeypatch.setitem(doctor._RUNTIMES, "onnxruntime", ("onnx", divmod))  # type: ignore[index]
    assert "installed but broken: TypeError" in run("doctor").stdout


def test_an_unknown_extra_is_answered_with_the_nearest(run: Run) -> None:
    result = run("doctor", "--extra", "onx")
    assert result.exit_code == 2 and "Nearest: onnx" in result.stderr


def test_inspect_lists_layers_and_why_not(project: Path, run: Run) -> None:
    answer = run("inspect", "tasks:net", "--input", "4x16", "--json").answer
    assert [layer["macs"] for layer in answer["layers"]] == [4 * 16 * 48, 4 * 48 * 32, 4 * 32 * 2]
    assert [layer["action"] for layer in answer["layers"]] == ["pruned", "pruned", "kept"]
    assert (answer["pruned"], answer["of"]) == (2, 3)
    told = run("inspect", "--task", "tasks:task").stdout
    assert "kept: output layer; dense=() prunes it too" in told and "2 of 3 weights would be pruned." in told
    assert "need an input" in run("inspect", "tasks:net").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Give either a model"),
        (["tasks:net", "--task", "tasks:task"], "Give either a model"),
        (["tasks:task"], "tasks:task returned Task, not a torch.nn.Module"),
        (["tasks:net", "--input", "1xx16"], "--input '1xx16'"),
        (["tasks:net", "--input", "1x16:floaty"], "--input '1x16:floaty'"),
        (["tasks:net", "--input", "1x15"], "1x15 and 16x48"),
    ],
)
def test_inspect_answers_bad_input_with_2(project: Path, run: Run, words: list[str], said: str) -> None:
    result = run("inspect", *words)
    assert result.exit_code == 2 and said in result.stderr


def test_bench_times_a_file_a_folder_and_a_class_side_by_side(project: Path, run: Run, exported: Path) -> None:
    file = exported / "model.onnx"
    words = ("bench", file, exported, "--threads", 1, "--runs", 50, "--batch", 3, "--json")
    answer = run(*words, "--runtime", "onnxruntime").answer
    assert answer["inputs"] == [[3, 16]]
    assert [row["bytes"] for row in answer["rows"]] == [
        file.stat().st_size,
        (exported / "model.safetensors").stat().st_size,
    ]
    assert answer["rows"][0]["comparison"] is None
    assert all(row["latency"]["n"] >= 50 and row["latency"]["threads"] == 1 for row in answer["rows"])


def test_bench_times_the_engine_beside_stock_runtimes(project: Path, run: Run, exported: Path) -> None:
    runtimes = ["engine", "onnxruntime", "openvino", "torch"]
    words = ("bench", exported, "--model", "tasks:net", "--runtime", ",".join(runtimes), "--threads", 1, "--runs", 50)
    answer = run(*words, "--json").answer
    assert [row["runtime"] for row in answer["rows"]] == runtimes
    assert all(0 < row["latency"]["median_ms"] < 100 and row["latency"]["threads"] == 1 for row in answer["rows"])
    assert "featherweight-engine" in answer["machine"]["versions"]
    assert [row["comparison"] is None for row in answer["rows"]] == [True, False, False, False]
    shown = " ".join(run(*words).stdout.split())
    assert "the engine runs all of it itself" in shown and "left out" not in shown


def test_bench_leaves_torch_out_of_a_file_without_a_class_and_says_so(project: Path, run: Run, exported: Path) -> None:
    words = ("bench", exported / "model.onnx", "--runtime", "torch,engine,onnxruntime", "--threads", 1, "--runs", 50)
    answer = run(*words, "--json").answer
    assert [row["runtime"] for row in answer["rows"]] == ["engine", "onnxruntime"]
    assert "PyTorch is left out" in answer["notes"][0] and "needs the model's class" in answer["notes"][0]


def test_bench_finds_the_slower_one(project: Path, run: Run, exported: Path) -> None:
    Path("sleepy.py").write_text(
        "import time, tasks\ndef net():\n    model = tasks.net()\n"
        "    model.register_forward_hook(lambda *args: time.sleep(0.02))\n    return model\n"
    )
    words = ("bench", "sleepy:net", exported, "--model", "tasks:net", "--runtime", "torch", "--runs", 50)
    result = run(*words, "--input", "1x16", "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    slow, fast = result.answer["rows"]
    assert slow["latency"]["median_ms"] >= 20
    assert fast["comparison"]["faster"] is True
    assert fast["comparison"]["ratio"] == pytest.approx(
        slow["latency"]["median_ms"] / fast["latency"]["median_ms"], rel=0.01
    )


def test_bench_sets_integers_beside_the_same_network_in_float32(project: Path, run: Run) -> None:
    """The twin answers as the file does but for its grids, and what stayed in floating point is named."""
    Path("few_bits.py").write_text(
        "import torch, tasks, featherweight as fw\n"
        "def task():\n    return tasks.task()\n"
        "def net():\n    model, task = tasks.net(), tasks.task()\n"
        "    fw.Quantize(8, activations='static', correct=())(model, task, fw.Stage())\n    return model\n"
        "def quantized():\n    import dataclasses\n    return dataclasses.replace(tasks.task(), model=net())\n"
    )
    written = run("export", "--task", "few_bits:quantized", "-o", "few_bits.onnx", "--json")
    assert written.exit_code == 0, written.stderr
    facts = written.answer["integers"]
    assert facts["int8"] > 0 and facts["inputs"] > 0
    assert written.answer["parity"]["steps"] < 1
    answer = run("bench", "few_bits.onnx", "--runs", 50, "--threads", 1, "--json").answer
    assert [row["runtime"] for row in answer["integers"]] == ["onnxruntime", "openvino"]
    for row in answer["integers"]:
        assert row["form"]["integer"] and row["comparison"]["ratio"] > 0
        assert "the same network in float32" in row["words"] and "layers in integers" in row["words"]
    shown = run("bench", "few_bits.onnx", "--runs", 50, "--threads", 1, "--runtime", "onnxruntime")
    assert "the same network in float32" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}/model.onnx", "--runtime", "torch"], "cannot run in torch, which needs the model's class"),
        (["{run}", "--runtime", "torch"], "Give --model package.module:factory"),
        (["{run}", "--runtime", "onnxrutime"], "Nearest: onnxruntime"),
        (["nowhere.onnx"], "nowhere.onnx is not there"),
        (["tasks:net"], "Give --input"),
        (["tasks.py"], "names no function"),
        (["recipe.onnx"], "could not be read as ONNX"),
    ],
)
def test_bench_answers_bad_input_with_2(project: Path, run: Run, exported: Path, words: list[str], said: str) -> None:
    Path("recipe.onnx").write_text("not ONNX")
    result = run("bench", *(word.replace("{run}", str(exported)) for word in words))
    assert result.exit_code == 2 and said in result.stderr, result.stderr


def answers(file: Path, inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file))
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def test_export_writes_what_answers_as_the_loaded_model(project: Path, run: Run, exported: Path) -> None:
    """ONNX Runtime called by hand, on a batch that the exporter never saw."""
    result = run("export", exported, "--model", "tasks:net", "-o", "out.onnx", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.answer["parity"]["passed"] and result.answer["opset"] == 18
    model = fw.load(net(), exported).eval()
    x = torch.randn(7, 16)
    assert np.allclose(answers(Path("out.onnx"), x.numpy()), model(x).detach().numpy(), atol=1e-5)
    assert not np.allclose(answers(Path("out.onnx"), x.numpy()), net()(x).detach().numpy(), atol=1e-3)


def test_export_of_a_task_with_a_fixed_batch(project: Path, run: Run) -> None:
    result = run("export", "--task", "tasks:task", "--static-batch", "-o", "fixed.onnx")
    assert result.exit_code == 0, result.stderr
    assert "the example's batch size" in result.stdout and "argmax agrees" in result.stdout
    assert onnxruntime.InferenceSession("fixed.onnx").get_inputs()[0].shape == [2, 16]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["{run}", "-o", "x.onnx"], 2, "give --model package.module:factory"),
        (["{run}", "--model", "tasks:net"], 2, "Give -o FILE.onnx"),
        (["--model", "tasks:net", "-o", "x.onnx"], 2, "Give --input"),
        (["nowhere", "--model", "tasks:net", "-o", "x.onnx"], 2, "nowhere is not a folder"),
        (
            ["--model", "tasks:net", "--input", "1x16", "--opset", "11", "-o", "x.onnx"],
            2,
            "greater than or equal to 18",
        ),
        (["--task", "tasks:unexportable", "-o", "x.onnx"], 4, "bessel_j0"),
    ],
)
def test_export_answers_what_it_cannot_do(
    project: Path, run: Run, exported: Path, words: list[str], code: int, said: str
) -> None:
    result = run("export", *(word.replace("{run}", str(exported)) for word in words))
    assert result.exit_code == code and said in result.stderr, result.stderr
    assert not Path("x.onnx").exists()


def test_report_renders_one_run_and_sets_several_side_by_side(tmp_path: Path, run: Run) -> None:
    folders = [tmp_path / "run-75", tmp_path / "run-90"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({**sample_report(seed), "title": folder.name}))
    assert run("report", folders[0]).exit_code == 0
    assert "run-75" in (folders[0] / "report.html").read_text()
    page = tmp_path / "both.html"
    assert run("report", *folders, "--html", page).exit_code == 0
    assert all(name in page.read_text() for name in ("run-75", "run-90"))
    assert "run-75" in run("report", folders[0], "--md").stdout.splitlines()[0]
    assert run("report", *folders).stdout.count("run-90") >= 1
    assert [r["title"] for r in run("report", *folders, "--json").answer["reports"]] == ["run-75", "run-90"]


def test_report_of_what_is_no_run_is_answered_with_2(tmp_path: Path, run: Run) -> None:
    assert "no run of featherweight has finished there" in run("report", tmp_path).stderr
    (tmp_path / "report.json").write_text("{}")
    assert "is not a report of featherweight" in run("report", tmp_path).stderr
    (tmp_path / "report.json").write_text("{")
    assert run("report", tmp_path).exit_code == 2
    assert "it is not a folder" in run("report", tmp_path / "nowhere").stderr
