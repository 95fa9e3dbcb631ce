# SPDX-License-Identifier: Apache-2.0
"""Oracle: torch's own MultiheadAttention and transformer layers, in every way that they can be called."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.edits import Attention, apply
from featherweight.errors import EditError, OptionError
from featherweight.plan import FakeQuant, Swap
from tests.edits.snapshot import snapshot

BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 4, 5, 8


def swapped(old: nn.MultiheadAttention) -> nn.Module:
    holder = nn.ModuleDict({"attention": copy.deepcopy(old)})
    apply(holder, Swap("attention", "attention"))
    return holder["attention"]


def lively(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def bool_mask(*shape: int) -> Tensor:
    """At least one key is left to each query: a row with none is NaN in one kernel of torch's and 0 in another."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def float_mask(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).masked_fill(bool_mask(*shape), float("-inf"))


BUILDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "cross, other widths": {"kdim": 6, "vdim": 10},
    "cross, batch first, no bias": {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
}
MASKS = {
    "no mask": dict,
    "bool mask": lambda: {"attn_mask": bool_mask(QUERIES, KEYS)},
    "float mask": lambda: {"attn_mask": float_mask(QUERIES, KEYS)},
    "bool mask per head": lambda: {"attn_mask": bool_mask(BATCH * HEADS, QUERIES, KEYS)},
    "float mask per head": lambda: {"attn_mask": float_mask(BATCH * HEADS, QUERIES, KEYS)},
    "bool padding": lambda: {"key_padding_mask": bool_mask(BATCH, KEYS)},
    "float padding": lambda: {"key_padding_mask": float_mask(BATCH, KEYS)},
    "both, bool": lambda: {"attn_mask": bool_mask(QUERIES, KEYS), "key_padding_mask": bool_mask(BATCH, KEYS)},
    "both, float": lambda: {
        "attn_mask": float_mask(BATCH * HEADS, QUERIES, KEYS),
        "key_padding_mask": float_mask(BATCH, KEYS),
    },
    "causal": lambda: {
        "attn_mask": torch.triu(torch.ones(QUERIES, KEYS, dtype=torch.bool), diagonal=1),
        "is_causal": True,
    },
}
WEIGHTS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
]


def inputs(old: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((QUERIES, old.embed_dim), (KEYS, old.kdim), (KEYS, old.vdim))
    shapes = [(BATCH, n, width) if old.batch_first else (n, BATCH, width) for n, width in sizes]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def same(ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("build", BUILDS)
def test_ours_answers_as_torch_does(build: str, mask: str, weights: dict[str, Any]) -> None:
    """Outputs, weights and gradients; in training mode with dropout from the same seed, and torch's fused kernel."""
    old = lively(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3, **BUILDS[build]))
    new = swapped(old)
    q, k, v = inputs(old)
    arguments = MASKS[mask]() | weights

    torch.manual_seed(1)
    theirs = old(q, k, v, **arguments)
    torch.manual_seed(1)
    ours = new(q, k, v, **arguments)
    same(ours, theirs)
    towards = torch.randn_like(theirs[0])
    for mine, other in zip(
        torch.autograd.grad((ours[0] * towards).sum(), (q, k, v)),
        torch.autograd.grad((theirs[0] * towards).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)

    old.eval()
    new.eval()
    same(new(q, k, v, **arguments), old(q, k, v, **arguments))
    with torch.no_grad():
        same(new(q, k, v, **arguments), old(q, k, v, **arguments))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_example_without_a_batch_axis(batch_first: bool, weights: dict[str, Any]) -> None:
    old = lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)).eval()
    x, y = torch.randn(QUERIES, WIDTH, dtype=torch.float64), torch.randn(KEYS, WIDTH, dtype=torch.float64)
    for masks in (
        {},
        {"attn_mask": bool_mask(QUERIES, KEYS), "key_padding_mask": bool_mask(KEYS)},
        {"attn_mask": float_mask(HEADS, QUERIES, KEYS)},
    ):
        same(swapped(old)(x, y, y, **masks, **weights), old(x, y, y, **masks, **weights))


def test_self_attention_in_eval_mode_equals_the_fused_kernel() -> None:
    """Only where query, key and value are one tensor does torch take its fused kernel; then masks go another way."""
    old = lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).eval()
    new = swapped(old)
    x = torch.randn(BATCH, KEYS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for masks in ({}, {"key_padding_mask": bool_mask(BATCH, KEYS)}, {"attn_mask": bool_mask(KEYS, KEYS)}):
            for weights in WEIGHTS:
                same(new(x, x, x, **masks, **weights), old(x, x, x, **masks, **weights))


def test_causal_without_a_mask_is_refused_as_torch_does() -> None:
    old = nn.MultiheadAttention(WIDTH, HEADS)
    x = torch.randn(KEYS, BATCH, WIDTH)
    with pytest.raises(RuntimeError, match="attn_mask"):
        old(x, x, x, is_causal=True)
    with pytest.raises(OptionError, match="needs it"):
        swapped(old)(x, x, x, is_causal=True)


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without gradients"])
@pytest.mark.parametrize("kind", ["encoder layer", "encoder, padding", "encoder, mask", "decoder", "transformer"])
def test_torchs_transformers_run_with_ours_inside(kind: str, gradients: bool) -> None:
    """In eval mode without gradients they would read fused weights instead of calling the attention."""
    x, memory = torch.randn(BATCH, KEYS, WIDTH), torch.randn(BATCH, QUERIES, WIDTH)
    padding = torch.arange(KEYS) >= torch.tensor([[5], [3], [2]])
    encoder_layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(KEYS)
    model: nn.Module
    if kind == "decoder":
        model, arguments = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, batch_first=True), {"memory": memory}
        arguments |= {"tgt_mask": causal, "tgt_is_causal": True}
    elif kind == "transformer":
        model, arguments = nn.Transformer(WIDTH, HEADS, 1, 1, 16, batch_first=True), {"tgt": memory}
    elif kind == "encoder layer":
        model, arguments = encoder_layer, {}
    else:
        model = nn.TransformerEncoder(encoder_layer, 2)
        arguments = {"src_key_padding_mask": padding} if kind == "encoder, padding" else {"mask": causal}
    model.eval()
    with torch.set_grad_enabled(gradients):
        theirs = model(x, **arguments)
        for name in [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]:
            apply(model, Swap(name, "attention"))
        ours = model(x, **arguments)
    assert not any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    if kind == "encoder, padding":  # at padded places torch's kernel gives zeros, and nobody looks
        ours, theirs = ours[~padding], theirs[~padding]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_torch_does_not_fuse_keeps_its_identity_and_frozen_stays_frozen() -> None:
    old = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=10)
    old.k_proj_weight.requires_grad_(False)
    old.in_proj_bias.requires_grad_(False)
    model = nn.ModuleDict({"attention": old})
    state = torch.get_rng_state()
    apply(model, Swap("attention", "attention"))
    assert torch.equal(torch.get_rng_state(), state)
    new = model["attention"]
    assert new.q.weight is old.q_proj_weight
    assert new.k.weight is old.k_proj_weight
    assert new.out.weight is old.out_proj.weight
    assert new.out.bias is old.out_proj.bias
    assert not new.k.weight.requires_grad and not new.v.bias.requires_grad and new.v.weight.requires_grad
    fused = nn.MultiheadAttention(WIDTH, HEADS)
    part = swapped(fused).q.weight
    assert part.untyped_storage().nbytes() == WIDTH * WIDTH * 4, "a view would drag all three along"


def test_a_shared_module_stays_shared() -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS)
    model = nn.ModuleDict({"a": nn.ModuleList([layer]), "b": layer})
    apply(model, Swap("b", "attention"))
    assert isinstance(model["b"], Attention)
    assert model["a"][0] is model["b"]


def hooked() -> nn.Module:
    layer = nn.MultiheadAttention(WIDTH, HEADS)
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


def rounded() -> nn.Module:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, HEADS)})
    apply(model, FakeQuant("a", 8, True))
    return model["a"]


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(WIDTH, HEADS)
        self.order = [self.a]


def tied() -> nn.Module:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, HEADS), "b": nn.MultiheadAttention(WIDTH, HEADS)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    return model


def computed() -> nn.Module:
    layer = nn.MultiheadAttention(WIDTH, HEADS)
    nn.utils.parametrizations.weight_norm(layer.out_proj)
    return layer


@pytest.mark.parametrize(
    ("model", "edit", "message"),
    [
        (nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, HEADS)}), Swap("a", "atention"), "known: attention"),
        (nn.ModuleDict({"a": nn.Linear(2, 2)}), Swap("a", "attention"), "a is a Linear"),
        (nn.ModuleDict({"a": nn.Linear(2, 2)}), Swap("b", "attention"), "no layer 'b'"),
        (nn.MultiheadAttention(WIDTH, HEADS), Swap("", "attention"), "the model itself cannot be replaced"),
        (
            nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)}),
            Swap("a", "attention"),
            "a has add_bias_kv",
        ),
        (
            nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True)}),
            Swap("a", "attention"),
            "add_zero_attn",
        ),
        (nn.ModuleDict({"a": hooked()}), Swap("a", "attention"), "a has hooks"),
        (nn.ModuleDict({"a": rounded()}), Swap("a", "attention"), "replace it before fake quantization"),
        (Lists(), Swap("a", "attention"), "also in the model.order"),
        (tied(), Swap("a", "attention"), "tied to one of b"),
        (nn.ModuleDict({"a": computed()}), Swap("a", "attention"), "computes its weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_swap_that_does_not_fit_changes_nothing(model: nn.Module, edit: Swap, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(EditError, match=re.escape(message)):
        apply(model, edit)
    assert snapshot(model) == before
