# SPDX-License-Identifier: Apache-2.0
"""Cuts end to end. Oracles: the layer arithmetic written out on the kept channels, and the model as it was.

What is cut is found by `trace`; that couplings of every pattern are right is tested there. Here: that they are carried
out in place, that whatever the model's code needs is found, and that what does not hold leaves no mark.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits import Attention, Cut, SelfAttention, cut, refusals, replay
from featherweight.errors import EditError, GraphError, OptionError, VerifyError
from featherweight.graph import Coupling, Group, Member, Trace, trace
from featherweight.plan import Attribute, Plan, Swap
from tests.edits.snapshot import snapshot
from tests.models import MODELS, Residual

IMAGE = (torch.randn(2, 3, 8, 8),)


def some(found: Trace, share: float) -> list[Coupling]:
    """That share of every group, at least one and never all."""
    return [c for group in found.groups if group.size > 1 for c in group[: max(1, int(share * group.size))]]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_any_share_of_everything_is_cut_proved_replayed_and_trained(name: str, share: float) -> None:
    build, example = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build(), example(3)
    found = trace(model, inputs)
    identity = {id(parameter) for parameter in model.parameters()}
    mode = model.training
    done = cut(model, some(found, share), trace=found, inputs=inputs)
    assert done.verified is not None
    assert done.verified.error <= 1e-9
    assert model.training is mode
    assert sum(p.numel() for p in model.parameters()) == found.parameters(done.kept)
    if "swap" not in done.ways:
        assert {id(parameter) for parameter in model.parameters()} == identity
    fresh = build()
    replay(fresh, Plan.from_json(done.plan.to_json()).edits)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(*inputs), model.eval()(*inputs))
    model.train()(*inputs).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_residual_network_computes_what_its_kept_channels_compute() -> None:
    """Written out by hand: of the stem's channels 1 and 4 go, with both norms and both ends of the branch."""
    torch.manual_seed(0)
    model = Residual().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    old, keep = copy.deepcopy(model), [0, 2, 3, 5, 6, 7]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    cut(model, [Coupling("stem", 1), Coupling("stem", 4)], inputs=(x,))
    h = F.conv2d(x, old.stem.weight[keep], old.stem.bias[keep], padding=1)
    norm = old.norm
    h = F.relu(F.batch_norm(h, norm.running_mean[keep], norm.running_var[keep], norm.weight[keep], norm.bias[keep]))
    a = F.relu(F.conv2d(h, old.a.weight[:, keep], padding=1))
    h = h + F.conv2d(a, old.b.weight[keep], old.b.bias[keep], padding=1)
    torch.testing.assert_close(model(x), F.linear(h.mean((2, 3)), old.head.weight[:, keep], old.head.bias))
    assert (model.stem.out_channels, model.norm.num_features, model.head.in_features) == (6, 6, 6)


class Heads(nn.Module):
    """Attention whose head count, width and shapes are written into its code, in three different ways."""

    def __init__(self, width: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.all_head_size = width
        self.shape = (heads, width // heads)
        self.width = width
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_attention_heads, self.attention_head_size).transpose(1, 2)
        k = self.k(x).view(b, n, *self.shape).transpose(1, 2)
        v = self.v(x).view(b, n, self.num_attention_heads, -1).transpose(1, 2)
        mixed = (q @ k.transpose(-2, -1) / self.attention_head_size**0.5).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(b, n, self.all_head_size))


class Fused(nn.Module):
    """timm's and DeiT's: the head size is computed from the width of the input."""

    def __init__(self, width: int = 12, heads: int = 4, drop: float = 0.1) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(b, n, c)))


class Torch(nn.Module):
    def __init__(self, width: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Blocks(nn.Module):
    """Two attentions of a kind behind norms, in a residual stream of the same width, and feed-forward layers."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.attention = nn.ModuleList(attention() for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(2))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for attention, norm, mlp in zip(self.attention, self.norm, self.mlp, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
        return self.head(x)


TOKENS = (torch.randn(2, 7, 5),)


def heads(found: Trace) -> list[Group]:
    return [group for group in found.groups if group.kind == "heads"]


@pytest.mark.parametrize(
    ("attention", "way", "kind"),
    [(Heads, "attribute", Heads), (Fused, "swap", SelfAttention), (Torch, "swap", Attention)],
)
def test_heads_are_cut_out_of_attentions_of_every_kind(attention: Any, way: str, kind: type[nn.Module]) -> None:
    """One head of the first attention and two of the second; then also the residual stream and the feed-forward."""
    model = Blocks(attention)
    fresh = copy.deepcopy(model)
    found = trace(model, TOKENS)
    first, second = heads(found)
    done = cut(model, [first[1], *second[2:]], trace=found, inputs=TOKENS)
    assert way in done.ways
    assert all(isinstance(m.layer if attention is Torch else m, kind) for m in model.attention)
    replay(fresh, done.plan.edits)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(*TOKENS), model.eval()(*TOKENS))
    again = trace(model, TOKENS)
    assert sorted(group.size for group in heads(again)) == [2, 3]
    done = cut(model, some(again, 0.3), trace=again, inputs=TOKENS)
    assert done.verified is not None
    assert done.verified.held
    assert model.enter.out_features == 9


def test_only_the_numbers_that_are_needed_are_set() -> None:
    """`width` equals a size that changes, and no code reads it; the head size stays, and with it the scale."""
    model = Blocks(Heads)
    found = trace(model, TOKENS)
    done = cut(model, heads(found)[0][:2], trace=found, inputs=TOKENS)
    attributes = {(e.layer, e.name): e.value for e in done.plan.edits if isinstance(e, Attribute)}
    assert attributes == {
        ("attention.0", "num_attention_heads"): 2,
        ("attention.0", "all_head_size"): 6,
        ("attention.0", "shape"): (2, 3),
    }
    assert model.attention[0].width == 12
    assert model.attention[1].num_attention_heads == 4


def test_without_a_proof_a_wrong_number_of_heads_is_not_left_standing() -> None:
    """It would run: the view of the values infers its last size."""
    model = Blocks(Heads)
    found = trace(model, TOKENS)
    done = cut(model, heads(found)[0][:1], trace=found, inputs=TOKENS, verify=False)
    assert done.verified is None
    assert model.attention[0].num_attention_heads == 3


def test_without_inputs_slices_are_all_that_is_done() -> None:
    model = Residual()
    found = trace(model, IMAGE)
    done = cut(model, found["a"][:3], trace=found, verify=False)
    assert (done.ways, model.a.out_channels, model.b.in_channels) == (("slice",), 5, 5)


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.a(x).view(-1, 8))))


def test_what_code_spells_out_is_refused_with_its_line_and_the_rest_can_go() -> None:
    model = Literal()
    x = (torch.randn(4, 5),)
    found = trace(model, x)
    before = snapshot(model)
    with pytest.raises(VerifyError, match=r"in the model, test_cut.py:\d+ in forward: `return self.c\(.*view\(-1, 8\)"):
        cut(model, found["a"][:1], trace=found, inputs=x)
    assert snapshot(model) == before
    assert list(refusals(model, found, x)) == ["a"]
    assert snapshot(model) == before
    assert cut(model, found["b"][:2], trace=found, inputs=x).verified


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, Trace]:
    model = Residual()
    return model, trace(model, IMAGE)


@pytest.mark.parametrize(
    ("couplings", "options", "error", "message"),
    [
        (["a"] * 8, {}, EditError, "all 8 couplings of a would be cut"),
        ([Coupling("a", 8)], {}, EditError, "group a has 8 couplings; there is no number 8"),
        ([Coupling("a", -1)], {}, EditError, "there is no number -1"),
        ([Coupling("stm", 0)], {}, GraphError, "no group is named 'stm'; nearest: stem"),
        (["a"], {"inputs": None}, OptionError, "pass `inputs`"),
        (["a"], {"trace": None, "inputs": None, "verify": False}, OptionError, "pass `inputs`"),
        (["a"], {"follow": [nn.Linear(2, 2)]}, OptionError, "a Linear is neither an optimizer nor a copy"),
        (["a"], {"follow": ["ema"]}, OptionError, "a str is neither an optimizer nor a copy"),
    ],
)
def test_bad_input_is_refused_and_the_model_left_as_it_was(
    residual: tuple[nn.Module, Trace], couplings: list[Any], options: Any, error: type[Exception], message: str
) -> None:
    model, found = residual
    before = snapshot(model)
    chosen = [Coupling(c, i) if isinstance(c, str) else c for i, c in enumerate(couplings)]
    with pytest.raises(error, match=message):
        cut(model, chosen, **{"trace": found, "inputs": IMAGE, **options})
    assert snapshot(model) == before


def test_a_trace_is_stale_after_a_cut_and_refused() -> None:
    model = Residual()
    found = trace(model, IMAGE)
    cut(model, found["a"][:1], trace=found, inputs=IMAGE)
    before = snapshot(model)
    with pytest.raises(EditError, match=r"the trace is stale: a.weight was \(8, 8, 3, 3\) .* \(7, 8, 3, 3\) now"):
        cut(model, found["a"][:1], trace=found, inputs=IMAGE)
    assert snapshot(model) == before
    with pytest.raises(EditError, match=r"the trace knows a tensor 'stem\.weight' that the model does not have"):
        cut(nn.Linear(2, 2), found["a"][:1], trace=found, inputs=IMAGE)


def test_nothing_to_cut_is_no_cut(residual: tuple[nn.Module, Trace]) -> None:
    model, found = residual
    assert cut(model, [], trace=found, inputs=IMAGE) == Cut(
        Plan(), {}, {g.name: g.size for g in found.groups}, (), None
    )


@pytest.mark.parametrize(
    ("tensor", "shift"), [("b.weight", 1), ("norm.running_var", 1), ("head.weight", 1), ("head.weight", None)]
)
def test_a_wrong_trace_does_not_prove_itself(tensor: str, shift: int | None) -> None:
    """One member's positions shifted by one (every shape agrees), or the member left out (they do not)."""
    model = Residual()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    found = trace(model, IMAGE)

    def wrong(member: Member) -> Member | None:
        if member.tensor != tensor:
            return member
        return None if shift is None else dataclasses.replace(member, positions=np.roll(member.positions, shift, 0))

    groups = tuple(
        dataclasses.replace(group, members=tuple(m for m in map(wrong, group.members) if m is not None))
        for group in found.groups
    )
    before = snapshot(model)
    with pytest.raises(VerifyError):
        cut(
            model,
            [Coupling("stem", 0)],
            trace=dataclasses.replace(found, groups=groups),
            inputs=IMAGE,
        )
    assert snapshot(model) == before


def test_ties_and_hooks_outlive_a_cut() -> None:
    model = MODELS["tied"][0]()
    inputs = MODELS["tied"][1](3)
    seen: list[int] = []
    model.mix.register_forward_hook(lambda *_: seen.append(1))
    found = trace(model, inputs)
    seen.clear()
    cut(model, some(found, 0.3), trace=found, inputs=inputs)
    assert model.words.weight is model.head.weight
    seen.clear()
    model(*inputs)
    assert seen == [1]


def test_a_loss_from_before_the_cut_does_not_hinder_training_after_it(residual: tuple[nn.Module, Trace]) -> None:
    model = copy.deepcopy(residual[0])
    loss = model(*IMAGE).sum()
    cut(model, residual[1]["stem"][:3], trace=residual[1], inputs=IMAGE)
    model(*IMAGE).sum().backward()
    assert loss.grad_fn is not None
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_an_encoder_layer_computes_with_our_attention_on_every_path() -> None:
    """In eval mode without gradients torch would read fused weights past any module that stands there."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, batch_first=True), 2)
    inputs = (torch.randn(2, 5, 12),)
    holder = nn.Sequential(nn.Linear(12, 12), model, nn.Linear(12, 3))
    found = trace(holder, inputs)
    group = heads(found)[0]
    done = cut(holder, group[:2], trace=found, inputs=inputs)
    assert Swap("1.layers.0.self_attn", "attention") in done.plan.edits
    with torch.enable_grad():
        expected = holder.eval()(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(holder(*inputs), expected)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        assert holder[1](holder[0](*inputs), src_key_padding_mask=padding).shape == (2, 5, 12)
