# SPDX-License-Identifier: Apache-2.0
"""Pooling and resizing against ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import featherweight_engine as core
from tests.engine.nodes import check, engine, model, node, onnxruntime


def array(*dims: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(dims, dtype=np.float32)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("width", [1, 5, 16, 31, 32, 33, 64, 65, 112])
@pytest.mark.parametrize(("taps", "stride", "pad"), [(3, 2, 1), (2, 2, 0), (5, 1, 2), (3, 1, 1), (3, 3, 1), (1, 1, 0)])
def test_windows_of_common_networks_at_every_remainder(op: str, width: int, taps: int, stride: int, pad: int) -> None:
    if width + 2 * pad < taps:
        pytest.skip("the window is longer than the input")
    x = array(2, 3, 7, width)
    made = model([node(op, ["x"], kernel_shape=[taps, taps], strides=[stride] * 2, pads=[pad] * 4)], {"x": x}, ["y"])
    check(made, {"x": x})


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_random_windows(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    average = data.draw(st.booleans())
    dims = [data.draw(st.integers(1, 40 if rank < 3 else 12)) for _ in range(rank)]
    taps = [data.draw(st.integers(1, 5)) for _ in range(rank)]
    dilations = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    begin = [data.draw(st.integers(0, t - 1)) for t in taps]
    end = [data.draw(st.integers(0, t - 1)) for t in taps]
    attributes: dict[str, Any] = {
        "kernel_shape": taps,
        "dilations": dilations,
        "strides": [data.draw(st.integers(1, 4)) for _ in range(rank)],
        "ceil_mode": data.draw(st.integers(0, 1)),
    }
    automatic = data.draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if automatic == "NOTSET":
        attributes["pads"] = begin + end
    else:
        attributes["auto_pad"] = automatic
        begin = end = [0] * rank
        attributes["dilations"] = [1] * rank  # ONNX Runtime pads for the window without its gaps
        attributes["ceil_mode"] = 0
        attributes["strides"] = [
            min(s, t) for s, t in zip(attributes["strides"], taps, strict=True)
        ]  # it refuses others
    if average:
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
        attributes["dilations"] = [1] * rank  # gaps of averages came with opset 19 and are not everywhere
    reach = [(t - 1) * d + 1 for t, d in zip(taps, attributes["dilations"], strict=True)]
    # With ceil_mode windows may reach over the end.
    beyond = [s - 1 if attributes["ceil_mode"] else 0 for s in attributes["strides"]]
    assume(all(n + b + e + o >= r for n, b, e, o, r in zip(dims, begin, end, beyond, reach, strict=True)))
    x = array(2, 3, *dims)
    check(model([node("AveragePool" if average else "MaxPool", ["x"], **attributes)], {"x": x}, ["y"]), {"x": x})


def test_pooling_a_view_of_channels_innermost() -> None:
    x = array(2, 14, 15, 6)
    nodes = [
        node("Transpose", ["x"], perm=[0, 3, 1, 2], outputs=["t"]),
        node("MaxPool", ["t"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    ]
    check(model(nodes, {"x": x}, ["y"]), {"x": x})


def test_negative_numbers_beside_padding() -> None:
    x = -np.abs(array(1, 2, 5, 20)) - 1
    check(model([node("MaxPool", ["x"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {"x": x}, ["y"]), {"x": x})


def test_indices_are_refused() -> None:
    x = array(1, 1, 4, 4)
    made = model([node("MaxPool", ["x"], outputs=["y", "i"], kernel_shape=[2, 2])], {"x": x}, ["y", "i"])
    with pytest.raises(core.Unsupported, match="Indices"):
        engine(made, {"x": x})


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_a_window_longer_than_its_input_is_filled_by_ceil_mode(op: str, include: int) -> None:
    """As networks write global pooling: a window as long as they are wide, over maps that are smaller."""
    counted = {"count_include_pad": include} if op == "AveragePool" else {}
    pool = node(op, ["x"], kernel_shape=[20, 20], strides=[20, 20], ceil_mode=1, **counted)
    check(model([pool], {"x": (x := array(2, 3, 1, 7))}, ["y"]), {"x": x})


def test_a_window_longer_than_its_input_is_an_error() -> None:
    made = model([node("MaxPool", ["x"], kernel_shape=[2, 2])], {"x": array(1, 1, 4, 4)}, ["y"])
    made.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    with pytest.raises(core.Error, match="longer"):
        engine(made, {"x": array(1, 1, 4, 1)})


MODES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
SIZES = [(10, 14), (5, 7), (15, 21), (3, 4), (1, 1), (13, 5), (64, 70)]


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("coordinates", MODES)
@pytest.mark.parametrize("to", SIZES)
def test_resize_by_sizes(mode: str, coordinates: str, to: tuple[int, int]) -> None:
    x = array(2, 3, 5, 7)
    resize = node("Resize", ["x", "", "", "to"], mode=mode, coordinate_transformation_mode=coordinates)
    check(model([resize], {"x": x}, ["y"], {"to": np.array([2, 3, *to])}), {"x": x})


@pytest.mark.parametrize("coordinates", [*MODES, "half_pixel_symmetric"])
@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest_neighbours_of_every_size(coordinates: str, nearest: str) -> None:
    """Where an old element lies halfway, rounding of the coordinate decides: it must be done as ONNX Runtime does."""
    resize = node(
        "Resize", ["x", "", "", "to"], mode="nearest", coordinate_transformation_mode=coordinates, nearest_mode=nearest
    )
    for before in range(1, 24, 3):
        x = np.tile(np.arange(before, dtype=np.float32), (1, 1, 2, 1))
        for after in range(1, 24):
            made = model([resize], {"x": x}, ["y"], {"to": np.array([1, 1, 3, after])})
            np.testing.assert_array_equal(
                engine(made, {"x": x})["y"], onnxruntime(made, {"x": x})["y"], f"{before} to {after}"
            )


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("scales", [(2, 2), (3, 2), (0.5, 0.5), (1.7, 2.3), (1, 2), (1, 1)])
@pytest.mark.parametrize("width", [4, 16, 20, 33])
def test_resize_by_scales(mode: str, scales: tuple[float, float], width: int) -> None:
    x = array(1, 3, 6, width)
    resize = node("Resize", ["x", "", "scales"], mode=mode)
    check(model([resize], {"x": x}, ["y"], {"scales": np.array([1, 1, *scales], np.float32)}), {"x": x})


def test_cubic_without_what_is_outside() -> None:
    x = array(1, 2, 6, 7)
    resize = node("Resize", ["x", "", "", "to"], mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5)
    check(model([resize], {"x": x}, ["y"], {"to": np.array([1, 2, 11, 9])}), {"x": x})


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_some_axes_keeps_their_ratio(policy: str, mode: str) -> None:
    x = array(1, 2, 6, 8)
    resize = node("Resize", ["x", "", "", "to"], mode=mode, axes=[2, 3], keep_aspect_ratio_policy=policy)
    check(model([resize], {"x": x}, ["y"], {"to": np.array([13, 9])}), {"x": x})


def test_resize_with_channels_innermost() -> None:
    x = array(2, 9, 11, 20)
    nodes = [
        node("Transpose", ["x"], perm=[0, 3, 1, 2], outputs=["t"]),
        node("Resize", ["t", "", "", "to"], mode="linear"),
    ]
    check(model(nodes, {"x": x}, ["y"], {"to": np.array([2, 20, 18, 15])}), {"x": x})


def test_linear_resize_is_torchs() -> None:
    x = array(1, 3, 9, 11)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=(20, 5), mode="bilinear", align_corners=False
    ).numpy()
    made = model([node("Resize", ["x", "", "", "to"], mode="linear", coordinate_transformation_mode="pytorch_half_pixel")],
                 {"x": x}, ["y"], {"to": np.array([1, 3, 20, 5])})  # fmt: skip
    np.testing.assert_allclose(engine(made, {"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample_of_old(mode: str) -> None:
    x = array(1, 2, 4, 5)
    made = model(
        [node("Upsample", ["x", "scales"], mode=mode)],
        {"x": x},
        ["y"],
        {"scales": np.array([1, 1, 2, 3], np.float32)},
        opset=9,
    )
    check(made, {"x": x})


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_old(mode: str) -> None:
    x = array(1, 2, 4, 5)
    made = model(
        [node("Resize", ["x", "scales"], mode=mode)],
        {"x": x},
        ["y"],
        {"scales": np.array([1, 1, 2, 1.5], np.float32)},
        opset=10,
    )
    check(made, {"x": x})


@pytest.mark.parametrize("attributes", [{"antialias": 1}, {"coordinate_transformation_mode": "tf_crop_and_resize"}])
def test_what_resize_refuses(attributes: dict[str, Any]) -> None:
    x = array(1, 1, 4, 4)
    made = model(
        [node("Resize", ["x", "", "", "to"], mode="linear", **attributes)],
        {"x": x},
        ["y"],
        {"to": np.array([1, 1, 2, 2])},
    )
    with pytest.raises(core.Unsupported):
        engine(made, {"x": x})
