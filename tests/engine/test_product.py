# SPDX-License-Identifier: Apache-2.0
"""Convolutions and matrix products against ONNX Runtime: every geometry, dense and sparse, in every instruction set."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import featherweight_engine as core
from tests.engine.nodes import check, engine, model, node, onnxruntime

Array = NDArray[np.float32]


def weights(random: np.random.Generator, shape: tuple[int, ...], zeros: float) -> Array:
    made = random.standard_normal(shape).astype(np.float32)
    made[random.random(shape) < zeros] = 0
    return made


def inputs(random: np.random.Generator, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    return {"x": random.standard_normal(shape).astype(np.float32)}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    group = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = group * draw(st.integers(1, 5))
    rows = group * draw(st.integers(1, 7))
    kernel = draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    strides = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    dilations = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    pads = draw(st.lists(st.integers(0, 3), min_size=2 * rank, max_size=2 * rank))
    size = draw(st.lists(st.integers(1, 23 if rank < 3 else 7), min_size=rank, max_size=rank))
    images = draw(st.integers(1, 5))
    zeros = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    bias = draw(st.booleans())
    return images, group, channels, rows, kernel, strides, dilations, pads, size, zeros, bias


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(convolutions(), st.integers(0, 9))
def test_convolutions_of_any_geometry(case: tuple[Any, ...], seed: int) -> None:
    images, group, channels, rows, kernel, strides, dilations, pads, size, zeros, bias = case
    rank = len(size)
    for i in range(rank):
        assume(size[i] + pads[i] + pads[rank + i] >= (kernel[i] - 1) * dilations[i] + 1)
    random = np.random.default_rng(seed)
    constants = {"w": weights(random, (rows, channels // group, *kernel), zeros)}
    if bias:
        constants["b"] = weights(random, (rows,), 0.0)
    conv = node("Conv", ["x", *constants], group=group, strides=strides, dilations=dilations, pads=pads)
    x = inputs(random, (images, channels, *size))
    check(model([conv], x, ["y"], constants), x, 2e-5)


ENDS = {
    "none": [],
    "Relu": [node("Relu", ["s"], outputs=["t"])],
    "ReLU6": [node("Clip", ["s", "zero", "six"], outputs=["t"])],
    "SiLU": [node("Sigmoid", ["s"], outputs=["g"]), node("Mul", ["s", "g"], outputs=["t"])],
    "HardSwish": [node("HardSwish", ["s"], outputs=["t"])],
}


@st.composite
def depthwise(draw: st.DrawFn) -> tuple[Any, ...]:
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (5, 5), (1, 3), (4, 2)]))
    stride = draw(st.sampled_from([(1, 1), (2, 2), (1, 1), (2, 2), (1, 2), (3, 3)]))
    dilation = draw(st.sampled_from([1, 1, 1, 2]))
    pads = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 70)))
    assume(all(size[i] + pads[i] + pads[2 + i] >= (kernel[i] - 1) * dilation + 1 for i in range(2)))
    images, channels, filters = (
        draw(st.sampled_from([1, 1, 2])),
        draw(st.integers(2, 6)),
        draw(st.sampled_from([1, 1, 2])),
    )
    end, added = draw(st.sampled_from([*ENDS])), draw(st.sampled_from(["", "before", "after"]))
    return kernel, stride, dilation, pads, size, images, channels, filters, end, added


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(depthwise(), st.integers(0, 9))
@example(((5, 5), (1, 1), 1, [0, 0, 0, 0], (20, 36), 1, 4, 1, "HardSwish", "before"), 0)  # lines of two whole registers
def test_depthwise_convolutions_of_any_geometry_and_end(case: tuple[Any, ...], seed: int) -> None:
    kernel, stride, dilation, pads, size, images, channels, filters, end, added = case
    random = np.random.default_rng(seed)
    rows = channels * filters
    constants = {"w": weights(random, (rows, 1, *kernel), 0.1), "b": weights(random, (rows,), 0.0)}
    constants |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    x = inputs(random, (images, channels, *size))
    out = [
        (n + a + b - (k - 1) * dilation - 1) // s + 1
        for n, a, b, k, s in zip(size, pads[:2], pads[2:], kernel, stride, strict=True)
    ]
    x |= {"r": random.standard_normal((images, rows, *out)).astype(np.float32)} if added else {}
    dilations = [dilation] * 2
    nodes = [
        node("Conv", ["x", "w", "b"], outputs=["c"], group=channels, strides=stride, dilations=dilations, pads=pads)
    ]
    nodes.append(
        node("Add", ["c", "r"], outputs=["s"]) if added == "before" else node("Identity", ["c"], outputs=["s"])
    )
    nodes += ENDS[end]
    last = "t" if ENDS[end] else "s"
    nodes.append(node("Add", [last, "r"]) if added == "after" else node("Identity", [last]))
    check(model(nodes, x, ["y"], constants), x, 2e-5)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [9, 10])
def test_pads_by_name(auto_pad: str, size: int) -> None:
    random = np.random.default_rng(0)
    x = inputs(random, (2, 3, size, size + 1))
    conv = node("Conv", ["x", "w"], auto_pad=auto_pad, strides=[2, 3])
    check(model([conv], x, ["y"], {"w": weights(random, (4, 3, 3, 4), 0.5)}), x)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(
    ("shape", "rows", "kernel", "stride", "group"),
    [
        ((1, 64, 56, 56), 64, 1, 1, 1),  # whole registers, read in place
        ((2, 300, 14, 14), 70, 1, 1, 1),  # several blocks of k; lines that end within a register
        ((3, 40, 7, 7), 90, 3, 1, 1),  # tiles that span images
        ((1, 3, 64, 64), 64, 7, 2, 1),
        ((1, 32, 28, 28), 32, 3, 1, 32),  # depthwise
        ((2, 24, 57, 31), 48, 5, 2, 24),  # depthwise, two rows a channel
        ((1, 6, 61, 47), 6, 3, 2, 6),  # depthwise, a plane that threads share
        ((1, 6, 29, 50), 6, 3, 1, 6),  # the same, whose registers go on over lines' ends
        ((2, 20, 7, 7), 20, 5, 1, 20),  # depthwise, lines shorter than a register
        ((1, 6, 64, 40), 6, 2, 1, 6),  # depthwise, an output wider than the input
        ((1, 6, 40, 40), 6, 3, 3, 6),  # depthwise, a stride that takes a window
        ((1, 64, 15, 15), 32, 3, 1, 4),
    ],
)
def test_sizes_that_networks_have(
    shape: tuple[int, ...], rows: int, kernel: int, stride: int, group: int, zeros: float
) -> None:
    random = np.random.default_rng(1)
    x = inputs(random, shape)
    constants = {
        "w": weights(random, (rows, shape[1] // group, kernel, kernel), zeros),
        "b": weights(random, (rows,), 0),
    }
    conv = node("Conv", ["x", "w", "b"], group=group, strides=[stride] * 2, pads=[kernel // 2] * 4)
    check(model([conv], x, ["y"], constants), x, 3e-5)


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["right", "left", "both"]),
    st.sampled_from([0.0, 0.8]),
    st.permutations(range(2)),
    st.integers(0, 9),
)
def test_products_of_any_shape(
    batch: list[int], rows: int, depth: int, columns: int, changing: str, zeros: float, order: list[int], seed: int
) -> None:
    """Constant on either side or on neither; the operand that changes lies in memory as it was given, or turned."""
    random = np.random.default_rng(seed)
    a, b = weights(random, (*batch, rows, depth), 0.0), weights(random, (*batch, depth, columns), 0.0)
    constants: dict[str, Array] = {}
    x: dict[str, Array] = {"a": a, "b": b}
    if changing == "left":
        constants["b"] = weights(random, (depth, columns), zeros)
        del x["b"]
    elif changing == "right":
        constants["a"] = weights(random, (rows, depth), zeros)
        del x["a"]
    nodes, names = [], {"a": "a", "b": "b"}
    for name, value in list(x.items()):
        if order[0] == 1:  # stored with its last axes turned, and turned back by a view
            last = value.ndim
            turn = [*range(last - 2), last - 1, last - 2]
            x[name] = np.ascontiguousarray(value.transpose(turn))
            nodes.append(node("Transpose", [name], outputs=[name + "_turned"], perm=turn))
            names[name] = name + "_turned"
    nodes.append(node("MatMul", [names["a"], names["b"]]))
    check(model(nodes, x, ["y"], constants), x, 2e-5)


@pytest.mark.parametrize(
    "shape", [(128, 384), (2, 128, 384), (1, 384), (3, 1, 384), (4, 3, 5, 384), (7, 384), (33, 2, 384)]
)
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_products_over_tokens(shape: tuple[int, ...], zeros: float) -> None:
    random = np.random.default_rng(2)
    x = inputs(random, shape)
    check(model([node("MatMul", ["x", "w"])], x, ["y"], {"w": weights(random, (384, 100), zeros)}), x, 3e-5)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c", [None, (), (1,), (30,), (1, 30), (5, 30), (5, 1)])
def test_gemm(trans_a: int, trans_b: int, c: tuple[int, ...] | None) -> None:
    random = np.random.default_rng(3)
    x = inputs(random, (20, 5) if trans_a else (5, 20))
    constants = {"w": weights(random, (30, 20) if trans_b else (20, 30), 0.5)}
    if c is not None:
        constants["c"] = np.asarray(random.standard_normal(c), np.float32)
    gemm = node("Gemm", ["x", *constants], transA=trans_a, transB=trans_b, alpha=0.5)
    check(model([gemm], x, ["y"], constants), x)


def test_what_is_not_a_product_of_floats_is_refused() -> None:
    x = {"x": np.zeros((2, 3), np.int32)}
    made = model([node("MatMul", ["x", "w"])], x, ["y"], {"w": np.zeros((3, 4), np.int32)})
    with pytest.raises(core.Unsupported, match="products are of floats"):
        engine(made, x)


def test_nan_and_infinity_pass_through() -> None:
    x = {"x": np.array([[np.nan, 1, 2], [np.inf, 1, 1], [1, 1, 1]], np.float32)}
    made = model([node("MatMul", ["x", "w"])], x, ["y"], {"w": np.ones((3, 5), np.float32)})
    np.testing.assert_array_equal(engine(made, x)["y"], onnxruntime(made, x)["y"])


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rows", [1, 10, 100, 1000])
def test_one_engine_multiplies_vectors_and_matrices(rows: int, zeros: float) -> None:
    """One row of x is a product of another kind than several; neither may take the weights as packed for the other."""
    random = np.random.default_rng(rows)
    w, bias = weights(random, (rows, 77), zeros), weights(random, (rows,), 0.0)
    made = model(
        [node("Gemm", ["x", "w", "b"], outputs=["sum"], transB=1), node("Relu", ["sum"])],
        {"x": np.zeros((1, 77), np.float32)},
        ["y"],
        {"w": w, "b": bias},
    )
    del made.graph.input[0].type.tensor_type.shape.dim[:]
    made.graph.input[0].type.tensor_type.shape.dim.add().dim_param = "batch"
    made.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 77
    for instruction_set in core.instruction_sets():
        engine = core.Engine(made.SerializeToString(), threads=2, instruction_set=instruction_set)
        for batch in (1, 5, 1, 40):
            x = weights(random, (batch, 77), 0.0)
            np.testing.assert_allclose(
                engine.run([x])[0], np.maximum(x.astype(np.float64) @ w.T + bias, 0), rtol=1e-4, atol=1e-5
            )


def test_decisions_are_taken_as_given() -> None:
    random = np.random.default_rng(0)
    x = {"x": weights(random, (1, 64, 12, 12), 0.0)}
    made = model(
        [node("Conv", ["x", "w"], pads=[1, 1, 1, 1])], x, ["y"], {"w": weights(random, (48, 64, 3, 3), 0.8)}
    ).SerializeToString()
    first = core.Engine(made)
    assert first.decided == 0
    [expected] = first.run([x["x"]])
    [(key, text)] = first.decisions.items()
    others = {"dense 3x189", "sparse 2x504"} - {text}
    for other in others:  # what was decided is what is done
        engine = core.Engine(made, decisions={key: other})
        [row] = [row for row in engine.profile([x["x"]]) if row["op"] == "Conv"]
        assert other in row["what"]
        assert engine.decisions == {key: other}
        np.testing.assert_allclose(engine.run([x["x"]])[0], expected, rtol=1e-4, atol=1e-4)
    # What no candidate is called is measured anew.
    engine = core.Engine(made, decisions={key: "dense 999999x-3", "other": "x"})
    engine.run([x["x"]])
    assert engine.decisions.keys() == {key, "other"}
    assert engine.decisions[key] != "dense 999999x-3"


def test_a_bias_on_rows_that_follow_from_a_shape() -> None:
    """As Perceivers repeat learned rows for each batch: both operands are known once the shape is."""
    random = np.random.default_rng(0)
    nodes = [
        node("Shape", ["x"], outputs=["shape"], start=0, end=1),
        node("Concat", ["shape", "sizes"], outputs=["to"], axis=0),
        node("Expand", ["rows", "to"], outputs=["repeated"]),
        node("MatMul", ["repeated", "w"], outputs=["product"]),
        node("Add", ["product", "b"], outputs=["sum"]),
        node("Add", ["sum", "x"]),
    ]
    constants = {
        "sizes": np.array([5, 12]),
        "rows": weights(random, (1, 5, 12), 0.0),
        "w": weights(random, (12, 7), 0.0),
        "b": weights(random, (7,), 0.0),
    }
    x = {"x": weights(random, (3, 5, 7), 0.0)}
    made = model(nodes, x, ["y"], constants)
    assert core.Engine(made.SerializeToString()).run([x["x"]])
    check(made, x)
