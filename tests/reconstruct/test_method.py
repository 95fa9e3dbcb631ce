# SPDX-License-Identifier: Apache-2.0
"""`Reconstruct` as a user meets it: what it makes of models, how it goes on after a kill, and what it says to bad input."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import DataError, NothingToCompress, NumericalError, OptionError
from featherweight.layers import problems
from featherweight.reconstruct.answer import solve


class Net(nn.Module):
    """Convolutions with BatchNorm, a grouped one, and a head: what a walk meets in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.grouped = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.grouped(torch.relu(x + self.body(x))))
        return self.head(x.mean((2, 3)))


def batches(count: int = 6, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    smooth = nn.AvgPool2d(3, 1, 1)
    return [4 * smooth(torch.randn(16, 3, 8, 8, generator=generator)) for _ in range(count)]


def make_task(model: nn.Module | None = None, **options: Any) -> fw.Task:
    torch.manual_seed(0)
    model = Net().eval() if model is None else model
    return fw.Task(model, (torch.zeros(1, 3, 8, 8),), **{"calibration": batches(), **options})


def run(method: fw.Reconstruct, task: fw.Task, **options: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    model, events = copy.deepcopy(task.model), []
    method(model, task, fw.Stage(report=events.append, **options))
    return model, events


def error(model: nn.Module, task: fw.Task) -> float:
    """Relative squared error of the outputs on samples that no walk saw."""
    with torch.no_grad():
        pairs = [(model.eval()(x), task.model.eval()(x)) for x in batches(3, seed=77)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_targets_that_answer_for_earlier_layers_leave_the_least_error() -> None:
    task = make_task()
    found = {
        targets: error(run(fw.Reconstruct(0.7, targets=targets, correct=()), task)[0], task)
        for targets in ("independent", "sequential", "corrected")
    }
    plain = error(run(fw.Reconstruct(0.7, solver="magnitude", targets="independent", correct=()), task)[0], task)
    assert found["corrected"] < 0.8 * min(found["independent"], found["sequential"])
    assert found["independent"] < 0.1 * plain


@pytest.mark.parametrize("targets", ["independent", "sequential", "corrected"])
def test_every_layer_has_the_zeros_that_were_asked_for(targets: str) -> None:
    model, events = run(fw.Reconstruct({"*": 0.5, "body": 0.75}, targets=targets), make_task())
    found = {p.name: float((p.matrix() == 0).float().mean()) for p in problems(model)[0]}
    assert found.pop("body.weight") == pytest.approx(0.75, abs=1e-3)
    assert set(found.values()) == {0.5}
    table = [event["layer"] for event in events if event["kind"] == "layer"]
    assert [row["name"] for row in table] == ["stem.weight", "body.weight", "grouped.weight", "head.weight"]
    assert all(row["error"] <= row["simple"] and row["tokens"] > 0 and row["seconds"] > 0 for row in table)
    assert table[0]["tokens"] == 5 * 16 * 64, (
        "a token is a position: 80 images of 8 x 8, one batch of six being held out"
    )


def test_a_layer_wider_than_its_hessian_may_be_is_solved_in_blocks_nearly_as_well() -> None:
    task = make_task()
    method = {"sparsity": 0.6, "correct": (), "layers": ["body"]}
    for targets in ("independent", "sequential", "corrected"):
        whole = error(run(fw.Reconstruct(**method, targets=targets), task)[0], task)
        model, events = run(fw.Reconstruct(**method, targets=targets, memory="400 kB"), task)
        [row] = [event["layer"] for event in events if event["kind"] == "layer"]
        assert "blocks" in row["solver"]
        assert "too many for one Hessian" in row["notes"][0]
        assert float((model.body.weight == 0).float().mean()) == pytest.approx(0.6, abs=0.01)
        simple = error(run(fw.Reconstruct(**method, solver="magnitude", targets="independent"), task)[0], task)
        assert error(model, task) < min(1.5 * whole, 0.1 * simple)


def test_bits_put_every_row_on_a_grid_and_zeros_stay_on_it() -> None:
    task = make_task()
    model, _ = run(fw.Reconstruct(bits={"*": 3, "head": 4}), task)
    for problem in problems(model)[0]:
        bits = 4 if problem.name == "head.weight" else 3
        assert all(len(row.unique()) <= 2**bits for row in problem.matrix())
    nearest = run(fw.Reconstruct(bits={"*": 3, "head": 4}, solver="nearest", targets="independent", correct=()), task)
    assert error(model, task) < 0.5 * error(nearest[0], task)
    both, _ = run(fw.Reconstruct(pattern="2:4", bits=4, keep=["stem"]), task)
    groups = both.body.weight.permute(0, 2, 3, 1).reshape(-1, 4)
    assert int((groups != 0).sum(1).max()) <= 2


def test_a_pruned_model_is_refitted_to_the_model_it_came_from() -> None:
    task = make_task()
    damaged = copy.deepcopy(task.model)
    fw.Prune(0.7, dense=())(damaged, task, fw.Stage())
    zeros = {name: p == 0 for name, p in damaged.named_parameters()}
    model = copy.deepcopy(damaged)
    fw.Reconstruct()(model, task, fw.Stage())
    assert all(bool((p == 0)[zeros[name]].all()) for name, p in model.named_parameters() if p.ndim > 1)
    assert error(model, task) < 0.3 * error(damaged, task)


def test_a_refit_needs_the_layers_of_the_model_that_it_answers_to() -> None:
    task = make_task()
    model = copy.deepcopy(task.model)
    fw.Factorize(rank=2, layers=("head",))(model, task, fw.Stage())
    before = copy.deepcopy(model)
    with pytest.raises(OptionError, match=r"head\.0\.weight is 2 x 16 here and not in the task's own model"):
        fw.Reconstruct()(model, task, fw.Stage())
    assert same(model, before)


def test_what_is_left_alone_is_said_with_its_reason() -> None:
    class Sleeper(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.words = nn.Linear(4, 4), nn.Embedding(4, 4)

    model, events = run(fw.Reconstruct(0.5, keep=["head"], dense=("first",)), make_task(Sleeper().eval()))
    lines = {e["weight"]["name"]: e["weight"] for e in events if e["kind"] == "selection"}
    kept = {name: line["reason"] for name, line in lines.items() if line["action"] == "kept"}
    assert set(kept) == {"stem.weight", "head.weight", "spare.weight", "words.weight"}
    assert "no calibration sample reached" in kept["spare.weight"]
    assert "left alone unless named" in kept["words.weight"]
    assert any("spare.weight" in e["text"] for e in events if e["kind"] == "message")
    assert not (model.spare.weight == 0).any()


def test_groups_that_n_of_m_does_not_fill_are_named() -> None:
    model, events = run(fw.Reconstruct(pattern="2:4"), make_task())
    [text] = [e["text"] for e in events if e["kind"] == "message" and "multiple" in e["text"]]
    assert text.startswith("stem.weight: 3 input channels are no multiple of 4")
    taps = model.stem.weight.permute(0, 2, 3, 1).reshape(-1, 3)
    assert int((taps != 0).sum(1).max()) == 2


def test_corrections_are_kept_only_where_they_help_and_said() -> None:
    task = make_task()
    _, events = run(fw.Reconstruct(0.8, targets="independent", correct=("batch_norm", "bias")), task)
    texts = [e["text"] for e in events if e["kind"] == "message"]
    assert sum("held-out output error" in text for text in texts) == 2
    with_all = error(run(fw.Reconstruct(0.8, targets="independent", correct=("bias",)), task)[0], task)
    without = error(run(fw.Reconstruct(0.8, targets="independent", correct=()), task)[0], task)
    assert with_all < without


class Nan(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.where(x.abs().amax() > 90, x / 0, x))


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        (lambda: fw.Reconstruct(0.5), {"calibration": []}, DataError, r"Task\.calibration is empty"),
        (lambda: fw.Reconstruct(0.5), {"calibration": None}, DataError, "This needs data"),
        (lambda: fw.Reconstruct(0.5, layers=["boddy"]), {}, NothingToCompress, r"Nearest names: body"),
        (lambda: fw.Reconstruct(0.5, keep=["*"]), {}, NothingToCompress, "Nothing to reconstruct: all 4"),
        (lambda: fw.Reconstruct(0.5), {"calibration": [torch.zeros(2, 7)] * 4}, Exception, "input"),
        (
            lambda: fw.Reconstruct(0.5, correct=()),
            {"forward": lambda model, batch: batch},
            NothingToCompress,
            "no sample",
        ),
        (
            lambda: fw.Reconstruct(0.5),
            {"calibration": [*batches(2), 100 + torch.zeros(4, 3, 8, 8), *batches(2)], "model": Nan().eval()},
            NumericalError,
            r"stem.*batch",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(
    method: Callable[[], fw.Reconstruct], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    task = make_task(**options)
    model = copy.deepcopy(task.model)
    with pytest.raises(error, match=words):
        method()(model, task, fw.Stage())
    assert same(model, task.model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_interrupted_walk_leaves_the_model_as_it_was() -> None:
    task = make_task()
    model = copy.deepcopy(task.model)

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fw.Reconstruct(0.5)(model, task, fw.Stage(report=stop))
    assert same(model, task.model)


@pytest.mark.parametrize("bad", range(6))
def test_activations_that_are_not_finite_name_layer_and_the_loaders_batch(bad: int) -> None:
    """Whether it was drawn to solve on or to judge by: no number of an inner list, which a user could not look up."""
    task = make_task()
    task.calibration[bad][3, 0, 0, 0] = torch.nan
    model = copy.deepcopy(task.model)
    with pytest.raises(NumericalError, match=rf"^stem: .* in batch {bad} of"):
        fw.Reconstruct(0.5, held_out=0.5)(model, task, fw.Stage())
    assert same(model, task.model)


def test_fewer_samples_than_inputs_are_damped_and_said() -> None:
    task = make_task(calibration=[x[:1, :, :3, :3] for x in batches(2)])
    model, events = run(fw.Reconstruct(0.5, layers=["body"], damping=0.0, targets="independent", correct=()), task)
    [row] = [event["layer"] for event in events if event["kind"] == "layer"]
    assert row["damping"] > 0
    assert any("more calibration samples would help" in note for note in row["notes"])
    assert torch.isfinite(model.body.weight).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "at least 0 and below 1"),
        ({"sparsity": {}}, "empty mapping"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "leave sparsity out"),
        ({"pattern": "1x4"}, "sparsity is missing"),
        ({"sparsity": 0.5, "pattern": "neuron"}, "takes whole outputs"),
        ({"bits": 9}, "from 2 to 8"),
        ({"sparsity": 0.5, "chunk": 32}, "give bits too"),
        ({"sparsity": 0.5, "solver": "admmm"}, "Nearest: admm"),
        ({"bits": 4, "solver": "wanda"}, "none of"),
        ({"sparsity": 0.5, "targets": "correct"}, "Nearest: corrected"),
        ({"sparsity": 0.5, "correct": ("batchnorm",)}, "Nearest: batch_norm"),
        ({"sparsity": 0.5, "correct": "bias"}, "list of strings"),
        ({"sparsity": 0.5, "held_out": 1.0}, "held_out"),
        ({"sparsity": 0.5, "memory": "2 gigs"}, "memory '2 gigs'"),
    ],
)
def test_options_are_checked_when_they_are_given(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        fw.Reconstruct(**options)


KILLED = """
import os, signal, sys
import torch
from tests.reconstruct.test_method import fw, make_task
real = fw.Reconstruct.__call__
def call(self, model, task, stage):
    seen = []
    def report(event):
        stage.report(event)
        seen.append(event["kind"])
        if seen.count("step") == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    return real(self, model, task, fw.Stage(stage.name, stage.folder, stage.resume, stage.seed, report))
fw.Reconstruct.__call__ = call
torch.set_num_threads(1)
fw.compress(make_task(), [fw.Reconstruct(0.6)], out=sys.argv[1], progress=False)
"""


def test_a_walk_that_was_killed_goes_on_from_the_last_layer_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run"), "3"], cwd=root, env=environment)
    assert killed.returncode == -9
    solved = sorted((tmp_path / "run" / ".work").rglob("[0-9]*.safetensors"))
    assert len(solved) == 2 + 1  # two convolutions; the groups of the third are one step
    solved[-1].write_bytes(b"half a file")  # the last one did not survive: it is solved again
    torch.set_num_threads(1)
    again: list[str] = []

    def noted(problem: Any, *rest: Any) -> Any:
        again.append(problem.name)
        return solve(problem, *rest)

    monkeypatch.setattr("featherweight.reconstruct.walk.solve", noted)
    result = fw.compress(make_task(), [fw.Reconstruct(0.6)], out=tmp_path / "run", resume=True, progress=False)
    assert again == ["grouped.weight[0]", "grouped.weight[1]", "head.weight"], "what was solved is not solved again"
    straight = fw.compress(make_task(), [fw.Reconstruct(0.6)], progress=False)
    assert same(result.model, straight.model)
    assert not list((tmp_path / "run").rglob(".work"))
    names = [row["name"] for row in result.report["stages"][0]["solved"]]
    assert names == ["stem.weight", "body.weight", "grouped.weight", "head.weight"]


TWO = """
import sys
import torch
import torch.distributed as dist
from tests.reconstruct.test_method import fw, make_task
torch.set_num_threads(1)
result = fw.compress(make_task(), [fw.Reconstruct(0.6, targets=sys.argv[2])], out=sys.argv[1], progress=False)
dist.barrier()
mine = torch.cat([p.detach().flatten() for p in result.model.parameters()])
others = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(others, mine)
assert dist.get_world_size() == 2
assert torch.equal(others[0], others[1])
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("targets", "port"), [("independent", 29631), ("corrected", 29632)])
def test_two_processes_give_what_one_gives(targets: str, port: int, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={port}",
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "run"
    two = subprocess.run([*command, str(folder), targets], cwd=root, env=environment, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-3000:]
    torch.set_num_threads(1)
    one = fw.compress(make_task(), [fw.Reconstruct(0.6, targets=targets)], progress=False)
    assert same(fw.load(Net(), folder), one.model)
