# SPDX-License-Identifier: Apache-2.0
"""Oracles: closed forms written out for each layer, torch's own FLOP counter where it sees everything, and sums by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from featherweight.edits import apply
from featherweight.errors import DataError, OptionError
from featherweight.measure import count
from featherweight.plan import FakeQuant


class Call(nn.Module):
    """A model from a function and the modules it uses."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def attention_macs(batch: int, queries: int, keys: int, width: int, kdim: int | None = None) -> int:
    kdim = kdim or width
    projections = queries * width * width * 2 + keys * kdim * width * 2  # q and out; k and v
    return batch * (projections + 2 * queries * keys * width)


CLOSED_FORMS = {
    "linear": (nn.Linear(5, 7), (3, 4, 5), 3 * 4 * 5 * 7),
    "linear on a vector": (nn.Linear(5, 7), (5,), 5 * 7),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11), 2 * 6 * 5 * 4 * 3),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2), (2, 4, 9, 8), 2 * 6 * 7 * 8 * 4 * 6),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
    "grouped conv": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8), 2 * 6 * 36 * 2 * 9),
    "depthwise conv": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 8, 8), 2 * 8 * 36 * 1 * 9),
    # A transposed conv spreads each input entry over out / groups x taps.
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 8, 8), 2 * 4 * 64 * 3 * 9),
    "layer norm": (nn.LayerNorm(5), (3, 5), 0),
    "lstm": (nn.LSTM(6, 8, 2, bidirectional=True), (7, 2, 6), 14 * 2 * (32 * (6 + 8) + 32 * (16 + 8))),
    "lstm with projection": (nn.LSTM(6, 8, proj_size=3), (7, 2, 6), 14 * (32 * (6 + 3) + 3 * 8)),
    "gru": (nn.GRU(6, 8), (7, 2, 6), 14 * 24 * (6 + 8)),
    "rnn": (nn.RNN(6, 8), (7, 2, 6), 14 * 8 * (6 + 8)),
    "lstm cell": (nn.LSTMCell(6, 8), (2, 6), 2 * 32 * (6 + 8)),
    "encoder layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (3, 5, 8),
        attention_macs(3, 5, 5, 8) + 3 * 5 * 2 * 8 * 16,
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_macs_of_a_layer_are_its_closed_form_and_no_op_is_missed(name: str) -> None:
    layer, shape, macs = CLOSED_FORMS[name]
    counts = count(layer, (torch.randn(shape),))
    assert counts.macs == macs
    assert counts.uncounted == ()
    assert sum(layer.macs for layer in counts.layers) == macs
    if not any(isinstance(module, nn.LayerNorm | nn.MultiheadAttention) for module in layer.modules()):
        assert counts.bops == 32 * macs


q, k = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 7, 3)
FUNCTIONS = {
    "attention, causal": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        (q,),
        2 * 4 * 5 * 5 * 3 * 2,
    ),
    "attention, queries sharing keys": (
        lambda m, x, y: F.scaled_dot_product_attention(x, y, y, enable_gqa=True),
        (q, k),
        2 * 4 * 5 * 7 * 3 * 2,
    ),
    "matrix times vector": (lambda m, x, y: x @ y, (torch.randn(5, 3), torch.randn(3)), 15),
    "dot product": (lambda m, x: x @ x, (torch.randn(9),), 9),
    "addmv": (lambda m, x, y: torch.addmv(torch.zeros(5), x, y), (torch.randn(5, 3), torch.randn(3)), 15),
    "addbmm": (
        lambda m, x, y: torch.addbmm(torch.zeros(2, 4), x, y),
        (torch.randn(6, 2, 3), torch.randn(6, 3, 4)),
        6 * 2 * 3 * 4,
    ),
    "einsum": (
        lambda m, x, y: torch.einsum("bij,bkj->bik", x, y),
        (torch.randn(2, 4, 3), torch.randn(2, 5, 3)),
        2 * 4 * 5 * 3,
    ),
    "bilinear": (
        lambda m, x, y: F.bilinear(x, y, torch.ones(5, 3, 4)),
        (torch.randn(2, 3), torch.randn(2, 4)),
        2 * 5 * 12,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_products_are_counted_under_the_module_that_calls_them(name: str) -> None:
    function, inputs, macs = FUNCTIONS[name]
    counts = count(Call(function), inputs)
    assert (counts.macs, counts.uncounted) == (macs, ())
    assert [(layer.name, layer.macs) for layer in counts.layers] == [("", macs)]


@pytest.mark.parametrize("fast", [True, False])
def test_attention_counts_alike_on_and_off_its_fused_path(fast: bool) -> None:
    """torch's counter sees nothing of the fused kernels that eval mode takes."""
    model = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)
    inputs = (torch.randn(3, 5, 8), torch.randn(3, 4, 6), torch.randn(3, 4, 6))
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        assert count(model, inputs).macs == attention_macs(3, 5, 4, 8, kdim=6)
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_a_packed_batch_counts_the_steps_that_are_there() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 6), torch.randn(2, 6)])
    counts = count(
        Call(lambda m, x, sizes: m.lstm(nn.utils.rnn.PackedSequence(x, sizes)), lstm=nn.LSTM(6, 8)), packed[:2]
    )
    assert counts.macs == 7 * 32 * (6 + 8)


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def test_torchs_own_counter_agrees_where_it_sees_everything() -> None:
    model, x = small_cnn().eval(), torch.randn(3, 1, 8, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert count(model, (x,)).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "wrap",
    [
        torch.inference_mode(),
        torch.no_grad(),
        torch.enable_grad(),
    ],
    ids=["inference_mode", "no_grad", "enable_grad"],
)
def test_the_grad_mode_that_a_model_sets_for_itself_changes_no_count(wrap) -> None:
    model = Call(lambda m, x: m.encoder(x), encoder=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    x = torch.randn(3, 5, 8)
    expected = count(model, (x,)).macs
    with_mode = Call(lambda m, x: wrap(m.inner)(x), inner=model)
    assert count(with_mode, (x,)).macs == expected


def test_work_after_a_layer_that_failed_counts_where_it_runs() -> None:
    def recover(m: nn.Module, x: Tensor) -> Tensor:
        try:
            return m.wrong(x)
        except RuntimeError:
            return x @ torch.ones(3, 2)

    layers = count(Call(recover, wrong=nn.Sequential(nn.Linear(9, 9))), (torch.ones(5, 3),)).layers
    assert [(layer.name, layer.macs) for layer in layers] == [("", 5 * 3 * 2), ("wrong.0", 0)]


def test_of_two_branches_the_one_taken_counts() -> None:
    model = Call(
        lambda m, x: torch.cond(
            x.sum() > 0, lambda y: m.wide(y) @ m.wide(y).mT, lambda y: m.wide(y) @ y.new_ones(9, 2), (x,)
        ),
        wide=nn.Linear(3, 9),
    )
    assert count(model, (torch.ones(2, 3),)).macs == 2 * 2 * 27 + 2 * 9 * 2
    assert count(model, (-torch.ones(2, 3),)).macs == 2 * 27 + 2 * 9 * 2


def test_work_without_a_formula_is_named_and_work_without_macs_is_not() -> None:
    def work(m: nn.Module, x: Tensor) -> Tensor:
        y = F.gelu(F.softmax(F.pad(x, (1, 1)), -1)).cumsum(-1).sort()[0].add_(1).clamp_(0, 1).abs_()
        return F.interpolate(torch.fft.rfft(y).abs()[None], scale_factor=2) + torch.cdist(x, x).sum()

    assert count(Call(work), (torch.randn(3, 6),)).uncounted == ("_fft_r2c", "_cdist_forward")


def test_bops_count_the_zeros_of_the_weights_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].bias.fill_(-1.0)  # so that all activations are zeros, which are nobody's
        model[0].weight[:, :3] = 0.0
        model[0].weight[0, 3] = -0.0
        model[2].weight.fill_(1.0)
    counts = count(model, (torch.zeros(5, 4),))
    assert counts.macs == 5 * (24 + 12)
    assert counts.bops == 32 * 5 * (5 + 12)
    assert counts.nonzeros == counts.parameters - 19


def test_products_of_activations_count_in_full_beside_pruned_projections() -> None:
    width, tokens = 8, 5
    model = nn.MultiheadAttention(width, 2, batch_first=True, bias=False)
    with torch.no_grad():
        model.in_proj_weight[:, :4] = 0.0
        model.out_proj.weight[: width // 4] = 0.0
    x = torch.randn(1, tokens, width)
    projections = tokens * width * width * 3 * 0.5 + tokens * width * width * 0.75
    assert count(model, (x, x, x)).bops == 32 * (projections + 2 * tokens * tokens * width)


def test_zeros_count_also_where_the_weight_is_computed_from_a_mask() -> None:
    model = nn.Linear(4, 6)
    prune.random_unstructured(model, "weight", amount=18)
    assert count(model, (torch.randn(2, 4),)).bops == 32 * 2 * 6


def test_a_lstm_counts_each_matrix_by_its_own_zeros() -> None:
    model = nn.LSTM(6, 8)
    with torch.no_grad():
        model.weight_hh_l0[8:] = 0.0
    assert count(model, (torch.randn(7, 2, 6),)).bops == 32 * 14 * (32 * 6 + 8 * 8)


def test_bops_use_the_width_of_the_numbers() -> None:
    assert count(nn.Linear(4, 6).bfloat16(), (torch.ones(1, 4, dtype=torch.bfloat16),)).bops == 16 * 24


def on_grid(shape: tuple[int, ...], bits: int) -> Tensor:
    """Integers of so many bits, the largest in each row, times a scale a row."""
    q = torch.randint(-(1 << (bits - 1)) + 1, 1 << (bits - 1), shape)
    q.flatten(1)[:, 0] = (1 << (bits - 1)) - 1
    return q * (0.01 + torch.rand(shape[0], *[1] * (len(shape) - 1)))


def test_bops_use_the_bits_of_the_grids_of_weights_and_of_what_they_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10, bias=False), nn.Linear(10, 16))
    x = torch.randn(2, 3, 6, 6)
    conv, wide, last = 2 * 8 * 16 * 27, 2 * 1280, 2 * 160
    dense = count(model, (x,))
    assert (dense.bops, dense.bits, dense.input_bits) == (32 * (conv + wide + last), 32.0, None)
    with torch.no_grad():
        model[0].weight.copy_(on_grid((8, 3, 3, 3), 8))
        model[2].weight.copy_(on_grid((10, 128), 5))
    conv, wide = 2 * 16 * int(model[0].weight.count_nonzero()), 2 * int(model[2].weight.count_nonzero())
    assert count(model, (x,)).bops == 8 * conv + 5 * wide + 32 * last
    apply(model, FakeQuant("2", bits=4, symmetric=True))
    counts = count(model, (x,))
    assert counts.bops == 8 * conv + round(5 * wide * 4 / 32) + 32 * last
    assert counts.bits == pytest.approx((8 * 216 + 5 * 1280 + 32 * 160) / (216 + 1280 + 160)) and counts.input_bits == 4
    with torch.no_grad():
        model[2].weight[:, 1:33] = 0.0
    assert count(model, (x,)).bops < counts.bops


def test_the_states_of_a_recurrent_layer_are_no_integers() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(16, 8, num_layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight" in name:
                parameter.copy_(on_grid(tuple(parameter.shape), 8))
    wrapped = nn.Sequential(model)
    apply(wrapped, FakeQuant("0", bits=8, symmetric=False))
    x = torch.rand(5, 3, 16) + 0.1
    nonzero = {name: int(p.count_nonzero()) for name, p in model.named_parameters() if "weight" in name}
    read = nonzero.pop("weight_ih_l0")
    assert count(wrapped, (x,)).bops == pytest.approx(8 * 15 * (read * 8 / 32 + sum(nonzero.values())), abs=4)


def test_parts_of_a_weight_and_scales_by_chunks_have_its_bits() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True, bias=False)
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        attention.in_proj_weight.copy_(on_grid((48, 16), 6))
    projected = 6 * int(attention.in_proj_weight.count_nonzero()) + 32 * 256
    assert count(attention, (x, x, x)).bops == 5 * projected + 32 * 2 * 25 * 16
    model = nn.Linear(32, 8)
    with torch.no_grad():
        model.weight.copy_(torch.cat([on_grid((8, 16), 4), 8 * on_grid((8, 16), 4)], 1))
    assert count(model, (torch.randn(1, 32),)).bits == 32.0
    assert count(model, (torch.randn(1, 32),), {"weight": "int:4:16"}).bits == 4.0


def test_halves_and_codebooks_are_stored_in_fewer_bits_and_only_halves_computed_with() -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(model.weight.half())
    assert count(model, (torch.randn(1, 32),)).bits == 16.0
    assert count(model, (torch.randn(1, 32),)).bops == 16 * 256
    with torch.no_grad():
        model.weight.copy_(torch.randn(16)[torch.randint(16, (8, 32))])
    for hint, bits in (("codebook:16", 4.0), ("entropy:codebook:16:huffman", 4.0), ("codebook:4", 32.0), ("", 32.0)):
        counts = count(model, (torch.randn(1, 32),), {"weight": hint})
        assert (counts.bits, counts.bops) == (bits, 32 * 256), hint


def test_tied_tensors_count_once_and_work_counts_where_it_runs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.block = nn.Linear(8, 8)
            self.again = self.block
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.again(self.block(self.embedding(ids))))

    counts = count(Tied(), (torch.zeros(2, 3, dtype=torch.long),))
    assert counts.parameters == 88 + 72
    assert counts.dense_bytes == 4 * (88 + 72)
    assert [(x.name, x.kind, x.shape, x.parameters, x.macs, x.dense_bytes) for x in counts.layers] == [
        ("embedding", "Embedding", (11, 8), 88, 0, 352),
        ("block", "Linear", (8, 8), 72, 2 * 6 * 64, 288),
        ("head", "Linear", (11, 8), 0, 6 * 88, 0),
    ]


def test_dense_bytes_are_those_of_the_state_dict() -> None:
    model = nn.Sequential(nn.Linear(3, 4).half(), nn.BatchNorm1d(4))
    model.register_buffer("cache", torch.zeros(100), persistent=False)
    # 16 half floats; weight, bias, mean and variance of 4 floats each; one int64.
    counts = count(model.float(), (torch.zeros(2, 3),))
    assert counts.dense_bytes == 16 * 4 + 4 * 4 * 4 + 8
    assert counts.dense_bytes == sum(layer.dense_bytes for layer in counts.layers)


def test_the_model_and_torchs_randomness_stay_as_they_were() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0
            self.history: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            self.history.append(float(torch.rand(())))
            x.add_(1)
            return self.layer(x)

    model, x = Restless().train(), torch.zeros(4, 3)
    model.layer[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    count(model, (x,))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (model.calls, model.history) == (0, [])
    assert torch.equal(torch.get_rng_state(), random)
    assert not x.any()
    assert not model._forward_hooks and not nn.modules.module._global_forward_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
def test_wrapped_and_parametrized_models_count_as_what_is_inside() -> None:
    model, x = small_cnn(), torch.randn(2, 1, 8, 8)
    expected = count(model, (x,)).macs
    assert count(torch.compile(model), (x,)).macs == expected
    assert count(nn.Sequential(torch.compile(model)), (x,)).macs == expected
    assert count(torch.jit.trace(model.eval(), x), (x,)).macs == expected
    nn.utils.parametrizations.weight_norm(model[0])
    assert count(model, (x,)).macs == expected


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_weight_with_a_history_does_not_stop_the_copy() -> None:
    model = nn.utils.weight_norm(nn.Linear(3, 4))
    model(torch.zeros(1, 3))
    assert count(model, (torch.zeros(2, 3),)).macs == 24


def test_peak_memory_is_weights_and_the_most_that_lived_at_once() -> None:
    model = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 20), nn.ReLU(inplace=True), nn.Linear(20, 1))
    x = torch.zeros(7, 10)
    weights = 4 * (10 * 1000 + 1000 + 1000 * 20 + 20 + 20 + 1)
    # The caller holds the input; the ReLU's input and output live together.
    assert count(model, (x,)).peak_memory_bytes == weights + 4 * 7 * (10 + 1000 + 1000)
    model[1] = nn.ReLU(inplace=True)
    assert count(model, (x,)).peak_memory_bytes == weights + 4 * 7 * (10 + 1000 + 20)


def test_peak_memory_counts_a_skip_connection_and_a_view_once() -> None:
    model = Call(
        lambda m, x: x.view(-1) + m.wide(x).sum(1).view(-1).repeat(5).view(-1), wide=nn.Linear(5, 300, bias=False)
    )
    # Input, wide (8 x 300), then their sum (8); later repeat (40) and the result (40).
    assert count(model, (torch.zeros(8, 5),)).peak_memory_bytes == 4 * (1500 + 40 + 2400 + 8)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "words"),
    [
        (nn.Linear(3, 4), (torch.zeros(2, 5),), DataError, r"Linear could not be called .*Tensor\[2, 5\]"),
        (nn.Linear(3, 4), torch.zeros(2, 3), OptionError, r"give a tuple, for one tensor: \(x,\)"),
        (nn.LazyLinear(3), (torch.zeros(2, 3),), OptionError, "weight belongs to a lazy module"),
    ],
)
def test_what_cannot_be_counted_says_why(model: nn.Module, inputs, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        count(model, inputs)


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = nn.Linear(3, 4)
    model.stream = (i for i in range(3))
    with pytest.raises(OptionError, match="cannot be copied"):
        count(model, (torch.zeros(2, 3),))


def test_a_failed_count_leaves_no_hooks_behind() -> None:
    with pytest.raises(DataError):
        count(Call(lambda m, x: m.inner(x), inner=nn.Linear(3, 4)), (torch.zeros(2, 5),))
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks
    assert math.isclose(count(nn.Linear(3, 4), (torch.zeros(2, 3),)).macs, 24)
