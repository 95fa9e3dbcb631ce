# SPDX-License-Identifier: Apache-2.0
"""Centroids trained by summed gradients: as parameters of their own would be, members equal to the last bit, zeros zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

import featherweight as fw
from featherweight.errors import NothingToCompress, NumericalError, OptionError
from featherweight.state import load_state, save_state
from tests.models import MODELS
from tests.quantize.two_processes import tune_on_rank

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def clustered(clusters: int = 5, share: str = "layer") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model[0].weight.data.view(-1)[::3] = 0
    model[2].weight.data.view(-1)[::2] = 0
    fw.Cluster(clusters, share=share)(model, fw.Task(model, ()), fw.Stage())
    return model


def bits(tensor: Tensor) -> set[int]:
    """The different values, told apart by their bits: -0.0 is not 0.0."""
    return set(tensor.detach().view(torch.int32).flatten().tolist())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, tuner: Any, steps: range, inputs: Any = None, parts: int = 1
) -> None:
    """A loop of the user's own; step t sees the same batch whenever it runs."""
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        for _ in range(parts):
            x = (torch.randn(6, 8, dtype=next(model.parameters()).dtype),) if inputs is None else inputs(4)
            out = model(*x)
            (out - torch.randn_like(out)).square().mean().backward()
        optimizer.step()
        tuner.step()


@pytest.mark.parametrize("share", ["layer", "model"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectories_are_those_of_codebooks_that_are_parameters(name: str, share: str) -> None:
    """Oracle: autograd through w = codebook[index], the same optimizer on codebooks, in float64."""
    model = clustered(share=share).double()
    layers = [model[0], model[2]]
    oracle = copy.deepcopy(model)
    together = torch.cat([layer.weight.detach().flatten() for layer in layers])
    every = [together] * 2 if share == "model" else [layer.weight.detach() for layer in layers]
    numbers = [one.unique() for one in every]
    index = [torch.searchsorted(n, layer.weight.detach()) for n, layer in zip(numbers, layers, strict=True)]
    books = [nn.Parameter(n.clone()) for n in (numbers[:1] if share == "model" else numbers)]
    biases = [oracle[0].bias, oracle[2].bias]
    theirs = OPTIMIZERS[name]([*books, *biases])

    optimizer = OPTIMIZERS[name](model.parameters())
    tuner = fw.TuneCentroids(share=share).attach(model, optimizer)
    for _ in range(25):
        x, y = torch.randn(16, 8).double(), torch.randn(16, 4).double()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        tuner.step()

        theirs.zero_grad()
        read = books * 2 if share == "model" else books
        made = [(book * (n != 0))[i] for book, n, i in zip(read, numbers, index, strict=True)]
        out = linear(torch.tanh(linear(x, made[0], biases[0])), made[1], biases[1])
        (out - y).square().mean().backward()
        theirs.step()
        for layer, i, book, n in zip(layers, index, books * 2 if share == "model" else books, numbers, strict=True):
            assert torch.allclose(layer.weight, (book.detach() * (n != 0))[i], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(model[0].weight, oracle[0].weight, atol=1e-3)  # it did learn


@pytest.mark.parametrize("name", [*OPTIMIZERS, "muon"])
def test_members_stay_equal_to_the_last_bit_and_zeros_zero(name: str) -> None:
    """Muon mixes the entries of a matrix: members must be made equal again."""
    model = clustered()
    zeros = [model[i].weight == 0 for i in (0, 2)]
    matrices = [model[0].weight, model[2].weight]
    optimizer = torch.optim.Muon(matrices, lr=0.02) if name == "muon" else OPTIMIZERS[name](model.parameters())
    tuner = fw.TuneCentroids().attach(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, tuner, range(20))
    for i, zero in zip((0, 2), zeros, strict=True):
        weight = model[i].weight.detach()
        assert len(bits(weight)) == 5 and torch.equal(weight == 0, zero)
        assert (weight.view(torch.int32)[zero] == 0).all()
        old = before[f"{i}.weight"]
        assert not torch.equal(weight, old)
        for number in old.unique():
            assert len(bits(weight[old == number])) == 1
            for key, state in optimizer.state[model[i].weight].items():
                if isinstance(state, Tensor) and state.shape == weight.shape:
                    assert len(bits(state[old == number])) == 1, key
    assert tuner.finalize() == fw.Plan()


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_is_tuned_and_left_as_it_was_found(kind: str) -> None:
    make, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    fw.Cluster(3)(model, fw.Task(model, inputs(2)), fw.Stage())
    ties = [[n for n, p in model.named_parameters(remove_duplicate=False) if p is q] for q in model.parameters()]
    counts = {n: len(p.unique()) for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tuner = fw.TuneCentroids().attach(model, optimizer, inputs(2))
    tuned = [line.name for line in tuner.selection if line.action == "tuned"]
    assert tuned
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, tuner, range(4), inputs)
    tuner.finalize()
    for name in tuned:
        after = model.get_parameter(name)
        assert len(after.unique()) <= counts[name] and not torch.equal(after, before[name]), name
    names = [[n for n, p in model.named_parameters(remove_duplicate=False) if p is q] for q in model.parameters()]
    assert names == ties
    assert not optimizer._optimizer_step_pre_hooks
    train(model, optimizer, copy.copy(_Nothing()), range(1), inputs)  # nothing holds the weights from now on
    assert any(len(model.get_parameter(name).unique()) > counts[name] for name in tuned)


class _Nothing:
    def step(self) -> None:
        return


def test_accumulated_gradients_are_summed_once() -> None:
    """Two backward passes before a step: their sum, and not the first one's clusters again."""
    model = clustered()
    twin = copy.deepcopy(model)
    pairs = [(m, torch.optim.SGD(m.parameters(), lr=0.01)) for m in (model, twin)]
    tuners = [fw.TuneCentroids().attach(m, optimizer) for m, optimizer in pairs]
    x, y = torch.randn(8, 8), torch.randn(8, 4)
    for part in (slice(0, 4), slice(4, 8)):
        (model(x[part]) - y[part]).square().sum().backward()
    (twin(x) - y).square().sum().backward()
    for (_, optimizer), tuner in zip(pairs, tuners, strict=True):
        optimizer.step()
        tuner.step()
    assert torch.allclose(model[0].weight, twin[0].weight, atol=1e-6)


@pytest.mark.parametrize("share", ["layer", "model"])
def test_a_resumed_run_ends_with_the_same_bits_also_where_two_centroids_have_met(share: str, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = clustered(share=share)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, fw.TuneCentroids(share=share).attach(model, optimizer)

    model, optimizer, tuner = start()
    train(model, optimizer, tuner, range(5))
    values = model[0].weight.detach().unique()
    model[0].weight.data[model[0].weight == values[0]] = values[1]  # equal by chance, but two clusters
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "tuner": tuner.state_dict()}
    save_state(tmp_path / "state", saved)
    train(model, optimizer, tuner, range(5, 12))

    again, theirs, other = start()
    state = load_state(tmp_path / "state")
    again.load_state_dict(state["model"])
    theirs.load_state_dict(state["optimizer"])
    other.load_state_dict(state["tuner"])
    train(again, theirs, other, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert len(model[0].weight.unique()) == 5


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    model = clustered()
    tuner = fw.TuneCentroids().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state = tuner.state_dict()
    with pytest.raises(OptionError, match="version None"):
        tuner.load_state_dict({})
    with pytest.raises(OptionError, match=r"different: 2\.weight"):
        tuner.load_state_dict({"version": 1, "index": {"0.weight": state["index"]["0.weight"]}})
    with pytest.raises(OptionError, match=r"different: 0\.weight"):
        tuner.load_state_dict({"version": 1, "index": state["index"] | {"0.weight": torch.ones(2, 2)}})
    assert all(torch.equal(state["index"][name], index) for name, index in tuner.state_dict()["index"].items())
    tuner.finalize()
    for call in (tuner.step, lambda: tuner.load_state_dict(state)):
        with pytest.raises(OptionError, match="finalized"):
            call()


def test_what_an_optimizer_remembers_from_before_is_made_equal() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, _Nothing(), range(3))
    model.weight.data.view(-1)[::2] = 0
    fw.Cluster(3)(model, fw.Task(model, ()), fw.Stage())
    before, moments = model.weight.detach().clone(), optimizer.state[model.weight]["exp_avg"].clone()
    tuner = fw.TuneCentroids().attach(model, optimizer)
    state = optimizer.state[model.weight]["exp_avg"]
    for number in before.unique():
        mine = before == number
        assert torch.allclose(state[mine], moments[mine].mean() if number else torch.zeros(()), atol=1e-7)
    train(model, optimizer, tuner, range(3, 6))
    assert len(bits(model.weight)) == 3


def test_a_pruner_beside_it_may_set_members_to_zero() -> None:
    model = clustered()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = fw.GradualPruning(0.8, begin=2, end=4, every=1, dense=()).attach(model, optimizer)
    tuner = fw.TuneCentroids().attach(model, optimizer)
    for step in range(8):
        train(model, optimizer, pruner, range(step, step + 1))
        tuner.step()
    for i in (0, 2):
        assert int((model[i].weight == 0).sum()) >= 0.8 * model[i].weight.numel() - 1
        assert len(bits(model[i].weight)) <= 5


def test_in_our_loop_with_a_teacher_and_killed_half_way(tmp_path: Path) -> None:
    model = clustered()
    data = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(4)]
    teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    task = fw.Task(teacher, (data[0][0],), train=data)
    method = fw.Train(steps=12, lr=0.01, distill=fw.KL(), hooks=[fw.TuneCentroids()], checkpoint_every=3)
    whole = copy.deepcopy(model)
    assert method(whole, task, fw.Stage()) == fw.Plan()
    assert [len(bits(whole[i].weight)) for i in (0, 2)] == [5, 5]

    class Killed(Exception):
        pass

    def kill(event: dict[str, Any]) -> None:
        if event.get("step") == 7:
            raise Killed

    with pytest.raises(Killed):
        method(copy.deepcopy(model), task, fw.Stage(folder=tmp_path, report=kill))
    resumed = copy.deepcopy(model)
    method(resumed, task, fw.Stage(folder=tmp_path, resume=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_processes_end_with_the_same_bits_and_few_values(tmp_path: Path) -> None:
    mp.spawn(tune_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert len(first["0.weight"].unique()) == 4


def test_only_what_is_clustered_trained_and_named_is_tuned() -> None:
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("a", "b", "c", "d")})
    model["e"] = nn.BatchNorm1d(16)  # ones and zeros are no codebook
    method = fw.Cluster(4, layers=["a", "b", "c"], biases=3)
    method(model, fw.Task(model, ()), fw.Stage())
    model["c"].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    lines = {line.name: line for line in fw.TuneCentroids(keep=["b"]).attach(model, optimizer).selection}
    assert [name for name, line in lines.items() if line.action == "tuned"] == ["a.weight", "a.bias", "c.bias"]
    assert "keep" in lines["b.weight"].reason and "not clustered" in lines["d.weight"].reason
    assert "not trained" in lines["c.weight"].reason and "3 different values" in lines["a.bias"].reason
    assert fw.TuneCentroids().select(model)[0].action == "tuned"


def test_nothing_clustered_no_optimizer_and_odd_options_are_refused() -> None:
    model = nn.Linear(16, 16)
    with pytest.raises(NothingToCompress, match="Run Cluster first"):
        fw.TuneCentroids().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(OptionError, match=r"attach\(model, optimizer\)"):
        fw.TuneCentroids().attach(model)
    with pytest.raises(NothingToCompress, match="Nearest"):
        fw.TuneCentroids(layers=["wait"]).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for options in ({"share": "rows"}, {"most": 1}, {"most": 1 << 15}, {"layers": "fc"}):
        with pytest.raises(OptionError):
            fw.TuneCentroids(**options)  # type: ignore[arg-type]


def test_a_sparse_gradient_and_a_centroid_that_is_lost_are_named() -> None:
    model = nn.Embedding(20, 4, sparse=True)
    fw.Cluster(3)(model, fw.Task(model, ()), fw.Stage())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fw.TuneCentroids().attach(model, optimizer)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(OptionError, match="sparse=False"):
        optimizer.step()
    dense = clustered()
    optimizer = torch.optim.SGD(dense.parameters(), lr=1e30)
    tuner = fw.TuneCentroids().attach(dense, optimizer)
    with pytest.raises(NumericalError, match=r"0\.weight became NaN or infinite"):
        train(dense, optimizer, tuner, range(20))
