# SPDX-License-Identifier: Apache-2.0
"""Each weight's MACs by hand: rows x columns x how often a row is used."""

import pytest
import torch
from torch import Tensor, nn

from featherweight.reconstruct.costs import dense_macs
from featherweight.task import default_forward
from tests.models import MODELS


def test_convolutions_of_every_kind() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2, stride=2)
    )
    found, total = dense_macs(model, default_forward, torch.zeros(5, 3, 8, 8))
    assert found == {"0.weight": 5 * 16 * 8 * 27, "1.weight": 5 * 4 * 8 * 9, "2.weight": 5 * 4 * 8 * 4 * 4}
    assert total == sum(found.values())


def test_gates_are_used_once_a_step_and_dicts_are_called_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)

        def forward(self, *, sequence: Tensor) -> Tensor:
            return self.lstm(sequence)[0]

    found, total = dense_macs(Named(), default_forward, {"sequence": torch.zeros(3, 5, 6)})
    assert found == {"lstm.weight_ih_l0": 15 * 32 * 6, "lstm.weight_hh_l0": 15 * 32 * 8}
    assert total == sum(found.values())


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}])
def test_attention_is_its_projections_and_products_that_are_no_weights(sizes: dict[str, int]) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attend(query, key, value=value, need_weights=False)[0]

    batch = (torch.zeros(2, 3, 8), torch.zeros(2, 4, sizes.get("kdim", 8)), torch.zeros(2, 4, sizes.get("vdim", 8)))
    found, total = dense_macs(Cross(), lambda model, inputs: model(*inputs), batch)
    if sizes:
        parts = {"q_proj_weight": 6 * 64, "k_proj_weight": 8 * 8 * 5, "v_proj_weight": 8 * 8 * 7}
    else:
        parts = {"in_proj_weight": (6 + 8 + 8) * 64}
    assert found == {f"attend.{leaf}": macs for leaf, macs in {**parts, "out_proj.weight": 6 * 64}.items()}
    assert total == sum(found.values()) + 2 * (2 * 3 * 4 * 8)  # q kᵀ and its product with v


def test_a_tied_weight_costs_what_its_output_layer_does() -> None:
    make, inputs = MODELS["tied"]
    found, total = dense_macs(make(), lambda model, batch: model(*batch), inputs(4))
    assert found == {"words.weight": 4 * 5 * 12 * 8, "mix.weight": 4 * 5 * 64} and total == sum(found.values())


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense_macs(model, default_forward, torch.randn(6, 4))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks
