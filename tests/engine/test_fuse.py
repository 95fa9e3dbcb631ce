# SPDX-License-Identifier: Apache-2.0
"""What is fused, what must not be, and that answers stay ONNX Runtime's."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

import featherweight_engine as core
from tests.engine.networks import ALL, exported
from tests.engine.nodes import Arrays, check, engine, model, node, onnxruntime

FIRST_SET = core.instruction_sets()[:1]


def array(*dims: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(dims, dtype=np.float32)


def number(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


def fused(made: onnx.ModelProto) -> list[tuple[str, str]]:
    """Ops that are left, each with what went into its end."""
    session = core.Engine(made.SerializeToString())
    return [(op, finish) for (_, op, *_), finish in zip(session.nodes, session.finishes, strict=True)]


def expect(
    nodes: Sequence[onnx.NodeProto],
    left: Sequence[tuple[str, str]],
    x: NDArray[np.float32],
    constants: Arrays | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
    **more: NDArray[Any],
) -> None:
    made = model(nodes, {"x": x, **more}, outputs, constants, opset)
    assert fused(made) == list(left)
    check(made, {"x": x, **more}, instruction_sets=FIRST_SET)


X = array(2, 6, 9, 10)
CONV: dict[str, NDArray[Any]] = {"w": array(6, 6, 3, 3, seed=1) * 0.2, "b": array(6, seed=2)}
NORM: dict[str, NDArray[Any]] = {
    "s": array(6, seed=3),
    "c": array(6, seed=4),
    "m": array(6, seed=5),
    "v": np.abs(array(6, seed=6)) + 0.1,
}


def conv(output: str = "y", x: str = "x", bias: bool = True, **attributes: Any) -> onnx.NodeProto:
    return node("Conv", [x, "w", "b"] if bias else [x, "w"], outputs=[output], pads=[1] * 4, **attributes)


def batch_norm(x: str, output: str = "y") -> onnx.NodeProto:
    return node("BatchNormalization", [x, "s", "c", "m", "v"], outputs=[output], epsilon=1e-3)


# ---- into weights


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_goes_into_a_conv(bias: bool) -> None:
    expect([conv("t", bias=bias), batch_norm("t")], [("Conv", "")], X, CONV | NORM)


def test_batch_norm_goes_into_a_grouped_conv() -> None:
    constants = {"w": array(6, 2, 3, 3, seed=1), "b": CONV["b"]} | NORM
    expect([conv("t", group=3), batch_norm("t")], [("Conv", "")], X, constants)


@pytest.mark.parametrize("turned", [0, 1])
def test_batch_norm_goes_into_a_gemm(turned: int) -> None:
    x = array(4, 5)
    weights = array(6, 5, seed=1) if turned else array(5, 6, seed=1)
    gemm = node("Gemm", ["x", "w", "b"], outputs=["t"], transB=turned, alpha=0.5, beta=2.0)
    expect([gemm, batch_norm("t")], [("Gemm", "")], x, {"w": weights, "b": CONV["b"]} | NORM)


def test_batch_norm_of_channels_far_from_one_is_exact() -> None:
    """Folded in float32 step by step, this would lose what double keeps."""
    constants = CONV | {
        "s": np.full(6, 1e-3, np.float32),
        "v": np.full(6, 1e4, np.float32),
        "m": np.full(6, 3e3, np.float32),
        "c": NORM["c"],
    }
    expect([conv("t"), batch_norm("t")], [("Conv", "")], X, constants)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1, 1), (1, 6, 1, 1), (1, 1, 1)])
def test_arithmetic_by_channel_goes_into_a_conv(op: str, shape: tuple[int, ...]) -> None:
    constants = CONV | {"k": np.abs(array(*shape, seed=7)).astype(np.float32) + 0.5}
    expect([conv("t"), node(op, ["t", "k"])], [("Conv", "")], X, constants)
    if op in ("Add", "Mul"):
        expect([conv("t"), node(op, ["k", "t"])], [("Conv", "")], X, constants)


@pytest.mark.parametrize("shape", [(10,), (9, 1), (6, 9, 10), (2, 6, 1, 1), (1, 1, 6, 1, 1)])
def test_other_constants_stay_arithmetic(shape: tuple[int, ...]) -> None:
    assert [
        op for op, _ in fused(model([conv("t"), node("Mul", ["t", "k"])], {"x": X}, ["y"], CONV | {"k": array(*shape)}))
    ] == ["Conv", "Mul"]
    constants = CONV | {"k": array(*shape)}
    if len(shape) < 5:
        check(
            model([conv("t"), node("Mul", ["t", "k"])], {"x": X}, ["y"], constants),
            {"x": X},
            instruction_sets=FIRST_SET,
        )


def test_a_number_less_a_conv_stays() -> None:
    constants = CONV | {"k": number(2)}
    expect([conv("t"), node("Sub", ["k", "t"])], [("Conv", ""), ("Sub", "")], X, constants)
    assert fused(model([conv("t"), node("Div", ["k", "t"])], {"x": X}, ["y"], constants)) == [("Conv", ""), ("Div", "")]


def test_a_division_by_zero_is_not_folded_into_weights_of_which_some_are_zero() -> None:
    """Zero times infinity is none of the channel's answers."""
    constants = CONV | {"k": np.array([1, 2, 0, 4, 5, 6], np.float32).reshape(6, 1, 1)}
    constants["w"] = np.where(np.arange(6)[:, None, None] == 0, np.float32(0), CONV["w"])
    made = model([conv("t"), node("Div", ["t", "k"])], {"x": X}, ["y"], constants)
    assert fused(made) == [("Conv", ""), ("Div", "")]
    expected = onnxruntime(made, {"x": X})["y"]
    np.testing.assert_allclose(engine(made, {"x": X})["y"], expected, rtol=1e-5, atol=1e-5)
    assert np.isinf(expected[:, 2]).all() and np.isfinite(expected[:, 3]).all()


def test_bias_goes_into_a_matmul() -> None:
    x, constants = array(2, 5, 8), {"w": array(8, 6, seed=1), "b": array(6, seed=2)}
    matmul = node("MatMul", ["x", "w"], outputs=["t"])
    expect([matmul, node("Add", ["t", "b"])], [("MatMul", "")], x, constants)
    expect([matmul, node("Add", ["b", "t"])], [("MatMul", "")], x, constants)
    expect([matmul, node("Add", ["t", "b"])], [("MatMul", ""), ("Add", "")], x, constants | {"b": array(5, 1)})


def test_what_is_read_elsewhere_is_not_changed() -> None:
    """The conv's own result is an output of the graph, or has a second reader."""
    expect([conv("t"), batch_norm("t")], [("Conv", ""), ("BatchNormalization", "")], X, CONV | NORM, ["y", "t"])
    nodes = [conv("t"), batch_norm("t", "u"), node("Sub", ["u", "t"])]
    assert [op for op, _ in fused(model(nodes, {"x": X}, ["y"], CONV | NORM))] == ["Conv", "BatchNormalization", "Sub"]
    check(model(nodes, {"x": X}, ["y"], CONV | NORM), {"x": X}, instruction_sets=FIRST_SET)


def test_a_batch_norm_with_statistics_that_are_inputs_stays() -> None:
    constants = CONV | {name: NORM[name] for name in ("s", "c", "v")}
    made = model([conv("t"), batch_norm("t")], {"x": X, "m": NORM["m"]}, ["y"], constants)
    assert [op for op, _ in fused(made)] == ["Conv", "BatchNormalization"]


def test_weights_that_two_convs_share_are_scaled_for_one() -> None:
    nodes = [conv("t"), batch_norm("t", "u"), conv("y", "u")]
    expect(nodes, [("Conv", ""), ("Conv", "")], X, CONV | NORM)


def test_zeros_stay_zeros() -> None:
    weights = CONV["w"] * (np.random.default_rng(9).random(CONV["w"].shape) < 0.1)
    made = model([conv("t"), batch_norm("t")], {"x": X}, ["y"], CONV | {"w": weights} | NORM)
    flops = {"fused": 0.0, "plain": 0.0}
    alone = model([conv("y")], {"x": X}, ["y"], CONV | {"w": weights})
    for key, each in (("fused", made), ("plain", alone)):
        flops[key] = sum(step["flops"] for step in core.Engine(each.SerializeToString()).profile([X]))
    assert flops["fused"] == flops["plain"]


# ---- activations

ACTIVATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("Relu", {}, "relu"),
    ("Sigmoid", {}, "sigmoid"),
    ("Tanh", {}, "tanh"),
    ("LeakyRelu", {"alpha": 0.2}, "leaky_relu"),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, "hard_sigmoid"),
    ("HardSwish", {}, "hard_swish"),
    ("Gelu", {}, "gelu"),
    ("Gelu", {"approximate": "tanh"}, "gelu_tanh"),
]


@pytest.mark.parametrize(("op", "attributes", "name"), ACTIVATIONS)
def test_activations_go_into_a_conv(op: str, attributes: dict[str, Any], name: str) -> None:
    expect([conv("t"), node(op, ["t"], **attributes)], [("Conv", name)], X, CONV)


@pytest.mark.parametrize("host", ["Gemm", "MatMul", "Add", "BatchNormalization"])
def test_hosts_of_an_activation(host: str) -> None:
    relu = node("Relu", ["t"])
    x = array(4, 6)
    if host == "BatchNormalization":
        expect([batch_norm("x", "t"), relu], [(host, "relu")], X, NORM)
    elif host == "Add":
        expect([node("Add", ["x", "z"], outputs=["t"]), relu], [(host, "relu")], x, z=array(4, 6, seed=1))
    else:
        expect([node(host, ["x", "w"], outputs=["t"]), relu], [(host, "relu")], x, {"w": array(6, 5)})


def test_clip_with_bounds_of_either_kind() -> None:
    bounds = {"low": number(-0.2), "high": number(0.7)}
    expect([conv("t"), node("Clip", ["t", "low", "high"])], [("Conv", "clip")], X, CONV | bounds)
    expect([conv("t"), node("Clip", ["t", "", "high"])], [("Conv", "clip")], X, CONV | bounds)
    expect([conv("t"), node("Clip", ["t", "low"])], [("Conv", "clip")], X, CONV | bounds)
    expect([conv("t"), node("Clip", ["t"], min=-0.2, max=0.7)], [("Conv", "clip")], X, CONV, opset=9)
    nodes = [conv("t"), node("Clip", ["t", "low", "x2"])]
    made = model(nodes, {"x": X, "x2": np.array(0.5, np.float32)}, ["y"], CONV | {"low": bounds["low"]})
    assert [op for op, _ in fused(made)] == ["Conv", "Clip"]


def test_clip_of_integers_stays_by_itself() -> None:
    x = np.arange(6, dtype=np.int64)
    nodes = [node("Add", ["x", "one"], outputs=["t"]), node("Clip", ["t", "low", "high"])]
    constants = {"one": np.array(1), "low": np.array(2), "high": np.array(4)}
    made = model(nodes, {"x": x}, ["y"], constants)
    assert fused(made) == [("Add", ""), ("Clip", "")]
    check(made, {"x": x}, instruction_sets=FIRST_SET)


def test_an_activation_of_what_is_an_output_stays() -> None:
    expect([conv("t"), node("Relu", ["t"])], [("Conv", ""), ("Relu", "")], X, CONV, ["y", "t"])


def test_one_activation_is_fused_and_the_next_stays() -> None:
    expect(
        [conv("t"), node("Relu", ["t"], outputs=["u"]), node("Tanh", ["u"])], [("Conv", "relu"), ("Tanh", "")], X, CONV
    )


# ---- residuals


def test_residual_before_an_activation() -> None:
    nodes = [conv("t"), node("Add", ["t", "x"], outputs=["u"]), node("Relu", ["u"])]
    expect(nodes, [("Conv", "+ x, relu")], X, CONV)
    nodes = [conv("t"), node("Add", ["x", "t"], outputs=["u"]), node("Sigmoid", ["u"])]
    expect(nodes, [("Conv", "+ x, sigmoid")], X, CONV)


def test_residual_behind_an_activation_is_the_last() -> None:
    nodes = [conv("t"), node("Relu", ["t"], outputs=["u"]), node("Add", ["u", "x"], outputs=["v"]), node("Relu", ["v"])]
    expect(nodes, [("Conv", "relu, + x"), ("Relu", "")], X, CONV)


def test_the_later_of_two_convs_takes_the_sum_and_runs_when_both_are_there() -> None:
    """The residual is made after the conv that takes it would have run."""
    nodes = [
        conv("t"),
        node("Relu", ["x"], outputs=["r"]),
        conv("u", "r"),
        node("Sigmoid", ["u"], outputs=["s"]),
        node("MaxPool", ["s"], outputs=["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Add", ["t", "p"]),
    ]
    expect(nodes, [("Relu", ""), ("Conv", "sigmoid"), ("MaxPool", ""), ("Conv", "+ p")], X, CONV)
    second = node("Conv", ["x", "w"], outputs=["u"], pads=[1] * 4)
    for inputs in (["t", "u"], ["u", "t"]):
        expect([conv("t"), second, node("Add", inputs)], [("Conv", ""), ("Conv", "+ t")], X, CONV)


def test_a_conv_added_to_itself() -> None:
    expect([conv("t"), node("Add", ["t", "t"])], [("Conv", ""), ("Add", "")], X, CONV)


@pytest.mark.parametrize("dims", [(1, 1, 1, 1), (2, 1, 9, 10), (6, 9, 10), (10,)])
def test_residuals_of_another_shape_stay_sums(dims: tuple[int, ...]) -> None:
    made = model([conv("t"), node("Add", ["t", "z"])], {"x": X, "z": array(*dims)}, ["y"], CONV)
    assert fused(made) == [("Conv", ""), ("Add", "")]
    check(made, {"x": X, "z": array(*dims)}, instruction_sets=FIRST_SET)


def test_a_residual_that_makes_the_result_larger_stays_a_sum() -> None:
    x = array(1, 6, 9, 10)
    made = model([conv("t"), node("Add", ["t", "z"])], {"x": x, "z": X}, ["y"], CONV)
    assert fused(made) == [("Conv", ""), ("Add", "")]
    check(made, {"x": x, "z": X}, instruction_sets=FIRST_SET)


def test_residuals_of_unknown_shape_stay_sums_and_of_equal_names_do_not() -> None:
    made = model([conv("t"), node("Add", ["t", "z"])], {"x": X, "z": X}, ["y"], CONV)
    for i, value in enumerate(made.graph.input):
        value.type.tensor_type.shape.dim[0].dim_param = f"batch{i}"
    assert fused(made) == [("Conv", ""), ("Add", "")]
    for value in made.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    assert fused(made) == [("Conv", "+ z")]
    check(made, {"x": X, "z": X}, instruction_sets=FIRST_SET)


def test_sums_of_integers_are_not_fused() -> None:
    x = np.arange(6, dtype=np.int64).reshape(2, 3)
    made = model([node("Mul", ["x", "x"], outputs=["t"]), node("Add", ["t", "x"])], {"x": x}, ["y"])
    assert fused(made) == [("Mul", ""), ("Add", "")]
    check(made, {"x": x}, instruction_sets=FIRST_SET)


# ---- pieces


def chain(*lines: str) -> list[onnx.NodeProto]:
    """Nodes from lines such as "t = Mul x half"."""
    made = []
    for line in lines:
        output, right = line.split(" = ")
        op, *inputs = right.split()
        made.append(helper.make_node(op, inputs, [output], name=output))
    return made


NUMBERS: dict[str, NDArray[Any]] = {
    "half": number(0.5),
    "one": number(1),
    "two": number(2),
    "three": number(3),
    "six": number(6),
    "zero": number(0),
    "root": number(math.sqrt(2)),
    "inverse": number(math.sqrt(0.5)),
    "pi": number(math.sqrt(2 / math.pi)),
    "cubic": number(0.044715),
    "sixth": number(1 / 6),
    "eps": number(1e-5),
}
GELU = {
    "legacy": ("a = Div x root", "e = Erf a", "p = Add e one", "m = Mul x p", "y = Mul m half"),
    "dynamo": ("a = Div x root", "e = Erf a", "p = Add e one", "h = Mul half p", "y = Mul x h"),
    "half first": ("h = Mul x half", "a = Mul x inverse", "e = Erf a", "p = Add one e", "y = Mul h p"),
    "divided": ("a = Mul inverse x", "e = Erf a", "p = Add e one", "m = Mul p x", "y = Div m two"),
}
TANH = {
    "pow": ("q = Pow x three", "k = Mul q cubic", "s = Add x k", "t = Mul s pi", "g = Tanh t", "p = Add g one", "h = Mul x half", "y = Mul h p"),
    "products": ("q = Mul x x", "r = Mul q x", "k = Mul cubic r", "s = Add k x", "t = Mul pi s", "g = Tanh t", "p = Add one g", "m = Mul x p", "y = Mul half m"),
    "inner": ("q = Mul x x", "k = Mul q cubic", "s = Add k one", "u = Mul x pi", "t = Mul u s", "g = Tanh t", "p = Add g one", "h = Mul half p", "y = Mul x h"),
}  # fmt: skip
OTHERS = {
    "Swish": ("s = Sigmoid x", "y = Mul x s"),
    "swapped Swish": ("s = Sigmoid x", "y = Mul s x"),
    "HardSwish": ("a = Add x three", "c = Clip a zero six", "m = Mul x c", "y = Div m six"),
    "gate first HardSwish": ("a = Add three x", "c = Clip a zero six", "d = Div c six", "y = Mul d x"),
    "sixth HardSwish": ("a = Add x three", "c = Clip a zero six", "m = Mul c sixth", "y = Mul x m"),
    "HardSigmoid": ("a = Add x three", "c = Clip a zero six", "y = Div c six"),
    "Mish": ("s = Softplus x", "t = Tanh s", "y = Mul x t"),
}


@pytest.mark.parametrize("lines", [*GELU.values(), *TANH.values()], ids=[*GELU, *TANH])
def test_gelu_in_pieces(lines: Sequence[str]) -> None:
    expect(chain(*lines), [("Gelu", "")], array(3, 40) * 3, NUMBERS)


@pytest.mark.parametrize("name", OTHERS)
def test_activations_in_pieces(name: str) -> None:
    expect(chain(*OTHERS[name]), [(name.split()[-1], "")], array(3, 40) * 3, NUMBERS)


@pytest.mark.parametrize(
    ("name", "lines"), [("gelu", GELU["dynamo"]), ("silu", OTHERS["Swish"]), ("hard_swish", OTHERS["HardSwish"])]
)
def test_pieces_go_into_a_product(name: str, lines: Sequence[str]) -> None:
    nodes = [node("MatMul", ["z", "w"], outputs=["u"]), node("Add", ["u", "b"], outputs=["x"]), *chain(*lines)]
    constants = NUMBERS | {"w": array(20, 40), "b": array(40)}
    made = model(nodes, {"z": array(3, 20)}, ["y"], constants)
    assert fused(made) == [("MatMul", name)]
    check(made, {"z": array(3, 20)}, instruction_sets=FIRST_SET)


def test_swish_of_another_slope_is_no_silu() -> None:
    lines = ("a = Mul x two", "s = Sigmoid a", "y = Mul x s")
    expect(chain(*lines), [("Swish", "")], array(3, 40), NUMBERS)


NEARLY = {
    "another gate": ("a = Add x one", "s = Sigmoid a", "y = Mul x s"),
    "another constant": ("a = Div x two", "e = Erf a", "p = Add e one", "m = Mul x p", "y = Mul m half"),
    "no half": ("a = Div x root", "e = Erf a", "p = Add e one", "y = Mul x p"),
    "clipped elsewhere": ("a = Add x three", "c = Clip a one six", "m = Mul x c", "y = Div m six"),
}


@pytest.mark.parametrize("lines", NEARLY.values(), ids=NEARLY)
def test_what_is_nearly_an_activation_stays_in_pieces(lines: Sequence[str]) -> None:
    made = model(chain(*lines), {"x": array(3, 40)}, ["y"], NUMBERS)
    assert not {op for op, _ in fused(made)} & {"Gelu", "Swish", "HardSwish", "HardSigmoid"}
    check(made, {"x": array(3, 40)}, instruction_sets=FIRST_SET)


def test_a_constant_that_adds_an_axis_is_no_number() -> None:
    x = np.array(0.3, np.float32)
    made = model(
        chain("s = Sigmoid x", "h = Mul x wide", "y = Mul h s"), {"x": x}, ["y"], {"wide": np.ones((1, 1), np.float32)}
    )
    check(made, {"x": x}, instruction_sets=FIRST_SET)


MEAN = {"axes": np.array([-1])}
LAYER = {
    "torch": ("m = ReduceMean x axes", "d = Sub x m", "q = Pow d two", "v = ReduceMean q axes", "a = Add v eps", "r = Sqrt a", "n = Div d r"),
    "two differences": ("m = ReduceMean x axes", "d = Sub x m", "d2 = Sub x m", "q = Mul d2 d2", "v = ReduceMean q axes", "a = Add eps v", "r = Sqrt a", "n = Div d r"),
    "reciprocal": ("m = ReduceMean x axes", "d = Sub x m", "q = Mul d d", "v = ReduceMean q axes", "a = Add v eps", "r = Sqrt a", "i = Reciprocal r", "n = Mul d i"),
}  # fmt: skip


@pytest.mark.parametrize("lines", LAYER.values(), ids=LAYER)
def test_layer_norm_in_pieces(lines: Sequence[str]) -> None:
    x = array(3, 5, 20) * 2 + 1
    constants = NUMBERS | MEAN | {"g": array(20, seed=1), "b": array(20, seed=2)}
    expect(chain(*lines, "s = Mul n g", "y = Add s b"), [("LayerNormalization", "")], x, constants)
    expect(chain(*lines, "s = Mul g n", "y = Add b s"), [("LayerNormalization", "")], x, constants)
    expect(chain(*lines, "y = Mul n g"), [("LayerNormalization", "")], x, constants)
    expect(chain(*lines, "y = Neg n"), [("LayerNormalization", ""), ("Neg", "")], x, constants)


def test_layer_norm_in_pieces_of_positive_axes() -> None:
    x = array(3, 5, 20)
    constants = NUMBERS | {"axes": np.array([1, 2])}
    expect(chain(*LAYER["torch"], "y = Neg n"), [("LayerNormalization", ""), ("Neg", "")], x, constants)
    made = model(chain(*LAYER["torch"], "y = Neg n"), {"x": x}, ["y"], NUMBERS | {"axes": np.array([1])})
    assert "LayerNormalization" not in {op for op, _ in fused(made)}
    check(made, {"x": x}, instruction_sets=FIRST_SET)


@pytest.mark.parametrize("last", ["n = Div x r", "n = Mul x i"])
def test_rms_norm_in_pieces(last: str) -> None:
    x = array(3, 5, 20)
    lines = [
        "q = Pow x two",
        "v = ReduceMean q axes",
        "a = Add v eps",
        "r = Sqrt a",
        "i = Reciprocal r",
        last,
        "y = Mul g n",
    ]
    expect(chain(*lines), [("RMSNormalization", "")], x, NUMBERS | MEAN | {"g": array(20, seed=1)})


# ---- what passes its input on, and what is dead


def test_identities_go_and_outputs_keep_their_names() -> None:
    nodes = [
        node("Identity", ["x"], outputs=["a"]),
        node("Dropout", ["a"], outputs=["d"]),
        conv("t", "d"),
        node("Identity", ["t"]),
    ]
    made = model(nodes, {"x": X}, ["y"], CONV)
    assert fused(made) == [("Conv", ""), ("Identity", "")]
    check(made, {"x": X}, instruction_sets=FIRST_SET)


def test_an_input_that_is_an_output_too() -> None:
    made = model([node("Identity", ["x"]), node("Relu", ["x"], outputs=["z"])], {"x": X}, ["y", "z"])
    check(made, {"x": X}, instruction_sets=FIRST_SET)


def test_dead_nodes_go() -> None:
    expect([conv("y"), node("Tanh", ["y"], outputs=["t"]), node("Exp", ["t"], outputs=["u"])], [("Conv", "")], X, CONV)


def test_constants_may_be_nodes() -> None:
    value = helper.make_tensor("k", TensorProto.FLOAT, [6, 1, 1], NORM["s"])
    nodes = [helper.make_node("Constant", [], ["k"], value=value), conv("t"), node("Mul", ["t", "k"])]
    expect(nodes, [("Conv", "")], X, CONV)


# ---- networks as torch exports them

EXPECTED: dict[str, dict[str, Any]] = {
    # ops that must be gone, and how many of what is left
    "resnet": {"gone": {"BatchNormalization", "Relu", "Add"}, "finishes": {"relu", "+"}},
    "mobilenet": {"gone": {"BatchNormalization", "Clip", "Add"}, "finishes": {"clip", "+"}},
    "yolo": {"gone": {"BatchNormalization", "Sigmoid", "Mul", "Add"}, "finishes": {"silu", "+"}},
    "vit": {"gone": {"Erf"}, "finishes": {"gelu"}},
    "bert": {"gone": {"Erf"}, "finishes": {"gelu"}},
}


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "tracing"])
@pytest.mark.parametrize("name", ALL)
def test_patterns_of_exported_networks_are_recognised(name: str, dynamo: bool) -> None:
    module, inputs = ALL[name]()
    made = exported(module, inputs, dynamo=dynamo, opset=18 if dynamo else 17)
    left = fused(made)
    ops, facts = Counter(op for op, _ in left), EXPECTED[name]
    assert not facts["gone"] & set(ops), ops
    finishes = " ".join(finish for _, finish in left)
    assert all(word in finishes for word in facts["finishes"])
    convs = sum(n.op_type in ("Conv", "Gemm", "MatMul") for n in made.graph.node)
    assert sum(ops[op] for op in ("Conv", "Gemm", "MatMul")) == convs
    if name in ("vit", "bert") and dynamo:  # all that is left to add: positions, and BERT's mask
        assert ops["Add"] <= 3, left


@pytest.mark.parametrize("name", ALL)
def test_exported_networks_answer_as_onnxruntime_does(name: str) -> None:
    module, inputs = ALL[name]()
    made = exported(module, inputs)
    arrays = {value.name: each.numpy() for value, each in zip(made.graph.input, inputs, strict=True)}
    check(made, arrays, tolerance=1e-4)
    with torch.no_grad():
        wanted = module(*inputs)
    first = wanted[0] if isinstance(wanted, tuple) else wanted
    found = onnxruntime(made, arrays)[made.graph.output[0].name]
    np.testing.assert_allclose(found, first.numpy(), rtol=1e-3, atol=1e-4)


def test_a_batch_norm_export_that_is_not_folded_is_folded_here() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 3, bias=False), torch.nn.BatchNorm2d(6), torch.nn.ReLU6()).eval()
    made = exported(module, (torch.from_numpy(X),))
    assert fused(made) in ([("Conv", "clip")], [("Conv", "relu")])
