# SPDX-License-Identifier: Apache-2.0
"""What is pruned, what is kept, and the words that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import featherweight as fw
from featherweight.errors import DataError, NothingToCompress, OptionError
from tests.models import MODELS


def reasons(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> dict[str, str]:
    lines = fw.GradualPruning(**{"sparsity": 0.5} | options).select(model, inputs or None)
    return {line.name: f"{line.action}: {line.reason}" for line in lines}


class OutOfOrder(nn.Module):
    """Defined from last to first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.mid = nn.Conv2d(4, 4, 3)
        self.depth = nn.Conv2d(4, 4, 1, groups=4)
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mid(self.depth(self.stem(x))).mean((2, 3)))


def test_rules_follow_the_order_of_calls_and_say_when_they_cannot_see_it() -> None:
    image = torch.zeros(1, 3, 8, 8)
    assert reasons(OutOfOrder(), image) == {
        "last.weight": "kept: output layer; dense=() prunes it too",
        "mid.weight": "pruned: layers='*' names it",
        "depth.weight": "kept: depthwise; dense=() prunes it too",
        "stem.weight": "kept: first layer, a convolution; dense=() prunes it too",
    }
    blind = reasons(OutOfOrder())
    assert blind["stem.weight"] == (
        "kept: last in definition order; give example_inputs to see the order of calls; dense=() prunes it too"
    )
    assert blind["last.weight"].startswith("pruned")  # first by definition, but not a convolution
    first = reasons(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Linear(2, 2)))
    assert first["0.weight"].startswith("kept: first layer in definition order, a convolution; give example_inputs")
    assert all(reason.startswith("pruned") for reason in reasons(OutOfOrder(), image, dense=()).values())
    only = reasons(OutOfOrder(), image, dense=("output",))
    assert [name for name, reason in only.items() if reason.startswith("kept")] == ["last.weight"]


def test_the_output_layer_of_a_tied_model_is_its_embedding() -> None:
    make, inputs = MODELS["tied"]
    found = reasons(make(), *inputs(2))
    assert found == {
        "words.weight": "kept: output layer; dense=() prunes it too",
        "mix.weight": "pruned: layers='*' names it",
    }


def test_the_projection_that_attention_never_calls_as_a_module_has_its_place_in_the_order() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.before = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.before(x)
            return self.attention(x, x, x)[0]

    found = reasons(Net(), torch.zeros(3, 1, 4))
    assert found["before.weight"].startswith("pruned")
    assert found["attention.in_proj_weight"].startswith("kept: output layer")
    assert found["attention.out_proj.weight"].startswith("kept: output layer")


def test_globs_name_keep_and_override() -> None:
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "body": nn.Linear(4, 4)})
    assert reasons(model, layers=["body"], keep=["norm*"], dense=()) == {
        "stem.weight": "kept: no glob of layers names it",
        "body.weight": "pruned: layers='body' names it",
    }
    assert reasons(model, keep=["s*"], dense=())["stem.weight"] == "kept: keep='s*' names it"
    lines = fw.GradualPruning({"*": 0.9, "stem": 0.5}, dense=()).select(model)
    assert [line.sparsity for line in lines] == [0.5, 0.9]
    lines = fw.GradualPruning({"stem": 0.5}, dense=()).select(model)
    assert [(line.action, line.sparsity) for line in lines] == [("pruned", 0.5), ("kept", 0.0)]
    assert lines[1].reason == "no glob of sparsity names it"


def test_globs_see_a_tied_weight_by_each_of_its_names() -> None:
    make, _ = MODELS["tied"]
    assert reasons(make(), keep=["head"], dense=())["words.weight"] == "kept: keep='head' names it"
    assert reasons(make(), layers=["head"], dense=())["words.weight"] == "pruned: layers='head' names it"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["fd*"]}, r"layers: 'fd\*' matches none of the model's 3 weights. Nearest names: fc"),
        ({"keep": ["haed"]}, r"keep: 'haed' matches none.*head"),
        ({"sparsity": {"mix": 0.5}}, r"sparsity: 'mix' matches none"),
        ({"ranking": "global", "caps": {"mix": 0.5}}, r"caps: 'mix' matches none"),
        (
            {"layers": ["fc"], "keep": ["fc"]},
            r"all 3 weights are kept. fc.weight: keep='fc' names it; mid.weight: no glob",
        ),
    ],
)
def test_what_names_nothing_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NothingToCompress, match=message):
        fw.GradualPruning(**{"sparsity": 0.5} | options).attach(MODELS["mlp"][0]())


def test_a_glob_that_others_override_everywhere_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"sparsity: 'fc' decides nothing, because '\*' after it.*Put 'fc' last"):
        fw.GradualPruning({"fc": 0.5, "*": 0.9}).select(MODELS["mlp"][0]())


def test_a_model_without_weights_and_one_all_kept_say_so() -> None:
    with pytest.raises(NothingToCompress, match="the model has no weights"):
        fw.GradualPruning(0.5).attach(nn.ReLU())
    with pytest.raises(
        NothingToCompress, match=r"all 1 weights are kept. weight: last in definition order.*dense=\(\)"
    ):
        fw.GradualPruning(0.5).attach(nn.Linear(2, 2))
    fw.GradualPruning(0.5).select(nn.Linear(2, 2))  # looking is no error


def test_bare_parameters_are_pruned_only_by_name() -> None:
    make, inputs = MODELS["functional"]
    found = reasons(make(), *inputs(1))
    assert found["kernel"] == (
        "kept: a parameter of Functional, which may or may not be a weight; name it to prune it: layers=['*', 'kernel']"
    )
    assert reasons(make(), *inputs(1), layers=["*", "kernel"])["kernel"].startswith("pruned")
    assert reasons(make(), *inputs(1), sparsity={"*": 0.5, "ker*": 0.7})["kernel"].startswith("pruned")
    tiles = reasons(make(), *inputs(1), layers=["*", "kernel"], pattern="1x2")
    assert "a bare parameter of 4 axes does not say which are its input channels" in tiles["kernel"]


def test_computed_and_zero_initialised_weights_are_kept_with_the_reason() -> None:
    model = nn.ModuleDict(
        {"normed": parametrizations.weight_norm(nn.Linear(3, 3)), "up": nn.Linear(3, 3), "lazy": nn.LazyLinear(2)}
    )
    nn.init.zeros_(model["up"].weight)
    found = reasons(model, dense=())
    assert "remove_parametrizations" in found["normed.parametrizations.weight.original1"]
    assert found["up.weight"] == "kept: all zeros, as adapters and zero-initialised branches start; nothing to rank"
    assert found["lazy.weight"] == "kept: a lazy module that has not run yet; call the model once first"
    lines = {line.name: line for line in fw.GradualPruning(0.5, dense=()).select(model)}
    assert (lines["lazy.weight"].shape, lines["lazy.weight"].parameters) == ((), 0) or lines["lazy.weight"].shape == ()


def test_facts_of_each_weight_are_listed() -> None:
    [line] = fw.GradualPruning(0.5, dense=()).select(nn.Conv2d(3, 4, 5))
    assert (line.name, line.kind, line.shape, line.parameters) == ("weight", "conv", (4, 3, 5, 5), 300)
    [line] = fw.GradualPruning(pattern="1:4", dense=()).select(nn.Linear(8, 2))
    assert line.sparsity == 0.75


def test_more_zeros_than_asked_for_are_kept_and_it_is_said() -> None:
    layer = nn.Linear(10, 10)
    layer.weight.data[:7] = 0
    found = reasons(layer, dense=())
    assert found["weight"] == "pruned: 70.0% are zero already, more than the target; they stay"


def test_inputs_that_the_model_does_not_take_are_named() -> None:
    with pytest.raises(DataError, match=r"cannot be called with example_inputs tuple\(Tensor\[1, 5\] float32\)"):
        fw.GradualPruning(0.5).select(MODELS["mlp"][0](), (torch.zeros(1, 5),))


def test_looking_changes_nothing() -> None:
    model, x = MODELS["residual"][0](), torch.randn(2, 3, 8, 8)
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for pattern in ("weight", "neuron"):
        fw.GradualPruning(0.5, pattern=pattern).select(model, (x,))
    assert model.training and not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    F.relu(model(x)).sum().backward()
