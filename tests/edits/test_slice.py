# SPDX-License-Identifier: Apache-2.0
"""Oracle: the model in which the dropped positions are set to zero. Cutting them off must give the same answer."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.edits import Attention, apply
from featherweight.errors import EditError
from featherweight.plan import Slice, Swap
from tests.edits.snapshot import snapshot


def zeroed(model: nn.Module, slices: list[Slice]) -> nn.Module:
    """A copy in which each slice's dropped positions are zero: parameters and buffers, with nothing cut."""
    model = copy.deepcopy(model)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for edit in slices:
        tensor = tensors[edit.tensor]
        dropped = [i for i in range(tensor.shape[edit.axis]) if i not in edit.keep]
        tensor.data.index_fill_(edit.axis, torch.tensor(dropped), 0)
    return model


def channels(keep: tuple[int, ...], *tensors: str) -> list[Slice]:
    """`"0.weight:1"` is axis 1 of that tensor; without a number, axis 0."""
    named = [tensor.partition(":") for tensor in tensors]
    return [Slice(name, int(axis or 0), keep) for name, _, axis in named]


@dataclasses.dataclass
class Case:
    name: str
    model: nn.Module
    input: tuple[int, ...]
    slices: list[Slice]


BATCH_NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
CASES = [
    Case(
        "conv, batch norm, relu, conv",
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)),
        (2, 3, 8, 8),
        channels((0, 2, 5), "0.weight", "0.bias", *BATCH_NORM, "3.weight:1"),
    ),
    Case(
        "1-d conv, prelu, conv with padding by its kernel",
        nn.Sequential(nn.Conv1d(3, 6, 3, padding="same"), nn.PReLU(6), nn.Conv1d(6, 2, 3, padding="same")),
        (2, 3, 9),
        channels((1, 4), "0.weight", "0.bias", "1.weight", "2.weight:1"),
    ),
    Case(
        "3-d conv",
        nn.Sequential(nn.Conv3d(2, 5, 2), nn.ReLU(), nn.Conv3d(5, 2, 2)),
        (1, 2, 4, 4, 4),
        channels((4,), "0.weight", "0.bias", "2.weight:1"),
    ),
    Case(
        "depthwise",
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)),
        (2, 3, 6, 6),
        channels((1, 2, 5), "0.weight", "0.bias", *BATCH_NORM, "2.weight", "2.bias", "3.weight:1"),
    ),
    Case(
        "depthwise with two outputs a channel",
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 4, 1)),
        (2, 3, 6, 6),
        [
            *channels((1, 3), "0.weight", "0.bias"),
            *channels((2, 3, 6, 7), "1.weight", "1.bias", "2.weight:1"),
        ],
    ),
    Case(
        "grouped conv, outputs: the same number in each group",
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 1)),
        (2, 4, 6, 6),
        channels((0, 1, 2, 4, 6, 7), "0.weight", "0.bias", "1.weight:1"),
    ),
    Case(
        "grouped conv, inputs: the same positions in each group",
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2)),
        (2, 3, 6, 6),
        [*channels((0, 2, 3, 5), "0.weight", "0.bias"), *channels((0, 2), "1.weight:1")],
    ),
    Case(
        "grouped conv, a whole group",
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 4, 1)),
        (2, 3, 6, 6),
        [
            *channels((0, 1, 4, 5), "0.weight", "0.bias"),
            *channels((0, 1, 2, 3, 8, 9, 10, 11), "1.weight", "1.bias", "2.weight:1"),
        ],
    ),
    Case(
        "transposed conv",
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.ConvTranspose2d(5, 6, 3, stride=2), nn.Conv2d(6, 2, 1)),
        (2, 3, 4, 4),
        [
            *channels((0, 3, 4), "0.weight", "0.bias", "1.weight:0"),
            *channels((1, 2), "1.weight:1", "1.bias", "2.weight:1"),
        ],
    ),
    Case(
        "transposed conv with groups: a whole group, and the same outputs in the others",
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 9, 3, groups=3), nn.Conv2d(9, 2, 1)),
        (2, 3, 4, 4),
        [
            *channels((2, 3, 4, 5), "0.weight", "0.bias", "1.weight:0"),
            *channels((0, 2), "1.weight:1"),
            *channels((3, 5, 6, 8), "1.bias", "2.weight:1"),
        ],
    ),
    Case(
        "transposed depthwise",
        nn.Sequential(nn.Conv1d(3, 6, 1), nn.ConvTranspose1d(6, 6, 3, groups=6), nn.Conv1d(6, 2, 1)),
        (2, 3, 7),
        channels((0, 5), "0.weight", "0.bias", "1.weight:0", "1.bias", "2.weight:1"),
    ),
    Case(
        "linear after flatten",
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 5)),
        (2, 1, 6, 6),
        [*channels((0, 2), "0.weight", "0.bias"), *channels((*range(16), *range(32, 48)), "3.weight:1")],
    ),
    Case(
        "group norm, a whole group",
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        (2, 3, 6, 6),
        channels((0, 1, 4, 5), "0.weight", "0.bias", "1.weight", "1.bias", "3.weight:1"),
    ),
    Case(
        "instance norm",
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        (2, 3, 6, 6),
        channels((0, 3), "0.weight", "0.bias", "1.weight", "1.bias", "3.weight:1"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cutting_channels_off_answers_as_setting_them_to_zero(case: Case) -> None:
    model = copy.deepcopy(case.model).double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0) if "running_var" in name else nn.init.normal_(tensor)
    x = torch.randn(case.input, dtype=torch.float64)
    expected = zeroed(model, case.slices)(x)
    assert not torch.allclose(expected, model(x))
    parameters = {name: id(p) for name, p in model.named_parameters()}
    for edit in case.slices:
        apply(model, edit)
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    model(x).sum().backward()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sizes_are_those_of_a_layer_built_small(case: Case) -> None:
    """Oracle: torch's own constructor, called with the size attributes that the cut layer claims."""
    model = copy.deepcopy(case.model)
    for edit in case.slices:
        apply(model, edit)
    for layer in model:
        if isinstance(layer, nn.modules.conv._ConvNd):
            built = type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups)
        elif isinstance(layer, nn.Linear):
            built = nn.Linear(layer.in_features, layer.out_features)
        elif isinstance(layer, nn.PReLU):
            built = nn.PReLU(layer.num_parameters)
        elif isinstance(layer, nn.GroupNorm):
            built = nn.GroupNorm(layer.num_groups, layer.num_channels)
        elif isinstance(layer, nn.modules.batchnorm._NormBase):
            built = type(layer)(layer.num_features, affine=True)
        else:
            continue
        assert {n: t.shape for n, t in built.state_dict().items()} == {
            n: t.shape for n, t in layer.state_dict().items()
        }


def test_layer_norm_is_that_of_the_kept_positions() -> None:
    """Its statistics change with a cut; what is right is NumPy's layer norm over what is left."""
    norm = nn.LayerNorm((2, 6), dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    gain, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    keep = (1, 2, 5)
    apply(norm, Slice("weight", 1, keep))
    apply(norm, Slice("bias", 1, keep))
    x = np.random.default_rng(0).normal(size=(4, 2, 3))
    centred = x - x.mean((1, 2), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean((1, 2), keepdims=True) + 1e-5) * gain[:, keep] + shift[:, keep]
    assert np.allclose(norm(torch.tensor(x)).detach().numpy(), expected, rtol=1e-10)


def test_a_tensor_with_several_names_is_cut_once_and_every_layer_that_holds_it_knows() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(10, 6, padding_idx=0), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["words"].weight
    old = model["words"].weight.detach().clone()
    apply(model, Slice("head.weight", 1, (0, 3)))
    apply(model, Slice("words.weight", 0, (0, 4, 9)))
    assert model["head"].weight is model["words"].weight
    assert torch.equal(model["head"].weight, old[[0, 4, 9]][:, [0, 3]])
    assert (model["words"].num_embeddings, model["words"].embedding_dim) == (3, 2)
    assert (model["head"].in_features, model["head"].out_features) == (2, 3)


def test_the_padding_row_of_an_embedding_keeps_its_role() -> None:
    words = nn.Embedding(6, 4, padding_idx=3)
    apply(words, Slice("weight", 0, (1, 3, 5)))
    assert words.padding_idx == 1
    words(torch.tensor([0, 1, 2])).sum().backward()
    assert words.weight.grad[1].abs().sum() == 0
    assert words.weight.grad[0].abs().sum() > 0


def test_training_goes_on_while_an_earlier_loss_is_still_in_scope() -> None:
    """Autograd remembers a parameter's shape as long as a graph through it is alive, as `loss` in a loop is."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shapes: list[torch.Size] = []
    model[0].weight.register_hook(lambda gradient: shapes.append(gradient.shape))
    loss = model(torch.randn(5, 3)).sum()
    loss.backward()
    gradient = model[0].weight.grad.clone()
    for edit in channels((0, 3), "0.weight", "0.bias", "1.weight:1"):
        apply(model, edit)
    assert torch.equal(model[0].weight.grad, gradient[[0, 3]])
    before = model[0].weight.detach().clone()
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert shapes == [(4, 3), (2, 3)]
    assert loss.requires_grad


def attention(width: int = 12, heads: int = 3) -> nn.ModuleDict:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    apply(model, Swap("attention", "attention"))
    return model


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "slices",
    [
        channels(
            (0, 1, 2, 3, 8, 9, 10, 11),
            *(f"attention.{part}.{leaf}" for part in "qkv" for leaf in ("weight", "bias")),
            "attention.out.weight:1",
        ),
        channels((0, 3, 5, 6, 8, 9), *(f"attention.{part}.{leaf}" for part in "qk" for leaf in ("weight", "bias"))),
        channels((0, 4, 11), "attention.v.weight", "attention.v.bias", "attention.out.weight:1"),
    ],
    ids=["a whole head", "positions of queries and keys", "positions of values"],
)
def test_heads_and_positions_in_them_are_cut_out_of_our_attention(slices: list[Slice], need_weights: bool) -> None:
    model = attention()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = zeroed(model, slices)["attention"](x, x, x, need_weights=False)[0]
    for edit in slices:
        apply(model, edit)
    assert torch.allclose(model["attention"](x, x, x, need_weights=need_weights)[0], expected, rtol=1e-10, atol=1e-12)
    cut: Attention = model["attention"]
    assert cut.num_heads == cut.q.out_features // cut.q_size == cut.v.out_features // cut.v_size


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 4)
        self.lstm = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.words = nn.Embedding(5, 4, padding_idx=2)
        self.lazy = nn.LazyLinear(3)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.register_buffer("count", torch.tensor(0))


REFUSED = [
    (Slice("fc.wieght", 0, (0,)), "no tensor 'fc.wieght'. Nearest: fc.weight"),
    (Slice("fcc.weight", 0, (0,)), "no layer 'fcc'. Nearest: fc"),
    (Slice("fc.weight", 2, (0,)), "shape (4, 8), which has no axis 2"),
    (Slice("fc.weight", -1, (0,)), "no axis -1"),
    (Slice("count", 0, (0,)), "no axis 0"),
    (Slice("fc.weight", 0, ()), "ascending positions below 4, at least one"),
    (Slice("fc.weight", 0, (0, 4)), "ascending positions below 4"),
    (Slice("fc.weight", 0, (-1, 2)), "ascending positions below 4"),
    (Slice("fc.weight", 0, (2, 1)), "ascending positions below 4"),
    (Slice("fc.weight", 0, (1, 1)), "ascending positions below 4"),
    (Slice("conv.weight", 0, (0, 1, 4)), "keeps 1 to 2 positions of the conv groups of 4"),
    (Slice("conv.weight", 2, (0, 1)), "axis 2 is of the kernel"),
    (Slice("norm.weight", 0, (0, 1, 2, 4)), "keeps 1 to 3 positions of the GroupNorm groups of 4"),
    (Slice("lstm.weight_ih_l0", 0, (0,)), "keeps other hidden units in one of its 4 gates"),
    (Slice("lstm.bias_hh_l0", 0, (0, 4, 8, 13)), "keeps other hidden units in one of its 4 gates"),
    (Slice("attention.in_proj_weight", 0, (0,)), "swap in 'attention' first"),
    (Slice("attention.out_proj.weight", 0, (0,)), "swap in 'attention' first"),
    (Slice("words.weight", 0, (0, 1)), "entry 2 is the padding"),
    (Slice("lazy.weight", 0, (0,)), "lazy module"),
    (Slice("bilinear.weight", 3, (0,)), "no axis 3"),
]


@pytest.mark.parametrize(("edit", "message"), REFUSED, ids=[f"{e.tensor}-{e.axis}-{e.keep}" for e, _ in REFUSED])
def test_a_slice_that_does_not_fit_changes_nothing(edit: Slice, message: str) -> None:
    model = Plain()
    before = snapshot(model)
    with pytest.raises(EditError, match=re.escape(message)):
        apply(model, edit)
    assert snapshot(model) == before


def test_a_tie_is_refused_whole_where_one_of_its_layers_refuses() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 16, bias=False), "lstm": nn.LSTM(4, 4)})
    model["fc"].weight = model["lstm"].weight_ih_l0
    before = snapshot(model)
    with pytest.raises(EditError, match="one of its 4 gates"):
        apply(model, Slice("fc.weight", 0, (0, 1)))
    assert snapshot(model) == before


def test_uneven_heads_are_refused() -> None:
    model = attention()
    before = snapshot(model)
    with pytest.raises(EditError, match="keeps 1 to 4 positions of the attention heads of 4"):
        apply(model, Slice("attention.q.weight", 0, (0, 1, 2, 3, 4)))
    assert snapshot(model) == before


def test_transformer_layers_take_a_smaller_feed_forward_on_every_path() -> None:
    """In eval mode without gradients torch runs a fused kernel on the weights; it must see the cut ones."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True).double().eval()
    slices = channels((0, 5, 7, 11), "linear1.weight", "linear1.bias", "linear2.weight:1")
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected: Tensor = zeroed(layer, slices)(x)
    for edit in slices:
        apply(layer, edit)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)
