# SPDX-License-Identifier: Apache-2.0
"""Oracles: sums in Python's integers, rounding in exact fractions, the adjoint identity, and ONNX Runtime's own kernels."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper

from featherweight.deploy import IntegerReference, agreement, agreement_by_node, session
from featherweight.deploy.arithmetic import convolve, dequantize, filtered, multiply, quantize, requantize
from featherweight.errors import ArtefactError, DataError, NumericalError

RANDOM = np.random.default_rng(0)
PLAIN = {"stride": [1, 1], "pads": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}


def test_products_are_sums_of_whole_numbers() -> None:
    x = RANDOM.integers(0, 256, (3, 4, 70), dtype=np.uint8)
    w = RANDOM.integers(-128, 128, (70, 5), dtype=np.int8)
    bias = RANDOM.integers(-(2**20), 2**20, 5).astype(np.int32)
    want = [
        [
            [sum((int(a) - 17) * int(b) for a, b in zip(row, w[:, j], strict=True)) + int(bias[j]) for j in range(5)]
            for row in rows
        ]
        for rows in x
    ]
    assert multiply(x, np.uint8(17), w, bias).tolist() == want


def test_a_convolution_is_the_sum_over_windows() -> None:
    """Strides, dilations, uneven pads and groups; a padded value is worth zero, that is the zero point."""
    x = RANDOM.integers(0, 256, (2, 6, 9, 8), dtype=np.uint8)
    w = RANDOM.integers(-128, 128, (4, 3, 3, 2), dtype=np.int8)
    got = convolve(x, np.uint8(9), w, stride=[2, 1], pads=[1, 0, 2, 1], dilation=[1, 2], groups=2)
    padded = np.pad(x.astype(int) - 9, ((0, 0), (0, 0), (1, 2), (0, 1)))
    windows = sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, :, :, ::2]
    halves = [
        np.einsum("ncijkl,ockl->noij", windows[:, 3 * g : 3 * g + 3], w[2 * g : 2 * g + 2].astype(int)) for g in (0, 1)
    ]
    assert np.array_equal(got, np.concatenate(halves, 1))


def test_a_transposed_convolution_is_the_adjoint_of_the_convolution() -> None:
    x = RANDOM.integers(-50, 50, (1, 4, 7, 9)).astype(np.float64)
    y = RANDOM.integers(-50, 50, (1, 6, 3, 4)).astype(np.float64)
    w = RANDOM.integers(-50, 50, (6, 2, 3, 3)).astype(np.float64)
    options = {"stride": [2, 2], "pads": [0, 1, 0, 1], "dilation": [1, 1], "groups": 2}
    there = filtered(x, w, None, **options, output_padding=None)
    assert there.shape == (1, 6, 3, 5)
    y = RANDOM.integers(-50, 50, tuple(there.shape)).astype(np.float64)
    back = filtered(y, w, None, **options, output_padding=[0, 0])
    assert float((there.numpy() * y).sum()) == float((x * back.numpy()).sum())


def test_requantization_rounds_halves_to_even_and_saturates() -> None:
    total = np.arange(-700, 701, dtype=np.int64)
    for multiplier in (0.5, 0.25, np.float32(0.37)):
        want = [
            min(255, max(0, round(Fraction(float(np.float32(n) * np.float32(multiplier)))) + 10))
            for n in total.tolist()
        ]
        assert requantize(total, np.float32(multiplier), np.uint8(10)).tolist() == want
    per_row = requantize(np.array([[[5], [5]]]), np.float32([0.5, 0.3]), np.int8(0))
    assert per_row.ravel().tolist() == [2, 2]


def test_an_accumulator_that_int32_cannot_hold_is_refused() -> None:
    x, w = np.full((1, 140_000), 255, np.uint8), np.full((140_000, 1), 127, np.int8)
    with pytest.raises(NumericalError, match="more than the int32"):
        multiply(x, np.uint8(0), w)


def test_quantizing_refuses_nan_and_takes_infinity_to_the_ends() -> None:
    assert quantize(np.float32([-np.inf, np.inf]), np.float32(1), np.int8(0)).tolist() == [-128, 127]
    with pytest.raises(NumericalError, match="no place on a grid"):
        quantize(np.float32([np.nan]), np.float32(1), np.uint8(0))


def test_blocks_and_channels_have_scales_of_their_own() -> None:
    q = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int8)
    assert dequantize(q, np.float32([[1, 10], [100, 1000]]), np.int8(0), 1, 2).tolist() == [
        [1, 2, 30, 40],
        [500, 600, 7000, 8000],
    ]
    assert dequantize(q, np.float32([1, 2]), np.int8([0, 5]), 0).tolist() == [[1, 2, 3, 4], [0, 2, 4, 6]]


GRIDS = {"a": (0.021, 113), "b": (0.017, 140), "y": (0.03, 98)}


def one_op(kind: str, path: Path, clipped: bool = False, **attributes) -> Path:
    """DQ, one op, Q, DQ, put together by hand, of one or two inputs; a Relu and a Clip behind the op."""
    two = kind in ("Add", "Sub", "Mul", "Concat")
    names = ["a", "b"] if two else ["a"]
    tables: dict[str, np.ndarray] = {}
    nodes, inputs = [], [f"{name}_f" for name in names]
    for name, (scale, zero) in GRIDS.items():
        tables |= {f"{name}_s": np.float32(scale), f"{name}_z": np.uint8(zero)}
    for name in names:
        nodes += [
            helper.make_node("QuantizeLinear", [name, f"{name}_s", f"{name}_z"], [f"{name}_q"]),
            helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [f"{name}_f"]),
        ]
    if kind in ("Conv", "ConvTranspose"):
        shape = (6, 4 // attributes.get("group", 1), 3, 3) if kind == "Conv" else (4, 5, 3, 3)
        axis, rows = (0, 6) if kind == "Conv" else (1, 5)
        tables |= {
            "w_q": RANDOM.integers(-127, 128, shape, dtype=np.int8),
            "w_s": RANDOM.uniform(0.001, 0.01, rows).astype(np.float32),
        }
        tables |= {
            "c_q": RANDOM.integers(-9999, 9999, rows, dtype=np.int32),
            "c_s": tables["w_s"] * np.float32(GRIDS["a"][0]),
        }
        nodes += [
            helper.make_node("DequantizeLinear", ["w_q", "w_s"], ["w"], axis=axis),
            helper.make_node("DequantizeLinear", ["c_q", "c_s"], ["c"], axis=0),
        ]
        inputs += ["w", "c"]
    if clipped:
        tables["top"] = np.float32(1.0)
    if kind == "Reshape":
        tables["shape"] = np.array([0, -1], np.int64)
        inputs.append("shape")
    nodes += [
        helper.make_node(kind, inputs, ["exact" if clipped else "y"], **attributes),
        *(
            [helper.make_node("Relu", ["exact"], ["r"]), helper.make_node("Clip", ["r", "", "top"], ["y"])]
            if clipped
            else []
        ),
        helper.make_node("QuantizeLinear", ["y", "y_s", "y_z"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "y_s", "y_z"], ["out"]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4, None, None])  # noqa: E731
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes,
        kind,
        [value(n) for n in names],
        [out],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tables.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


OPS = {
    "Add": {},
    "Sub": {},
    "Mul": {},
    "Concat": {"axis": 1},
    "Conv": {"pads": [1, 0, 1, 0], "strides": [2, 1]},
    "Conv grouped": {"group": 2},
    "Conv clipped": {},  # within its grid, so that saturation does not do it
    "ConvTranspose": {"strides": [2, 2], "output_padding": [1, 0]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "AveragePool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    "GlobalAveragePool": {},
    "Relu": {},
    "Sigmoid": {},
    "Softmax": {"axis": 1},
    "Transpose": {"perm": [0, 2, 3, 1]},
    "Reshape": {},
}


@pytest.mark.parametrize("name", OPS)
def test_each_op_agrees_with_both_runtimes_within_one_step(name: str, tmp_path) -> None:
    """Inputs go beyond both ends of their grids."""
    path = one_op(name.split()[0], tmp_path / "op.onnx", clipped="clipped" in name, **OPS[name])
    shapes = 2 if name in ("Add", "Sub", "Mul", "Concat") else 1
    x = tuple(torch.from_numpy(RANDOM.normal(0, 2.5, (3, 4, 8, 9)).astype(np.float32)) for _ in range(shapes))
    least = 0.9 if name == "Softmax" else 0.99  # ONNX Runtime takes exponentials from a table
    for runtime in agreement(path, [x]):
        assert runtime.within == 1.0 and runtime.largest < 1.01, runtime.words
        assert runtime.exact > least, runtime.words
    rows = agreement_by_node(path, x, tmp_path)
    assert [row.op for row in rows][-1] == ("Clip" if "clipped" in name else name.split()[0])
    assert all(row.largest <= 1 and row.exact > least for row in rows)
    reference = IntegerReference(path)
    reference(*x)
    outside, seen = reference.saturated["a"]
    a = x[0].numpy() / np.float32(GRIDS["a"][0])
    assert (outside, seen) == (int(((np.rint(a) < -113) | (np.rint(a) > 142)).sum()), a.size) and outside > 0


def test_a_runtime_that_is_wrong_is_seen(tmp_path, monkeypatch) -> None:
    path = one_op("Conv", tmp_path / "op.onnx")
    x = torch.randn(1, 4, 8, 9)
    real = session(path)

    def off(*args, **kwargs):
        return lambda *inputs: real(*inputs) + 2 * GRIDS["y"][0]

    monkeypatch.setattr("featherweight.deploy.integer.session", off)
    [runtime] = agreement(path, [(x,)], ["onnxruntime"])
    assert runtime.within == 0.0 and runtime.largest == pytest.approx(2, abs=1e-3)


def test_a_file_that_cannot_be_followed_says_so(tmp_path) -> None:
    with pytest.raises(ArtefactError, match=r"none.onnx is not there"):
        IntegerReference(tmp_path / "none.onnx")
    with pytest.raises(DataError, match=r"takes 1 inputs \(a\)"):
        IntegerReference(one_op("Relu", tmp_path / "op.onnx"))(torch.zeros(1), torch.zeros(1))
