# SPDX-License-Identifier: Apache-2.0
"""Oracle: the singular value decomposition. At full rank its factors give the layer back."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from featherweight.edits import apply
from featherweight.errors import EditError
from featherweight.plan import Factor, FakeQuant
from tests.edits.snapshot import snapshot


def fill(parts: nn.Module, weight: torch.Tensor, rank: int) -> None:
    u, s, vt = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    down, up = parts
    with torch.no_grad():
        up.weight.copy_(torch.tensor(u[:, :rank] * s[:rank]))
        down.weight.copy_(torch.tensor(vt[:rank]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "inside"), [(5, 7), (7, 5)])
def test_filled_at_full_rank_the_layer_answers_as_before(out: int, inside: int, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(3, inside), nn.Linear(inside, out, bias=bias)).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    expected, weight = model(x), model[1].weight
    apply(model, Factor("1", rank=min(out, inside)))
    fill(model[1], weight, min(out, inside))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_at_a_low_rank_the_error_is_that_of_eckart_and_young() -> None:
    """The Frobenius norm of what is lost is that of the singular values left out."""
    model = nn.Sequential(nn.Linear(8, 6)).double()
    weight = model[0].weight.detach().numpy().copy()
    apply(model, Factor("0", rank=2))
    fill(model[0], torch.tensor(weight), 2)
    product = (model[0][1].weight @ model[0][0].weight).detach().numpy()
    lost = np.linalg.svd(weight, compute_uv=False)[2:]
    assert np.isclose(np.linalg.norm(weight - product), np.linalg.norm(lost), rtol=1e-12)


def test_new_layers_start_at_zero_in_the_old_ones_type_and_state_and_the_bias_is_the_same_parameter() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(6, 4)}).to(torch.bfloat16).eval()
    model["fc"].weight.requires_grad_(False)
    bias = model["fc"].bias
    state = torch.get_rng_state()
    apply(model, Factor("fc", rank=3))
    assert torch.equal(torch.get_rng_state(), state)
    down, up = model["fc"]
    assert up.bias is bias and bias.requires_grad
    assert {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()} == {
        "fc.0.weight": ((3, 6), torch.bfloat16),
        "fc.1.weight": ((4, 3), torch.bfloat16),
        "fc.1.bias": ((4,), torch.bfloat16),
    }
    assert not down.weight.any() and not up.weight.any()
    assert not down.weight.requires_grad and not up.weight.requires_grad
    assert not any(module.training for module in model.modules())


def test_a_shared_layer_stays_shared() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    apply(model, Factor("2", rank=1))
    assert model[0] is model[2]
    assert isinstance(model[0], nn.Sequential)


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without gradients"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "plain"])
def test_torchs_transformer_encoder_calls_the_factors(gradients: bool, padded: bool) -> None:
    """In eval mode without gradients it would read `linear1.weight`, which is no longer there."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    arguments: dict[str, Any] = {"src_key_padding_mask": padding} if padded else {}
    seen = ~padding if padded else torch.ones_like(padding)
    with torch.set_grad_enabled(gradients):
        expected = model(x, **arguments)
        for name in ("layers.0.linear1", "layers.1.linear2"):
            weight = model.get_submodule(name).weight
            apply(model, Factor(name, rank=8))
            fill(model.get_submodule(name), weight, 8)
        torch.testing.assert_close(model(x, **arguments)[seen], expected[seen], rtol=1e-4, atol=1e-5)


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(3, 3))


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(3, 3))


def rounded() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    apply(model, FakeQuant("a", 8, True))
    return model["a"]


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.by_name = {"a": self.a}


@pytest.mark.parametrize(
    ("model", "edit", "message"),
    [
        (nn.ModuleDict({"a": nn.Linear(3, 3)}), Factor("aa", 1), "no layer 'aa'. Nearest: a"),
        (nn.ModuleDict({"a": nn.Linear(3, 3)}), Factor("a", 0), "rank 0 is outside 1..3"),
        (nn.ModuleDict({"a": nn.Linear(3, 3)}), Factor("a", 4), "rank 4 is outside 1..3"),
        (nn.ModuleDict({"a": nn.Conv2d(3, 3, 1)}), Factor("a", 1), "a is a Conv2d"),
        (nn.ModuleDict({"a": nn.LazyLinear(3)}), Factor("a", 1), "a is a lazy module"),
        (nn.Linear(3, 3), Factor("", 1), "the model itself cannot be replaced"),
        (nn.MultiheadAttention(4, 2), Factor("out_proj", 1), "factor splits a plain torch.nn.Linear only"),
        (nn.ModuleDict({"a": parametrized()}), Factor("a", 1), "a is a ParametrizedLinear"),
        (nn.ModuleDict({"a": old_weight_norm()}), Factor("a", 1), "a has hooks"),
        (nn.ModuleDict({"a": rounded()}), Factor("a", 1), "replace it before fake quantization"),
        (Lists(), Factor("a", 1), "also in the model.by_name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_factor_that_does_not_fit_changes_nothing(model: nn.Module, edit: Factor, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(EditError, match=re.escape(message)):
        apply(model, edit)
    assert snapshot(model) == before
