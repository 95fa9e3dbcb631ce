# SPDX-License-Identifier: Apache-2.0
"""Equalization, SmoothQuant and the links they scale along. Oracles: the papers' equations in NumPy, and the answers before."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits import apply
from featherweight.layers import to_matrix, weights
from featherweight.plan import Swap
from featherweight.quantize.equalize import equalize
from featherweight.quantize.links import Link, find_links, is_norm, scale, without
from featherweight.quantize.smooth import smooth
from tests.models import Transformer


class Convs(nn.Module):
    """A chain of every kind of conv to a flattened linear layer, with what a factor passes through in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.leaky_relu(self.point(F.relu(self.depth(x))))
        x = F.avg_pool2d(F.relu(self.grouped(F.pad(F.relu(self.up(x)), (1, 1, 1, 1)))), 2)
        return self.fc(F.adaptive_avg_pool2d(x, 3).flatten(1))


def every(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def layers_of(model: nn.Module, x: Tensor) -> tuple[tuple[Link, ...], dict[str, str]]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return find_links(model, (x,), lambda name, module: isinstance(module, kinds), every(model))


def test_a_chain_of_convs_is_linked_from_end_to_end() -> None:
    links, left = layers_of(Convs(), torch.randn(2, 3, 8, 8))
    order = ["stem", "depth", "point", "up", "grouped", "fc"]
    assert links == tuple(Link(a, (b,)) for a, b in itertools.pairwise(order))
    assert left == {"fc": "the model answers with it"}


def test_equalized_layers_share_their_range_and_answer_as_before() -> None:
    """Equation 9 to 11: where nothing moves any more, each row's largest magnitude is that of the column that reads it."""
    torch.manual_seed(0)
    model, x = Convs(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.stem.weight.mul_(torch.logspace(-2, 2, 8)[:, None, None, None])
    links, _ = layers_of(model, x)
    expected = model(x)
    assert equalize(model, links) > 5
    assert (model(x) - expected).detach().abs().max() < 1e-6 * expected.detach().abs().max()
    matrices = {w.name.rpartition(".")[0]: (w, to_matrix(w, w.parameter.detach()).double()) for w in weights(model)[0]}
    for link in links:
        rows = matrices[link.source][1].abs().amax(1)
        weight, columns = matrices[link.readers[0]]
        if link.readers[0] == "fc":
            own = columns.abs().view(5, 8, 9).amax((0, 2))
        else:
            split = columns.view(weight.groups, -1, columns.shape[1] // weight.columns_per_tap, weight.columns_per_tap)
            own = split.abs().amax((1, 2)).flatten()
        assert torch.allclose(rows, own, rtol=5e-3), link


def test_one_pair_is_equalized_as_the_paper_says() -> None:
    """Oracle: equation 11 in NumPy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    W1, b1, W2 = (t.detach().numpy().copy() for t in (model[0].weight, model[0].bias, model[2].weight))
    s = np.sqrt(np.abs(W1).max(1) / np.abs(W2).max(0))
    equalize(model, [Link("0", ("2",))])
    assert np.allclose(model[0].weight.detach().numpy(), W1 / s[:, None], rtol=1e-5)
    assert np.allclose(model[0].bias.detach().numpy(), b1 / s, rtol=1e-5)
    assert np.allclose(model[2].weight.detach().numpy(), W2 * s, rtol=1e-5)


def test_a_dead_channel_is_left_alone_and_zeros_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[1] = 0.0
    model[2].weight.data[:, 2] = 0.0
    before = copy.deepcopy(model)
    equalize(model, [Link("0", ("2",))])
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old == 0, new == 0)
    assert torch.equal(model[0].weight[1:], before[0].weight[1:])


class Hard(nn.Module):
    """Layers none of which may be scaled, each for its own reason."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("six", "gelu", "twice", "tied", "mixed", "other", "last"):
            self.add_module(name, nn.Linear(4, 4))
        self.end = nn.Linear(4, 4)
        self.end.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.six(x))
        x = F.gelu(self.gelu(x))
        y = self.twice(x)
        x = self.end(torch.relu(y)) + y
        x = self.mixed(self.tied(x))
        x = self.last(x.flip(-1))
        return self.last(torch.relu(self.other(x)))


def test_what_cannot_be_scaled_is_left_with_the_reason() -> None:
    model = Hard()
    links, left = layers_of(model, torch.randn(3, 4))
    assert not links
    assert left["six"] == "hardtanh reads it"
    assert left["gelu"] == "gelu reads it"
    assert left["twice"] == "add reads it"
    assert left["tied"] == "it shares a parameter with another layer"
    assert left["mixed"] == "flip reads it"
    assert left["other"] == "last reads other channels too"


class Shuffled(nn.Module):
    """Channels that come to the reader in another order: every operation passes factors, and the proof does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).view(-1, 2, 3).transpose(1, 2).flatten(1))


def test_channels_in_another_order_do_not_pass_the_proof() -> None:
    links, left = layers_of(Shuffled(), torch.randn(3, 4))
    assert not links and left["a"] == "scaled channels change the answer"


def test_nothing_is_changed_by_looking() -> None:
    model, x = Convs().train(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    layers_of(model, x)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Block(nn.Module):
    """A transformer's block with a norm before attention and a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(8), nn.RMSNorm(8)
        self.attention: Any = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def test_norms_feed_their_linears_and_values_and_gates_pass_factors_on() -> None:
    model, x = Block(), torch.randn(2, 5, 8)
    apply(model, Swap("attention", to="attention"))
    links, left = find_links(
        model, (x,), lambda name, module: is_norm(module) or isinstance(module, nn.Linear), every(model)
    )
    assert set(links) == {
        Link("norm", ("attention.q", "attention.k", "attention.v")),
        Link("attention.v", ("attention.out",)),
        Link("second", ("gate", "up")),
        Link("up", ("down",)),
    }
    assert left["gate"] == "silu reads it"
    assert left["attention.q"] == "scaled channels change the answer"


def test_smoothing_follows_the_paper_and_leaves_the_answer() -> None:
    """Oracle: equation 4 in NumPy, from activations that a hook kept."""
    torch.manual_seed(0)
    model, alpha = Block().eval(), 0.6
    apply(model, Swap("attention", to="attention"))
    with torch.no_grad():
        model.norm.weight[3], model.norm.bias[3] = 40.0, 2.0
    data = [torch.randn(2, 5, 8) for _ in range(3)]
    plain = copy.deepcopy(model)
    peak = torch.stack([model.norm(x).abs().flatten(0, 1).amax(0) for x in data]).amax(0).detach().numpy()
    readers = ("attention.q", "attention.k", "attention.v")
    W = np.stack([model.get_submodule(name).weight.detach().abs().amax(0).numpy() for name in readers]).max(0)
    s = peak**alpha / W ** (1 - alpha)
    largest = smooth(model, [Link("norm", readers)], data, lambda model, batch: model(batch), alpha)
    assert np.allclose(model.norm.weight.detach().numpy(), plain.norm.weight.detach().numpy() / s, rtol=1e-5)
    assert np.allclose(model.norm.bias.detach().numpy(), plain.norm.bias.detach().numpy() / s, rtol=1e-5, atol=1e-7)
    assert np.allclose(
        model.attention.k.weight.detach().numpy(), plain.attention.k.weight.detach().numpy() * s, rtol=1e-5, atol=1e-7
    )
    assert largest == pytest.approx(np.exp(np.abs(np.log(s)).max()), rel=1e-4)
    x = data[0]
    assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count_in_what_is_smoothed() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(1, 3, 4)
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 0]])}
    cut = {"x": x[:, :2], "attention_mask": torch.tensor([[1, 1]])}
    twin = copy.deepcopy(model)
    for one, data in ((model, batch), (twin, cut)):
        smooth(one, [Link("0", ("1",))], [data], lambda model, batch: model(batch["x"]), 0.5)
    assert torch.equal(model[1].weight, twin[1].weight)


def test_links_of_layers_that_are_to_stay_are_left_out() -> None:
    links, left = without([Link("a", ("b",)), Link("b", ("c",))], {"c": "keeps its grid"})
    assert links == [Link("a", ("b",))] and left == {"b": "c keeps its grid"}


def test_scaling_leaves_a_model_of_torchs_own_blocks_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = Transformer().eval(), torch.randn(2, 5, 8)
    apply(model, Swap("block.self_attn", to="attention"))
    links, _ = find_links(
        model, (x,), lambda name, module: is_norm(module) or isinstance(module, nn.Linear), every(model)
    )
    assert Link("block.norm2", ("head",)) in links
    expected = model(x)
    for link in links:
        count = len(model.get_submodule(link.source).weight)
        assert scale(model, link, torch.rand(count).double() + 0.5)
    assert torch.allclose(model(x), expected, atol=1e-5)
