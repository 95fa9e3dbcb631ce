# SPDX-License-Identifier: Apache-2.0
"""The demo from the command line: real digits, 90 % zeros, and every claim of its table checked on what it wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import featherweight as fw
from featherweight.cli import app
from featherweight.demo import FLOOR, QUICK_FLOOR, _check_own, recipe
from featherweight.digits import Digits, DigitsNet, digits, digits_task
from featherweight.recipe import to_dict
from featherweight.state import save_state


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What one run of the demo says, and its folder."""
    place = tmp_path_factory.mktemp("demo")
    words = [sys.executable, "-m", "featherweight.cli", "demo", "--json"]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), place / "featherweight-demo"


@pytest.fixture(scope="module")
def pruned(finished: tuple[dict[str, Any], Path]) -> torch.nn.Module:
    return fw.load(DigitsNet(), finished[1]).eval()


def right(answers: torch.Tensor, labels: torch.Tensor) -> float:
    return int((answers.argmax(1) == labels).sum()) / len(labels)


def test_the_pruned_network_reads_digits_it_never_saw(
    finished: tuple[dict[str, Any], Path], pruned: torch.nn.Module
) -> None:
    report = finished[0]["report"]
    images, labels = digits("test")
    assert right(pruned(images), labels) == pytest.approx(report["after"]["metric"])
    assert report["after"]["metric"] >= FLOOR
    assert report["before"]["metric"] >= FLOOR, "the dense network is worth comparing with"


def test_ninety_percent_of_each_layer_but_the_first_are_zeros(pruned: torch.nn.Module) -> None:
    weights = [p for p in pruned.parameters() if p.ndim > 1]
    assert [int((w == 0).sum()) for w in weights] == [0, *(round(0.9 * w.numel()) for w in weights[1:])]


def test_the_file_on_disk_is_as_small_as_it_says(finished: tuple[dict[str, Any], Path]) -> None:
    """A bit a weight and 4 bytes a kept one is the best known for 90 %; header, norms and the first layer come on top."""
    report, folder = finished[0]["report"], finished[1]
    size = (folder / "model.safetensors").stat().st_size
    assert size == report["after"]["packed_bytes"]
    assert report["before"]["dense_bytes"] / size >= 6.5


def test_the_onnx_file_answers_as_the_network(finished: tuple[dict[str, Any], Path], pruned: torch.nn.Module) -> None:
    report, folder = finished[0]["report"], finished[1]
    assert report["export"]["parity"]["passed"]
    images, labels = digits("test")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    answers = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    assert np.allclose(answers, pruned(images).detach().numpy(), atol=1e-4)
    assert right(torch.from_numpy(answers), labels) == pytest.approx(report["after"]["metric"])


def test_everything_is_there_and_the_curves_have_points(finished: tuple[dict[str, Any], Path]) -> None:
    answer, folder = finished
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "model.onnx",
        "model.safetensors",
        "plan.json",
        "report.html",
        "report.json",
    }
    history = answer["report"]["stages"][0]["history"]
    assert sum("metric" in row for row in history) >= 20
    assert history[-1]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert answer["report"]["reproduce"]["command"] == "featherweight demo --json"
    assert set(answer["report"]["comparisons"]) >= {"torch", "onnxruntime"}


def test_the_quick_demo_reaches_its_floor_too() -> None:
    """Its training alone, without packing and measuring."""
    torch.manual_seed(0)
    task = digits_task()
    fw.Train(steps=120, lr=3e-3, weight_decay=1e-4)(task.model, task, fw.Stage())
    result = fw.compress(task, recipe(quick=True))
    assert result.scorecards["after"].metric >= QUICK_FLOOR


@pytest.mark.parametrize("finished_run", [True, False])
def test_it_leaves_other_runs_alone(tmp_path: Path, finished_run: bool) -> None:
    if finished_run:
        fw.save(torch.nn.Linear(2, 2), fw.Plan(), tmp_path)
    else:
        (tmp_path / ".work").mkdir()
        save_state(tmp_path / ".work" / "run.safetensors", {"run": {"recipe": [{"method": "prune"}], "seed": 0}})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "holds a run that is not the demo's" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_it_replaces_what_an_earlier_demo_left(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Whether that one came to its end or was stopped."""
    _check_own(finished[1])
    (tmp_path / ".work").mkdir()
    begun = {"recipe": [to_dict(stage) for stage in recipe(quick=True).stages], "seed": 0}
    save_state(tmp_path / ".work" / "run.safetensors", {"run": begun})
    _check_own(tmp_path)


def test_the_splits_are_disjoint_and_are_the_real_digits() -> None:
    parts = [digits(split) for split in ("train", "validation", "test")]
    images = torch.cat([part[0] for part in parts]).view(-1, 64) * 16
    rows = torch.cat([images, torch.cat([part[1] for part in parts])[:, None]], dim=1).long().numpy()
    pixels, labels = load_digits(return_X_y=True)
    expected = np.column_stack([pixels, labels]).astype(int)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, expected))


def test_an_epoch_has_each_digit_at_most_once_in_a_new_order() -> None:
    data = Digits()
    epochs = [torch.cat([labels for _, labels in data]) for _ in range(2)]
    assert len(epochs[0]) == len(data) * 64
    assert not torch.equal(epochs[0], epochs[1])
    images = torch.cat([images for images, _ in data])
    assert images.shape == (len(data) * 64, 1, 8, 8)
    assert float(images.min()) == 0 and float(images.max()) == 1
