# SPDX-License-Identifier: Apache-2.0
"""A database holds what the solvers give, survives kills, refuses what it is not, and stitches to what `prune` gives."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import ArtefactError, DataError, NothingToCompress, NumericalError, OptionError
from featherweight.reconstruct.building import build_database
from featherweight.reconstruct.database import Database, load_database
from featherweight.reconstruct.entries import Contents
from featherweight.reconstruct.profiles import uniform, within
from featherweight.reconstruct.stitching import stitch
from featherweight.solvers import prune, prune_and_quantize, quantize
from tests.models import MODELS

SMALL = Contents(patterns=("weight", "2:4"), levels=(0.5, 0.8), bits=(3,), joint=(("2:4", None, 4),))


def forward(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch)


class Net(nn.Module):
    """A conv and a linear layer whose inputs can be told without hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean(3).flatten(1))

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        """X (d, tokens) of each layer; the conv's columns are taps x channels."""
        patches = F.unfold(x, 3, padding=1, stride=2).view(len(x), 4, 9, -1).transpose(1, 2)
        return {
            "conv.weight": patches.permute(1, 2, 0, 3).reshape(36, -1),
            "fc.weight": F.relu(self.conv(x)).mean(3).flatten(1).T,
        }


def net() -> tuple[Net, list[tuple[Tensor]], list[tuple[Tensor]]]:
    torch.manual_seed(0)
    model = Net().double().eval()
    mixing = torch.randn(4, 4, dtype=torch.float64)
    data = [(torch.einsum("ij,njhw->nihw", mixing, torch.randn(16, 4, 8, 8).double()),) for _ in range(5)]
    return model, data[:3], data[3:]


def matrix(name: str, weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).flatten(1) if name.startswith("conv") else weight


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, list[tuple[Tensor]], list[tuple[Tensor]], Database]:
    model, fit, held_out = net()
    folder = tmp_path_factory.mktemp("database")
    build_database(model, fit, forward, folder, SMALL, held_out=held_out)
    return model, fit, held_out, load_database(folder)


def test_stitched_weights_are_those_of_the_solvers_on_the_layers_inputs(made: tuple) -> None:
    dense, fit, held_out, database = made
    X, outside = (dense.inputs(torch.cat([x for (x,) in data])) for data in (fit, held_out))
    for label in ("weight 0.5", "weight 0.8", "2:4", "3 bit", "2:4 + 4 bit"):
        model, _, _ = net()
        stitch(database, model, {name: database.entry(name, label) for name in X}, fit, forward)
        for name, inputs in X.items():
            W, V = (matrix(name, dict(m.named_parameters())[name].detach()) for m in (dense, model))
            H = (2 * inputs @ inputs.T / inputs.shape[1]).detach()
            run = 4 if name.startswith("conv") else 32

            def judge(V: Tensor, W: Tensor = W, name: str = name) -> float:
                return float(((W - V) @ outside[name]).square().sum().detach())

            if label == "3 bit":
                alone = quantize(W, H, SMALL.spec(3), judge=judge).weights
            elif "bit" in label:
                alone = prune_and_quantize(W, H, SMALL.spec(4), "2:4", run=run, judge=judge).weights
            else:
                pattern, _, sparsity = label.partition(" ")
                level = float(sparsity) if sparsity else None
                alone = prune(W, H, pattern, level, solver="exact_obs", run=run).weights
            assert torch.allclose(V, alone, rtol=1e-5, atol=1e-6), (label, name)
            assert torch.equal(V == 0, alone == 0)


def test_losses_are_errors_of_the_outputs_there_and_on_held_out_samples(made: tuple) -> None:
    dense, fit, held_out, database = made
    model, _, _ = net()
    for label in ("weight 0.8", "3 bit", "2:4"):
        choice = {name: database.entry(name, label) for name in database.layers}
        stitch(database, model, choice, fit, forward)
        for data, figure in ((fit, "relative"), (held_out, "held_out")):
            for name, X in dense.inputs(torch.cat([x for (x,) in data])).items():
                W, V = (matrix(name, dict(m.named_parameters())[name].detach()) for m in (dense, model))
                error, energy = (out.detach().square().sum() for out in ((W - V) @ X, W @ X))
                assert getattr(choice[name], figure) == pytest.approx(float(error / energy), rel=1e-4)
                if figure == "relative":
                    assert choice[name].loss == pytest.approx(float(error / X.shape[1]), rel=1e-4)
                    assert database.layers[name].tokens == X.shape[1]
        model, _, _ = net()


def test_costs_are_the_macs_of_what_is_not_zero(made: tuple) -> None:
    model, fit, _, database = made
    batch = len(fit[0][0])
    dense = {"conv.weight": batch * 16 * 8 * 36, "fc.weight": batch * 32 * 6}
    assert database.macs == sum(dense.values())
    assert database.bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    for name, macs in dense.items():
        for entry in database.entries(name):
            assert entry.macs == pytest.approx(macs * (1 - entry.sparsity))
    assert database.entry("fc.weight", "weight 0.5").sparsity == 0.5
    assert database.entry("fc.weight", "dense").bytes == 32 * 6 * 8


def test_a_mixed_profile_changes_just_what_it_names_and_nothing_else(made: tuple) -> None:
    dense, fit, _, database = made
    model, _, _ = net()
    stitch(database, model, {"conv.weight": database.entry("conv.weight", "2:4")}, fit, forward)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, dense.state_dict()[name])}
    assert changed == {"conv.weight"}
    found = within(database, 0.4)
    model, _, _ = net()
    stitch(database, model, found.choice, fit, forward)
    zeros = {name: int((dict(model.named_parameters())[name] == 0).sum()) for name in database.layers}
    assert zeros == {n: round(e.sparsity * database.layers[n].parameters) for n, e in found.choice.items()}


def test_refused_choices_leave_the_model_as_it_was(made: tuple) -> None:
    _, fit, _, database = made
    model, _, _ = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fc, conv = database.entry("fc.weight", "2:4"), database.entry("conv.weight", "2:4")
    for choice, message in (
        ({"fc.wight": fc}, "Nearest: fc.weight"),
        ({"fc.weight": conv}, "not an entry"),
        ({"fc.weight": dataclasses.replace(fc, loss=1.0)}, "not an entry"),
    ):
        with pytest.raises(OptionError, match=message):
            stitch(database, model, choice, fit, forward)
    with pytest.raises(DataError):
        stitch(database, model, {"fc.weight": fc}, [], forward)
    with pytest.raises(OptionError, match="Nearest: 2:4"):
        database.entry("fc.weight", "2:5")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_database_is_not_of_another_model(made: tuple) -> None:
    _, fit, _, database = made
    model, _, _ = net()
    model.fc.weight.data[0, 0] += 1e-12
    with pytest.raises(ArtefactError, match=r"of another model: fc.weight \[6, 32\] has other values"):
        stitch(database, model, uniform(database, "2:4").choice, fit, forward)
    with pytest.raises(ArtefactError, match="this model has not"):
        stitch(database, nn.Sequential(nn.Linear(3, 3)), uniform(database, "2:4").choice, fit, forward)


def test_a_byte_budget_takes_more_passes_to_the_same_answers(made: tuple, tmp_path: Path) -> None:
    model, fit, held_out, database = made
    calls = []

    def counted(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        calls.append(1)
        return model(*batch)

    small = build_database(model, fit, counted, tmp_path, SMALL, held_out=held_out, budget_bytes=1)
    assert len(calls) == 1 + 2 * 5  # MACs are counted once; a layer at a time, both data sets are run through
    for name in database.layers:
        for one, other in zip(database.entries(name), small.entries(name), strict=True):
            assert one.label == other.label and one.loss == pytest.approx(other.loss, rel=1e-9)
    model, _, _ = net()
    again, _, _ = net()
    stitch(database, model, uniform(database, "weight", 0.5).choice, fit, forward)
    stitch(database, again, uniform(database, "weight", 0.5).choice, fit, forward, budget_bytes=1)
    assert torch.allclose(model.conv.weight, again.conv.weight) and torch.allclose(model.fc.weight, again.fc.weight)


def test_the_users_figures_are_taken_with_one_layer_in_place(tmp_path: Path) -> None:
    model, fit, _ = net()
    x = fit[0][0]
    answer = model(x).detach()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    database = build_database(
        model,
        fit,
        forward,
        tmp_path,
        SMALL,
        evaluate=lambda m: 5.0 + float((m(x) - answer).square().mean()),
        cost=lambda entry: 3.0 * entry.bytes,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name in database.layers:
        for entry in database.entries(name):
            twin, _, _ = net()
            stitch(database, twin, {name: entry}, fit, forward)
            assert entry.measured == pytest.approx(
                float((twin(x).detach() - answer).square().mean()), rel=1e-4, abs=1e-12
            )
            assert entry.cost == 3.0 * entry.bytes
    assert within(database, 0.5, "cost", loss="measured").feasible


def test_evaluation_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, fit, _ = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answers = iter([0.0, 0.0, float("nan")])
    with pytest.raises(NumericalError, match="evaluate gave nan"):
        build_database(model, fit, forward, tmp_path, SMALL, evaluate=lambda m: next(answers))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.reconstruct.test_database import SMALL, build_database, forward, net

def report(event):
    if event["kind"] == "step":
        os.kill(os.getpid(), signal.SIGKILL)

model, fit, held_out = net()
build_database(model, fit, forward, sys.argv[1], SMALL, held_out=held_out, report=report)
"""


def test_a_killed_run_goes_on_after_the_last_weight_that_it_finished(made: tuple, tmp_path: Path) -> None:
    model, fit, held_out, whole = made
    folder = tmp_path / "database"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    [first] = folder.glob("*.safetensors")
    stamp = first.stat().st_mtime_ns
    with pytest.raises(ArtefactError, match="not finished: 1 weights are"):
        load_database(folder)
    solved: list[str] = []
    build_database(
        model, fit, forward, folder, SMALL, held_out=held_out, report=lambda e: solved.append(e.get("text", ""))
    )
    assert [text.split()[0] for text in solved if text] == ["fc.weight"]
    assert first.stat().st_mtime_ns == stamp
    database = load_database(folder)
    for name in whole.layers:
        for one, other in zip(whole.entries(name), database.entries(name), strict=True):
            assert one == other or one.loss == pytest.approx(other.loss)
            settled, again = whole.settled(one), database.settled(other)
            for part in ("pruned", "integers"):
                a, b = getattr(settled, part), getattr(again, part)
                assert (a is None and b is None) or torch.equal(a, b)
    again: list[str] = []
    build_database(model, fit, forward, folder, SMALL, held_out=held_out, report=lambda e: again.append(e["kind"]))
    assert not again


def test_a_run_is_not_resumed_as_another_one(made: tuple, tmp_path: Path) -> None:
    model, fit, held_out, database = made
    folder = tmp_path / "copy"
    shutil.copytree(database.folder, folder)
    for contents, data, options, message in (
        (dataclasses.replace(SMALL, bits=(4,)), fit, {"held_out": held_out}, r"other contents: bits was \(3,\), now"),
        (SMALL, held_out, {"held_out": held_out}, "other data"),
        (SMALL, fit, {}, "other figures"),
    ):
        with pytest.raises(ArtefactError, match=message):
            build_database(model, data, forward, folder, contents, **options)
    other, _, _ = net()
    other.conv.weight.data.mul_(2)
    with pytest.raises(ArtefactError, match="another model"):
        build_database(other, fit, forward, folder, SMALL, held_out=held_out)
    anew = build_database(other, fit, forward, folder, dataclasses.replace(SMALL, bits=()), overwrite=True)
    assert "3 bit" not in {entry.label for entry in load_database(folder).entries("fc.weight")}
    assert len(list(folder.iterdir())) == 1 + len(anew.weights)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    model, fit, _ = net()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"thesis\.tex"):
        build_database(model, fit, forward, tmp_path, SMALL, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def damage(folder: Path, how: str) -> None:
    index, tensors = folder / "index.json", next(folder.glob("*fc*.safetensors"))
    content = bytearray(tensors.read_bytes())
    facts = json.loads(index.read_text())
    if how == "a bit flips":
        content[-3] ^= 4
        tensors.write_bytes(content)
    elif how == "a file is cut":
        tensors.write_bytes(content[: len(content) // 2])
    elif how == "a file is gone":
        tensors.unlink()
    elif how == "the index is gone":
        index.unlink()
    elif how == "the index is cut":
        index.write_text(index.read_text()[:-40])
    elif how == "a loss is another":
        facts["weights"]["fc.weight"]["layers"][0]["entries"][1]["loss"] *= 2
        index.write_text(json.dumps(facts))
    elif how == "a later version":
        index.write_text(json.dumps(facts | {"version": 2}))
    else:
        index.write_text(json.dumps({"format": "something else"}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a bit flips", r"fc.weight.safetensors, the entries of fc.weight, is damaged. Delete"),
        ("a file is cut", "is damaged"),
        ("a file is gone", "is missing"),
        ("the index is gone", "holds no database"),
        ("the index is cut", "is damaged: JSONDecodeError"),
        ("a loss is another", "its checksum does not fit"),
        ("a later version", "version 2"),
        ("not an index", "not the index"),
    ],
)
def test_damage_is_refused_with_the_file(made: tuple, tmp_path: Path, how: str, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made[3].folder, folder)
    damage(folder, how)
    with pytest.raises(ArtefactError, match=message):
        load_database(folder)


def test_78_entries_and_the_dense_one_take_less_than_one_dense_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    data = [(torch.randn(256, 96),)]
    database = build_database(model, data, forward, tmp_path)
    entries = database.entries("0.weight")
    assert len(entries) == 1 + 44 + 1 + 29 + 3 + 1
    [file] = tmp_path.glob("*.safetensors")
    n, grids, header = 64 * 96, 4 * 64 * 5, 2048
    assert file.stat().st_size < (6 + 1 + 5 / 4 + 4 + 3 + 2 + 4) / 8 * n + grids + header < 4 * n
    assert database.stored_bytes == file.stat().st_size + (tmp_path / "index.json").stat().st_size


@pytest.mark.parametrize("name", [name for name in MODELS if name != "functional"])
def test_every_kind_of_model_is_built_and_stitched(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    data = [inputs(8), inputs(8)]
    contents = Contents(patterns=("weight",), levels=(0.5,), bits=(4,), joint=())
    database = build_database(model, data, forward, tmp_path, contents)
    assert sum(layer.macs for layer in database.layers.values()) <= database.macs
    choice = {
        problem: database.entry(problem, "weight 0.5" if i % 2 else "4 bit")
        for i, problem in enumerate(database.layers)
    }
    stitch(database, model, choice, data, forward)
    parameters = dict(model.named_parameters())
    for weight in {layer.weight for layer in database.layers.values()}:
        own = [layer for layer in database.layers.values() if layer.weight == weight]
        zeros = sum(choice[layer.name].sparsity * layer.parameters for layer in own)
        assert int((parameters[weight] == 0).sum()) == round(zeros), weight
        assert sum(layer.parameters for layer in own) == parameters[weight].numel()


def test_an_embeddings_rows_weigh_as_often_as_they_are_looked_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    words = torch.randint(0, 5, (32, 3))
    contents = Contents(patterns=("weight",), levels=(0.25, 0.5, 0.7), bits=(4,), joint=(), layers=("0",))
    database = build_database(model, [(words,)], forward, tmp_path, contents)
    assert set(database.left) == {"2.weight"} and database.entry("0.weight", "dense").macs == 0.0
    dense = model[0].weight.detach().clone()
    # Words that never occur count as if they had half a time.
    seen = torch.bincount(words.flatten(), minlength=10) + 0.5
    order = (seen.sqrt()[:, None] * dense.abs()).flatten().argsort()
    for sparsity in (0.25, 0.5, 0.7):
        model[0].weight.data.copy_(dense)
        entry = database.entry("0.weight", f"weight {sparsity}")
        stitch(database, model, {"0.weight": entry}, [(words,)], forward)
        expected = dense.flatten().index_fill(0, order[: round(sparsity * 40)], 0.0).view(10, 4)
        assert torch.allclose(model[0].weight, expected, rtol=1e-5)
        wanted = F.embedding(words, dense)
        error = (model[0](words).detach() - wanted).square().sum() / wanted.square().sum()
        assert entry.relative == pytest.approx(float(error), rel=1e-5, abs=1e-9)
    model[0].weight.data.copy_(dense)
    stitch(database, model, {"0.weight": database.entry("0.weight", "4 bit")}, [(words,)], forward)
    assert float((model[0].weight.detach() - dense).abs().max()) < 0.2 * float(dense.abs().max())
    assert all(len(row.unique()) <= 16 for row in model[0].weight)


def test_experts_without_data_are_left_with_the_reason(tmp_path: Path) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    data = [(torch.randn(20, 4),)]
    events: list[dict[str, object]] = []
    database = build_database(Routed(), data, forward, tmp_path, SMALL, report=events.append)
    assert set(database.layers) == {"used.weight"} and "no calibration batch" in database.left["idle.weight"]
    assert any("idle.weight: no calibration batch" in str(event.get("text")) for event in events)
    with pytest.raises(OptionError, match="It was left alone: no calibration batch"):
        load_database(tmp_path).entries("idle.weight")


def test_layers_that_are_too_wide_for_the_work_are_solved_in_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 8))
    data = [(torch.randn(100, 48),)]
    # An elimination of 8 rows of 16 columns takes 0.41 * 8 * 16³ multiply-adds; three of them are paid for here.
    contents = dataclasses.replace(SMALL, work=3.01 * 0.41 * 8 * 16**3 / 1e9)
    database = build_database(model, data, forward, tmp_path, contents)
    assert [layer.d for layer in database.layers.values()] == [16, 16, 16]
    assert {entry.solver for name in database.layers for entry in database.entries(name) if entry.level} == {
        "exact_obs"
    }
    assert sum(layer.macs for layer in database.layers.values()) == database.macs == 100 * 48 * 8
    energy = sum(layer.energy for layer in database.layers.values())
    for name in database.layers:
        for entry in database.entries(name):
            assert entry.relative == pytest.approx(entry.loss / energy)
    stitch(database, model, uniform(database, "2:4").choice, data, forward)
    assert bool(((model[0].weight.view(8, 12, 4) == 0).sum(2) == 2).all())


def test_parts_of_a_grouped_layer_add_up_to_the_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6))
    data = [(torch.randn(20, 6, 5, 5),)]
    answer = (model[0](data[0][0]) - model[0].bias.view(-1, 1, 1)).detach()
    dense = model[0].weight.detach().clone()
    database = build_database(model, data, forward, tmp_path, dataclasses.replace(SMALL, bits=(), joint=()))
    found = uniform(database, "weight", 0.5)
    stitch(database, model, found.choice, data, forward)
    change = F.conv2d(data[0][0], model[0].weight.detach() - dense, groups=6)
    assert found.loss == pytest.approx(float(change.square().sum() / answer.square().sum()), rel=1e-4)


@pytest.mark.parametrize("solver", ["best", "admm+swap"])
def test_few_samples_and_a_judge_still_stitch_to_the_weights_that_were_judged(solver: str, tmp_path: Path) -> None:
    dense, fit, held_out = net()
    fit = [(fit[0][0][:2],)]
    contents = Contents(patterns=("weight", "2:4"), levels=(0.5, 0.8), bits=(), joint=(), solver=solver)
    database = build_database(dense, fit, forward, tmp_path, contents, held_out=held_out)
    X = dense.inputs(fit[0][0])
    for label in ("weight 0.5", "weight 0.8", "2:4"):
        model, _, _ = net()
        choice = {name: database.entry(name, label) for name in X}
        stitch(database, model, choice, fit, forward)
        for name, inputs in X.items():
            W, V = (matrix(name, dict(m.named_parameters())[name].detach()) for m in (dense, model))
            error = ((W - V) @ inputs).detach().square().sum() / inputs.shape[1]
            assert choice[name].loss == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize(
    ("data", "contents", "error", "message"),
    [
        ([], SMALL, DataError, "no batch"),
        (iter([1]), SMALL, DataError, "one-shot"),
        (None, dataclasses.replace(SMALL, layers=("convv",)), NothingToCompress, "Nearest names: conv.weight"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tmp_path: Path, data: list[object] | None, contents: Contents, error: type[Exception], message: str
) -> None:
    model, fit, _ = net()
    with pytest.raises(error, match=message):
        build_database(model, fit if data is None else data, forward, tmp_path, contents)
