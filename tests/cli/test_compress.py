# SPDX-License-Identifier: Apache-2.0
"""`featherweight compress`: what it delivers, and how it answers each kind of bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import featherweight as fw
from featherweight import artefact, errors

from .conftest import RECIPE, Run, write_project

COMPRESS = ("compress", "--recipe", "recipe.toml", "--out", "run")
FEATHERWEIGHT = [sys.executable, "-m", "featherweight.cli"]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_task_and_a_recipe_give_a_verified_folder(project: Path, run: Run) -> None:
    result = run(*COMPRESS, "--task", "tasks:task")
    assert result.exit_code == 0, result.stderr
    assert "run/report.html" in result.stdout
    assert "smaller on disk" in result.stdout
    assert "\x1b" not in result.stdout
    assert files(project / "run") == {
        "README.md", "model.onnx", "model.safetensors", "plan.json", "report.html", "report.json",
    }  # fmt: skip
    import tasks

    model = fw.load(tasks.net(), "run")
    zeros = [int((model[i].weight == 0).sum()) / model[i].weight.numel() for i in (0, 2, 4)]
    assert zeros == [0.75, 0.75, 0.0]
    report = json.loads((project / "run/report.json").read_text())
    assert report["reproduce"]["command"] == "featherweight compress --recipe recipe.toml --out run --task tasks:task"


def test_a_model_without_data_takes_a_recipe_that_needs_none(project: Path, run: Run) -> None:
    Path("recipe.toml").write_text('[[stages]]\nmethod = "prune"\nsparsity = 0.5\n')
    result = run(*COMPRESS, "tasks:net", "--input", "1x16", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert [match["pruned"] for match in result.answer["stages"][0]["matches"]] == [2]


def test_a_dry_run_tells_and_writes_nothing(project: Path, run: Run) -> None:
    before = files(project)
    result = run(*COMPRESS, "--task", "tasks:task", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "gradual_pruning matches 2 of 3 weights" in result.stdout
    assert "output layer" in result.stdout
    assert "Estimates, not measurements" in result.stdout
    assert {name for name in files(project) if "__pycache__" not in name} == before


def test_a_missed_budget_ends_in_3_with_the_best_model_delivered(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featherweight.deploy.export_onnx", cannot_export)
    Path("recipe.toml").write_text(
        '[[stages]]\nmethod = "iterative"\nrounds = 1\nuntil = { sparsity = 0.9 }\n'
        'step = [{ method = "prune", sparsity = 0.2, of = "remaining" }]\n'
    )
    result = run(*COMPRESS, "--task", "tasks:task", "--json")
    assert result.exit_code == result.answer["exit_code"] == 3
    assert "BudgetNotMet" in result.stderr and "90.0% zeros" in result.stderr
    assert {"model.safetensors", "plan.json", "report.json"} <= files(project / "run")


def cannot_export(*args: object, **options: object) -> None:
    """In place of an export that a test has no need of: most of a small run's time."""
    raise errors.ExportError("not in this test")


def test_what_cannot_be_exported_is_delivered_without_the_onnx_file(project: Path, run: Run) -> None:
    """And with --json stdout holds one document, though the user's own code prints."""
    result = run(*COMPRESS, "--task", "tasks:unexportable", "--seed", 7, "--keep", "2", "--json")
    assert result.exit_code == result.answer["exit_code"] == 4
    assert "Everything but a model.onnx" in result.stderr
    assert files(project / "run") == {"README.md", "model.safetensors", "plan.json", "report.html", "report.json"}
    assert "a line of the user's own" in result.stderr
    assert result.answer["report"]["reproduce"]["seed"] == 7
    chosen = {line["name"]: line["reason"] for line in result.answer["report"]["stages"][0]["selection"]}
    assert chosen["2.weight"] == "keep='2' names it"


BAD_TASKS = [
    ("tasks:empty_loader", "DataError: Task.train is empty"),
    ("tasks:one_shot_loader", "DataError: Task.train is a one-shot iterator"),
    ("tasks:wrong_shape", "Tensor[160, 15]"),
    ("tasks:nan_weights", "NumericalError: 2.weight has NaN"),
    ("tasks:nan_loss", "NumericalError: "),
    ("tasks:not_a_task", "tasks:not_a_task returned Sequential, not a featherweight.Task"),
    ("tasks:broken", "tasks:broken() failed: KeyError: 'no such key'"),
    ("tasks:needs_an_argument", "missing 1 required positional argument"),
    ("tasks:tsk", "tasks has no 'tsk'. Nearest names: task"),
    ("tasks", "'tasks' names no function"),
    ("tasks.py:task", "For that file: tasks:task."),
    ("no_such_module:task", "There is no module 'no_such_module'"),
    ("tasks:broken_evaluate", "KeyError: 'my own mistake'"),
]


@pytest.mark.parametrize(("name", "said"), BAD_TASKS, ids=[name for name, _ in BAD_TASKS])
def test_a_bad_task_is_answered_in_one_message_and_2(project: Path, run: Run, name: str, said: str) -> None:
    result = run(*COMPRESS, "--task", name)
    assert result.exit_code == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr and "Internal error" not in result.stderr
    assert not (project / "run/plan.json").exists()


def test_an_error_of_ours_in_the_users_function_keeps_its_code(project: Path, run: Run) -> None:
    result = run(*COMPRESS, "--task", "tasks:needs_an_extra")
    assert result.exit_code == 5 and result.stderr.startswith("MissingExtra: a_package_that_is_not_there")


@pytest.mark.parametrize("name", ["broken", "broken_evaluate"])
def test_the_users_line_is_named(project: Path, run: Run, name: str) -> None:
    culprits = {"broken": 'return {}["no such key"]', "broken_evaluate": 'raise KeyError("my own mistake")'}
    lines = Path("tasks.py").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, start=1) if culprits[name] in line)
    assert re.search(rf"tasks\.py(:|, line ){number}\b", run(*COMPRESS, "--task", f"tasks:{name}").stderr)


BAD_RECIPES = [
    (RECIPE.replace("lr = 0.01", "learning_rate = 0.01"), "recipe.toml, line 5: method 'train' has no key 'learning_rate'"),
    (RECIPE.replace("sparsity = 0.75", "sparsity = 1.0"), "must be at least 0 and below 1; got 1.0"),
    (RECIPE.replace("sparsity = 0.75", "sparsity = -0.1"), "must be at least 0 and below 1; got -0.1"),
    (RECIPE.replace("end = 20", "begin = 25, end = 20"), "end=20 is before begin=25"),
    (RECIPE.replace("end = 20", "end = 30"), "ends at step 30, but training stops after step 29"),
    (RECIPE.replace("end = 20", 'end = 20, layers = ["conv*"]'), "NothingToCompress: layers: 'conv*' matches none"),
    (RECIPE.replace("gradual_pruning", "gradual_prunning"), "no method 'gradual_prunning'. Nearest: gradual_pruning"),
    ("stages = 3", "a recipe needs at least one table [[stages]]"),
    ("[[stages]\n", "recipe.toml: "),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "said"), BAD_RECIPES, ids=[said for _, said in BAD_RECIPES])
def test_a_bad_recipe_is_answered_in_one_message_and_2(project: Path, run: Run, recipe: str, said: str) -> None:
    Path("recipe.toml").write_text(recipe)
    result = run(*COMPRESS, "--task", "tasks:task", "--json")
    assert result.exit_code == result.answer["exit_code"] == 2
    assert said in result.stderr and said.partition(": ")[2] in result.answer["error"]["message"]


def test_a_keep_that_nothing_can_take_is_refused(project: Path, run: Run) -> None:
    Path("recipe.toml").write_text('[[stages]]\nmethod = "train"\nsteps = 1\n')
    result = run(*COMPRESS, "--task", "tasks:task", "--keep", "fc")
    assert result.exit_code == 2 and "no method of the recipe has an option keep" in result.stderr


def test_a_second_run_into_one_folder_is_refused_and_the_first_stays(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featherweight.deploy.export_onnx", cannot_export)
    Path("recipe.toml").write_text('[[stages]]\nmethod = "prune"\nsparsity = 0.5\n')
    assert run(*COMPRESS, "--task", "tasks:task").exit_code == 4  # delivered, but for the export
    before = (project / "run/model.safetensors").read_bytes()
    result = run(*COMPRESS, "--task", "tasks:task", "--seed", 1)
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert (project / "run/model.safetensors").read_bytes() == before
    assert run(*COMPRESS, "--task", "tasks:task", "--overwrite").exit_code == 4
    assert (project / "run/model.safetensors").read_bytes() == before


def test_a_folder_that_another_run_is_writing_is_refused(project: Path, run: Run) -> None:
    with artefact.claim(project / "run"):
        result = run(*COMPRESS, "--task", "tasks:task", "--overwrite")
    assert result.exit_code == 2 and "is in use by another run" in result.stderr


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(project: Path, run: Run) -> None:
    Path("run").write_text("a file, not a folder")
    result = run(*COMPRESS, "--task", "tasks:task")
    assert result.exit_code == 2 and "cannot be written" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_full_disk_ends_in_one_message(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        Path("/dev/full").write_text("x")

    monkeypatch.setattr("featherweight.state.save_file", full)
    result = run(*COMPRESS, "--task", "tasks:task")
    assert result.exit_code == 2 and "No space left on device" in result.stderr and "Internal" not in result.stderr


def test_a_bug_of_ours_says_so_and_ends_in_1(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featherweight.run._recipe", divmod)  # fails in our line, as a bug of ours would
    result = run(*COMPRESS, "--task", "tasks:task")
    assert result.exit_code == 1
    assert "Internal error, TypeError" in result.stderr and "This is a bug of featherweight" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run(*COMPRESS, "--task", "tasks:task", "--debug").stderr


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*FEATHERWEIGHT, *COMPRESS, "--task", "tasks:slow", *more]
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that are run in the background inherit that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Against a run that nobody stopped: the file of weights equal to the last byte, and the same curve."""
    whole, stopped = write_project(tmp_path / "whole"), write_project(tmp_path / "stopped")
    killed = start(stopped)
    wait_for(stopped / "run/.work/training.safetensors", killed)
    killed.kill()
    killed.wait()
    assert not (stopped / "run/plan.json").exists()
    runs = [start(whole), start(stopped, "--resume")]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    reports = [json.loads((folder / "run/report.json").read_text()) for folder in (whole, stopped)]
    assert reports[0]["stages"][0]["history"] == reports[1]["stages"][0]["history"]
    weights = [(folder / "run/model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert weights[0] == weights[1]


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(write_project(tmp_path / "project"))
    wait_for(tmp_path / "project/run/.work/training.safetensors", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "\nInterrupted." in said and "Traceback" not in said
    assert "featherweight compress --recipe recipe.toml --out run --task tasks:slow --resume" in said
