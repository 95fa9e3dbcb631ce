# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, or sound and up to no good: an answer or a clear error, in bounded time and memory.

`make fuzz` runs the same for as long as one likes, and a fuzzer that is told which code it reached.
"""

import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import featherweight_engine as core
from tests.engine import hostile
from tests.engine.builds import HOSTILE, MEMORY, ROOT

SANITIZED = (
    "FEATHERWEIGHT_SANITIZED" in os.environ
)  # then address space is used by the terabyte, and a crash says where


@pytest.mark.parametrize("number", range(len(hostile.models())))
def test_what_is_damaged_was_sound(number: int) -> None:
    name = hostile.NODES[number][0] if number < len(hostile.NODES) else "several nodes"
    assert hostile.attempt(hostile.models()[number], 2) == "ran", name


def test_every_op_is_there() -> None:
    """Whoever adds an op adds its line to hostile.NODES."""
    ops = {node.op_type for data in hostile.models() for node in onnx.load_from_string(data).graph.node}
    assert ops >= set(core.op_names())


def test_damaged_and_senseless_files_end_no_process(tmp_path: Path) -> None:
    """In a process of its own, as one that dies takes pytest with it; the file at work is left behind."""
    last = tmp_path / "last.onnx"
    limit = [] if SANITIZED else [str(MEMORY)]
    ran = subprocess.run(
        [*HOSTILE, "-", "1", "3000", str(last), *limit], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stderr[-2000:]}\nthe file: {last.read_bytes().hex()}"
    assert "'ran'" in ran.stdout and "'error'" in ran.stdout and "'unsupported'" in ran.stdout, ran.stdout


def constants(**values: Any) -> list[TensorProto]:
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


@pytest.mark.parametrize(
    ("nodes", "initializers"),
    [
        ([helper.make_node("Range", ["a", "b", "c"], ["y"])], constants(a=0, b=1 << 31, c=1)),
        (
            [helper.make_node("Range", ["a", "b", "c"], ["y"])],
            constants(a=np.float32(0), b=np.float32(2e9), c=np.float32(1)),
        ),
        # A broadcast takes no memory until something wants its elements.
        (
            [helper.make_node("Expand", ["a", "b"], ["e"]), helper.make_node("Reshape", ["x", "e"], ["y"])],
            constants(a=1, b=[1 << 28]),
        ),
        # Many that are small enough each.
        (
            [helper.make_node("Range", ["a", "b", "c"], [f"y{i}" if i else "y"]) for i in range(40)],
            constants(a=0, b=1 << 24, c=1),
        ),
    ],
    ids=["range", "range_of_floats", "broadcast", "many"],
)
def test_a_short_file_cannot_have_constants_without_end(nodes: list[Any], initializers: list[TensorProto]) -> None:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [
            helper.make_tensor_value_info(node.output[0], TensorProto.UNDEFINED, None)
            for node in nodes[-40:]
            if node.output[0].startswith("y")
        ],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    engine = core.Engine(model.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(core.Unsupported, match="too large to keep"):
        engine.run([np.ones(1, np.float32)])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert SANITIZED or grown < 1_200_000, f"{grown} KiB more"
