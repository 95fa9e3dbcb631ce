# SPDX-License-Identifier: Apache-2.0
"""Oracle: the layer itself. A matrix view is right if the layer's own arithmetic, row by row, agrees with it."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from featherweight.errors import NothingToCompress
from featherweight.layers import call_order, from_matrix, matches, select, to_matrix, weights
from tests.layers.oracles import Conv1D

CONVS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), groups=2),
    nn.Conv3d(2, 3, 2),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.ConvTranspose3d(2, 3, 2),
]


@pytest.mark.parametrize("conv", CONVS, ids=lambda c: f"{type(c).__name__}-g{c.groups}")
def test_rows_of_a_conv_are_its_output_channels_and_columns_its_inputs(conv: nn.Module) -> None:
    """Zeroing row r must silence output channel r alone; a column is one (tap, channel), channels fastest."""
    [weight], left = weights(conv)
    assert left == {}
    matrix = to_matrix(weight, conv.weight.detach())
    out_channels = conv.out_channels
    assert matrix.shape[0] == out_channels
    assert torch.equal(from_matrix(weight, matrix), conv.weight)
    x = torch.randn(2, conv.in_channels, *([5] * (conv.weight.ndim - 2)))
    conv.bias.data.zero_()
    for row in range(out_channels):
        masked = matrix.clone()
        masked[row] = 0
        conv.weight.data = from_matrix(weight, masked)
        silent = [c for c in range(out_channels) if conv(x)[:, c].abs().max() == 0]
        assert silent == [row]
    # The first columns_per_tap columns are all the inputs of row 0 at the first tap.
    channels = conv.in_channels // conv.groups
    assert weight.columns_per_tap == channels
    for channel in range(channels):
        lone = torch.zeros_like(matrix)
        lone[0, channel] = 1.0
        conv.weight.data = from_matrix(weight, lone)
        y = conv(x)[:, 0]
        others = x.clone()
        others[:, channel] = 0
        assert y.abs().max() > 0
        assert conv(others)[:, 0].abs().max() == 0


def test_depthwise_is_seen_also_with_a_multiplier() -> None:
    [weight], _ = weights(nn.Conv2d(4, 8, 3, groups=4))
    assert weight.depthwise
    [weight], _ = weights(nn.Conv2d(4, 8, 3, groups=2))
    assert not weight.depthwise
    [weight], _ = weights(nn.Conv2d(1, 8, 3))
    assert not weight.depthwise


@pytest.mark.parametrize("real", [False, True])
def test_transformers_conv1d_is_a_linear_layer_stored_in_x_out(real: bool) -> None:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 5) if real else Conv1D(3, 5)
    [weight], left = weights(nn.Sequential(layer))
    assert (weight.kind, weight.columns_per_tap, left) == ("transposed linear", 5, {})
    matrix, x = to_matrix(weight, layer.weight.detach()), torch.randn(4, 5)
    assert torch.equal(from_matrix(weight, matrix), layer.weight)
    torch.testing.assert_close(layer(x), x @ matrix.T + layer.bias)


def test_ties_count_once_under_the_first_name() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    [weight], _ = weights(model)
    assert (weight.name, weight.aliases, weight.kind) == ("embedding.weight", ("head.weight",), "embedding")


def test_all_kinds_are_found() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
            "cell": nn.GRUCell(3, 4),
            "attention": nn.MultiheadAttention(8, 2),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        }
    )
    found, left = weights(model)
    assert left == {}
    kinds = {w.name: w.kind for w in found}
    assert sum(kind == "recurrent" for kind in kinds.values()) == 2 * 2 * 3 + 2
    assert kinds["attention.in_proj_weight"] == "attention"
    assert kinds["cross.k_proj_weight"] == "attention"
    assert kinds["cross.out_proj.weight"] == "linear"


def test_computed_weights_are_left_alone_with_the_reason() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), nn.utils.weight_norm(nn.Linear(4, 2)), nn.LazyLinear(3)
    )
    found, left = weights(model)
    assert found == []
    assert {name.partition(".")[0] for name in left} == {"0", "1", "2"}, left
    assert "remove_parametrizations" in left["0.parametrizations.weight.original1"]
    assert "remove_weight_norm" in left["1.weight_v"]


def test_bare_parameters_are_marked() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3))

    [weight], _ = weights(Net())
    assert weight.kind == "bare"


def test_globs_name_tensors_layers_and_what_holds_them() -> None:
    names = ["stem.0.weight", "blocks.0.fc.weight", "blocks.1.fc.weight", "head.weight"]
    assert select(names, ["blocks"]) == names[1:3]
    assert select(names, ["*.fc", "head*"]) == names[1:]
    assert not matches("blocks.10.fc.weight", ["blocks.1"])
    with pytest.raises(NothingToCompress, match=r"'haed\*' matches none of the model's 4 weights.*head.weight"):
        select(names, ["haed*"])


def test_call_order_is_that_of_the_forward_and_leaves_no_trace() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.first = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.first(x)))

    model = Net()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert call_order(model, (torch.randn(3, 4),)) == ("first", "norm", "last")
    assert model.training and not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
