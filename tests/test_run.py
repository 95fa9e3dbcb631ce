# SPDX-License-Identifier: Apache-2.0
"""`compress` from end to end on a small network and data that can be learned."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import featherweight as fw
from featherweight import errors

GRADUAL = fw.GradualPruning(sparsity=0.8, begin=2, end=30, every=7, dense=("output",))
RECIPE = [fw.Train(steps=40, lr=0.02, hooks=[GRADUAL], evaluate_every=10), fw.Train(steps=15, lr=0.005)]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )


def make_task(slow: float = 0.0, **options: Any) -> fw.Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(320, 16, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()

    def loss(out: torch.Tensor, batch: Any) -> torch.Tensor:
        time.sleep(slow)
        return cross_entropy(out, batch[1])

    def accuracy(model: Any) -> float:
        return float((model(x[256:]).argmax(1) == y[256:]).float().mean())

    train = DataLoader(TensorDataset(x[:256], y[:256]), batch_size=32, shuffle=True)
    return fw.Task(
        make_model(),
        (x[:2],),
        **{"train": train, "loss": loss, "evaluate": accuracy, "metric": "accuracy", "samples": 64, **options},
    )


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(u, v) for (n, u), (m, v) in pairs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[fw.Task, fw.Result]:
    task = make_task()
    return task, fw.compress(task, RECIPE, out=tmp_path_factory.mktemp("runs") / "run", progress=False)


def test_the_tasks_model_is_as_it_was(finished: tuple[fw.Task, fw.Result]) -> None:
    task, result = finished
    assert equal(task.model, make_model())
    assert not equal(task.model, result.model)
    assert task.model.training


def test_the_scorecards_tell_the_truth(finished: tuple[fw.Task, fw.Result]) -> None:
    """Counted by hand: parameters, zeros, MACs, bytes; the metric by the user's own function."""
    task, result = finished
    assert list(result.scorecards) == ["before", "1 train", "2 train", "after"]
    before, after = result.scorecards["before"], result.scorecards["after"]
    assert before.parameters == sum(p.numel() for p in task.model.parameters())
    assert before.macs == 2 * (16 * 64 + 64 * 64 + 64 * 2)  # a batch of two
    pruned = [result.model[0].weight, result.model[3].weight]
    assert [int((w == 0).sum()) for w in pruned] == [round(0.8 * w.numel()) for w in pruned]
    assert after.nonzeros == sum(int((p != 0).sum()) for p in result.model.parameters())
    assert before.dense_bytes == sum(t.numel() * t.element_size() for t in task.model.state_dict().values())
    assert after.packed_bytes == (result.folder / "model.safetensors").stat().st_size
    assert after.metric == task.evaluate(result.model.eval())
    assert {"torch", "onnxruntime"} <= set(after.latency)


def test_the_folder_holds_all_and_loads_to_the_last_bit(finished: tuple[fw.Task, fw.Result]) -> None:
    _, result = finished
    assert sorted(p.name for p in result.folder.iterdir()) == [
        "README.md",
        "model.onnx",
        "model.safetensors",
        "plan.json",
        "report.html",
        "report.json",
    ]
    assert equal(fw.load(make_model(), result.folder), result.model)
    report = json.loads((result.folder / "report.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    assert report["export"]["parity"]["passed"]
    assert len(report["verdict"]["numbers"]) == 5
    history = report["stages"][0]["history"]
    assert [r["sparsity"] for r in history] == sorted(r["sparsity"] for r in history)
    assert sum("metric" in r for r in history) == 4
    chosen = {fact["name"]: fact["action"] for fact in report["stages"][0]["selection"]}
    assert chosen == {"0.weight": "pruned", "3.weight": "pruned", "5.weight": "kept"}
    assert "steps = 40" in report["reproduce"]["recipe"]
    assert "smaller on disk" in report["gains"][0]


def test_it_learns_and_stays_sparse(finished: tuple[fw.Task, fw.Result]) -> None:
    _, result = finished
    assert result.scorecards["after"].metric > 0.75 > result.scorecards["before"].metric


def test_the_same_seed_gives_the_same_weights_and_another_does_not(finished: tuple[fw.Task, fw.Result]) -> None:
    _, result = finished
    assert equal(fw.compress(make_task(), RECIPE, progress=False).model, result.model)
    assert not equal(fw.compress(make_task(), RECIPE, seed=1, progress=False).model, result.model)


RUNS = """
import sys
from pathlib import Path
from tests.test_run import RECIPE, fw, make_task
fw.compress(make_task(slow=0.02), RECIPE, out=Path(sys.argv[1]), resume=sys.argv[2] == "resume", progress=False)
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_killed_with_kill_9_resumes_to_the_same_weights(
    tmp_path: Path, finished: tuple[fw.Task, fw.Result], stage: int
) -> None:
    root = Path(__file__).parents[1]
    out, work = tmp_path / "run", tmp_path / "run" / ".work"
    run = subprocess.Popen([sys.executable, "-c", RUNS, str(out), "fresh"], cwd=root)
    deadline = time.monotonic() + 60
    while not ((work / "training.safetensors").exists() and (stage == 1 or (work / "stage-1.safetensors").exists())):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (out / "plan.json").exists()
    with pytest.raises(errors.ArtefactError, match="--resume"):
        fw.load(make_model(), out)
    with pytest.raises(errors.ArtefactError, match="unfinished run"):
        fw.compress(make_task(), RECIPE, out=out, progress=False)
    with pytest.raises(errors.ArtefactError, match="another recipe"):
        fw.compress(make_task(), RECIPE[:1], out=out, resume=True, progress=False)
    result = fw.compress(make_task(), RECIPE, out=out, resume=True, progress=False)
    assert equal(result.model, finished[1].model)
    assert not work.exists()
    assert [len(s["history"]) for s in result.report["stages"]] == [
        len(s["history"]) for s in finished[1].report["stages"]
    ]


@dataclasses.dataclass(frozen=True)
class Breaks:
    what: str = "zeros"

    def __call__(self, model: nn.Module, task: fw.Task, stage: fw.Stage) -> fw.Plan:
        if self.what == "raises":
            raise RuntimeError("out of luck")
        with torch.no_grad():
            if self.what == "zeros":
                model[3].weight += 0.1
            elif self.what == "nan":
                model[3].weight[0, 0] = float("nan")
        return fw.Plan()


def test_a_stage_that_breaks_what_another_made_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(errors.StageError, match=r"'2 breaks' filled \d+ zeros of 3.weight") as caught:
        fw.compress(make_task(), [fw.Prune(0.5), Breaks()], out=tmp_path / "run", progress=False)
    assert "1 finished stages and the last checkpoint" in caught.value.__notes__[0]
    assert (tmp_path / "run" / ".work" / "stage-1.safetensors").exists()


@pytest.mark.parametrize(("what", "error"), [("nan", errors.NumericalError), ("raises", RuntimeError)])
def test_a_failed_stage_loses_nothing(tmp_path: Path, what: str, error: type[Exception]) -> None:
    recipe = [fw.Prune(0.5), Breaks(what)]
    with pytest.raises(error):
        fw.compress(make_task(), recipe, out=tmp_path / "run", progress=False)
    again = fw.compress(make_task(), [recipe[0], fw.Prune(0.6)], out=tmp_path / "run", overwrite=True, progress=False)
    assert (again.folder / "plan.json").exists()


def test_weights_that_are_not_numbers_are_named_before_anything_is_run() -> None:
    task = make_task()
    task.model[3].weight.data[0] = float("inf")
    with pytest.raises(errors.NumericalError, match=r"3\.weight.*as it was given"):
        fw.compress(task, RECIPE, progress=False)


class Branches(nn.Module):
    """A branch on data: it cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if x.sum() > 0:
            x = x.relu()
        return self.head(x)


def test_a_model_that_cannot_be_exported_is_delivered_without_onnx(tmp_path: Path) -> None:
    task = dataclasses.replace(make_task(), model=Branches())
    result = fw.compress(task, [fw.Prune(0.5)], out=tmp_path / "run", progress=False)
    names = {p.name for p in result.folder.iterdir()}
    assert names == {"README.md", "model.safetensors", "plan.json", "report.html", "report.json"}
    assert "test_run.py" in result.report["export"]["error"]
    assert any("ONNX" in text for text in result.report["warnings"])
    assert equal(fw.load(Branches(), result.folder), result.model)


def test_a_missing_extra_costs_its_page_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks_jinja2(report: Any) -> str:
        return errors.require("jinja2_that_is_not_here", extra="report").render(report)

    monkeypatch.setattr("featherweight.evidence.render", lacks_jinja2)
    result = fw.compress(make_task(), [fw.Prune(0.5)], out=tmp_path / "run", progress=False)
    assert not (result.folder / "report.html").exists()
    assert any('pip install "featherweight[report]"' in text for text in result.report["warnings"])
    assert equal(fw.load(make_model(), result.folder), result.model)


def test_a_budget_that_is_not_met_is_said_and_the_best_is_kept(tmp_path: Path) -> None:
    loop = fw.Iterative([fw.Prune(0.5, of="remaining", dense=())], {"sparsity": 0.95, "drop": 1.0}, rounds=2)
    result = fw.compress(make_task(), [loop], progress=False)
    assert "Budget not met" in result.unmet[0]
    assert result.report["warnings"] == list(result.unmet)
    assert 0.7 < 1 - result.scorecards["after"].nonzeros / result.scorecards["after"].parameters < 0.8


def test_recipes_are_lists_objects_or_files(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('seed = 3\n[[stages]]\nmethod = "prune"\nsparsity = 0.5\nimportance = "random"\nseed = 1\n')
    by_file = fw.compress(make_task(), path, progress=False)
    by_hand = fw.compress(make_task(), fw.Recipe((fw.Prune(0.5, importance="random", seed=1),), seed=3), progress=False)
    assert equal(by_file.model, by_hand.model)
    with pytest.raises(errors.OptionError, match="empty"):
        fw.compress(make_task(), [])
    with pytest.raises(errors.OptionError, match=r"put it into Train\(hooks"):
        fw.compress(make_task(), [GRADUAL])


def test_edits_by_hand_that_do_not_fit_together_leave_the_model_alone() -> None:
    task = make_task()
    model = copy.deepcopy(task.model)
    with pytest.raises(errors.EditError, match="does not run on example_inputs"):
        fw.Apply([fw.Slice("0.weight", 0, tuple(range(32)))])(model, task, fw.Stage())
    assert equal(model, task.model)
    keep = tuple(range(0, 64, 2))
    cut = [fw.Slice(f"{i}.{leaf}", 0, keep) for i, leaf in ((0, "weight"), (0, "bias"), (1, "weight"), (1, "bias"))]
    cut += [fw.Slice("1.running_mean", 0, keep), fw.Slice("1.running_var", 0, keep), fw.Slice("3.weight", 1, keep)]
    result = fw.compress(task, [fw.Apply(cut)], progress=False)
    assert result.model[3].in_features == 32
    assert result.scorecards["after"].macs == 2 * (16 * 32 + 32 * 64 + 64 * 2)


def test_data_that_dries_up_or_a_metric_that_fails_names_the_stage() -> None:
    with pytest.raises(errors.DataError, match=r"Task\.train is empty"):
        fw.compress(make_task(train=[]), RECIPE, progress=False)


TWO = """
import sys
import torch
from tests.test_run import RECIPE, fw, make_task
result = fw.compress(make_task(), RECIPE, out=sys.argv[1], progress=False)
torch.distributed.barrier()
mine = torch.cat([p.detach().flatten() for p in result.model.parameters()])
others = [torch.empty_like(mine) for _ in range(2)]
torch.distributed.all_gather(others, mine)
assert torch.distributed.get_world_size() == 2
assert torch.equal(others[0], others[1])
torch.distributed.destroy_process_group()
"""


def test_two_processes_under_torchrun_train_one_model(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, str(tmp_path / "run")], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    model = fw.load(make_model(), tmp_path / "run")
    for weight in (model[0].weight, model[3].weight):
        assert int((weight == 0).sum()) == round(0.8 * weight.numel())
