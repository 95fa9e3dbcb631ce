# SPDX-License-Identifier: Apache-2.0
"""Batches that are run image by image, where images do not meet. Oracle: the whole batch in ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import featherweight as fw
import featherweight_engine as core
from tests.engine.networks import ALL
from tests.engine.nodes import model, node, onnxruntime

RNG = np.random.default_rng(0)
BATCH = 3


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, dtype=np.float32)


def decided(made: onnx.ModelProto, inputs: Mapping[str, Any]) -> str:
    """The key under which it was decided whether images go one by one; "" where they cannot."""
    engine = core.Engine(made.SerializeToString(), threads=2)
    engine.run([inputs[name] for name, *_ in engine.inputs])
    return next((key for key in engine.decisions if key.startswith("images/")), "")


def in_both_ways(made: onnx.ModelProto, inputs: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """Images can go one by one, and the answer is ONNX Runtime's so and together."""
    key, expected = decided(made, inputs), onnxruntime(made, inputs)
    assert key
    for way in ("one by one", "together"):
        engine = core.Engine(made.SerializeToString(), threads=2, decisions={key: way})
        arrays = [inputs[name] for name, *_ in engine.inputs]
        for _ in range(2):
            for (name, *_), found in zip(engine.outputs, engine.run(arrays), strict=True):
                scale = float(np.abs(expected[name]).max(initial=1))
                np.testing.assert_allclose(found, expected[name], rtol=tolerance, atol=tolerance * scale, err_msg=way)
        assert engine.decisions[key] == way
        steps = sum(row["flops"] for row in engine.profile(arrays))
        assert steps == pytest.approx(
            sum(row["flops"] for row in core.Engine(made.SerializeToString()).profile(arrays))
        )


def together(made: onnx.ModelProto, x: NDArray[np.float32]) -> None:
    """Images cannot go one by one, and the answer is ONNX Runtime's."""
    assert decided(made, {"x": x}) == ""
    engine = core.Engine(made.SerializeToString(), threads=2)
    for found, expected in zip(engine.run([x]), onnxruntime(made, {"x": x}).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


X = normal(BATCH, 4, 6, 5)
SQUARE = normal(BATCH, BATCH, 6, 5)  # as many channels as images
CONSTANTS = {
    "w": normal(4, 4, 3, 3),
    "b": normal(4),
    "k": normal(1, 4, 1, 1),
    "per": normal(BATCH, 1, 1, 1),
    "v": normal(8, 8),
    "f": normal(120, 7),
    "table": normal(9, 6),
    "one": np.array([1]),
    "zero": np.array([0]),
    "two": np.array([2]),
    "flat": np.array([-1, 120]),
    "keep": np.array([0, 2, -1]),
    "mixed": np.array([-1, 240 // 2 * BATCH]),
    "batch": np.array([BATCH, 120]),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "more": np.array([2, 1, 1, 1], np.float32),
}
CONV = node("Conv", ["x", "w", "b"], outputs=["c"], pads=[1] * 4)

APART: dict[str, list[onnx.NodeProto]] = {
    "conv": [CONV, node("Relu", ["c"], outputs=["r"]), node("Add", ["r", "x"])],
    "channels": [node("Mul", ["x", "k"], outputs=["m"]), node("Softmax", ["m"], axis=1)],
    "flatten": [node("Flatten", ["x"], outputs=["t"]), node("MatMul", ["t", "f"])],
    "gemm": [node("Flatten", ["x"], outputs=["t"]), node("Gemm", ["t", "f"])],
    "reshape": [CONV, node("Reshape", ["c", "flat"], outputs=["t"]), node("MatMul", ["t", "f"])],
    "reshape that keeps": [node("Reshape", ["x", "keep"])],
    "pool": [node("MaxPool", ["x"], outputs=["p"], kernel_shape=[2, 2]), node("GlobalAveragePool", ["p"])],
    "resize": [node("Resize", ["x", "", "scales"], mode="linear")],
    "mean": [node("ReduceMean", ["x", "two"], keepdims=0)],
    "slice": [node("Slice", ["x", "zero", "two", "one"])],
    "split": [node("Split", ["x"], outputs=["p", "q"], axis=1, num_outputs=2), node("Mul", ["p", "q"])],
    "joined": [node("Concat", ["x", "x"], axis=1, outputs=["t"]), node("Transpose", ["t"], perm=[0, 2, 3, 1])],
    "squeeze": [node("Unsqueeze", ["x", "one"], outputs=["t"]), node("Squeeze", ["t", "one"])],
    "attention": [
        node("Transpose", ["x"], outputs=["t"], perm=[0, 1, 3, 2]),
        node("MatMul", ["x", "t"], outputs=["s"]),
        node("Softmax", ["s"], outputs=["a"]),
        node("MatMul", ["a", "x"]),
    ],
    "slope": [node("PRelu", ["x", "k"])],
}

TOGETHER: dict[str, list[onnx.NodeProto]] = {
    "softmax over the batch": [CONV, node("Softmax", ["c"], axis=0)],
    "mean over the batch": [node("ReduceMean", ["x", "zero"], outputs=["m"]), node("Sub", ["x", "m"])],
    "mean over everything": [node("ReduceMean", ["x"], outputs=["m"], keepdims=0), node("Sub", ["x", "m"])],
    "another for each image": [node("Mul", ["x", "per"])],
    "images change places": [node("Transpose", ["x"], perm=[1, 0, 2, 3])],
    "mixed by a reshape": [node("Reshape", ["x", "mixed"])],
    "joined along the batch": [node("Concat", ["x", "x"], axis=0)],
    "some images": [node("Slice", ["x", "zero", "two", "zero"])],
    "a turned slice": [node("Slice", ["x", "minus", "far", "zero", "minus"])],
    "more images": [node("Resize", ["x", "", "more"], mode="nearest")],
    "picked": [node("Gather", ["x", "order"], axis=0)],
    "gram": [
        node("Flatten", ["x"], outputs=["t"]),
        node("Transpose", ["t"], outputs=["u"], perm=[1, 0]),
        node("MatMul", ["t", "u"], outputs=["g"]),
        node("MatMul", ["g", "t"]),
    ],
    "counted by the batch": [
        node("Shape", ["x"], outputs=["s"], start=0, end=1),
        node("Cast", ["s"], outputs=["n"], to=onnx.TensorProto.FLOAT),
        node("Div", ["x", "n"]),
    ],
    "numbered": [
        node("Shape", ["x"], outputs=["s"], start=0, end=1),
        node("Squeeze", ["s"], outputs=["n"]),
        node("Range", ["start", "n", "step"], outputs=["i"]),
        node("Cast", ["i"], outputs=["f32"], to=onnx.TensorProto.FLOAT),
        node("Reshape", ["f32", "column"], outputs=["j"]),
        node("Add", ["x", "j"]),
    ],
    "running sums": [node("CumSum", ["x", "start"])],
    "an axis in front": [node("Unsqueeze", ["x", "zero"])],
    "another output": [node("Add", ["k", "k"], outputs=["z"]), node("Relu", ["x"])],
}
MORE = {
    "minus": np.array([-1]),
    "far": np.array([-9]),
    "order": np.array([2, 0, 1]),
    "start": np.array(0),
    "step": np.array(1),
    "column": np.array([-1, 1, 1, 1]),
}


@pytest.mark.parametrize("nodes", APART.values(), ids=APART)
def test_images_that_do_not_meet_may_go_one_by_one(nodes: list[onnx.NodeProto]) -> None:
    in_both_ways(model(nodes, {"x": X}, ["y"], CONSTANTS), {"x": X})


@pytest.mark.parametrize("name", TOGETHER)
def test_images_that_meet_stay_together(name: str) -> None:
    outputs = ["y", "z"] if name == "another output" else ["y"]
    made = model(TOGETHER[name], {"x": X}, outputs, CONSTANTS | MORE)
    together(made, X)


# Of a single image these have the right shape, and the wrong numbers.
THERE_AND_BACK: dict[str, list[onnx.NodeProto]] = {
    "Transpose": [
        node("Transpose", ["x"], outputs=["t"], perm=[1, 0, 2, 3]),
        node("Softmax", ["t"], outputs=["s"], axis=1),
        node("Transpose", ["s"], perm=[1, 0, 2, 3]),
    ],
    "Softmax": [node("Softmax", ["x"], axis=-4)],
    "Reduce": [
        node("ReduceMean", ["x", "zero"], outputs=["m"], keepdims=1),
        node("Add", ["m", "x"]),
    ],
    "Gather": [node("Gather", ["x", "turned"], outputs=["t"], axis=0), node("Add", ["t", "x"])],
    "Concat": [
        node("Concat", ["x", "x"], outputs=["t"], axis=0),
        node("Slice", ["t", "one", "four", "zero"], outputs=["s"]),
        node("Add", ["s", "x"]),
    ],
    "Split": [
        node("Split", ["x"], outputs=["p", "q", "r"], axis=0, num_outputs=3),
        node("Add", ["p", "x"]),
    ],
    "MatMul": [
        node("ReduceMean", ["x", "rest"], outputs=["t"], keepdims=0),
        node("Transpose", ["t"], outputs=["u"], perm=[1, 0]),
        node("MatMul", ["u", "t"]),
    ],
    "Shape": [
        node("Shape", ["x"], outputs=["s"], start=0, end=1),
        node("Cast", ["s"], outputs=["n"], to=onnx.TensorProto.FLOAT),
        node("Div", ["x", "n"]),
    ],
    "Expand": [
        node("Shape", ["x"], outputs=["s"]),
        node("Expand", ["k", "s"], outputs=["e"]),
        node("Add", ["e", "x"]),
    ],
}


@pytest.mark.parametrize("nodes", THERE_AND_BACK.values(), ids=THERE_AND_BACK)
def test_what_has_the_right_shape_may_still_meet(nodes: list[onnx.NodeProto]) -> None:
    more = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "four": np.array([4]),
        "turned": np.array([2, 0, 1]),
        "rest": np.array([2, 3]),
        "k": normal(1, BATCH, 1, 1),
    }
    made = model(nodes, {"x": SQUARE}, ["y"], more)
    together(made, SQUARE)


def test_an_axis_that_is_as_long_as_the_batch_is_none() -> None:
    nodes = [node("MatMul", ["x", "small"], outputs=["m"]), node("Softmax", ["m"], axis=1)]
    in_both_ways(model(nodes, {"x": SQUARE}, ["y"], {"small": normal(5, 2)}), {"x": SQUARE})


def test_a_shape_that_is_taken_from_the_batch_may_be_used_as_a_shape() -> None:
    nodes = [
        node("Shape", ["x"], outputs=["n"], start=0, end=1),
        node("Concat", ["n", "rest"], axis=0, outputs=["s"]),
        node("Reshape", ["x", "s"]),
    ]
    in_both_ways(model(nodes, {"x": SQUARE}, ["y"], {"rest": np.array([6, -1])}), {"x": SQUARE})


def test_tokens_are_looked_up_for_each_sequence() -> None:
    ids = RNG.integers(0, 9, (BATCH, 5))
    nodes = [node("Gather", ["table", "ids"], outputs=["e"]), node("LayerNormalization", ["e", "scale"])]
    made = model(nodes, {"ids": ids}, ["y"], CONSTANTS | {"scale": normal(6)})
    in_both_ways(made, {"ids": ids})


def test_a_batch_that_stands_in_the_file_stays_together() -> None:
    made = model([node("Reshape", ["x", "batch"])], {"x": X}, ["y"], CONSTANTS)
    assert decided(made, {"x": X}) == ""


def test_inputs_of_different_lengths_are_no_batch() -> None:
    other = normal(BATCH + 1, 4)
    nodes = [node("Relu", ["x"], outputs=["y"]), node("Relu", ["o"], outputs=["z"])]
    assert decided(model(nodes, {"x": X, "o": other}, ["y", "z"]), {"x": X, "o": other}) == ""


def test_a_single_image_needs_no_decision() -> None:
    assert decided(model([CONV, node("Relu", ["c"])], {"x": X[:1]}, ["y"], CONSTANTS), {"x": X[:1]}) == ""


@pytest.mark.parametrize("network", ["resnet", "mobilenet", "yolo"])
def test_networks_of_images_may_go_one_by_one(network: str, tmp_path: Path) -> None:
    module, example = ALL[network]()
    made = onnx.load(fw.export_onnx(module, example, tmp_path / "model.onnx").path)
    inputs = {value.name: normal(BATCH, *example[0].shape[1:]) for value in made.graph.input}
    in_both_ways(made, inputs, 1e-4)
