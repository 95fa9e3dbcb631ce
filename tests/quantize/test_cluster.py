# SPDX-License-Identifier: Apache-2.0
"""Clustering a model's weights: few values, the right ones, zeros and ties kept, and a model that is whole when it fails."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import DataError, NothingToCompress, NumericalError, OptionError
from featherweight.layers import collect, problems, to_matrix, weights
from featherweight.quantize.diagonals import hessian_diagonals
from featherweight.task import default_forward
from tests.models import MODELS


def run(method: fw.Cluster, model: nn.Module, **task: Any) -> tuple[fw.Plan, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return method(model, fw.Task(model, (), **task), fw.Stage(report=events.append)), events


def values(tensor: Tensor) -> list[float]:
    return [float(v) for v in tensor.detach().unique()]


def nearest_of_means(before: Tensor, after: Tensor) -> bool:
    """Whether each value went to the nearest of the new ones, and these are means of what came to them, or zero."""
    old, new = before.detach().double().numpy().ravel(), after.detach().double().numpy().ravel()
    numbers = np.unique(new)
    gaps = np.abs(old[:, None] - numbers)
    near = np.abs(old - new) <= gaps.min(1) + 1e-6
    means = [0.0 if number == 0 else old[new == number].mean() for number in numbers]
    return bool(near.all() and np.allclose(means, numbers, atol=1e-6))


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_keeps_few_values_the_nearest_means_its_zeros_and_its_ties(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    for weight in weights(model)[0]:
        weight.parameter.data.view(-1)[::3] = 0.0
    before = copy.deepcopy(model)
    plan, events = run(fw.Cluster(5), model)
    lines = [event["weight"] for event in events if event["kind"] == "selection"]
    assert [line["name"] for line in lines] == [weight.name for weight in weights(before)[0]]
    for weight, line in zip(weights(before)[0], lines, strict=True):
        old, new = weight.parameter, model.get_parameter(weight.name)
        if line["action"] == "kept":
            assert torch.equal(old, new) and weight.name not in plan.formats
            continue
        assert len(values(new)) == 5 and plan.formats[weight.name] == "codebook:5"
        assert (new[old == 0] == 0).all() and nearest_of_means(old, new)
        assert all(model.get_parameter(alias) is new for alias in weight.aliases)
    for name, parameter in before.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(parameter, model.get_parameter(name))


def test_a_clustered_model_makes_a_smaller_file_and_loads_to_the_last_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    plan, _ = run(fw.Cluster(bits=4), model)
    coded = fw.save(model, plan, tmp_path)
    assert all(coded[name].coded_bytes < 64 * 64 / 2 + 150 for name in ("0.weight", "2.weight"))
    again = fw.load(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_slow_coder_is_tried_where_it_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(600, 300)
    layer.weight.data *= torch.rand(300, 600) < 0.3 * (
        torch.rand(600) < 0.3
    )  # whole columns are empty: a pattern to learn
    plan, _ = run(fw.Cluster(8, coder="adaptive", biases=4), layer)
    assert plan.formats == {"weight": "entropy:codebook:8:adaptive", "bias": "entropy:codebook:4:adaptive"}
    coded = fw.save(layer, plan, tmp_path / "asked")
    assert coded["weight"].codec.endswith(":adaptive")
    assert not fw.save(layer, fw.Plan(), tmp_path / "unasked")["weight"].codec.endswith(":adaptive")


def test_a_glob_gives_layers_their_own_number_and_the_last_one_decides() -> None:
    model = nn.ModuleDict({name: nn.Linear(20, 20) for name in ("a", "b", "c")})
    before = copy.deepcopy(model.state_dict())
    run(fw.Cluster({"*": 9, "b": 3}, keep=["c"]), model)
    assert [len(values(model[name].weight)) for name in "abc"] == [9, 3, 400]
    run(fw.Cluster(bits={"c": 2}), model)
    assert [len(values(model[name].weight)) for name in "abc"] == [9, 3, 4]
    assert torch.equal(model["c"].bias, before["c.bias"])


def test_without_a_number_there_are_sixteen_and_bits_are_the_same_in_other_words() -> None:
    first, second, third = (nn.Linear(30, 30) for _ in range(3))
    second.load_state_dict(first.state_dict())
    third.load_state_dict(first.state_dict())
    for layer, method in ((first, fw.Cluster()), (second, fw.Cluster(bits=4)), (third, fw.Cluster(16))):
        run(method, layer)
    assert len(values(first.weight)) == 16
    assert torch.equal(first.weight, second.weight) and torch.equal(first.weight, third.weight)


def test_the_whole_model_shares_one_codebook_that_is_that_of_all_its_weights_together() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5), nn.Linear(5, 40))
    before = [layer.weight.detach().flatten().clone() for layer in model]
    run(fw.Cluster(6, share="model", start="exact"), model)
    after = [layer.weight.detach().flatten() for layer in model]
    assert len(values(torch.cat(after))) == 6 and nearest_of_means(torch.cat(before), torch.cat(after))
    alone = copy.deepcopy(model[1])
    alone.weight.data = before[1].view(5, 20).clone()
    run(fw.Cluster(6, start="exact"), alone)
    assert not torch.equal(alone.weight, model[1].weight)


@pytest.mark.parametrize("layer", [nn.Linear(12, 7), nn.Conv2d(4, 7, 3), nn.ConvTranspose2d(7, 4, 3)])
def test_rows_share_numbers_with_their_neighbours_only(layer: nn.Module) -> None:
    [weight], _ = weights(layer)
    before = to_matrix(weight, layer.weight.detach().clone())
    run(fw.Cluster(3, share="rows", rows=2), layer)
    after = to_matrix(weight, layer.weight.detach())
    for i in range(0, len(after), 2):
        assert len(values(after[i : i + 2])) == 3 and nearest_of_means(before[i : i + 2], after[i : i + 2])
    assert len(values(after)) > 3


@pytest.mark.parametrize("kind", MODELS)
def test_diagonals_are_those_of_the_whole_hessians(kind: str) -> None:
    """Against the statistics that reconstruction uses, which sum all of H in another way."""
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    model, batches = make(), [(*inputs(3), torch.zeros(1)) for _ in range(3)]
    found, _ = problems(model)
    diagonals = hessian_diagonals(model, found, batches, default_forward)
    statistics = collect(model, found, batches, default_forward)
    assert set(diagonals) == set(statistics)
    for name, one in statistics.items():
        expected = one.H.diagonal() if one.scale is None else 2 * one.scale[:, None] ** 2
        assert torch.allclose(diagonals[name], expected, rtol=1e-5, atol=1e-9), name


def test_hessian_importance_is_weighted_k_means_by_the_inputs_second_moments() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 200, bias=False), torch.randn(500, 6) * torch.tensor([10.0, 5.0, 1.0, 0.5, 0.1, 0.0])
    before = layer.weight.detach().double()
    plain = copy.deepcopy(layer)
    run(fw.Cluster(4, importance="hessian", samples=500), layer, calibration=list(x.split(100)))
    run(fw.Cluster(4), plain)

    def error(weight: Tensor) -> float:
        return float(((weight.detach().double() - before) @ x.double().T).square().sum())

    assert error(layer.weight) < error(plain.weight)
    importance = x.double().square().sum(0).expand(200, 6)
    for number in values(layer.weight):
        mine = layer.weight.detach() == number
        mean = (before * importance)[mine].sum() / importance[mine].sum()
        assert float(mean) == pytest.approx(number, rel=2e-3)  # silent inputs count a little


def test_weights_that_no_hook_sees_count_alike_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("unused", nn.Linear(4, 4))
    task = {"calibration": [torch.randn(8, 4)], "forward": lambda model, batch: model[0](batch)}
    _, events = run(fw.Cluster(3, importance="hessian"), model, **task)
    assert any("unused.weight" in e.get("text", "") and "count alike" in e["text"] for e in events)
    with pytest.raises(DataError, match=r"calibration|train"):
        run(fw.Cluster(3, importance="hessian"), nn.Linear(4, 4))


def test_a_rate_makes_fewer_bits_of_the_same_number_of_values() -> None:
    torch.manual_seed(0)
    plain, priced = nn.Linear(100, 100), nn.Linear(100, 100)
    plain.weight.data = torch.randn(100, 100) * (torch.rand(100, 100) < 0.1)
    priced.weight.data = plain.weight.data.clone()
    run(fw.Cluster(16), plain)
    run(fw.Cluster(16, rate=0.02), priced)

    def bits(weight: Tensor) -> float:
        shares = weight.detach().unique(return_counts=True)[1] / weight.numel()
        return float(-(shares * shares.log2()).sum())

    assert bits(priced.weight) < 0.9 * bits(plain.weight)
    assert len(values(priced.weight)) <= 16


def test_biases_and_other_vectors_get_numbers_of_their_own_where_asked() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.BatchNorm1d(50), nn.Linear(50, 30))
    nn.init.normal_(model[1].weight)
    plan, _ = run(fw.Cluster(8, biases=5, keep=["2"]), model)
    assert [len(values(p)) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)] == [5, 5, 1, 30]
    assert plan.formats["0.bias"] == "codebook:5"


def test_few_values_are_left_exactly_and_reported() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.1, -0.3, 0.0, 0.7, 1e-20]).repeat(10, 2))
        model[1].weight.fill_(0.25)
        model[2].weight.zero_()
    before = copy.deepcopy(model)
    for method in (fw.Cluster(5), fw.Cluster(5, rate=0.5, start="exact")):
        plan, events = run(method, model)
        assert all(torch.equal(model[i].weight, before[i].weight) for i in range(3))
        [text] = [event["text"] for event in events if event["kind"] == "message"]
        assert "0.weight, 1.weight, 2.weight" in text
        kept = [e["weight"]["action"] for e in events if e["kind"] == "selection"]
        assert kept[:3] == ["kept"] * 3
    assert plan.formats["0.weight"] == "codebook:5"


def test_zeros_may_be_given_up_where_asked() -> None:
    layer = nn.Linear(20, 20)
    layer.weight.data.add_(1.0).view(-1)[::4] = 0.0
    kept = copy.deepcopy(layer)
    run(fw.Cluster(2, keep_zeros=False), layer)
    run(fw.Cluster(2), kept)
    assert not (kept.weight.detach().view(-1)[::4] != 0).any() and len(values(kept.weight)) == 2
    assert values(layer.weight)[0] == pytest.approx(0.0, abs=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    layer = nn.Linear(30, 30).to(dtype)
    layer.weight.data.view(-1)[::2] = 0
    run(fw.Cluster(7), layer)
    assert layer.weight.dtype == dtype and len(values(layer.weight)) == 7
    assert (layer.weight.view(-1)[::2] == 0).all()


def test_what_fails_leaves_the_model_as_it_was_and_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[2, 3] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match=r"1\.weight has 1 of 16"):
        run(fw.Cluster(2), model)
    assert all(torch.equal(a, b) or name == "1.weight" for (name, a), b in zip(model.state_dict().items(), before.values(), strict=True))  # fmt: skip
    model[1].weight.data[2, 3] = 0.5
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match="squares overflow"):
        run(fw.Cluster(2, importance="hessian"), model, calibration=[torch.full((2, 4), torch.inf)])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_nothing_to_cluster_says_why() -> None:
    with pytest.raises(NothingToCompress, match="no weights"):
        run(fw.Cluster(), nn.ReLU())
    with pytest.raises(NothingToCompress, match="keep="):
        run(fw.Cluster(keep=["*"]), nn.Linear(2, 2))
    with pytest.raises(NothingToCompress, match=r"Nearest names: 0\.weight"):
        run(fw.Cluster(layers=["0.weigth"]), nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 1}, "from 2 to 65536"),
        ({"clusters": 4, "bits": 2}, "give one"),
        ({"bits": 17}, "from 1 to 16"),
        ({"clusters": {}}, "at least one glob"),
        ({"clusters": {"a": True}}, "clusters of 'a'"),
        ({"clusters": {"a": 4}, "share": "model"}, "one number"),
        ({"rows": 4}, "share='rows'"),
        ({"share": "rows", "rows": 0}, "rows"),
        ({"start": "kmeans++"}, "start"),
        ({"share": "rwos"}, "Nearest: rows"),
        ({"importance": "fisher"}, "hessian"),
        ({"coder": "huffmann"}, "adaptive"),
        ({"rate": -0.1}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"biases": 1}, "biases"),
        ({"layers": "fc"}, r"layers is a list of strings, layers=\['fc'\] say"),
        ({"dense": ["last"]}, "dense"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        fw.Cluster(**options)


def test_select_tells_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8))
    before = copy.deepcopy(model.state_dict())
    lines = fw.Cluster(dense=["first"]).select(model, (torch.zeros(1, 1, 4, 4),))
    assert [(line.name, line.action) for line in lines] == [("0.weight", "kept"), ("2.weight", "clustered")]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
