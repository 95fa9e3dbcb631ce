# SPDX-License-Identifier: Apache-2.0
"""Oracles: the same arithmetic in NumPy's float64, and a plain run of the model in double."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits.exact import Exact, double, run
from featherweight.errors import EditError


class Rough(nn.Module):
    """Casts down and up, makes float32 tensors of its own, and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.plain = torch.tensor([0.1, 0.2, 0.3])

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.half().to(self.fc.weight.dtype)).float() * self.plain
        y = y + torch.zeros(3).add_(1.0).bfloat16()
        return torch.softmax(y, -1, dtype=torch.float32).to(x.dtype)


def test_every_operation_runs_in_float64_whatever_the_code_casts_to() -> None:
    model = double(Rough())
    x = torch.randn(5, 4)
    got = run(model, (x,), Exact())
    weight, bias = (t.detach().numpy() for t in (model.fc.weight, model.fc.bias))
    y = (x.double().numpy() @ weight.T + bias) * np.float64(model.plain.numpy()) + 1
    expected = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-13)


def test_what_the_code_makes_by_itself_comes_out_in_float64_too() -> None:
    assert run(Call(lambda x: torch.ones(3)), (torch.ones(1),), Exact()).dtype == torch.float64


def test_a_copy_in_double_shares_nothing_and_keeps_ties_and_the_original() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False)).half().train()
    model[2].weight = model[0].weight
    nn.utils.weight_norm(extra := nn.Linear(3, 3))
    model.append(extra)
    twin = double(model)
    assert twin[0].weight is twin[2].weight
    assert {t.dtype for t in twin.state_dict().values()} == {torch.float64, torch.int64}
    assert not twin.training
    assert model.training
    assert model[0].weight.dtype == torch.float16
    twin[0].weight.data.zero_()
    assert model[0].weight.any()


def test_a_model_that_cannot_be_copied_is_told_so() -> None:
    model = nn.Linear(2, 2)
    model.generator = (i for i in range(3))
    with pytest.raises(EditError, match="cannot be copied, so that a cut cannot be proved: TypeError"):
        double(model)


def by_hand(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * x.var(-1, keepdim=True).rsqrt()


NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
    "by hand": by_hand,
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 1).transpose(1, 2),
    "batch_norm": lambda x: F.batch_norm(x.transpose(0, 2), None, None, training=True).transpose(0, 2),
    "var_mean": lambda x: (x - torch.var_mean(x, -1, keepdim=True)[1]) / torch.std_mean(x, -1, keepdim=True)[0],
}


class Call(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize("name", NORMS)
def test_with_held_statistics_a_norm_does_the_same_to_fewer_channels(name: str) -> None:
    """With its own statistics it does not; that each channel is then an affine map of itself is what a proof needs."""
    x, keep = torch.randn(3, 5, 8, dtype=torch.float64), [0, 1, 4, 6]
    model = Call(NORMS[name])
    first = Exact()
    whole = run(model, (x,), first)
    cut = Exact(first.statistics)
    got = run(model, (x[..., keep],), cut)
    assert cut.held
    held = run(model, (x,), Exact(first.statistics, frozenset(cut.held)))
    torch.testing.assert_close(got, held[..., keep], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(run(model, (x[..., keep],), Exact()), whole[..., keep])


def test_what_has_the_same_sizes_is_not_held_and_sums_only_on_demand() -> None:
    model = Call(lambda x: x.mean((0, 1)).sum() + x.sum(-1).mean())
    x = torch.randn(3, 5, 8)
    first = Exact()
    run(model, (x,), first)
    for sums, expected in ((False, 0), (True, 2)):
        again = Exact(first.statistics, sums=sums)
        run(model, (x[..., :6],), again)
        assert len(again.held) == expected


def test_a_norm_in_eval_mode_that_uses_running_statistics_is_left_alone() -> None:
    model = nn.BatchNorm1d(4).eval()
    first = Exact()
    run(model, (torch.randn(2, 4, 3),), first)
    assert not first.statistics


def test_seed_and_switches_are_put_back() -> None:
    model = Call(lambda x: x + torch.rand(3))
    state = torch.get_rng_state()
    x = torch.zeros(3)
    assert torch.equal(run(model, (x,), Exact(), seed=3), run(model, (x,), Exact(), seed=3))
    assert not torch.equal(run(model, (x,), Exact(), seed=3), run(model, (x,), Exact(), seed=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cudnn.enabled
