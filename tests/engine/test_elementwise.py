# SPDX-License-Identifier: Apache-2.0
"""Elementwise ops against ONNX Runtime: functions, broadcasting over any strides, integers, casts, special values."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

import featherweight_engine as core
from tests.engine.nodes import Arrays, check, engine, model, node, onnxruntime

UNARY = [
    "Neg",
    "Abs",
    "Sqrt",
    "Reciprocal",
    "Exp",
    "Log",
    "Erf",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Sin",
    "Cos",
    "Relu",
    "LeakyRelu",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Tanh",
    "Gelu",
    "Elu",
    "Selu",
    "Softplus",
    "Mish",
    "Softsign",
    "ThresholdedRelu",
]
BINARY = ["Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "PRelu"]
COMPARISONS = ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"]


def array(*dims: int, seed: int = 0, scale: float = 3) -> NDArray[np.float32]:
    return scale * np.random.default_rng(seed).standard_normal(dims, dtype=np.float32)


def checked(op: str, arrays: Arrays, constants: tuple[str, ...] = (), opset: int = 22, **attributes: Any) -> None:
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    inputs = {name: value for name, value in arrays.items() if name not in constants}
    held = {name: arrays[name] for name in constants}
    check(model([node(op, list(arrays), **attributes)], inputs, ["y"], held, opset=opset), inputs)


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 100, 50_003])
def test_every_function_at_every_length(op: str, size: int) -> None:
    x = array(size)
    checked(op, {"x": np.abs(x) if op in ("Log", "Sqrt") else x})


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("LeakyRelu", {"alpha": 0.3}),
        ("Elu", {"alpha": 0.3}),
        ("Selu", {"alpha": 0.3, "gamma": 2.0}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.1}),
        ("Gelu", {"approximate": "tanh"}),
        ("Gelu", {"approximate": "none"}),
        ("ThresholdedRelu", {"alpha": 0.5}),
    ],
)
def test_parameters_of_activations(op: str, attributes: dict[str, Any]) -> None:
    checked(op, {"x": array(333)}, **attributes)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_swish_against_its_definition(alpha: float) -> None:
    x = array(333)
    made = model([node("Swish", ["x"], alpha=alpha)], {"x": x}, ["y"], opset=24)
    expected = x / (1 + np.exp(-alpha * x.astype(np.float64)))
    for name in core.instruction_sets():
        np.testing.assert_allclose(engine(made, {"x": x}, instruction_set=name)["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", UNARY)
def test_functions_against_double_precision(op: str) -> None:
    """Relative errors, also of small results: the comparison with ONNX Runtime above is of the largest."""
    x = np.concatenate([np.geomspace(1e-30, 60, 400), -np.geomspace(1e-30, 60, 400)]).astype(np.float32)
    x = np.abs(x) if op in ("Log", "Sqrt") else x
    wide = torch.from_numpy(x.astype(np.float64))
    f = torch.nn.functional
    known: dict[str, Any] = {
        "LeakyRelu": lambda v: f.leaky_relu(v, float(np.float32(0.01))),
        "HardSigmoid": lambda v: (v * float(np.float32(0.2)) + 0.5).clip(0, 1),
        "HardSwish": f.hardswish,
        "Gelu": f.gelu,
        "Elu": f.elu,
        "Selu": f.selu,
        "Softplus": lambda v: torch.log1p(torch.exp(v)),
        "Mish": f.mish,
        "Softsign": f.softsign,
        "ThresholdedRelu": lambda v: f.threshold(v, 1, 0),
    }
    expected = (known.get(op) or getattr(torch, op.lower()))(wide).numpy()
    # Where a difference of two numbers near 1 is small, as GELU far below zero and log near 1, only the difference counts.
    loose = (
        2e-7 * np.maximum(np.abs(x), 1) if op in ("Gelu", "Log", "HardSigmoid", "HardSwish", "Sin", "Cos") else 1e-37
    )
    for name in core.instruction_sets():
        found = engine(model([node(op, ["x"])], {"x": x}, ["y"], opset=22), {"x": x}, instruction_set=name)["y"]
        assert (np.abs(found - expected) <= 1e-6 * np.abs(expected) + loose).all(), name


SPECIAL = np.float32([np.nan, np.inf, -np.inf, -0.0, 0.0, -1.5, 2.5, 0.5, -0.5, 100, -100, 1e30, -1e30, 1e-40, 3, 7, 1])


def same(found: NDArray[Any], expected: NDArray[Any], atol: float = 1e-30) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=atol)
    zeros = (expected == 0) & (found == 0)
    assert (np.signbit(found) == np.signbit(expected))[zeros].all()


@pytest.mark.parametrize("op", UNARY)
def test_special_values(op: str) -> None:
    x = SPECIAL
    if op in ("Sin", "Cos"):  # far out the two libraries reduce angles differently
        x = x[~(np.abs(x) == np.float32(1e30))]
    if op in ("Softplus", "Selu", "Sign"):  # ONNX Runtime gives +0 at -0, or a sum that it cuts off
        x = x[~((x == 0) | (x == -100))]
    if op in ("Sigmoid", "Tanh"):  # ONNX Runtime's saturate early
        x = x[np.abs(x) != 100]
    if op in ("Exp", "Mish", "Gelu", "HardSwish", "Elu"):
        x = x[~(x < -50)]
    made = model([node(op, ["x"])], {"x": x}, ["y"], opset=22)
    expected = onnxruntime(made, {"x": x})["y"]
    for name in core.instruction_sets():
        same(engine(made, {"x": x}, instruction_set=name)["y"], expected, atol=1e-7)


def test_activations_far_below_zero() -> None:
    x = np.float32([-20, -90, -1e4, -1e30])
    for op in ("Gelu", "Mish", "HardSwish", "Sigmoid", "Exp", "Softplus"):
        for name in core.instruction_sets():
            found = engine(model([node(op, ["x"])], {"x": x}, ["y"], opset=22), {"x": x}, instruction_set=name)["y"]
            assert (np.abs(found) <= 4.2e-8).all(), (op, found)


@pytest.mark.parametrize("op", BINARY)
def test_special_values_in_pairs(op: str) -> None:
    a, b = (part.ravel() for part in np.meshgrid(SPECIAL, SPECIAL))
    if op == "PRelu":
        a, b = a[a != 0], b[a != 0]
    made = model([node(op, ["a", "b"])], {"a": a, "b": b}, ["y"])
    expected = onnxruntime(made, {"a": a, "b": b})["y"]
    for name in core.instruction_sets():
        found = engine(made, {"a": a, "b": b}, instruction_set=name)["y"]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-44)


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize(
    "dims", [(2, 5, 7, 7), (5, 1, 1), (1,), (), (7,), (7, 1), (2, 1, 7, 7), (2, 5, 1, 1), (1, 5, 1, 7)]
)
def test_shapes_that_broadcast(op: str, dims: tuple[int, ...]) -> None:
    a, b = array(2, 5, 7, 7), array(*dims, seed=1)
    a = np.abs(a) if op == "Pow" else a
    checked(op, {"a": a, "b": b})
    checked(op, {"a": a, "b": b}, constants=("b",))
    if op != "PRelu":
        checked(op, {"b": np.abs(b), "a": a})
        checked(op, {"a": a, "b": array(3, *dims, seed=1) if len(dims) == 4 else b})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_strides(data: st.DataObject) -> None:
    """Operands of any order of storage, cut out of more, backwards, broadcast along any axes."""
    op = data.draw(st.sampled_from([*BINARY[:6], *COMPARISONS, "Where", "Sum", "Mean"]))
    rank = data.draw(st.integers(1, 4))
    dims = data.draw(st.lists(st.sampled_from([1, 2, 3, 16, 19, 40]), min_size=rank, max_size=rank))
    if np.prod(dims) > 60_000:
        dims[0] = 1
    nodes, inputs = [], {}
    operands = {"Where": 3, "Sum": 4, "Mean": 3}.get(op, 2)
    for i in range(operands):
        own = [data.draw(st.sampled_from([size, size, 1])) for size in dims]
        order = data.draw(st.permutations(range(rank)))
        step = data.draw(st.sampled_from([1, 1, 2, -1]))
        axis = data.draw(st.integers(0, rank - 1))
        there = [own[a] for a in order]
        there[axis] *= abs(step)
        whole = np.round(array(*there, seed=i) * 2) / 2
        whole[whole == 0] = 1
        name = f"x{i}"
        inputs[name] = whole > 0 if op == "Where" and i == 0 else whole
        bounds = [0, 2**31] if step > 0 else [-1, -(2**31)]
        for part, value in zip(("start", "end", "axis", "step"), (*bounds, axis, step), strict=True):
            nodes.append(
                helper.make_node("Constant", [], [name + part], value=onnx.numpy_helper.from_array(np.int64([value])))
            )
        nodes.append(node("Slice", [name, *(name + p for p in ("start", "end", "axis", "step"))], outputs=[name + "s"]))
        nodes.append(
            node("Transpose", [name + "s"], outputs=[name + "t"], perm=[int(i) for i in np.argsort(list(order))])
        )
    nodes.append(node(op, [f"x{i}t" for i in range(operands)]))
    check(model(nodes, inputs, ["y"]), inputs)


def test_large_tensors_of_two_orders() -> None:
    """One of them is copied first, by blocks, and the work is shared out among threads."""
    a, b = array(1, 200, 333), array(1, 333, 200, seed=1)
    turned = node("Transpose", ["a"], outputs=["t"], perm=[0, 2, 1])
    check(model([turned, node("Add", ["t", "b"])], {"a": a, "b": b}, ["y"]), {"a": a, "b": b})
    check(model([turned, node("Mul", ["b", "t"])], {"a": a, "b": b}, ["y"]), {"a": a, "b": b})
    check(model([turned, node("Sub", ["t", "b"])], {"a": a}, ["y"], {"b": b}), {"a": a})


@pytest.mark.parametrize("dims", [(1, 300, 7, 7), (4, 300, 7, 7), (2, 3000, 3, 3), (1, 64, 56, 56), (3, 50, 50, 3)])
def test_values_by_channel_and_by_last_axis(dims: tuple[int, ...]) -> None:
    x = array(*dims)
    checked("Mul", {"x": x, "c": array(dims[1], 1, 1)}, constants=("c",))
    checked("Mul", {"x": x, "c": array(dims[0], dims[1], 1, 1)})
    checked("Add", {"x": x, "c": array(dims[-1])}, constants=("c",))


@pytest.mark.parametrize("op", ["Sum", "Mean", "Min", "Max"])
@pytest.mark.parametrize("many", [1, 2, 3, 5])
def test_any_number_of_inputs(op: str, many: int) -> None:
    dims = [(4, 1000, 13), (1, 1000, 1), (13,), (4, 1, 13), (4, 1000, 13)]
    checked(op, {f"x{i}": array(*dims[i], seed=i) for i in range(many)})


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -1.0, -2.0, 1.7, 0.0, 1.0])
@pytest.mark.parametrize("kind", [np.float32, np.int64, np.int32])
def test_powers(exponent: float, kind: type) -> None:
    x = array(3, 100)
    checked("Pow", {"x": x, "e": kind(exponent)}, constants=("e",))
    checked("Pow", {"x": x, "e": kind(exponent)})
    checked("Pow", {"x": x, "e": np.full((1, 1, 1), exponent, kind)}, constants=("e",))


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.int32])
@pytest.mark.parametrize("constants", [(), ("low",), ("low", "high")])
@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2)])
def test_clip(kind: type, constants: tuple[str, ...], bounds: tuple[int, int]) -> None:
    x = array(5, 700).astype(kind)
    checked("Clip", {"x": x, "low": kind(bounds[0]), "high": kind(bounds[1])}, constants=constants)


def test_clip_with_bounds_left_out() -> None:
    x = array(5, 700)
    high = np.array(0.5, np.float32)
    check(model([node("Clip", ["x", "", "high"])], {"x": x, "high": high}, ["y"]), {"x": x, "high": high})
    check(model([node("Clip", ["x", "", "high"])], {"x": x}, ["y"], {"high": high}), {"x": x})
    checked("Clip", {"x": x})
    for attributes in ({"min": -1.0, "max": 0.5}, {"max": 0.5}, {"min": 0.0}, {}):
        checked("Clip", {"x": x}, opset=10, **attributes)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_integers(kind: type) -> None:
    edges = np.iinfo(kind)
    a = np.concatenate([np.arange(-40, 41), [edges.min, edges.max, edges.max, edges.min]]).astype(kind)
    b = np.concatenate([np.arange(1, 82) % 9 - 4, [3, 7, -2, 1]]).astype(kind)
    b[b == 0] = 5
    for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Mod", *COMPARISONS):
        checked(op, {"a": a, "b": b})
        checked(op, {"a": a, "b": b[:1]}, constants=("b",))
    checked("Mod", {"a": a, "b": b}, fmod=1)
    for op in ("Neg", "Abs", "Sign"):
        checked(op, {"a": a})
    checked("Pow", {"a": np.arange(-5, 6).astype(kind), "b": (np.arange(11) % 4).astype(kind)})


@pytest.mark.parametrize("op", ["Div", "Mod"])
@pytest.mark.parametrize("held", [False, True])
def test_an_integer_divided_by_zero_is_an_error(op: str, held: bool) -> None:
    a, b = np.int64([[1, 2]]), np.int64([[3], [0]])
    made = model([node(op, ["a", "b"])], {"a": a} if held else {"a": a, "b": b}, ["y"], {"b": b} if held else {})
    with pytest.raises(core.Error, match=f"{op} '.*divided by zero"):
        engine(made, {"a": a, "b": b})


def test_the_most_negative_integer_over_minus_one_wraps() -> None:
    a, b = np.int32([np.iinfo(np.int32).min, 5]), np.int32([-1, -1])
    assert engine(model([node("Div", ["a", "b"])], {"a": a, "b": b}, ["y"]), {"a": a, "b": b})["y"].tolist() == [
        np.iinfo(np.int32).min,
        -5,
    ]
    for fmod in (0, 1):
        made = model([node("Mod", ["a", "b"], fmod=fmod)], {"a": a, "b": b}, ["y"])
        assert engine(made, {"a": a, "b": b})["y"].tolist() == [0, 0]


def test_remainders_of_floats() -> None:
    a, b = (part.ravel() for part in np.meshgrid(array(40), array(40, seed=1)))
    checked("Mod", {"a": a, "b": b}, fmod=1)
    made = model([node("Mod", ["a", "b"], fmod=0)], {"a": a, "b": b}, ["y"])
    np.testing.assert_allclose(engine(made, {"a": a, "b": b})["y"], np.mod(a, b), rtol=1e-5, atol=1e-6)


def test_comparisons_and_logic() -> None:
    x = np.round(array(2, 90, 7, 7))
    z = np.round(array(2, 90, 7, 7, seed=1))
    for op in COMPARISONS:
        checked(op, {"x": x, "z": z})
        checked(op, {"x": SPECIAL, "z": SPECIAL[::-1].copy()})
    for op in ("And", "Or", "Xor", "Equal"):
        checked(op, {"x": x > 0, "z": z > 0})
        checked(op, {"x": x > 0, "z": z[:, :1] > 0})
    checked("Not", {"x": x > 0})
    checked("IsNaN", {"x": SPECIAL})
    for positive in (0, 1):
        for negative in (0, 1):
            checked("IsInf", {"x": SPECIAL}, detect_positive=positive, detect_negative=negative)


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.int32, np.bool_, np.float64, np.uint8])
def test_where(kind: type) -> None:
    which = array(2, 40, 20, 20) > 0
    a, b = array(2, 40, 20, 20, seed=1).astype(kind), array(2, 40, 20, 20, seed=2).astype(kind)
    if kind is np.bool_:  # ONNX Runtime has none of these
        made = model([node("Where", ["w", "a", "b"])], {"w": which, "a": a, "b": b}, ["y"])
        assert (engine(made, {"w": which, "a": a, "b": b})["y"] == np.where(which, a, b)).all()
        return
    checked("Where", {"w": which, "a": a, "b": b})
    checked("Where", {"w": which, "a": a, "b": kind(3)}, constants=("b",))
    checked("Where", {"w": which, "a": kind(3), "b": b})
    checked("Where", {"w": which[:1, :1], "a": a, "b": b[:, :, :1]})


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)])
@pytest.mark.parametrize("constants", [(), ("s", "b", "m", "v")])
def test_batch_normalization(order: tuple[int, ...], constants: tuple[str, ...]) -> None:
    x = array(2, 70, 9, 70)
    parameters = {name: array(70, seed=i, scale=1) for i, name in enumerate("sbm")}
    parameters["v"] = np.abs(array(70, seed=9)) + 0.1
    inputs = {"x": x} if constants else {"x": x, **parameters}
    made = model(
        [
            node("Transpose", ["x"], outputs=["t"], perm=list(order)),
            node("BatchNormalization", ["t", "s", "b", "m", "v"], epsilon=0.01),
        ],
        inputs,
        ["y"],
        parameters if constants else {},
    )
    check(made, inputs, tolerance=1e-5)


TYPES = [
    *(np.float32, np.float64, np.float16, np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64, np.bool_),
]


@pytest.mark.parametrize("source", TYPES)
def test_casts_between_all_types(source: type) -> None:
    wide = source not in (np.int8, np.uint8, np.bool_)
    x = (np.arange(120) * (13 if wide else 2) / (2 if np.dtype(source).kind == "f" else 1)).reshape(3, 40)
    x = (x - 100 if np.dtype(source).kind == "i" and wide else x).astype(source)
    for target in TYPES:
        checked("Cast", {"x": x}, to=helper.np_dtype_to_tensor_dtype(np.dtype(target)))


def test_half_precision_to_the_last_bit() -> None:
    halves = np.arange(65536).astype(np.uint16).view(np.float16)
    made = model([node("Cast", ["x"], to=TensorProto.FLOAT)], {"x": halves}, ["y"])
    np.testing.assert_array_equal(engine(made, {"x": halves})["y"], halves.astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.concatenate([halves.astype(np.float32) * np.float32(f) for f in (1, 1.00048828125, 1.0003, 0.9997)])
        between = np.float32([65519.99, 65520, -65520, 2.9802322e-8, 2.98024e-8, -(2.0**-25), 6.1e-5, 1e-45, 3e38])
        values = np.concatenate([near, between])
        made = model([node("Cast", ["x"], to=TensorProto.FLOAT16)], {"x": values}, ["y"])
        np.testing.assert_array_equal(engine(made, {"x": values})["y"], values.astype(np.float16))


def test_bfloat16_to_the_last_bit() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), SPECIAL, np.float32([3.3961775e38, 3.4e38])])
    nodes = [node("Cast", ["x"], outputs=["b"], to=TensorProto.BFLOAT16), node("Cast", ["b"], to=TensorProto.FLOAT)]
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(engine(model(nodes, {"x": x}, ["y"]), {"x": x})["y"], expected)


def test_casts_of_what_no_integer_holds() -> None:
    x = np.float32([np.nan, np.inf, -np.inf, 3e9, -3e9, 1e20, -1.7, 1.7, -0.0])
    for target in (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL):
        checked("Cast", {"x": x}, to=target)


def test_ops_that_do_nothing() -> None:
    x = array(3, 4)
    checked("Identity", {"x": x})
    made = model([node("Dropout", ["x"], outputs=["y", "mask"])], {"x": x}, ["y", "mask"])
    check(made, {"x": x})
    like = np.zeros(1, np.int32)
    made = model([node("CastLike", ["x", "like"])], {"x": x, "like": like}, ["y"])
    assert (engine(made, {"x": x, "like": like})["y"] == x.astype(np.int32)).all()


def test_nothing_of_anything() -> None:
    for op in ("Add", "Mul", "Less"):
        checked(op, {"a": array(3, 0, 2), "b": array(2)})
    checked("Relu", {"a": array(0)})
    checked("Cast", {"a": array(0, 3)}, to=TensorProto.INT64)


@pytest.mark.parametrize(
    ("op", "arrays", "attributes"),
    [
        ("Add", {"a": np.ones(2, np.float16), "b": np.ones(2, np.float16)}, {}),
        ("Mul", {"a": np.ones(2, np.float64), "b": np.ones(2, np.float64)}, {}),
        ("Add", {"a": np.ones(2, np.uint8), "b": np.ones(2, np.uint8)}, {}),
        ("Relu", {"a": np.ones(2, np.int32)}, {}),
        ("Less", {"a": np.ones(2, np.float64), "b": np.ones(2, np.float64)}, {}),
    ],
)
def test_types_that_are_refused(op: str, arrays: Arrays, attributes: dict[str, Any]) -> None:
    with pytest.raises(core.Unsupported, match=op):
        engine(model([node(op, list(arrays), **attributes)], arrays, ["y"]), arrays)
