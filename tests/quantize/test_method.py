# SPDX-License-Identifier: Apache-2.0
"""`Quantize` by its parts. Oracles: NumPy's rounding to a grid, and the layer on inputs rounded by hand."""

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.edits import FakeQuantize, saturation
from featherweight.errors import DataError, FeatherweightError, NothingToCompress, NumericalError, OptionError
from featherweight.grids import GridSpec, fit_grid, read_grid
from featherweight.layers import to_matrix, weights
from tests.edits.snapshot import snapshot
from tests.models import MODELS


class Every(nn.Module):
    """Weights of every kind, one tied, and a parameter that its module uses by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, 8, 3, groups=2, padding=1)
        self.depth = nn.Conv1d(8, 8, 9, groups=8, padding=4)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1, groups=2)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 12, batch_first=True)
        self.attention: Any = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.words.weight
        self.own = nn.Parameter(torch.randn(12, 12))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).transpose(1, 2)
        x = torch.relu(self.grouped(torch.relu(self.conv(x))))
        x = torch.relu(self.up(self.depth(x))).transpose(1, 2)
        x = self.gru(self.lstm(x)[0])[0]
        return self.head(self.attention(x, x, x, need_weights=False)[0] @ self.own)


def every_task(seed: int = 0) -> fw.Task:
    torch.manual_seed(seed)
    data = [torch.randint(0, 20, (8, 9)) for _ in range(4)]
    return fw.Task(Every().eval(), (data[0][:2],), calibration=data)


def run(method: fw.Quantize, task: fw.Task) -> tuple[Any, fw.Plan, list[dict[str, Any]]]:
    model, events = copy.deepcopy(task.model), []
    plan = method(model, task, fw.Stage(report=events.append))
    return model.eval(), plan, events


def texts(events: list[dict[str, Any]]) -> str:
    return "\n".join(event["text"] for event in events if event["kind"] == "message")


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for weight in weights(model)[0]:
        if weight.kind != "bare":
            yield weight.name, to_matrix(weight, weight.parameter.detach())


WEIGHTS_ONLY = {"correct": ()}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_every_kind_of_weight_is_rounded_to_its_nearest_grid_value(bits: int, symmetric: bool) -> None:
    """Row by row against NumPy, with the range of all values."""
    task = every_task()
    model, plan, _ = run(fw.Quantize(bits, symmetric=symmetric, search="minmax", **WEIGHTS_ONLY), task)
    dense = dict(matrices(task.model))
    found = dict(matrices(model))
    assert len(found) == 13 and set(plan.formats) == set(found)
    for name, matrix in found.items():
        rows, d = matrix.shape
        assert plan.formats[name] == f"int:{bits}:{d}"
        W = dense[name].double().numpy()
        low, high = np.minimum(W.min(1), 0), np.maximum(W.max(1), 0)
        if symmetric:
            scale = np.float32(np.maximum(-low, high) / (2 ** (bits - 1) - 1)).astype(np.float64)
            zero = np.zeros(rows)
        else:
            exact = (high - low) / (2**bits - 1)
            zero = -(2 ** (bits - 1)) + np.rint(-low / exact)
            scale = np.float32(exact).astype(np.float64)
        q = np.clip(np.rint(W / scale[:, None] + zero[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert np.array_equal(matrix.numpy(), np.float32((q - zero[:, None]) * scale[:, None])), name
    assert model.words.weight is model.head.weight
    assert torch.equal(model.own, task.model.own)


def test_one_bit_is_a_sign_and_the_rows_mean_magnitude() -> None:
    """XNOR-Net, equation 6: the best scale of a row of signs is the mean of its magnitudes."""
    task = every_task()
    model, plan, _ = run(fw.Quantize(1, **WEIGHTS_ONLY), task)
    for (name, matrix), (_, dense) in zip(matrices(model), matrices(task.model), strict=True):
        expected = dense.sign() * dense.double().abs().mean(1, keepdim=True).float()
        assert torch.equal(matrix, expected), name
        assert plan.formats[name].startswith("int:1:")


def test_one_bit_keeps_what_is_pruned_and_says_so() -> None:
    task = every_task()
    task.model.conv.weight.data.view(-1)[::3] = 0.0
    model, plan, events = run(fw.Quantize(1, **WEIGHTS_ONLY), task)
    assert torch.equal(model.conv.weight, task.model.conv.weight) and "conv.weight" not in plan.formats
    [line] = [e["weight"] for e in events if e["kind"] == "selection" and e["weight"]["name"] == "conv.weight"]
    assert line["action"] == "kept" and "zeros, which 1 bit cannot hold" in line["reason"]


@pytest.mark.parametrize(("half", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precisions_are_rounded_to(half: str, dtype: torch.dtype) -> None:
    task = every_task()
    model, plan, _ = run(fw.Quantize(half, **WEIGHTS_ONLY), task)
    for (name, matrix), (_, dense) in zip(matrices(model), matrices(task.model), strict=True):
        assert torch.equal(matrix, dense.to(dtype).float()) and plan.formats[name] == half


def test_what_float16_cannot_hold_is_refused() -> None:
    task = every_task()
    task.model.conv.weight.data[0, 0, 0] = 1e6
    with pytest.raises(NumericalError, match=r"conv\.weight holds values beyond 65504.*bits='bf16'"):
        run(fw.Quantize("fp16"), task)


def test_one_scale_for_a_tensor_or_for_every_chunk() -> None:
    task = every_task()
    whole, _, _ = run(fw.Quantize(8, per="tensor", **WEIGHTS_ONLY), task)
    for name, matrix in matrices(whole):
        assert read_grid(matrix.reshape(1, -1), most_bits=8) is not None, name
    chunked, plan, _ = run(fw.Quantize(3, chunk=5, **WEIGHTS_ONLY), task)
    for name, matrix in matrices(chunked):
        grid = read_grid(matrix, most_bits=3, chunk=5)
        assert grid is not None and plan.formats[name] == f"int:3:{min(5, matrix.shape[1])}"


@pytest.mark.parametrize("search", ["minmax", "percentile", "mse"])
def test_searches_are_those_of_the_grids(search: Any) -> None:
    task = every_task()
    model, _, _ = run(fw.Quantize(4, search=search, percentile=95.0, **WEIGHTS_ONLY), task)
    dense = to_matrix(weights(task.model.conv)[0][0], task.model.conv.weight.detach())
    expected = fit_grid(dense, GridSpec(4, True, None, search, percentile=95.0)).nearest(dense)
    assert torch.equal(to_matrix(weights(model.conv)[0][0], model.conv.weight.detach()), expected)


def test_bits_by_glob_and_what_no_glob_names_stays() -> None:
    task = every_task()
    model, plan, events = run(fw.Quantize({"*conv*": 8, "lstm": 4, "lstm.weight_hh_l0": "fp16"}, **WEIGHTS_ONLY), task)
    assert {name: hint.split(":")[:2] for name, hint in plan.formats.items()} == {
        "conv.weight": ["int", "8"],
        "lstm.weight_ih_l0": ["int", "4"],
        "lstm.weight_hh_l0": ["fp16"],
        "lstm.weight_ih_l0_reverse": ["int", "4"],
        "lstm.weight_hh_l0_reverse": ["int", "4"],
    }
    assert torch.equal(model.up.weight, task.model.up.weight)
    kept = {e["weight"]["name"]: e["weight"]["reason"] for e in events if e["kind"] == "selection"}
    assert kept["up.weight"] == "no glob of bits names it"


def test_zeros_stay_zeros() -> None:
    task = every_task()
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.ndim > 1:
                parameter.view(-1)[::3] = 0.0
    model, _, _ = run(fw.Quantize(3, symmetric=False, activations="static"), task)
    for name, parameter in task.model.named_parameters():
        if parameter.ndim > 1 and name in dict(model.named_parameters()):
            assert not bool(model.get_parameter(name)[parameter == 0].any()), name
    fused = task.model.attention.in_proj_weight
    mine = torch.cat([getattr(model.attention, part).weight for part in "qkv"])
    assert not bool(mine[fused == 0].any())


def test_a_weight_on_a_grid_keeps_it_and_one_on_a_finer_grid_does_not() -> None:
    """OBQ's 4-bit grid survives 8 bits: its values do not move by a bit. So does what it was reconstructed by."""
    task = every_task()
    data = [torch.randn(16, 8) for _ in range(6)]
    task = fw.Task(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)), (data[0],), calibration=data)
    solved, _, _ = run_reconstruct(fw.Reconstruct(bits=4, samples=64, work=0.1), task)
    again = fw.Task(solved, task.example_inputs, calibration=data)
    model, plan, events = run(fw.Quantize(8, activations="static"), again)
    for name in ("0.weight", "2.weight"):
        assert torch.equal(model.get_parameter(name), solved.get_parameter(name))
        assert re.fullmatch(r"int:[234]:\d+", plan.formats[name])
    assert "keeps its grid of 4 bits" in str(events)
    coarser, plan, _ = run(fw.Quantize(3), again)
    assert not torch.equal(coarser[0].weight, solved[0].weight) and plan.formats["0.weight"] == "int:3:8"


def run_reconstruct(method: Any, task: fw.Task) -> tuple[Any, fw.Plan, None]:
    model = copy.deepcopy(task.model)
    return model, method(model, task, fw.Stage()), None


def normed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4))
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return model.eval()


def test_norms_are_folded_and_a_grid_is_folded_with_them() -> None:
    """The integers stay; a negative gain turns them about. Oracle: the model with its norms."""
    model, x = normed(), torch.randn(16, 3, 20)
    assert bool((model[1].weight < 0).any())
    task = fw.Task(model, (x[:2],), calibration=[x])
    on_grid, _, _ = run(fw.Quantize(4, symmetric=False, **WEIGHTS_ONLY), task)
    before = read_grid(to_matrix(weights(on_grid[0])[0][0], on_grid[0].weight.detach()), most_bits=4)
    assert before is not None
    method = fw.Quantize(8, activations="static", activation_bits=16, **WEIGHTS_ONLY)
    folded, plan, _ = run(method, fw.Task(on_grid, (x[:2],), calibration=[x]))
    assert [edit.kind for edit in plan.edits] == ["fold", "fold", "fake_quant", "fake_quant"]
    after = read_grid(to_matrix(weights(folded[0])[0][0], folded[0].weight.detach()), most_bits=4)
    assert after is not None and plan.formats["0.weight"] == "int:4:15"
    error = (folded(x) - on_grid(x)).detach().norm() / on_grid(x).detach().norm()
    assert float(error) < 1e-3
    unfolded, plan, _ = run(dataclasses.replace(method, fold=False), task)
    assert type(unfolded[1]) is nn.BatchNorm1d and {edit.kind for edit in plan.edits} == {"fake_quant"}


def test_static_grids_hold_what_the_layers_read() -> None:
    """Oracle: the smallest and largest of what hooks see in the model with rounded weights, on the samples that fit."""
    task = every_task()
    model, plan, _ = run(fw.Quantize(8, activations="static", correct=()), task)
    placed = [edit.layer for edit in plan.edits if isinstance(edit, fw.FakeQuant)]
    read = {
        "conv",
        "grouped",
        "depth",
        "up",
        "lstm",
        "gru",
        "head",
        *(f"attention.{part}" for part in ("q", "k", "v", "out")),
    }
    assert set(placed) == read and fw.Swap("attention", "attention") in plan.edits
    seen: dict[str, list[Tensor]] = {name: [] for name in read}
    plain, _, _ = run(fw.Quantize(8, correct=()), task)
    fw.apply(plain, fw.Swap("attention", "attention"))
    for name in read:
        layer = plain.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append((*args, *kwargs.values())[0]), with_kwargs=True
        )
    assert task.calibration is not None
    for batch in list(task.calibration)[:3]:  # one of four batches is held out, and it is the last
        plain(batch)
    for name in read:
        low = min(min(float(x.detach().min()) for x in seen[name]), 0.0)
        high = max(max(float(x.detach().max()) for x in seen[name]), 0.0)
        grid = model.get_submodule(f"{name}.input_grid")
        assert float(grid.scale) == pytest.approx((high - low) / 255, rel=1e-5), name
        assert int(grid.zero_point) == round(-128 - low / float(grid.scale)), name
    assert int(model.grouped.input_grid.zero_point) == -128  # behind a ReLU


def test_a_quantized_layer_answers_as_its_integers_do() -> None:
    """Oracle: int32 arithmetic on the integers of weight and input."""
    torch.manual_seed(0)
    data = [torch.randn(64, 16) for _ in range(4)]
    task = fw.Task(nn.Sequential(nn.Linear(16, 8, bias=False)), (data[0],), calibration=data)
    model, _, _ = run(fw.Quantize(8, activations="static", correct=()), task)
    grid = read_grid(model[0].weight.detach())
    assert grid is not None
    inputs: Any = model[0].input_grid
    x = data[1]
    q = np.clip(np.rint(x.numpy() / inputs.scale.numpy()) + int(inputs.zero_point), -128, 127).astype(np.int32)
    w = grid.integers(model[0].weight.detach()).numpy() - grid.zero_point.numpy()
    exact = (q - int(inputs.zero_point)) @ w.T * (float(inputs.scale) * grid.scale[:, 0].double().numpy())
    assert np.allclose(model(x).detach().numpy(), exact, rtol=1e-5, atol=1e-5)


def test_dynamic_grids_go_to_linear_and_recurrent_layers() -> None:
    task = every_task()
    model, plan, events = run(fw.Quantize(8, activations="dynamic"), task)
    placed = {edit.layer for edit in plan.edits if isinstance(edit, fw.FakeQuant) and edit.dynamic}
    assert placed == {"lstm", "gru", "head", *(f"attention.{part}" for part in ("q", "k", "v", "out"))}
    assert "What 4 layers read stays float: conv, grouped, depth, up: dynamic grids are for linear and" in texts(events)
    x = torch.randint(0, 20, (3, 9))
    assert float((model(x) - task.model(x)).detach().norm() / task.model(x).detach().norm()) < 0.05


def test_a_dynamic_grid_needs_no_data() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    task = fw.Task(model, (torch.zeros(1, 8),))
    done, plan, events = run(fw.Quantize(8, activations="dynamic"), task)
    assert plan.edits == (fw.FakeQuant("0", 8, False, dynamic=True),)
    assert "no data to correct biases by" in texts(events)
    x = torch.randn(5, 8)
    span = max(float(x.max()), 0) - min(float(x.min()), 0)
    assert float((done[0].input_grid(x) - x).abs().max()) <= span / 255 * 0.51


def test_activations_outside_the_range_saturate_and_are_counted_and_told() -> None:
    data = [torch.rand(10, 4) for _ in range(4)] + [torch.full((10, 4), 3.0)]
    task = fw.Task(nn.Sequential(nn.Linear(4, 2)), (data[0],), calibration=data)
    model, _, events = run(fw.Quantize(8, activations="static", held_out=0.2, correct=()), task)
    top = float(torch.cat(data[:4]).max())
    assert (
        "40 of 40 activations of held-out samples were outside the calibrated ranges and saturated; most at 0: 100 %"
        in (texts(events))
    )
    x = torch.tensor([[0.0, 0.5, -1.0, 100.0]])
    with saturation(model) as counts:
        answer = model(x)
    assert (counts["0"].outside, counts["0"].seen, counts["0"].share) == (2, 4, 0.5)
    expected = nn.functional.linear(model[0].input_grid(x), model[0].weight, model[0].bias)
    assert torch.equal(answer, expected)
    assert float(model[0].input_grid(x)[0, 3]) == pytest.approx(top, rel=1e-2)
    model(x)
    assert counts["0"].seen == 4  # it counts no longer


def test_a_packed_sequence_is_rounded() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
            return self.lstm(packed)[1][0]

    data = [torch.randn(5, 2, 4) for _ in range(3)]
    task = fw.Task(Packed(), (data[0],), calibration=data)
    model, plan, _ = run(fw.Quantize(8, activations="static", **WEIGHTS_ONLY), task)
    assert len(plan.edits) == 1
    assert torch.allclose(model(data[0]), task.model(data[0]), atol=0.02)
    assert not torch.equal(model(data[0]), task.model(data[0]))


def test_padding_does_not_widen_a_range() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc(x)

    x = torch.rand(2, 3, 4)
    x[:, 2] = 1000.0
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    batch = {"x": x, "attention_mask": mask}
    task = fw.Task(Masked(), (x, mask), calibration=[batch, batch])
    model, _, _ = run(fw.Quantize(8, activations="static", correct=()), task)
    assert float(model.fc.input_grid.scale) < 0.01


def test_biases_are_corrected_where_held_out_answers_come_nearer() -> None:
    """Two bits shift the mean; afterwards the outputs' means are those of the dense layer, on the samples that fit."""
    torch.manual_seed(0)
    data = [torch.rand(64, 16) for _ in range(8)]
    task = fw.Task(nn.Sequential(nn.Linear(16, 8)), (data[0],), calibration=data)
    raw, _, _ = run(fw.Quantize(2, correct=()), task)
    corrected, _, events = run(fw.Quantize(2), task)
    assert torch.equal(raw[0].weight, corrected[0].weight) and not torch.equal(raw[0].bias, corrected[0].bias)
    x = torch.cat(data)
    shift = [float((model(x) - task.model(x)).mean(0).detach().abs().max()) for model in (raw, corrected)]
    assert shift[1] < 0.2 * shift[0]
    assert "bias: held-out output error" in texts(events)


def test_equalizing_helps_where_channels_differ_and_rows_share_a_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    spread = torch.logspace(-2, 2, 16)
    with torch.no_grad():
        model[0].weight.mul_(spread[:, None]), model[0].bias.mul_(spread), model[2].weight.div_(spread)
    data = [torch.randn(32, 8) for _ in range(5)]
    task = fw.Task(model, (data[0],), calibration=data)
    options: dict[str, Any] = {"per": "tensor", "activations": "static", "correct": ()}
    x = torch.randn(100, 8)

    def error(method: fw.Quantize) -> float:
        return float((run(method, task)[0](x) - model(x)).detach().norm() / model(x).detach().norm())

    assert error(fw.Quantize(8, equalize=True, **options)) < 0.1 * error(fw.Quantize(8, **options))


def test_smoothing_helps_where_activations_have_outlier_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight[5] = 100.0
        model[1].weight[:, 5] /= 100.0
    data = [torch.randn(32, 16) for _ in range(5)]
    task = fw.Task(model, (data[0],), calibration=data)
    x = torch.randn(100, 16)

    def error(method: fw.Quantize) -> float:
        return float((run(method, task)[0](x) - model(x)).detach().norm() / model(x).detach().norm())

    assert "smooth: 1 norms and layers" in texts(run(fw.Quantize(activations="static", smooth=0.5), task)[2])
    assert error(fw.Quantize(activations="static", smooth=0.5)) < 0.3 * error(fw.Quantize(activations="static"))


def test_scaling_that_does_not_help_is_not_kept() -> None:
    """α = 0 puts all the spread of the columns into the activations, which share one grid of 16 values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    model[1].weight.data[:, 3] *= 100.0
    data = [torch.randn(32, 16) for _ in range(5)]
    task = fw.Task(model, (data[0],), calibration=data)
    method = fw.Quantize(16, activations="static", activation_bits=4)
    plain, _, _ = run(method, task)
    tried, _, events = run(dataclasses.replace(method, smooth=0.0), task)
    assert re.search(r"smooth: 1 norms and layers, .*, not kept", texts(events))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), tried.state_dict().values(), strict=True))


def test_smoothing_reaches_convolutions_behind_a_relu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[0].weight[2] *= 50
        model[2].weight[2] /= 50
    data = [torch.randn(8, 3, 10, 10) for _ in range(5)]
    task = fw.Task(model, (data[0],), calibration=data)
    x = torch.randn(8, 3, 10, 10)
    method = fw.Quantize(activations="static", correct=())

    def error(method: fw.Quantize) -> float:
        return float((run(method, task)[0](x) - model(x)).detach().norm() / model(x).detach().norm())

    assert error(dataclasses.replace(method, smooth=0.5)) < 0.3 * error(method)


def test_scaling_leaves_weights_on_a_grid_alone() -> None:
    torch.manual_seed(0)
    data = [torch.randn(32, 16) for _ in range(5)]
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    on_grid, _, _ = run(fw.Quantize({"2": 4}, **WEIGHTS_ONLY), fw.Task(model, (data[0],), calibration=data))
    task = fw.Task(on_grid, (data[0],), calibration=data)
    done, _, events = run(fw.Quantize(8, equalize=True), task)
    assert torch.equal(done[2].weight, on_grid[2].weight)
    assert "0 (2 keeps its grid), 2 (2 keeps its grid)" in texts(events)


def quantize_and_reload(kind: str, method: fw.Quantize, folder: Path) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    data = [inputs(8) for _ in range(4)]
    task = fw.Task(make().eval(), inputs(2), calibration=data, forward=lambda model, batch: model(*batch))
    model, plan, _ = run(method, task)
    fw.save(model, plan, folder)
    again = fw.load(make(), folder).eval()
    x = inputs(3)
    assert torch.equal(again(*x), model(*x))
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "method",
    [
        fw.Quantize(8, activations="static", equalize=True, smooth=0.5),
        fw.Quantize(4, symmetric=False, activations="dynamic", activation_bits=4),
        fw.Quantize("bf16"),
    ],
    ids=["static", "dynamic", "bf16"],
)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_loads_to_the_last_bit(kind: str, method: fw.Quantize, tmp_path: Path) -> None:
    quantize_and_reload(kind, method, tmp_path / "run")


# Data that is no good, and models that do not fit.


def failing(make: Callable[[], Any], task: fw.Task, error: type[FeatherweightError], message: str) -> None:
    model = copy.deepcopy(task.model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        make()(model, task, fw.Stage())
    assert snapshot(model) == before


def linear(calibration: Any) -> fw.Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    return fw.Task(model, (torch.zeros(2, 4),), calibration=calibration)


def static() -> fw.Quantize:
    return fw.Quantize(activations="static", equalize=True)


def test_missing_and_empty_data_are_refused() -> None:
    failing(static, linear(None), DataError, "the task has none")
    failing(static, linear([]), DataError, "Task.calibration is empty")


@pytest.mark.parametrize(("number", "bad"), [(0, math.nan), (2, math.inf), (4, math.nan)])
def test_activations_that_are_not_finite_name_layer_and_batch(number: int, bad: float) -> None:
    data = [torch.randn(4, 4) for _ in range(5)]
    data[number][2, 3] = bad
    method = lambda: fw.Quantize(activations="static", held_out=0.5)  # noqa: E731  # batches 1 and 3
    failing(method, linear(data), NumericalError, f"0 reads NaN or infinity in batch {number} of the calibration data")


def test_weights_that_are_not_finite_are_named() -> None:
    task = linear([torch.randn(4, 4)] * 3)
    task.model[3].weight.data[0, 0] = math.nan
    failing(lambda: fw.Quantize(8), task, NumericalError, r"3\.weight holds NaN or infinity")


def test_one_sample_gives_ranges_and_no_correction() -> None:
    model, plan, events = run(static(), linear([torch.randn(1, 4)]))
    assert len(plan.formats) == 2 and float(model[0].input_grid.scale) > 0
    assert "Nothing is held out" in texts(events) and "held 1 samples of the 512" in texts(events)


def test_constant_activations_have_a_grid_and_are_told() -> None:
    model, _, events = run(static(), linear([torch.full((4, 4), 2.0) for _ in range(3)]))
    assert "1 layer read one same value throughout the calibration data: 0." in texts(events)
    assert torch.allclose(model[0].input_grid(torch.tensor([2.0])), torch.tensor([2.0]))
    zeros, _, _ = run(static(), linear([torch.zeros(4, 4) for _ in range(3)]))
    assert float(zeros[0].input_grid.scale) == 1.0


def test_a_layer_that_no_sample_reaches_has_no_grid() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    task = fw.Task(Two(), (torch.zeros(1, 4),), calibration=[torch.randn(4, 4)] * 3)
    model, plan, events = run(fw.Quantize(activations="static"), task)
    assert [edit.layer for edit in plan.edits if isinstance(edit, fw.FakeQuant)] == ["used"]
    assert not hasattr(model.unused, "input_grid") and read_grid(model.unused.weight) is not None
    assert "no calibration sample reached them: unused" in texts(events)


def test_rules_and_globs_say_what_stays_dense() -> None:
    torch.manual_seed(0)
    make, inputs = MODELS["residual"]
    data = [inputs(8) for _ in range(3)]
    task = fw.Task(make().eval(), inputs(2), calibration=data, forward=lambda model, batch: model(*batch))
    model, plan, _ = run(fw.Quantize(activations="static", dense=["first", "output"], keep=["b"]), task)
    assert set(plan.formats) == {"a.weight"}
    assert [m for m in model.modules() if isinstance(m, FakeQuantize)] == [model.a.input_grid]
    assert type(model.norm) is nn.BatchNorm2d  # the layer before it stays as it is
    with pytest.raises(NothingToCompress, match=r"stem_.*Nearest names: stem"):
        fw.Quantize(layers=["stem_"])(copy.deepcopy(task.model), task, fw.Stage())


def test_a_layer_that_has_a_grid_keeps_it() -> None:
    task = linear([torch.randn(8, 4) for _ in range(3)])
    first, _, _ = run(static(), task)
    again, plan, _ = run(static(), fw.Task(first, task.example_inputs, calibration=[torch.randn(8, 4) * 9] * 3))
    assert plan.edits == ()
    assert torch.equal(again[0].input_grid.scale, first[0].input_grid.scale)
    assert torch.equal(again[0].weight, first[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits is a whole number from 1 to 16, 'fp16' or 'bf16'; got 0"),
        ({"bits": 17}, "got 17"),
        ({"bits": True}, "got True"),
        ({"bits": "fp8"}, "got 'fp8'"),
        ({"bits": {}}, "bits is an empty mapping"),
        ({"bits": {"fc": 0}}, "bits of 'fc' is a whole number"),
        ({"bits": "fp16", "activations": "static"}, "integer runtimes do not take"),
        ({"bits": "fp16", "chunk": 4}, "has no scales"),
        ({"per": "channel"}, "per 'channel' is none of row, tensor"),
        ({"per": "tensor", "chunk": 4}, "give one"),
        ({"chunk": 0}, "chunk must be a whole number from 1"),
        ({"search": "kl"}, "search 'kl' is none of"),
        ({"observer": "kl"}, "observer 'kl' is none of minmax, percentile, mse"),
        ({"activations": "int8"}, "activations 'int8' is none of static, dynamic"),
        ({"activation_bits": 1}, "activation_bits must be 2 to 16; got 1"),
        ({"percentile": 50}, "percentile must be above 50"),
        ({"smooth": 1.5}, "smooth is SmoothQuant's alpha"),
        ({"held_out": 1.0}, "held_out is the share"),
        ({"samples": 0}, "samples must be a whole number from 1"),
        ({"dense": ("last",)}, "dense 'last' is none of"),
        ({"correct": ("biases",)}, "correct 'biases' is none of"),
        ({"layers": "fc"}, r"layers is a list of strings"),
    ],
)
def test_options_are_checked_when_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message) if "[" not in message else message):
        fw.Quantize(**options)


def test_a_grid_that_stays_has_no_negative_zeros_which_no_integer_is() -> None:
    task = linear([torch.randn(4, 4)] * 3)
    values = torch.tensor([[0.5, -0.0, 1.0, -1.5], [-0.0, 0.25, 0.5, 1.75]])
    task.model[3].weight.data.copy_(values)
    model, _, _ = run(fw.Quantize(8, **WEIGHTS_ONLY), task)
    assert torch.equal(model[3].weight, values)
    assert not bool(torch.signbit(model[3].weight[values == 0]).any())
    assert not bool(torch.signbit(run(fw.Quantize(2, **WEIGHTS_ONLY), task)[0][0].weight.eq(0).float()).any())


def test_a_recipe_takes_the_same_options(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[[stages]]\nmethod = "quantize"\nbits = { "*" = 8, "3" = 4 }\nactivations = "static"\nobserver = "mse"\n'
        'smooth = 0.5\ndense = ["first"]\n'
    )
    [method] = fw.load_recipe(path).stages
    assert method == fw.Quantize({"*": 8, "3": 4}, activations="static", observer="mse", smooth=0.5, dense=("first",))
    result = fw.compress(linear([torch.randn(8, 4) for _ in range(4)]), path, tmp_path / "out", progress=False)
    assert sorted(hint.split(":")[1] for hint in result.plan.formats.values()) == ["4", "8"]
    again = fw.load(linear(None).model, tmp_path / "out")
    assert torch.equal(again[3].weight, result.model[3].weight)
