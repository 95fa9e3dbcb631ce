# SPDX-License-Identifier: Apache-2.0
"""Oracles: the torch model, its weights to the last bit, ONNX's reference evaluator, and the runtimes' optimised graphs."""

from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from featherweight.deploy import (
    agreement,
    agreement_by_node,
    available_runtimes,
    calibration_inputs,
    check_parity,
    export_onnx,
    form_in,
    is_quantized,
    parity,
    session,
    without_integers,
)
from featherweight.deploy.ranges import record_ranges
from featherweight.errors import DataError, NumericalError
from featherweight.task import Task
from tests.deploy.quantized import Block, Words, on_grid, quantized
from tests.deploy.zoo import Recurrent

torch.manual_seed(0)
IMAGES = torch.randn(4, 3, 17, 17)
IDS = torch.randint(0, 40, (3, 6))


@pytest.fixture(scope="module")
def block(tmp_path_factory) -> tuple[nn.Module, Path, object]:
    """All that integer convs meet, with grids between layers too."""
    torch.manual_seed(0)
    model = quantized(Block(), (IMAGES,))
    made = export_onnx(model, (IMAGES,), tmp_path_factory.mktemp("block") / "model.onnx", calibration=[IMAGES])
    return model, made.path, made


def constants(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def nodes(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(str(path)).graph.node)


def kinds(path: Path) -> set[str]:
    return {node.op_type for node in nodes(path)}


def test_weights_are_int8_and_stand_for_the_models_own_to_the_last_bit(block) -> None:
    model, path, made = block
    held = constants(path)
    for name in ("stem", "a", "b", "depth", "side", "mix"):
        weight = model.get_submodule(name).weight.detach().numpy()
        q, scale = held[f"{name}.weight_q"], held[f"{name}.weight_scale"]
        assert q.dtype == np.int8 and scale.shape == weight.shape[:1]
        assert np.array_equal(q.astype(np.float32) * scale.reshape(-1, 1, 1, 1), weight), name
        assert np.array_equal(q == 0, weight == 0)
    assert (made.integers.int8, made.integers.inputs, made.integers.int4) == (
        7,
        6,
        0,
    )  # two layers read one rounded value
    assert made.bytes < 3 * sum(p.numel() for p in model.parameters()) + 12_000
    onnx.checker.check_model(str(path), full_check=True)


def test_every_layer_runs_in_integers_in_both_runtimes(block) -> None:
    form = form_in(block[1], "onnxruntime")
    assert form.floating == () and sum(form.integer.values()) == 7
    assert form.integer["QLinearConv"] == 6
    form = form_in(block[1], "openvino")
    assert form.floating == () and sum(form.integer.values()) == 7


def test_concatenation_and_pooling_share_the_grid_of_what_they_read(block) -> None:
    path = block[1]
    held, graph = constants(path), nodes(path)
    maker = {output: node for node in graph for output in node.output}
    reader = {name: node for node in graph for name in node.input}

    def grid(node: onnx.NodeProto) -> tuple[float, int]:
        assert node.op_type in ("QuantizeLinear", "DequantizeLinear"), node.op_type
        return float(held[node.input[1]]), int(held[node.input[2]])

    pool = next(node for node in graph if node.op_type == "MaxPool")
    assert grid(maker[pool.input[0]]) == grid(reader[pool.output[0]])
    # What comes through a Relu keeps a grid from 0 on, or ONNX Runtime would compute its conv in floating point.
    joined = next(node for node in graph if node.op_type == "Concat")
    outer = grid(reader[joined.output[0]])
    assert [grid(maker[name]) == outer for name in joined.input] == [False, True]
    assert grid(maker[joined.input[0]])[1] == 0
    total = next(node for node in graph if node.op_type == "Add")
    assert all(maker[name].op_type == "DequantizeLinear" for name in total.input)


def test_answers_agree_with_the_model_and_with_the_integer_reference(block, tmp_path) -> None:
    model, path, _ = block
    more = torch.randn(2, 3, 17, 17)
    checked = check_parity(model, path, [(IMAGES,), (more,)])
    assert checked.steps is not None and checked.steps < 1 and "steps of an 8-bit grid" in checked.words
    for runtime in agreement(path, [(IMAGES,), (more,)]):
        assert runtime.within == 1.0, runtime.words
    rows = agreement_by_node(path, (more,), tmp_path)
    assert len(rows) >= 10
    for row in rows:
        assert row.largest <= 1 and row.exact > 0.99, row


def test_the_definition_is_onnxs_own(block) -> None:
    """ONNX's reference evaluator computes the file in floating point, node by node."""
    _, path, _ = block
    [want] = onnx.reference.ReferenceEvaluator(str(path)).run(None, {"x": IMAGES[:1].numpy()})
    [got] = agreement(path, [(IMAGES[:1],)], ["onnxruntime"])
    assert got.within == 1.0
    answer = session(path)(IMAGES[:1]).numpy()
    step = (max(want.max(), 0) - min(want.min(), 0)) / 255
    assert np.abs(answer - want).max() <= step


def test_what_is_outside_the_calibrated_range_saturates_as_in_the_reference(block) -> None:
    model, path, _ = block
    far = 50 * IMAGES
    [runtime] = agreement(path, [(far,)], ["onnxruntime"])
    assert runtime.saturated > 0.2 and runtime.within == 1.0 and "saturate" in runtime.words
    farther = 5000 * IMAGES  # beyond the range it is all the same
    torch.testing.assert_close(session(path)(torch.sign(IMAGES) * 1e6), session(path)(torch.sign(IMAGES) * 1e7))
    assert parity(model, path, [(farther,)]).steps is not None


def test_any_batch_is_taken(block) -> None:
    _, path, made = block
    assert made.dynamic_batch
    for rows in (1, 3, 7):
        x = torch.randn(rows, 3, 17, 17)
        assert session(path)(x).shape == (rows, 5)


def test_the_same_network_in_float32_has_no_grids(block, tmp_path) -> None:
    model, path, _ = block
    without_integers(path, tmp_path / "float.onnx")
    assert is_quantized(path) and not is_quantized(tmp_path / "float.onnx")
    bare = Block().eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "input_grid" not in k})
    torch.testing.assert_close(session(tmp_path / "float.onnx")(IMAGES), bare(IMAGES).detach(), rtol=1e-4, atol=1e-5)


def test_without_calibration_only_layers_inputs_have_grids_and_a_note_says_so(tmp_path) -> None:
    model = quantized(Block(), (IMAGES,))
    made = export_onnx(model, (IMAGES,), tmp_path / "model.onnx")
    assert made.integers.edges == 0 and "Give calibration" in made.notes[0]
    assert check_parity(model, made.path, [(IMAGES,)]).within_one_step == 1.0


@pytest.mark.parametrize(
    ("calibration", "error", "words"),
    [
        ([], DataError, "calibration is empty: it yielded no batch"),
        ([("text", 1)], DataError, r"tuple\(str, int\), and the model takes 1 tensors"),
        ([torch.full((1, 3, 17, 17), torch.nan)], NumericalError, "NaN or infinite on batch 0"),
        ([torch.full((1, 3, 17, 17), 1e30)], NumericalError, "doubled is NaN or infinite on batch 0"),
    ],
)
def test_calibration_that_gives_no_range_is_refused(calibration, error, words, tmp_path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["squared"]),
        helper.make_node("Add", ["squared", "squared"], ["doubled"]),
    ]
    shape = [None, 3, 17, 17]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "doubled")]
    graph = helper.make_graph(nodes, "squares", values[:1], values[1:])
    path = tmp_path / "squares.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    with pytest.raises(error, match=words):
        record_ranges(path, ["doubled"], calibration, tmp_path)
    found = record_ranges(path, ["doubled"], [IMAGES, (3 * IMAGES, "label")], tmp_path)
    assert found["doubled"] == (0.0, pytest.approx(18 * float(IMAGES.square().max())))


def test_a_failed_calibration_leaves_nothing(tmp_path) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), (x,))
    with pytest.raises(DataError, match="calibration is empty"):
        export_onnx(model, (x,), tmp_path / "model.onnx", calibration=[])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sample", [IMAGES[:1], torch.zeros(1, 3, 17, 17)], ids=["one sample", "constant zero"])
def test_one_sample_and_constant_activations_give_a_file_that_runs(sample: Tensor, tmp_path) -> None:
    model = Block()
    if not sample.any():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
    model = quantized(model, (sample,))
    made = export_onnx(model, (sample,), tmp_path / "model.onnx", calibration=[(sample, torch.tensor([1]))])
    assert made.integers.edges > 0
    torch.testing.assert_close(session(made.path)(sample), model(sample).detach(), rtol=0.05, atol=0.02)


def test_a_vocabulary_is_picked_as_integers_and_tied_weights_stay_exact(tmp_path) -> None:
    model = quantized(Words(), (IDS,), activations=None)
    made = export_onnx(model, (IDS,), tmp_path / "model.onnx")
    held = constants(made.path)
    assert made.integers.int8 == 3 and not any(
        array.dtype == np.float32 and array.ndim > 1 and array.shape[1] > 1 for array in held.values()
    )
    assert parity(model, made.path, [(IDS,)]).max_rel_diff < 1e-5
    for runtime in ("onnxruntime", "openvino"):
        torch.testing.assert_close(
            session(made.path, runtime, exact=True)(IDS), model(IDS).detach(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("chunk", "blocks"), [(None, False), (32, True)])
def test_four_bits_are_int4_at_opset_21_with_blocks_where_rows_have_several_scales(chunk, blocks, tmp_path) -> None:
    model = quantized(
        nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 6)),
        (torch.randn(2, 3, 64),),
        bits=4,
        activations=None,
    )
    if chunk:
        with torch.no_grad():
            model[0].weight.copy_(on_grid(torch.randn(48, 64), 4, chunk))
    x = torch.randn(2, 3, 64)
    made = export_onnx(model, (x,), tmp_path / "model.onnx")
    assert (made.opset, made.integers.int4, made.integers.int8) == (21, 2, 0)
    graph = onnx.load(str(made.path)).graph
    packed = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(packed) == 2 and sum(len(t.raw_data) for t in packed) == (48 * 64 + 48 * 6) // 2
    sizes = [a.i for n in graph.node for a in n.attribute if a.name == "block_size"]
    assert sizes == ([32] if blocks else [])
    for runtime in ("onnxruntime", "openvino"):
        torch.testing.assert_close(session(made.path, runtime, exact=True)(x), model(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 24)], ids=["MatMul", "Gemm"])
def test_dynamic_grids_are_integer_products_of_each_calls_own_range(shape, tmp_path) -> None:
    x = torch.randn(shape)
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 6))
    model = quantized(net, (x,), activations="dynamic")
    made = export_onnx(model, (x,), tmp_path / "model.onnx")
    assert made.integers.dynamic == 2
    assert "DynamicQuantizeLinear" in kinds(made.path)
    assert form_in(made.path, "onnxruntime").integer == {"DynamicQuantizeMatMul": 2}
    for scale in (0.01, 1.0, 300.0):  # no range was fixed
        assert check_parity(model, made.path, [(scale * x,)]).within_one_step == 1.0
    [runtime] = agreement(made.path, [(x,)], ["onnxruntime"])
    assert runtime.within == 1.0
    without_integers(made.path, tmp_path / "float.onnx")
    bare = nn.Sequential(*(type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in net))
    bare.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(session(tmp_path / "float.onnx")(x), bare(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_recurrent_network_keeps_int8_in_the_file_and_says_what_computes_in_floats(tmp_path) -> None:
    """Wide enough that the exporter leaves the slicing of gates to the graph."""
    x = torch.randn(2, 3, 40)
    model = quantized(Recurrent(nn.LSTM(40, 280, batch_first=True)), (x,))
    made = export_onnx(model, (x,), tmp_path / "model.onnx")
    assert made.integers.int8 == 3
    assert "Weights are integers in the file, and floats to every runtime: LSTM" in " ".join(made.notes)
    assert made.bytes < 1.3 * sum(p.numel() for p in model.parameters())
    assert check_parity(model, made.path, [(x,)]).within_one_step == 1.0


@pytest.mark.parametrize("activations", [None, "static", "dynamic"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(24, 32, batch_first=True),
        nn.GRU(24, 32, batch_first=True),
        nn.LSTM(24, 16, num_layers=2, batch_first=True, bidirectional=True),
    ],
    ids=["LSTM", "GRU", "bi-LSTM"],
)
def test_recurrent_layers_run_in_every_runtime_whatever_grids_their_inputs_have(layer, activations, tmp_path) -> None:
    """Beside a static grid OpenVINO folds no dequantized int8, and takes no recurrent weights but constants."""
    x = torch.randn(2, 5, 24)
    model = quantized(Recurrent(layer), (x,), activations=activations)
    made = export_onnx(model, (x,), tmp_path / "model.onnx", calibration=[x])
    stored = [array for array in constants(made.path).values() if array.dtype == np.int8 and array.ndim > 1]
    assert sum(array.size for array in stored) >= sum(p.numel() for n, p in model.named_parameters() if "weight_" in n)
    assert check_parity(model, made.path, [(x,)]).passed
    for runtime in available_runtimes():
        answer = session(made.path, runtime, exact=True)(x)
        # A dynamic grid is each runtime's own: what it rounds differs by its last bit, and so may a step.
        within = 2e-2 if activations == "dynamic" else 1e-5
        torch.testing.assert_close(answer, model(x).detach(), rtol=1e-4, atol=within)
    without_integers(made.path, tmp_path / "float.onnx")
    assert not is_quantized(tmp_path / "float.onnx")
    assert not any(array.dtype == np.int8 for array in constants(tmp_path / "float.onnx").values())


def test_recurrent_weights_with_zero_points_are_exact_in_every_runtime(tmp_path) -> None:
    x = torch.randn(2, 5, 24)
    model = quantized(Recurrent(nn.LSTM(24, 32, batch_first=True)), (x,))
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            weight = getattr(model.layer, name)
            q = torch.randint(0, 256, weight.shape)
            q[:, :2] = torch.tensor([0, 255])
            scale = 1e-3 * (1 + torch.rand(len(q), 1))
            weight.copy_((q - torch.randint(10, 60, (len(q), 1))) * scale)
    made = export_onnx(model, (x,), tmp_path / "model.onnx")
    zeros = [array for name, array in constants(made.path).items() if "_zero_point" in name and array.ndim == 2]
    assert made.integers.int8 == 3 and len(zeros) == 2
    for runtime in available_runtimes():
        torch.testing.assert_close(session(made.path, runtime)(x), model(x).detach(), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """A recurrent cell called at each step, and a convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
        self.cell = nn.LSTMCell(16, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(torch.relu(self.mix(x)))
        state = (x.new_zeros(len(x), 24), x.new_zeros(len(x), 24))
        for step in range(x.shape[-1]):
            state = self.cell(x[..., step], state)
        return self.head(state[0])


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_weight_that_is_used_twice_is_stored_once(calibrated, tmp_path) -> None:
    x = torch.randn(2, 16, 5)
    model = quantized(Twice(), (x,))
    made = export_onnx(model, (x,), tmp_path / "model.onnx", calibration=[x] if calibrated else None)
    held = [array for name, array in constants(made.path).items() if array.dtype == np.int8 and array.ndim > 1]
    assert sum(array.size for array in held) == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert made.integers.int8 == 4
    assert check_parity(model, made.path, [(x,)]).passed


def test_a_norm_that_the_exporter_folds_leaves_the_models_integers(tmp_path) -> None:
    x = torch.randn(3, 4, 9, 9)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net[1].running_var.uniform_(0.3, 3)
    net[1].running_mean.normal_()
    with torch.no_grad():
        net[1].weight.uniform_(-2, 2)  # a row that is turned over
    model = quantized(net, (x,))
    made = export_onnx(model, (x,), tmp_path / "model.onnx", calibration=[x])
    assert made.integers.int8 == 1 and "BatchNormalization" not in kinds(made.path)
    q = constants(made.path)["0.weight_q"].astype(np.float64)
    weight = model[0].weight.detach().double().numpy()
    steps = np.abs(weight).reshape(8, -1).max(1).reshape(-1, 1, 1, 1) / 127
    turned = np.sign(net[1].weight.detach().numpy()).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(q * turned, weight / steps, atol=1e-4)


def test_a_transposed_conv_and_narrow_grids_agree_with_the_model(tmp_path) -> None:
    x = torch.randn(2, 6, 5, 5)
    model = quantized(nn.Sequential(nn.ConvTranspose2d(6, 8, 3, stride=2), nn.Conv2d(8, 4, 3)), (x,), activation_bits=5)
    made = export_onnx(model, (x,), tmp_path / "model.onnx", calibration=[x])
    assert "Clip" in kinds(made.path)  # 5 bits saturate before 8 do
    assert check_parity(model, made.path, [(x,), (3 * x,)]).passed
    held = constants(made.path)
    weight = model[0].weight.detach().numpy()
    assert np.array_equal(held["0.weight_q"].astype(np.float32) * held["0.weight_scale"].reshape(1, -1, 1, 1), weight)


def test_a_pad_with_zeros_before_a_conv_becomes_the_convs_own(tmp_path) -> None:
    """Uneven, as networks that came from TensorFlow have it."""
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(
        nn.ZeroPad2d((0, 1, 2, 3)), nn.Conv2d(3, 4, 3, padding=1), nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 4, 3)
    )
    model = quantized(net, (x,))
    made = export_onnx(model, (x,), tmp_path / "model.onnx", calibration=[x])
    graph = nodes(made.path)
    pads = [list(a.ints) for node in graph if node.op_type == "Conv" for a in node.attribute if a.name == "pads"]
    assert pads == [[3, 1, 4, 2], [0, 0, 0, 0]]
    assert [node.op_type for node in graph].count("Pad") == 1  # 0.5 is not what a conv pads with
    assert check_parity(model, made.path, [(x,)]).steps < 0.5


def test_symmetric_grids_behind_a_relu_are_told_as_slow(tmp_path) -> None:
    model = quantized(Block(), (IMAGES,), symmetric=True)
    made = export_onnx(model, (IMAGES,), tmp_path / "model.onnx", calibration=[IMAGES])
    assert "activation_symmetric=False" in " ".join(made.notes)
    assert form_in(made.path, "onnxruntime").floating  # the note is true
    assert check_parity(model, made.path, [(IMAGES,)]).passed


def test_a_files_error_beyond_a_step_and_beyond_what_its_grids_do_fails_the_check(block, tmp_path) -> None:
    model, path, _ = block
    damaged = onnx.load(str(path))
    table = next(t for t in damaged.graph.initializer if t.name == "mix.weight_q")
    q = numpy_helper.to_array(table).copy()
    q[3] = -q[3]
    table.CopyFrom(numpy_helper.from_array(q, table.name))
    onnx.save(damaged, str(tmp_path / "damaged.onnx"))
    result = parity(model, tmp_path / "damaged.onnx", [(IMAGES,)])
    assert not result.passed and result.largest_steps > 1


def test_a_tasks_batches_are_given_to_the_model_as_the_task_does() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x + y)

    x = torch.arange(8.0).reshape(2, 4)
    batches = [{"image": x, "other": 2 * x, "label": torch.ones(2)}] * 5
    task = Task(TwoInputs(), (x, x), calibration=batches, forward=lambda model, b: model(y=b["other"], x=b["image"]))
    found = list(calibration_inputs(task.model, task, samples=3))
    assert len(found) == 2
    assert torch.equal(found[0][0], x) and torch.equal(found[0][1], 2 * x)
    assert calibration_inputs(task.model, Task(TwoInputs(), (x, x))) is None


def test_calibration_by_keyword_reaches_arguments_behind_one_that_is_left_out(tmp_path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, wide: Tensor, mask: Tensor | None = None, narrow: Tensor | None = None) -> Tensor:
            return self.wide(wide) + self.narrow(narrow)

    wide, narrow = 100 * torch.randn(8, 4), torch.randn(8, 4)
    batches = [{"narrow": narrow, "wide": wide, "label": torch.ones(8)}]
    task = Task(
        Gated(), (wide, None, narrow), calibration=batches, forward=lambda m, b: m(wide=b["wide"], narrow=b["narrow"])
    )
    [found] = calibration_inputs(task.model, task)
    assert torch.equal(found[0], wide) and found[1] is None and torch.equal(found[2], narrow)
    # As they are, such batches go to the file's inputs by name, and not in the order of their keys.
    nodes = [helper.make_node("Identity", ["wide"], ["w"]), helper.make_node("Identity", ["narrow"], ["n"])]
    shaped = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [8, 4])
        for name in ("wide", "narrow", "w", "n")
    }
    graph = helper.make_graph(nodes, "two", [shaped["wide"], shaped["narrow"]], [shaped["w"], shaped["n"]])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "two.onnx"
    )
    ranges = record_ranges(tmp_path / "two.onnx", ["w", "n"], batches, tmp_path)
    assert ranges["w"] == pytest.approx((float(wide.min()), float(wide.max())))
    assert ranges["n"] == pytest.approx((float(narrow.min()), float(narrow.max())))
