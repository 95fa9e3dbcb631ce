# SPDX-License-Identifier: Apache-2.0
"""Reductions, Softmax and norms against ONNX Runtime, over any axes and any strides."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import featherweight_engine as core
from tests.engine.nodes import Arrays, check, engine, model, node, onnxruntime

REDUCTIONS = [
    f"Reduce{name}" for name in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")
]


def array(*dims: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(dims, dtype=np.float32)


def stored(
    order: list[int], *nodes: onnx.NodeProto, x: NDArray[np.float32], constants: Arrays | None = None, opset: int = 20
) -> onnx.ModelProto:
    """A model whose nodes read "t", of which axis `order[-1]` is the one that lies innermost."""
    back = [int(i) for i in np.argsort(order)]
    return model(
        [node("Transpose", ["x"], outputs=["t"], perm=back), *nodes], {"x": x.transpose(order)}, ["y"], constants, opset
    )


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("axes", [[0], [1], [2], [0, 2], [1, 2], [0, 1, 2], [-1], []])
@pytest.mark.parametrize("keep", [0, 1])
def test_every_reduction_over_every_set_of_axes(op: str, axes: list[int], keep: int) -> None:
    x = np.abs(array(3, 5, 37)) + 0.5
    check(
        model([node(op, ["x"], axes=axes or None, keepdims=keep)], {"x": x}, ["y"], opset=11), {"x": x}, tolerance=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_shapes_axes_and_strides(data: st.DataObject) -> None:
    op = data.draw(st.sampled_from(REDUCTIONS))
    dims = data.draw(
        st.lists(st.sampled_from([1, 2, 3, 16, 17, 33, 70]), min_size=1, max_size=4).filter(
            lambda d: np.prod(d) < 20000
        )
    )
    order = data.draw(st.permutations(range(len(dims))))
    axes = data.draw(st.lists(st.sampled_from(range(len(dims))), unique=True))
    x = (np.abs(array(*dims)) + 0.5) ** (0.01 if op == "ReduceProd" else 1)
    made = stored(
        list(order),
        node(op, ["t", "axes"], keepdims=data.draw(st.integers(0, 1)), noop_with_empty_axes=0),
        x=x.astype(np.float32),
        constants={"axes": np.array(axes, np.int64)},
    )
    check(made, {"x": np.ascontiguousarray(x.astype(np.float32).transpose(order))}, tolerance=2e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_long_sum_keeps_its_digits(axis: int) -> None:
    x = (array(300000, 3) + 1000).astype(np.float32)
    x = x if axis == 0 else np.ascontiguousarray(x.T)
    made = model([node("ReduceSum", ["x", "axes"], keepdims=0)], {"x": x}, ["y"], {"axes": np.array([axis])})
    np.testing.assert_allclose(engine(made, {"x": x})["y"], x.astype(np.float64).sum(axis), rtol=1e-6)


def test_a_sum_of_exponentials_neither_overflows_nor_vanishes() -> None:
    x = np.array([[1000, 999, -np.inf], [-1000, -1001, -np.inf], [-np.inf] * 3], np.float32)
    for shape in (x, np.ascontiguousarray(x.T)):
        axis = 1 if shape is x else 0
        made = model(
            [node("ReduceLogSumExp", ["x", "axes"], keepdims=0)], {"x": shape}, ["y"], {"axes": np.array([axis])}
        )
        expected = [1000 + np.log1p(np.exp(-1)), -1000 + np.log1p(np.exp(-1)), -np.inf]
        np.testing.assert_allclose(engine(made, {"x": shape})["y"], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("op", ["ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin"])
def test_integers(op: str, dtype: type) -> None:
    x: NDArray[Any] = np.random.default_rng(0).integers(-9, 9, (4, 3, 2)).astype(dtype)
    for axes in ([0], [1, 2], [0, 1, 2]):
        check(model([node(op, ["x", "axes"])], {"x": x}, ["y"], {"axes": np.array(axes)}), {"x": x})


def test_no_axes_may_mean_nothing_to_reduce() -> None:
    x = array(3, 40)
    none = np.zeros(0, np.int64)
    made = model([node("ReduceSum", ["x", "axes"], noop_with_empty_axes=1)], {"x": x}, ["y"], {"axes": none})
    np.testing.assert_array_equal(engine(made, {"x": x})["y"], x)


def test_reducing_nothing() -> None:
    x = np.zeros((2, 0, 3), np.float32)
    for op, value in (("ReduceSum", 0), ("ReduceProd", 1), ("ReduceMax", -np.inf), ("ReduceMin", np.inf)):
        made = model([node(op, ["x", "axes"], keepdims=0)], {"x": x}, ["y"], {"axes": np.array([1])})
        np.testing.assert_array_equal(engine(made, {"x": x})["y"], np.full((2, 3), value, np.float32))


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("last", [0, 1])
def test_index_of_the_best(op: str, axis: int, last: int) -> None:
    x = np.round(array(6, 7, 20))  # ties
    for keep in (0, 1):
        made = model([node(op, ["x"], axis=axis, keepdims=keep, select_last_index=last)], {"x": x}, ["y"])
        check(made, {"x": x})


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [2, 1, 0]])
def test_softmax_by_axis_opset_and_storage(op: str, opset: int, axis: int, order: list[int]) -> None:
    x = array(3, 37, 70) * 5
    made = stored(order, node(op, ["t"], axis=axis), x=x, opset=opset)
    check(made, {"x": np.ascontiguousarray(x.transpose(order))}, tolerance=2e-6)


@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 2, 17, 150])
def test_softmax_over_either_axis_at_every_remainder(rows: int, columns: int) -> None:
    x = array(rows, columns)
    for axis in (0, 1):
        check(model([node("Softmax", ["x"], axis=axis)], {"x": x}, ["y"]), {"x": x}, tolerance=2e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_of_large_and_masked_scores(axis: int) -> None:
    x = array(40, 40) + 1e4
    x[np.triu_indices(40, 1)] = -np.inf
    x[:, 0] = 1e4  # no line is wholly masked
    x[39] = 1e4
    check(model([node("Softmax", ["x"], axis=axis)], {"x": x}, ["y"]), {"x": x})
    found = engine(model([node("Softmax", ["x"], axis=axis)], {"x": x}, ["y"]), {"x": x})["y"]
    assert (found[x == -np.inf] == 0).all()


def test_softmax_of_one_number() -> None:
    x = np.array(3.0, np.float32)
    made = model(
        [node("Unsqueeze", ["x", "at"], outputs=["u"]), node("Softmax", ["u"])], {"x": x}, ["y"], {"at": np.array([0])}
    )
    check(made, {"x": x})


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [1, 2, 0]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_norm_by_storage(order: list[int], bias: bool, axis: int) -> None:
    x = array(3, 37, 70) * 3 + 50
    dims = x.shape[axis:]
    constants = {"s": array(*dims, seed=1)} | ({"b": array(*dims, seed=2)} if bias else {})
    made = stored(
        order, node("LayerNormalization", ["t", *constants], axis=axis, epsilon=1e-3), x=x, constants=constants
    )
    check(made, {"x": np.ascontiguousarray(x.transpose(order))}, tolerance=2e-5)


def test_layer_norm_keeps_its_digits_far_from_zero() -> None:
    x = (array(20, 300) + 3000).astype(np.float32)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    ones = np.ones(300, np.float32)
    made = model([node("LayerNormalization", ["x", "s"])], {"x": x}, ["y"], {"s": ones})
    np.testing.assert_allclose(engine(made, {"x": x})["y"], expected, atol=2e-3)
    turned = model(
        [node("Transpose", ["x"], outputs=["t"], perm=[1, 0]), node("LayerNormalization", ["t", "s"])],
        {"x": np.ascontiguousarray(x.T)},
        ["y"],
        {"s": ones},
    )
    np.testing.assert_allclose(engine(turned, {"x": np.ascontiguousarray(x.T)})["y"], expected, atol=2e-3)


def test_layer_norm_gives_its_statistics() -> None:
    x = array(4, 5, 33)
    constants = {"s": array(33), "b": array(33, seed=1)}
    made = model(
        [node("LayerNormalization", ["x", "s", "b"], outputs=["y", "mean", "inverse"])],
        {"x": x},
        ["y", "mean", "inverse"],
        constants,
    )
    check(made, {"x": x})


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_rms_norm(order: list[int]) -> None:
    x, scale = array(3, 37, 70), array(70, seed=1)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
    made = stored(order, node("RMSNormalization", ["t", "s"], axis=-1), x=x, constants={"s": scale}, opset=23)
    found = engine(made, {"x": np.ascontiguousarray(x.transpose(order))})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_lp_normalization(axis: int) -> None:
    x = array(4, 20, 33)
    check(model([node("LpNormalization", ["x"], axis=axis)], {"x": x}, ["y"]), {"x": x})
    with pytest.raises(core.Unsupported, match="p = 2"):
        engine(model([node("LpNormalization", ["x"], axis=axis, p=1)], {"x": x}, ["y"]), {"x": x})


@pytest.mark.parametrize("dims", [(2, 6, 7, 9), (1, 6, 50), (3, 6, 2, 3, 4), (2, 6, 64, 64)])
def test_instance_and_group_norm(dims: tuple[int, ...]) -> None:
    x = array(*dims) * 2 + 10
    scale, bias = array(6, seed=1), array(6, seed=2)
    constants = {"s": scale, "b": bias}
    check(model([node("InstanceNormalization", ["x", "s", "b"])], {"x": x}, ["y"], constants), {"x": x}, tolerance=2e-5)

    plain = torch.nn.functional.group_norm(torch.from_numpy(x), 3).numpy()
    group = node("GroupNormalization", ["x", "s", "b"], num_groups=3)
    sides = (1, 6) + (1,) * (len(dims) - 2)
    found = engine(model([group], {"x": x}, ["y"], constants, opset=21), {"x": x})["y"]
    np.testing.assert_allclose(found, plain * scale.reshape(sides) + bias.reshape(sides), rtol=1e-4, atol=2e-5)
    # Until opset 21 there is one scale a group.
    old = {"s": scale[:3], "b": bias[:3]}
    found = engine(model([group], {"x": x}, ["y"], old, opset=18), {"x": x})["y"]
    expected = plain * scale[:3].repeat(2).reshape(sides) + bias[:3].repeat(2).reshape(sides)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 3, 1]])
def test_global_pooling_by_storage(op: str, order: list[int]) -> None:
    x = array(2, 40, 7, 9)
    check(stored(order, node(op, ["t"]), x=x), {"x": np.ascontiguousarray(x.transpose(order))})


def test_what_lies_in_pieces_is_reduced_too() -> None:
    """A slice with a step, a broadcast axis and an axis walked backwards."""
    x = array(8, 9, 20)
    constants = {
        "start": np.array([7, 0]),
        "end": np.array([-100, 20]),
        "axes": np.array([0, 2]),
        "step": np.array([-2, 3]),
        "shape": np.array([5, 4, 9, 7]),
        "last": np.array([3]),
    }
    nodes = [
        node("Slice", ["x", "start", "end", "axes", "step"], outputs=["s"]),
        node("Expand", ["s", "shape"], outputs=["e"]),
        node("Softmax", ["e"], axis=1, outputs=["m"]),
        node("ReduceSum", ["e", "last"], outputs=["r"]),
        node("Mul", ["m", "r"]),
    ]
    check(model(nodes, {"x": x}, ["y"], constants), {"x": x})


def test_doubles_are_refused_by_name() -> None:
    x = np.zeros((2, 3))
    with pytest.raises(core.Unsupported, match="double"):
        engine(model([node("Softmax", ["x"])], {"x": x}, ["y"]), {"x": x})
    assert onnxruntime(model([node("Softmax", ["x"])], {"x": x}, ["y"]), {"x": x})["y"].shape == (2, 3)
