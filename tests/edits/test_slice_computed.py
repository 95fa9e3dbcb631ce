# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers, and tensors that a module computes. Oracle: the model in which the dropped positions are zero.

Masks are written on plain tensors: of a parametrized layer the oracle's parametrization is removed first.
"""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from featherweight.edits import apply
from featherweight.errors import EditError
from featherweight.plan import Slice
from tests.edits.snapshot import snapshot
from tests.edits.test_slice import zeroed

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


def units(keep: tuple[int, ...], hidden: int, gates: int) -> tuple[int, ...]:
    return tuple(gate * hidden + unit for gate in range(gates) for unit in keep)


def recurrent_slices(layer: nn.RNNBase, keep: tuple[int, ...]) -> list[Slice]:
    """All tensors of the hidden units; every layer and direction loses the same ones."""
    hidden, gates = layer.hidden_size, GATES[type(layer)]
    rows, slices = units(keep, hidden, gates), []
    for name, tensor in layer.named_parameters():
        where = f"rnn.{name}"
        if "weight_hr" in name:
            slices.append(Slice(where, 1, keep))
            continue
        slices.append(Slice(where, 0, rows))
        if "weight_hh" in name and not layer.proj_size:
            slices.append(Slice(where, 1, keep))
        elif "weight_ih" in name and "_l0" not in name and not layer.proj_size:
            slices.append(Slice(where, 1, units(keep, hidden, tensor.shape[1] // hidden)))
    return slices


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.GRU, {"num_layers": 2}),
        (nn.RNN, {"bidirectional": True, "nonlinearity": "tanh"}),
        (nn.LSTM, {"proj_size": 3}),
    ],
)
def test_hidden_units_are_cut_out_of_recurrent_layers(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """Outputs of kept units, the last state, and an input of its own width; the list of flat weights is the same."""
    model = nn.ModuleDict({"rnn": kind(6, 5, batch_first=True, **options)}).double()
    keep, x = (0, 3), torch.randn(2, 7, 6, dtype=torch.float64)
    slices = recurrent_slices(model["rnn"], keep)
    expected, _ = zeroed(model, slices)["rnn"](x)
    if not options.get("proj_size"):
        expected = expected.unflatten(-1, (-1, 5))[..., list(keep)].flatten(-2)
    identity = {name: id(parameter) for name, parameter in model.named_parameters()}
    for edit in slices:
        apply(model, edit)
    assert model["rnn"].hidden_size == 2
    torch.testing.assert_close(model["rnn"](x)[0], expected, rtol=1e-10, atol=1e-12)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identity
    assert [id(p) for p in model["rnn"]._flat_weights] == list(identity.values())
    model["rnn"](x)[0].sum().backward()
    copy.deepcopy(model)["rnn"](x)


def test_inputs_and_projections_of_an_lstm_have_sizes_of_their_own() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(6, 5, proj_size=4, batch_first=True)}).double()
    slices = [Slice("rnn.weight_ih_l0", 1, (1, 2, 5)), Slice("rnn.weight_hr_l0", 0, (0, 2))]
    slices.append(Slice("rnn.weight_hh_l0", 1, (0, 2)))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    expected = zeroed(model, slices)["rnn"](x)[0][..., [0, 2]]
    for edit in slices:
        apply(model, edit)
    assert (model["rnn"].input_size, model["rnn"].proj_size, model["rnn"].hidden_size) == (3, 2, 5)
    torch.testing.assert_close(model["rnn"](x[..., [1, 2, 5]])[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells_are_cut_too(kind: type[nn.RNNCellBase], gates: int) -> None:
    model = nn.ModuleDict({"rnn": kind(4, 5)}).double()
    keep, rows = (1, 4), units((1, 4), 5, gates)
    slices = [Slice(f"rnn.{name}", 0, rows) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    slices += [Slice("rnn.weight_hh", 1, keep), Slice("rnn.weight_ih", 1, (0, 1, 3))]
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = zeroed(model, slices)["rnn"](x)
    for edit in slices:
        apply(model, edit)
    got = model["rnn"](x[:, [0, 1, 3]])
    for mine, other in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, expected)), strict=True):
        torch.testing.assert_close(mine, other[:, list(keep)], rtol=1e-10, atol=1e-12)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(layer)


def over_inputs(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer, dim=1)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def doubled(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Doubled())


class Squashed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def squashed(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Squashed())


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, over_inputs, old_weight_norm, doubled, squashed])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_computed_weight_is_cut_by_its_own_name(kind: Any, axis: int) -> None:
    """Oracle: rows and columns of the value that the layer computed before."""
    layer = kind(nn.Conv2d(3, 4, 2)).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer(torch.randn(1, 3, 4, 4, dtype=torch.float64))
    model, old = nn.ModuleDict({"conv": layer}), layer.weight.detach().clone()
    identity = {name: id(parameter) for name, parameter in model.named_parameters()}
    layer(torch.randn(1, 3, 4, 4, dtype=torch.float64)).sum().backward()
    apply(model, Slice("conv.weight", axis, (0, 2)))
    torch.testing.assert_close(model["conv"].weight, old.index_select(axis, torch.tensor([0, 2])))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identity
    assert (layer.out_channels, layer.in_channels) == tuple(layer.weight.shape[:2])
    if axis == 0:
        apply(model, Slice("conv.bias", 0, (0, 2)))
    layer(torch.randn(1, layer.in_channels, 4, 4, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


class OneWay(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(0)


def one_way(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", OneWay())


@pytest.mark.parametrize("kind", [parametrizations.spectral_norm, parametrizations.orthogonal, one_way])
def test_a_parametrization_that_cannot_hold_the_part_is_refused_and_left_alone(kind: Any) -> None:
    model = nn.ModuleDict({"fc": kind(nn.Linear(4, 4))}).train()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    with pytest.raises(EditError, match=re.escape("fc.weight is computed by a parametrization that cannot be cut")):
        apply(model, Slice("fc.weight", 0, (0, 2)))
    assert snapshot(model) == before
    assert [module.training for module in model.modules()] == modes


def test_buffers_that_no_file_keeps_are_cut_like_others() -> None:
    layer = nn.Linear(3, 4)
    layer.register_buffer("gain", torch.arange(4.0), persistent=False)
    apply(layer, Slice("gain", 0, (1, 3)))
    assert layer.gain.tolist() == [1.0, 3.0]
    assert "gain" not in layer.state_dict()


def test_a_bilinear_layer_is_cut_on_each_of_its_three_axes() -> None:
    layer = nn.Bilinear(3, 4, 5).double()
    a, b = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    slices = [
        Slice("weight", 0, (0, 4)),
        Slice("bias", 0, (0, 4)),
        Slice("weight", 1, (1, 2)),
        Slice("weight", 2, (0,)),
    ]
    expected = zeroed(layer, slices)(a, b)[:, [0, 4]]
    for edit in slices:
        apply(layer, edit)
    torch.testing.assert_close(layer(a[:, [1, 2]], b[:, [0]]), expected)
    assert (layer.out_features, layer.in1_features, layer.in2_features) == (2, 2, 1)
