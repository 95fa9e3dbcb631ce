# SPDX-License-Identifier: Apache-2.0
"""A right cut is proved, and each kind of wrong one is caught: on zero-initialised weights too, and behind norms.

Cuts are written by hand here, so that nothing of the tracing is needed; the small models' kept channels are known.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from featherweight.edits import Verified, replay, verify
from featherweight.errors import EditError, VerifyError
from featherweight.plan import Attribute, Edit, Factor, Plan, Slice, Swap
from tests.edits.snapshot import snapshot

KEEP = (0, 2, 3)


def slices(*names: str, keep: tuple[int, ...] = KEEP) -> tuple[Slice, ...]:
    """`"fc.weight:1"` is axis 1 of that tensor; without a number, axis 0."""
    named = [name.partition(":") for name in names]
    return tuple(Slice(name, int(axis or 0), keep) for name, _, axis in named)


def proved(model: nn.Module, edits: Sequence[Edit], inputs: Any, **options: Any) -> Verified:
    small = copy.deepcopy(model)
    replay(small, edits)
    return verify(model, small, Plan(tuple(edits)), inputs, **options)


class Body(nn.Module):
    """One layer that makes five channels, something between, and one that reads them."""

    def __init__(self, between: nn.Module | Callable[[Tensor], Tensor], width: int = 5) -> None:
        super().__init__()
        self.make = nn.Linear(4, width)
        self.between = between
        self.read = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.between(self.make(x)))


CHANNELS = ("make.weight", "make.bias", "read.weight:1")
X = (torch.randn(3, 6, 4),)


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.gain + self.shift


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Over(nn.Module):
    """A norm over the channels of (batch, tokens, channels) that torch has only for channels first."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("between", "more", "held"),
    [
        (nn.ReLU(), (), 0),
        (nn.Sigmoid(), (), 0),
        (nn.LayerNorm(5), ("between.weight", "between.bias"), 1),
        (nn.RMSNorm(5), ("between.weight",), 1),
        (HandWritten(), ("between.gain", "between.shift"), 2),
        (Llama(), ("between.weight",), 1),
        (Over(nn.GroupNorm(1, 5)), ("between.norm.weight", "between.norm.bias"), 1),
        (Over(nn.InstanceNorm1d(5, affine=True)), ("between.norm.weight", "between.norm.bias"), 0),
    ],
    ids=["relu", "sigmoid", "layernorm", "rmsnorm", "by_hand", "llama", "groupnorm", "instancenorm"],
)
def test_a_right_cut_is_proved_and_a_shift_by_one_is_not(between: nn.Module, more: tuple[str, ...], held: int) -> None:
    """The wrong plan keeps the same number of positions on one tensor, so that every shape agrees."""
    model = Body(between)
    names = (*CHANNELS, *more)
    found = proved(model, slices(*names), X)
    assert found.error < 1e-12
    assert len(found.held) == held
    assert all("between" in line for line in found.held)
    # What each channel's own mean takes away cannot be told from anything else.
    blind = {"make.bias"} if isinstance(between, Over) and isinstance(between.norm, nn.InstanceNorm1d) else set()
    for wrong in set(names) - blind:
        edits = [Slice(e.tensor, e.axis, (0, 1, 3)) if wrong.startswith(e.tensor) else e for e in slices(*names)]
        with pytest.raises(VerifyError, match=r"does not answer as.*differs by"):
            proved(model, edits, X)


def test_where_the_model_starts_from_zeros_random_weights_show_what_is_wrong() -> None:
    """A branch behind a zero gain does nothing: on its own weights, any cut of it would look right."""
    model = Body(nn.ReLU())
    nn.init.zeros_(model.read.weight)
    assert proved(model, slices(*CHANNELS), X).error < 1e-12
    wrong = (*slices("make.weight", "make.bias"), *slices("read.weight:1", keep=(0, 1, 2)))
    small = copy.deepcopy(model)
    replay(small, wrong)
    torch.testing.assert_close(small(*X), model(*X))
    with pytest.raises(VerifyError, match="differs by"):
        verify(model, small, Plan(wrong), X)


def test_the_models_own_weights_are_checked_too() -> None:
    """A model whose weights were moved after the cut is not what the plan makes of the one before."""
    model = Body(nn.ReLU())
    small = copy.deepcopy(model)
    replay(small, slices(*CHANNELS))
    with torch.no_grad():
        small.read.weight[0, 0] += 1e-3
    with pytest.raises(VerifyError, match="differs by"):
        verify(model, small, Plan(slices(*CHANNELS)), X)


def test_a_plan_that_was_not_carried_out_is_no_proof() -> None:
    model = Body(nn.ReLU())
    with pytest.raises(VerifyError, match=r"make.weight has shape \(5, 4\) in the cut model, but \(3, 4\) by its plan"):
        verify(model, copy.deepcopy(model), Plan(slices(*CHANNELS)), X)


def test_casts_inside_a_model_do_not_blur_the_proof() -> None:
    model = Body(lambda x: x.half().float().to(torch.bfloat16).to(x.dtype).exp().log1p())
    model.between = lambda x: torch.nn.functional.silu(x.half().to(torch.bfloat16).to(x.dtype))
    assert proved(model, slices(*CHANNELS), X).error < 1e-12


def test_a_half_precision_model_is_proved_in_float64() -> None:
    model = Body(nn.GELU()).to(torch.bfloat16)
    assert proved(model, slices(*CHANNELS), (X[0].to(torch.bfloat16),)).error < 1e-12


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(((q @ k.transpose(-2, -1) / 2**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_wrong_number_of_heads_runs_and_is_caught() -> None:
    """The second and fourth head go; with the old number the same rows are read as heads of one."""
    rows = tuple(f"{part}.{kind}" for part in "qkv" for kind in ("weight", "bias"))
    edits = slices(*rows, "o.weight:1", keep=(0, 1, 4, 5))
    x = (torch.randn(2, 5, 8),)
    with pytest.raises(VerifyError, match="differs by"):
        proved(Heads(), edits, x)
    assert proved(Heads(), (*edits, Attribute("", "heads", 2)), x).error < 1e-12


def test_a_swap_is_part_of_what_is_proved() -> None:
    model = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
    rows = [f"self_attn.{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    edits = (Swap("self_attn", "attention"), *slices(*rows, "self_attn.out.weight:1", keep=(2, 3, 6, 7)))
    found = proved(model, edits, (torch.randn(2, 5, 8),))
    assert found.error < 1e-12
    assert not found.held


def test_sequences_and_mappings_of_outputs_are_compared_by_name() -> None:
    class Several(Body):
        def forward(self, x: Tensor) -> Any:
            hidden = torch.relu(self.make(x))
            return {"logits": [self.read(hidden), None], "hidden": hidden}

    with pytest.raises(VerifyError, match=r"the output\['hidden'\] has shape \(3, 6, 5\), but \(3, 6, 3\)"):
        proved(Several(nn.ReLU()), slices(*CHANNELS), X)


def test_keyword_inputs_are_taken() -> None:
    assert proved(Body(nn.ReLU()), slices(*CHANNELS), {"x": X[0]}).error < 1e-12


class Divided(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


class Constant(Body):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(2, requires_grad=True) + 0 * super().forward(x).detach().sum()


class Silent(Body):
    def forward(self, x: Tensor) -> str:
        super().forward(x)
        return "done"


class Branching(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.make.out_features == 5 else y + torch.relu(x).mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Divided, "not finite, which proves nothing"),
        (Constant, r"do not depend on anything that was cut \(make.weight, make.bias"),
        (Silent, "answers with no tensor"),
        (Branching, "takes another way: 1 means and norms were computed, where the uncut one computes 0"),
    ],
)
def test_what_proves_nothing_is_no_proof(kind: type[Body], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        proved(kind(nn.ReLU()), slices(*CHANNELS), X)


def test_a_cut_that_cannot_run_names_layer_and_line() -> None:
    with pytest.raises(VerifyError, match=r"cannot run: in read, test_verify.py:\d+ in forward: `return self.read"):
        proved(Body(nn.ReLU()), slices("make.weight", "make.bias"), X)


def test_only_cuts_are_proved() -> None:
    model = Body(nn.ReLU())
    with pytest.raises(EditError, match="is no cut: only slices, swaps and attributes are proved"):
        verify(model, model, Plan((Factor("make", 2),)), X)


def test_nothing_is_changed_by_a_proof() -> None:
    model = Body(HandWritten()).train()
    small = copy.deepcopy(model)
    edits = slices(*CHANNELS, "between.gain", "between.shift")
    replay(small, edits)
    before, after, random = snapshot(model), snapshot(small), torch.get_rng_state()
    verify(model, small, Plan(edits), X)
    assert (snapshot(model), snapshot(small)) == (before, after)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *small.parameters()))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_parametrized_layer_is_proved_and_its_class_left_alone() -> None:
    model = Body(nn.ReLU())
    parametrizations.weight_norm(model.read)
    parametrizations.weight_norm(model.make)
    assert proved(model, slices(*CHANNELS), X).error < 1e-12
    assert parametrize.is_parametrized(model.read, "weight")
    model(*X)
