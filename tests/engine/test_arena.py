# SPDX-License-Identifier: Apache-2.0
"""Where activations lie: never on each other, and with several threads in at most twice the room that one thread needs."""

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import featherweight_engine as core
from tests.engine.nodes import check, model, node


def image(channels: int, size: int) -> NDArray[np.float32]:
    return np.random.default_rng(size).standard_normal((1, channels, size, size), dtype=np.float32)


def arena(made: onnx.ModelProto, x: NDArray[np.float32], threads: int) -> int:
    return core.Engine(made.SerializeToString(), threads=threads).arena_bytes([x])


def chain(x: NDArray[np.float32], sizes: list[int]) -> onnx.ModelProto:
    """A convolution of its own at each size, all joined at the end so that each lives to the end."""
    channels = x.shape[1]
    constants: dict[str, NDArray[np.float32]] = {"w": np.eye(channels, dtype=np.float32)[:, :, None, None]}
    nodes, means = [], []
    for i, size in enumerate(sizes):
        constants[f"scales{i}"] = np.array([1, 1, size / x.shape[2], size / x.shape[2]], np.float32)
        nodes += [
            node("Resize", ["x", "", f"scales{i}"], outputs=[f"r{i}"], mode="nearest"),
            node("Conv", [f"r{i}", "w"], outputs=[f"c{i}"]),
        ]
        means.append(f"m{i}")
    nodes += [node("GlobalAveragePool", [f"c{i}"], outputs=[f"m{i}"]) for i in range(len(sizes))]
    return model([*nodes, node("Sum", means)], {"x": x}, ["y"], constants)


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_planes_of_odd_sizes_take_little_more_than_they_are(channels: int) -> None:
    """67 x 67 floats are no whole number of cache lines: channels that begin alike are 16 planes apart."""
    x = image(channels, 67)
    nodes = [node("Sigmoid", ["x"], outputs=["a"]), node("MaxPool", ["a"], kernel_shape=[3, 3], pads=[1] * 4)]
    made = model(nodes, {"x": x}, ["y"])
    assert 2 * x.nbytes <= arena(made, x, 1) <= 1.1 * 2 * x.nbytes + 1000
    assert arena(made, x, 2) <= 2 * arena(made, x, 1)
    check(made, {"x": x})


def test_planes_of_many_sizes_share_the_arena_where_apart_they_would_waste_it() -> None:
    x = image(16, 64)
    nodes = [node("Sigmoid", ["x"], outputs=["p0"])]
    nodes += [node("MaxPool", [f"p{i}"], outputs=[f"p{i + 1}"], kernel_shape=[3, 3]) for i in range(29)]
    made = model([*nodes, node("Relu", ["p29"])], {"x": x}, ["y"])
    assert arena(made, x, 2) <= 2 * arena(made, x, 1)
    check(made, {"x": x})


def test_what_is_alive_together_lies_apart() -> None:
    x = image(16, 33)
    made = chain(x, [66, 33, 99, 66, 132])
    assert arena(made, x, 3) > 16 * 4 * (2 * 66**2 + 33**2 + 99**2 + 132**2)
    check(made, {"x": x})
