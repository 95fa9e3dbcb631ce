# SPDX-License-Identifier: Apache-2.0
"""What a proof in float64 and eval mode cannot see: kernels that ask for aligned sizes, and tensors of training only."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits import cut, refusals
from featherweight.errors import VerifyError
from featherweight.graph import trace


class Masked(nn.Module):
    """A learned vector takes the place of some steps, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(6, 8), nn.Linear(8, 3)
        self.mask = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        if self.training:
            x = torch.where(torch.rand(x.shape[0], 1) < 0.5, self.mask, x)
        return self.outside(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 8, 32)), nn.Parameter(torch.randn(2, 32, 8))
        self.register_buffer("ends", torch.tensor([4, 12], dtype=torch.int32))

    def forward(self, rows: Tensor) -> Tensor:
        return F.grouped_mm(F.grouped_mm(rows, self.up, offs=self.ends), self.down, offs=self.ends)


CASES = [(Masked, torch.randn(5, 6), "training mode"), (Experts, torch.randn(12, 8), "multiple, such as 8")]


@pytest.mark.parametrize(("network", "x", "words"), CASES)
def test_a_cut_that_would_not_run_as_the_user_runs_it_is_refused_and_undone(
    network: type[nn.Module], x: Tensor, words: str
) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = trace(model, (x,))
    with pytest.raises(VerifyError, match=words):
        cut(model, found.groups[0][:1], trace=found, inputs=(x,))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(refusals(model, found, (x,))) == [found.groups[0].name]


def test_experts_cut_by_a_multiple_run() -> None:
    model, x = Experts(), torch.randn(12, 8)
    found = trace(model, (x,))
    cut(model, found.groups[0][:8], trace=found, inputs=(x,))
    assert model.up.shape == (2, 8, 24) and model(x).shape == (12, 8)


def test_a_model_that_never_trained_on_these_inputs_is_not_asked_to() -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), torch.randn(1, 3)
    model.eval()
    with pytest.raises(ValueError, match="more than 1 value"):
        copy.deepcopy(model).train()(x)
    found = trace(model, (x,))
    cut(model, found["0"][:3], trace=found, inputs=(x,))
    assert model[0].out_features == 5 and not model.training
