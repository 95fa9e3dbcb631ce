# SPDX-License-Identifier: Apache-2.0
"""Biases after correction against the mean differences that they should make up for."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.correct import correct_bias, match_moments, output_error, reestimate_batch_norm
from featherweight.errors import OptionError
from tests.correct.surroundings import Stopped, bits, call, hooks, pruned, same, stopping


class Conv1D(nn.Module):
    """Laid out as transformers' own."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), -1),
    "conv 1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (6, 9), 1),
    "conv 2d, grouped and strided": (lambda: nn.Conv2d(6, 4, 3, stride=2, groups=2, padding="valid"), (6, 9, 8), 1),
    "conv 3d": (lambda: nn.Conv3d(2, 4, 2, padding_mode="circular", padding=1), (2, 4, 4, 4), 1),
    "transposed conv": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (6, 5, 5), 1),
    "a library's linear": (lambda: Conv1D(4, 6), (3, 6), -1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_bias_takes_up_the_mean_difference_of_its_channel(kind: str) -> None:
    torch.manual_seed(0)
    make, shape, axis = LAYERS[kind]
    reference = make()
    model = pruned(reference)
    batches = [torch.randn(n, *shape) + 1 for n in (5, 2)]
    old = model.bias.detach().double()
    with torch.no_grad():
        gap = torch.cat([(reference(x) - model(x)).double().movedim(axis, -1).reshape(-1, 4) for x in batches])
    moved = correct_bias(model, reference, batches, call)
    assert moved.names == ("bias",)
    assert torch.allclose(model.bias.double(), old + gap.mean(0), atol=1e-5)


def test_an_unbatched_input_has_its_channels_first() -> None:
    torch.manual_seed(0)
    reference = nn.Conv1d(3, 4, 3)
    model = pruned(reference)
    x = torch.randn(3, 9)
    correct_bias(model, reference, [x], call)
    assert torch.allclose(model(x).mean(1), reference(x).mean(1), atol=1e-6)


def test_each_layer_answers_for_its_own_shift() -> None:
    """The second layer is whole: whatever the first lost is made up for there, and the second's bias stays."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    model = copy.deepcopy(reference)
    model[0].weight.data[:, 1:4] = 0.0
    batches = [torch.randn(n, 6) + 2 for n in (20, 5)]
    correct_bias(model, reference, batches, call)
    assert torch.allclose(model[1].bias, reference[1].bias, atol=1e-5)
    means = [torch.cat([one(x) for x in batches]).mean(0) for one in (model, reference)]
    assert torch.allclose(*means, atol=1e-5)


def test_a_mask_of_positions_is_not_one_of_channels() -> None:
    """As many channels as positions: what is no longer a position each must not be cut by their mask."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 6)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(x.mean(1))

    torch.manual_seed(0)
    reference = Pooled()
    model = pruned(reference)
    batch = {"x": torch.randn(9, 6, 4) + 1, "attention_mask": torch.rand(9, 6) < 0.5}
    correct_bias(model, reference, [batch], call)
    assert torch.allclose(model(**batch).mean(0), reference(**batch).mean(0), atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 6])
def test_attention_gets_the_means_of_all_its_projections(batch_first: bool, kdim: int | None) -> None:
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(4, 2, batch_first=batch_first, kdim=kdim, vdim=kdim)
    nn.init.normal_(reference.in_proj_bias)
    nn.init.normal_(reference.out_proj.bias)
    model = pruned(reference)
    memory = torch.randn(5, 7, kdim or 4) + 1
    batch = {"query": torch.randn(5, 7, 4) + 1, "key": memory, "value": memory}
    moved = correct_bias(model, reference, [batch], call)
    assert moved.names == ("in_proj_bias", "out_proj.bias")

    def projections(attention: nn.MultiheadAttention) -> list[Tensor]:
        fused = attention.in_proj_weight
        parts = fused.chunk(3) if fused is not None else [getattr(attention, f"{c}_proj_weight") for c in "qkv"]
        biases = attention.in_proj_bias.chunk(3)
        return [F.linear(x, w, b).mean((0, 1)) for x, w, b in zip(batch.values(), parts, biases, strict=True)]

    for own, dense in zip(projections(model), projections(reference), strict=True):
        assert torch.allclose(own, dense, atol=1e-5)
    own, dense = (one(**batch)[0].mean((0, 1)) for one in (model, reference))
    assert torch.allclose(own, dense, atol=1e-5)


@pytest.mark.parametrize(("kind", "cell"), [(nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell), (nn.RNN, nn.RNNCell)])
def test_gates_get_the_mean_differences_of_what_they_read(kind: type[nn.RNNBase], cell: type[nn.RNNCellBase]) -> None:
    """Oracle: the same network as cells, one step after the other."""
    torch.manual_seed(0)
    reference = kind(3, 4, batch_first=True)
    model = pruned(reference, 0.7)
    start = copy.deepcopy(model)
    x = torch.randn(6, 5, 3) + 1

    def means(layer: nn.RNNBase) -> tuple[Tensor, Tensor]:
        one = cell(3, 4)
        one.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        states, state = [torch.zeros(6, 4)], None
        for t in range(5):
            state = one(x[:, t], state)
            states.append(state[0] if isinstance(state, tuple) else state)
        h = torch.stack(states[:-1]).mean((0, 1))
        return (
            layer.weight_ih_l0 @ x.mean((0, 1)) + layer.bias_ih_l0,
            layer.weight_hh_l0 @ h + layer.bias_hh_l0,
        )

    correct_bias(model, reference, [x], call)
    for name, own, dense in zip(("bias_ih_l0", "bias_hh_l0"), means(start), means(reference), strict=True):
        assert torch.allclose(getattr(model, name), getattr(start, name) + dense - own, atol=1e-5)


def test_a_stack_of_recurrent_layers_comes_nearer_with_every_layer_corrected() -> None:
    torch.manual_seed(0)
    reference = nn.LSTM(3, 8, num_layers=2, bidirectional=True)
    model = pruned(reference, 0.6)
    batches = [torch.randn(9, n, 3) + 1 for n in (8, 4)]
    before = output_error(model, reference, batches, call)
    moved = correct_bias(model, reference, batches, call)
    assert set(moved.names) == {name for name, _ in model.named_parameters() if name.startswith("bias")}
    assert output_error(model, reference, batches, call) < 0.6 * before


def test_biases_of_cells_in_a_loop_of_the_models_own() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x:
                state = self.cell(step, state)
            return state[0]

    torch.manual_seed(0)
    reference = Loop()
    model = pruned(reference, 0.6)
    batches = [torch.randn(9, n, 3) + 1 for n in (8, 4)]
    before = output_error(model, reference, batches, call)
    assert correct_bias(model, reference, batches, call).names == ("cell.bias_ih", "cell.bias_hh")
    assert output_error(model, reference, batches, call) < before


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), norm, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("again", ["batch_norm", "moments"])
def test_norms_are_corrected_again_where_biases_move_what_they_read(again: str) -> None:
    torch.manual_seed(0)
    reference = Normed(nn.BatchNorm2d(8))
    batches = [torch.randn(16, 3, 8, 8) + 1]
    reestimate_batch_norm(reference, batches, call)
    model = pruned(reference, 0.6)
    if again == "batch_norm":
        reestimate_batch_norm(model, batches, call)
    else:
        match_moments(model, reference, batches, call)
    moved = correct_bias(model, reference, batches, call, again=[again])
    assert any(name.startswith("norm.") for name in moved.names)
    x = torch.cat(batches)
    model.eval(), reference.eval()
    with torch.no_grad():
        read = model.conv(x).relu().double()
        own, dense = (one.norm(one.conv(x).relu()).double() for one in (model, reference))
    if again == "batch_norm":
        assert torch.allclose(model.norm.running_mean.double(), read.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(model.norm.running_var.double(), read.var((0, 2, 3)), rtol=1e-4)
    else:
        assert torch.allclose(own.mean((0, 2, 3)), dense.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(own.std((0, 2, 3)), dense.std((0, 2, 3)), rtol=1e-4)


def test_what_is_left_alone_is_named_with_its_reason() -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(5, 5, bias=i != 0) for i in range(6)]
    parts[2].bias = parts[1].bias
    reference = nn.ModuleList(parts)
    model = pruned(reference)
    before = bits(model)

    def forward(model: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in model[:5]:
            x = layer(x)
        return x

    moved = correct_bias(model, reference, [torch.randn(9, 5)], forward, frozen=["3.bias"])
    assert moved.names == ("4.bias",)
    assert moved.left == {
        "0": "has no bias",
        "1": "shares its bias with another layer",
        "2": "shares its bias with another layer",
        "3": "its bias is frozen",
        "5": "the calibration samples never reach it",
    }
    after = bits(model)
    assert same({**before, "4.bias": after["4.bias"]}, after)
    with pytest.raises(OptionError, match="Nearest"):
        correct_bias(model, reference, [torch.randn(9, 5)], forward, frozen=["3.bais"])


def test_a_layer_of_other_channels_than_the_references_is_left() -> None:
    reference = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    moved = correct_bias(model, reference, [torch.randn(9, 5)], call)
    assert moved.names == ("1.bias",) and set(moved.left) == {"0"}


def test_biases_of_pruned_neurons_stay_zero() -> None:
    torch.manual_seed(0)
    reference = nn.Linear(5, 4)
    with torch.no_grad():
        reference.bias[2:] = 0.0  # as they came: the last one's row lives, so that it may move
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.weight[0] = model.bias[0] = 0.0
        model.weight[2] = 0.0
        model.weight[1:, :3] = 0.0
    correct_bias(model, reference, [torch.randn(9, 5) + 1], call)
    assert (model.bias == 0).tolist() == [True, False, True, False]
    empty = copy.deepcopy(model)
    correct_bias(empty, empty, [torch.randn(9, 5)], call)
    assert empty.bias[0] == 0


@pytest.mark.parametrize("after", range(4))
def test_a_failure_at_any_batch_leaves_both_models(after: int) -> None:
    torch.manual_seed(0)
    reference = Normed(nn.BatchNorm2d(8))
    model = pruned(reference)
    own, dense = bits(model), bits(reference)
    data = [torch.randn(4, 3, 8, 8)] * 2
    with pytest.raises(Stopped):
        correct_bias(model, reference, data, stopping(after, Stopped()), again=["batch_norm"])
    assert same(own, bits(model)) and same(dense, bits(reference)) and hooks(model) + hooks(reference) == 0
