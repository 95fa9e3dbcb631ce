# SPDX-License-Identifier: Apache-2.0
"""Re-estimated statistics against NumPy's of the inputs, and against torch's own training mode."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.correct import reestimate_batch_norm
from featherweight.errors import DataError, NumericalError
from tests.correct.surroundings import Stopped, bits, call, hooks, same, stopping


def statistics(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance by channel of (items, channels, positions...)."""
    flat = values.double().movedim(1, -1).reshape(-1, values.shape[1]).numpy()
    return flat.mean(0), flat.var(0, ddof=1)


def close(buffer: Any, expected: np.ndarray) -> bool:
    return np.allclose(buffer.double().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), ()),
        (nn.BatchNorm1d(3), (5,)),
        (nn.BatchNorm2d(3, momentum=None), (4, 2)),
        (nn.BatchNorm3d(3, affine=False), (2, 2, 2)),
        (nn.SyncBatchNorm(3), (4, 2)),
    ],
)
def test_statistics_are_those_of_all_values_of_uneven_batches(norm: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batches = [50 + (1 + i) * torch.randn(n, 3, *shape) for i, n in enumerate((7, 2, 1))]
    moved = reestimate_batch_norm(norm, batches, call)
    mean, variance = statistics(torch.cat(batches))
    assert close(norm.running_mean, mean) and close(norm.running_var, variance)
    assert int(norm.num_batches_tracked) == 3
    assert moved.names == ("running_mean", "running_var") and not moved.left
    assert norm.training


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
        self.conv, self.drop = nn.Conv2d(3, 4, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.conv(self.first(x)).relu()))


def test_later_layers_see_inputs_as_in_evaluation_by_the_second_pass() -> None:
    torch.manual_seed(0)
    model, batches = Two(), [torch.randn(n, 3, 6, 6) * n for n in (2, 5, 3)]
    reestimate_batch_norm(model, batches, call)
    x = torch.cat(batches)
    mean, variance = statistics(x)
    assert close(model.first.running_mean, mean) and close(model.first.running_var, variance)
    model.eval()
    with torch.no_grad():
        mean, variance = statistics(model.conv(model.first(x)).relu())
    assert close(model.second.running_mean, mean) and close(model.second.running_var, variance)


def test_the_first_pass_is_torchs_training_mode() -> None:
    """For batches of one size the mean of their means is the mean, and torch's momentum=None computes just that."""
    torch.manual_seed(0)
    model, batches = Two(), [torch.randn(4, 3, 6, 6) * (1 + i) for i in range(3)]
    reestimate_batch_norm(model, batches, call, passes=1)
    own = Two()
    own.load_state_dict(model.state_dict())
    for norm in (own.first, own.second):
        norm.reset_running_stats()
        norm.momentum = None
    own.train()
    own.drop.eval()
    for batch in batches:
        own(batch)
    assert torch.allclose(model.second.running_mean, own.second.running_mean, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_estimated_is_left_and_named() -> None:
    model = nn.ModuleDict(
        {
            "used": nn.BatchNorm1d(2),
            "stateless": nn.BatchNorm1d(2, track_running_stats=False),
            "idle": nn.BatchNorm1d(2),
        }
    )
    before = bits(model["idle"])
    moved = reestimate_batch_norm(model, [torch.randn(9, 2)], lambda m, x: m["stateless"](m["used"](x)))
    assert moved.names == ("used.running_mean", "used.running_var")
    assert set(moved.left) == {"stateless", "idle"}
    assert same(before, bits(model["idle"]))


def test_a_model_without_batch_norm_has_nothing_to_correct() -> None:
    assert reestimate_batch_norm(nn.Linear(2, 2), [torch.ones(1, 2)], call).note == "nothing to correct"


@pytest.mark.parametrize("after", range(6))
def test_a_failure_at_any_batch_leaves_the_statistics(after: int) -> None:
    torch.manual_seed(0)
    model = Two()
    before = bits(model)
    with pytest.raises(Stopped):
        reestimate_batch_norm(model, [torch.randn(2, 3, 6, 6)] * 3, stopping(after, Stopped()))
    assert same(before, bits(model)) and hooks(model) == 0 and model.training


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model = Two()
    before = bits(model)
    with pytest.raises(NumericalError, match="first"):
        reestimate_batch_norm(model, [torch.full((2, 3, 6, 6), torch.nan)], call)
    assert same(before, bits(model))


def test_no_batch_is_refused() -> None:
    with pytest.raises(DataError):
        reestimate_batch_norm(nn.BatchNorm1d(2), [], call)
