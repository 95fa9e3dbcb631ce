# SPDX-License-Identifier: Apache-2.0
"""The Pareto front's benchmark on a made-up subject: rows, files, what goes on where it stopped, and what is drawn of it."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from benchmarks.engine import distilled, pareto, pareto_plot
from benchmarks.reconstruct import data
from benchmarks.reconstruct.subjects import Subject
from benchmarks.results import read
from onnx import numpy_helper
from torch import nn

INPUTS = torch.randn(256, 12, generator=torch.Generator().manual_seed(0))


def subject() -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        right = model(INPUTS).argmax(1)

    def per_sample(candidate: Any) -> np.ndarray:
        with torch.no_grad():
            return (candidate(INPUTS).argmax(1) == right).double().numpy()

    return Subject("made_up", model, list(INPUTS.split(32)), (INPUTS[:2],), "accuracy", len(INPUTS), per_sample)


def work(made: Subject) -> distilled.Work:
    def batches(steps: int, seed: int) -> list[torch.Tensor]:
        return list(torch.randn(steps, 16, 12, generator=torch.Generator().manual_seed(seed)))

    return distilled.Work(made, batches, nn.functional.mse_loss, 1e-3, 12, "12 steps")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(data.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setitem(pareto.SUBJECTS, "made_up", subject)
    monkeypatch.setitem(pareto.SOLVERS, "made_up", {"solver": "admm"})
    monkeypatch.setitem(distilled.WORKS, "made_up", work)
    return tmp_path


def run(action: str, folder: Path, *more: str) -> None:
    threads = torch.get_num_threads()
    try:
        pareto.main([action, "made_up", "--results", str(folder), "--docs", str(folder / "docs"), *more])
    finally:
        torch.set_num_threads(threads)


def zeros(path: Path) -> list[float]:
    """The share of zeros in each matrix of a file."""
    arrays = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    return [float((array == 0).mean()) for array in arrays if array.ndim == 2]


def test_files_have_the_zeros_that_rows_claim_and_a_run_that_was_cut_off_goes_on(folder: Path) -> None:
    run("prune", folder, "--zeros", "0.5")
    first = read(folder / "pareto.jsonl")
    run("prune", folder, "--zeros", "0.5", "0.75")
    rows = read(folder / "pareto.jsonl")
    assert rows[: len(first)] == first
    assert [(row["method"], row["zeros"]) for row in rows] == [
        ("dense", 0.0), ("int8", 0.0), ("after training", 0.5), ("gradual", 0.5), ("after training", 0.75), ("gradual", 0.75)
    ]  # fmt: skip
    for row in rows:
        if row["method"] != "int8":
            assert zeros(folder / "cache" / "engine" / "pareto" / row["file"]) == pytest.approx(
                [row["zeros"]] * 3, abs=0.02
            )
    assert rows[-1]["steps"] == 2 * rows[3]["steps"] == 24


def test_a_later_share_of_the_training_holds_the_zeros_of_the_one_before_and_leaves_the_teacher_alone() -> None:
    made = subject()
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    model = subject().model
    trained = work(made)
    trained.train(model, 0.5, (), seed=0)
    half = {name: tensor == 0 for name, tensor in model.state_dict().items() if tensor.ndim == 2}
    trained.train(model, 0.75, (), seed=1)
    for name, gone in half.items():
        weight = model.state_dict()[name]
        assert gone.float().mean() == 0.5 and (weight == 0).float().mean() == 0.75
        assert not weight[gone].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())


def test_dropout_and_statistics_of_batch_norm_rest_while_a_network_is_trained() -> None:
    """The first step's loss is nothing, since student and teacher are alike; hooks and mode are as they were afterwards."""
    made = subject()
    norm, losses = nn.BatchNorm1d(32), []
    model = nn.Sequential(made.model[0], norm, nn.Dropout(0.5), *made.model[1:]).eval()
    norm.running_mean.fill_(0.25)

    def loss(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        losses.append(nn.functional.mse_loss(outputs, wanted))
        return losses[-1]

    trained = dataclasses.replace(work(dataclasses.replace(made, model=model)), loss=loss)
    student = copy.deepcopy(model)
    trained.train(student, 0.5, (), seed=0)
    assert losses[0] == 0 and losses[-1] > 0
    assert student[1].running_mean.eq(0.25).all() and not student._forward_pre_hooks and not student.training
    assert not torch.equal(student[1].weight, norm.weight)


def test_pieces_of_a_tone_become_frames_of_the_tone_at_another_speed() -> None:
    length, cycles = 1536, 96
    tone = torch.sin(2 * torch.pi * cycles * torch.arange(length) / length)[None] * 3 + 1
    frames = distilled.frames(tone, 200, torch.Generator().manual_seed(0))
    assert frames.shape == (200, 1024)
    assert frames.mean(1).abs().max() < 1e-5 and (frames.var(1, correction=0) - 1).abs().max() < 0.01
    window = np.hanning(1024)
    spectrum = np.abs(np.fft.rfft(frames.numpy() * window, 8 * 1024))
    speeds = spectrum.argmax(1) / 8 / (cycles * 1024 / length)
    assert 0.69 < speeds.min() < 0.75 and 1.3 < speeds.max() < 1.41


def test_every_file_is_timed_against_what_onnx_runtime_answers_and_drawn(folder: Path) -> None:
    run("prune", folder, "--zeros", "0.5", "--methods", "int8", "after training")
    run("latency", folder, "--rounds", "2", "--turn", "1", "--stock", "0.5", "--threads", "1")
    [row] = read(folder / "pareto_latency.jsonl")
    assert row["inputs"] == [[1, 12]]
    found = {(way["runtime"], way["file"].split("-", 1)[1]): way for way in row["ways"]}
    expected = [*((r, f) for r in ("engine", "onnxruntime", "openvino") for f in ("dense-0.onnx", "after-training-0.5.onnx")),
                *((r, "int8-0.onnx") for r in ("onnxruntime", "openvino"))]  # fmt: skip
    assert {*found} == {*expected, ("openvino_bf16", "dense-0.onnx")}
    for key in expected:
        assert found[key]["median_ms"] > 0 and found[key]["runs"] >= 2
        assert found[key]["difference"] < (1e-4 if "int8" not in key[1] else 0.2)
    (folder / "docs").mkdir()
    (folder / "docs" / "engine.md").write_text("<!-- pareto -->\n<!-- end -->\n")
    run("plot", folder)
    assert (folder / "docs" / "img" / "engine-pareto.png").stat().st_size > 10_000
    assert (folder / "docs" / "engine.md").read_text().count("| made_up |") == 3


def test_the_table_compares_with_the_fastest_stock_runtime_in_float32() -> None:
    dense = {"subject": "s", "method": "dense", "zeros": 0.0, "file": "d", "name": "accuracy", "metric": 0.9}
    judged = {"change": -0.01, "low": -0.02, "high": 0.0}
    pruned = dense | judged | {"method": "gradual", "zeros": 0.9, "file": "p", "metric": 0.89, "processor_seconds": 90}
    whole = dense | {"change": 0.0, "low": 0.0, "high": 0.0}
    ways = [{"runtime": r, "file": f, "median_ms": ms} for r, f, ms in (
        ("engine", "d", 9.0), ("engine", "p", 2.0), ("onnxruntime", "d", 8.0), ("openvino", "d", 6.0),
        ("openvino_bf16", "d", 1.0), ("onnxruntime", "q", 1.5))]  # fmt: skip
    latency = [{"subject": "s", "ways": []}, {"subject": "s", "ways": ways}]
    panel = pareto_plot.Panel.of("s", [whole, pruned], latency)
    assert panel is not None and pareto_plot.Panel.of("other", [whole, pruned], latency) is None
    *_, first, last = pareto_plot.table([panel]).splitlines()
    assert "| 9.00 | 8.00 | 6.00 | 1.00 | 0.67x |" in first
    assert "| accuracy 0.890 | -0.010 [-0.020, +0.000] | 2.00 |  |  |  | 3.00x | 1.5 |" in last
