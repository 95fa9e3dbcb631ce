# SPDX-License-Identifier: Apache-2.0
"""Ops on shapes: what they say is known while planning, and what is made of it costs no step."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import featherweight_engine as core
from tests.engine.nodes import check, engine, model, node


def array(*dims: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(dims, dtype=np.float32)


@pytest.mark.parametrize("start", [None, 0, 1, -2, -9, 9])
@pytest.mark.parametrize("end", [None, 0, 2, -1, -9, 9])
def test_shapes(start: int | None, end: int | None) -> None:
    x = array(2, 0, 5)
    check(model([node("Shape", ["x"], start=start, end=end)], {"x": x}, ["y"]), {"x": x})


def test_sizes() -> None:
    for x in (array(2, 3), array(0, 2), array()):
        check(model([node("Size", ["x"])], {"x": np.asarray(x)}, ["y"]), {"x": np.asarray(x)})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (np.float32, (0, 3, 0.5)),
        (np.float32, (3, -1, -0.75)),
        (np.float32, (3, 1, 1)),
        (np.int64, (2, 11, 3)),
        (np.int64, (11, 2, -3)),
        (np.int64, (2, 11, -3)),
        (np.int32, (-5, 5, 1)),
        (np.int64, (2**63 - 3, 2**63 - 1, 2)),
        (np.int64, (-(2**63), -(2**63) + 5, 2)),
    ],
)
def test_ranges(kind: Any, values: tuple[float, ...]) -> None:
    constants = {name: np.array(value, kind) for name, value in zip("abc", values, strict=True)}
    check(model([node("Range", ["a", "b", "c"])], {}, ["y"], constants), {})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (np.float32, (0, 3, 0)),
        (np.int64, (0, 3, 0)),
        (np.int64, (-(2**63), 2**63 - 1, 1)),
        (np.float32, (0, 3e38, 1e-30)),
    ],
)
def test_ranges_without_end_are_errors(kind: Any, values: tuple[float, ...]) -> None:
    constants = {name: np.array(value, kind) for name, value in zip("abc", values, strict=True)}
    made = model([node("Range", ["a", "b", "c"])], {}, ["y"], constants)
    with pytest.raises(core.Error, match=r"its step is zero|it is too long"):
        engine(made, {})


@pytest.mark.parametrize("value", [None, np.float32([2.5]), np.int64([7]), np.bool_([True]), np.float64([1.5])])
@pytest.mark.parametrize("dims", [(), (3,), (2, 0, 3), (2, 3)])
def test_constants_of_a_shape(value: NDArray[Any] | None, dims: tuple[int, ...]) -> None:
    attributes = {} if value is None else {"value": numpy_helper.from_array(value)}
    shape = np.array(dims, np.int64)
    made = model([node("ConstantOfShape", ["s"], **attributes)], {}, ["y"], {"s": shape})
    check(made, {})


def test_arithmetic_on_shapes_is_done_while_planning() -> None:
    """The flattening that exporters write, and a mask made of the input's length: one step is left."""
    x = array(3, 4, 5)
    nodes = [
        node("Shape", ["x"], outputs=["s"]),
        node("Gather", ["s", "one"], outputs=["n"], axis=0),
        node("Mul", ["n", "five"], outputs=["m"]),
        node("Unsqueeze", ["m", "zero"], outputs=["u"]),
        node("Concat", ["minus", "u"], outputs=["d"], axis=0),
        node("Reshape", ["x", "d"], outputs=["r"]),
        node("Range", ["none", "m", "single"], outputs=["i"]),
        node("Cast", ["i"], outputs=["f"], to=1),
        node("Less", ["f", "ten"], outputs=["w"]),
        node("Where", ["w", "r", "ten"]),
    ]
    constants = {
        **{name: np.array(value, np.int64) for name, value in {"one": 1, "five": 5, "none": 0, "single": 1}.items()},
        "zero": np.int64([0]),
        "minus": np.int64([-1]),
        "ten": np.array(10, np.float32),
    }
    made = model(nodes, {"x": x}, ["y"], constants)
    expected = np.where(np.arange(20) < 10, x.reshape(3, 20), np.float32(10))
    session = core.Engine(made.SerializeToString())
    np.testing.assert_array_equal(session.run([x])[0], expected)
    assert [step["op"] for step in session.profile([x])] == ["Where"]


@pytest.mark.parametrize("op", ["Range", "ConstantOfShape"])
def test_what_hangs_on_values_is_refused(op: str) -> None:
    names = ["a", "b", "c"] if op == "Range" else ["a"]
    inputs = {name: np.array(1 if op == "Range" else [1], np.int64) for name in names}
    with pytest.raises(core.Unsupported, match=f"{op} .*must be a constant"):
        engine(model([node(op, names)], inputs, ["y"]), inputs)
