# SPDX-License-Identifier: Apache-2.0
"""Oracle: the grid's formula in NumPy, applied to the input before an untouched copy of the layer."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.edits import FakeQuantize, apply
from featherweight.errors import EditError
from featherweight.plan import FakeQuant, Swap
from tests.edits.snapshot import snapshot


def grid(bits: int, scale: float, zero_point: int) -> FakeQuantize:
    made = FakeQuantize(bits, symmetric=zero_point == 0)
    made.scale.fill_(scale)
    made.zero_point.fill_(zero_point)
    return made


def rounded(x: np.ndarray, bits: int, scale: float, zero_point: int) -> np.ndarray:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)) + zero_point, low, high)
    return (integers - zero_point).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("offset", [0, -1, 1], ids=["symmetric", "lowest", "odd"])
def test_values_are_those_of_the_formula(bits: int, offset: int) -> None:
    """Halves between grid points among them, where rounding half up and half to even differ, and both ends."""
    zero_point = offset if offset != -1 else -(2 ** (bits - 1))
    zero_point = min(zero_point, 2 ** (bits - 1) - 1)
    scale = 0.25
    x = np.concatenate(
        [np.arange(-40, 40) * scale / 2, np.random.default_rng(0).normal(size=200) * 8, [1e6, -1e6, 0.0, -0.0, np.inf]]
    ).astype(np.float32)
    expected = rounded(x, bits, scale, zero_point)
    assert np.array_equal(grid(bits, scale, zero_point)(torch.tensor(x)).numpy(), expected)
    assert len(np.unique(expected)) <= 2**bits
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    torchs = torch.fake_quantize_per_tensor_affine(torch.tensor(x), scale, zero_point, low, high)
    assert np.array_equal(torchs.numpy(), expected)


def test_nan_is_not_hidden() -> None:
    assert grid(8, 0.1, 3)(torch.tensor([float("nan")])).isnan()


@given(
    value=st.floats(-1e4, 1e4, width=32),
    bits=st.integers(1, 16),
    scale=st.floats(2**-10, 2**10, width=32),
    data=st.data(),
)
def test_any_value_lands_on_the_grid_and_zero_stays_zero(value: float, bits: int, scale: float, data: Any) -> None:
    zero_point = data.draw(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    made = grid(bits, scale, zero_point)
    x = np.array([value, 0.0], dtype=np.float32)
    y = made(torch.tensor(x))
    assert np.array_equal(y.numpy(), rounded(x, bits, scale, zero_point))
    assert y[1] == 0
    assert torch.equal(made(y), y)


def test_the_gradient_goes_straight_through_within_the_range_and_stops_outside() -> None:
    x = torch.tensor([-5.0, -2.0, -0.4, 0.9, 1.1, 3.0], requires_grad=True)
    grid(2, 1.0, 0)(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_moved_to_another_type_keeps_its_grid(dtype: torch.dtype) -> None:
    layer = nn.ModuleDict({"fc": nn.Linear(3, 2)})
    apply(layer, FakeQuant("fc", 4, True))
    layer["fc"].input_grid.scale.fill_(0.5)
    layer = layer.to(dtype)
    x = torch.tensor([[0.6, -9.0, 1.3]], dtype=dtype)
    assert layer["fc"].input_grid(x).tolist() == [[0.5, -4.0, 1.5]]
    assert layer["fc"](x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_the_steps_of_a_fine_grid_exactly(dtype: torch.dtype) -> None:
    """1.0 / 0.007 has more digits than bfloat16; rounding it there would land on a neighbour."""
    made = grid(12, 0.007, 0).to(dtype)
    x = (torch.randn(500) * 3).to(dtype)
    expected = rounded(x.float().numpy(), 12, float(made.scale), 0)
    assert torch.equal(made(x), torch.tensor(expected).to(dtype))


class Net(nn.Module):
    """Calls one layer by position, one by keyword, one twice, and has one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.fc = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.words = nn.Embedding(3, 4)
        self.list = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(input=self.conv(x).transpose(1, 2))
        return self.attention(value=h, key=h, query=self.again(self.again(h)))[0]


@pytest.mark.parametrize("name", ["conv", "fc", "again", "attention"])
def test_the_first_input_is_rounded_however_the_layer_is_called(name: str) -> None:
    """Oracle: a hook on an untouched copy that rounds by the formula."""
    model = Net().eval()
    plain = copy.deepcopy(model)

    def first_rounded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def by_formula(x: Tensor) -> Tensor:
            return torch.tensor(rounded(x.detach().numpy(), 3, 0.2, 0))

        if args:
            return (by_formula(args[0]), *args[1:]), kwargs
        first = "input" if "input" in kwargs else "query"
        return args, {**kwargs, first: by_formula(kwargs[first])}

    getattr(plain, name).register_forward_pre_hook(first_rounded, with_kwargs=True)
    apply(model, FakeQuant(name, 3, True))
    getattr(model, name).input_grid.scale.fill_(0.2)
    x = torch.randn(2, 2, 8)
    assert torch.equal(model(x), plain(x))


def test_state_dict_keys_stay_and_the_grid_has_its_own() -> None:
    model = Net().eval()
    before = model.state_dict()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    apply(model, FakeQuant("fc", 8, False))
    after = model.state_dict()
    assert set(after) - set(before) == {"fc.input_grid.scale", "fc.input_grid.zero_point"}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert type(model.fc) is nn.Linear
    assert not model.fc.input_grid.training


def test_a_copy_has_a_grid_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    apply(model, FakeQuant("0", 4, True))
    twin = copy.deepcopy(model)
    twin[0].input_grid.scale.fill_(0.01)
    x = torch.tensor([[0.6, 1.6, -0.3]])
    assert torch.equal(model(x), nn.functional.linear(torch.tensor([[1.0, 2.0, -0.0]]), model[0].weight, model[0].bias))
    assert not torch.equal(twin(x), model(x))


def test_the_model_itself_can_be_one_layer() -> None:
    layer = nn.Linear(2, 2)
    apply(layer, FakeQuant("", 8, True))
    assert "input_grid.scale" in layer.state_dict()


@pytest.mark.parametrize("name", ["conv", "fc", "attention"])
def test_it_exports(name: str) -> None:
    model = Net().eval()
    apply(model, FakeQuant(name, 8, False))
    x = torch.randn(2, 2, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert any("round" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 2, 8)
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without gradients"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "plain"])
def test_torchs_transformer_encoder_does_not_pass_it_by(gradients: bool, padded: bool) -> None:
    """In eval mode without gradients it computes from the weights of its layers. Oracle: the same with training's path,
    which calls them (dropout is 0)."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    arguments: dict[str, Any] = {"src_key_padding_mask": padding} if padded else {}
    plain = model(x, **arguments)
    apply(model, FakeQuant("layers.0.linear1", 2, True))
    with torch.set_grad_enabled(gradients):
        rounded_now = model(x, **arguments)
        expected = model.train()(x, **arguments)
    seen = ~padding if padded else torch.ones_like(padding)
    torch.testing.assert_close(rounded_now[seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rounded_now[seen], plain[seen], atol=1e-3)


def twice() -> nn.Module:
    model = Net()
    apply(model, FakeQuant("fc", 8, True))
    return model


@pytest.mark.parametrize(
    ("model", "edit", "message"),
    [
        (Net(), FakeQuant("fcc", 8, True), "no layer 'fcc'. Nearest: fc"),
        (Net(), FakeQuant("fc", 0, True), "bits must be 1 to 16; got 0"),
        (Net(), FakeQuant("fc", 17, True), "bits must be 1 to 16; got 17"),
        (Net(), FakeQuant("words", 8, True), "its input is indices"),
        (Net(), FakeQuant("list", 8, True), "never called"),
        (Net(), FakeQuant("attention.out_proj", 8, True), "swap in 'attention' first"),
        (twice(), FakeQuant("fc", 8, True), "has a grid on its input already"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_grid_that_does_not_fit_changes_nothing(model: nn.Module, edit: FakeQuant, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(EditError, match=re.escape(message)):
        apply(model, edit)
    assert snapshot(model) == before


def test_the_projections_of_our_attention_can_be_rounded() -> None:
    model = Net().eval()
    apply(model, Swap("attention", "attention"))
    x = torch.randn(2, 2, 8)
    plain = model(x)
    apply(model, FakeQuant("attention.out", 2, True))
    assert not torch.allclose(model(x), plain)
