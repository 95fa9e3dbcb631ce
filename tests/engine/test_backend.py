# SPDX-License-Identifier: Apache-2.0
import functools
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.backend.test.case.test_case import TestCase as Case

import featherweight_engine as core
from tests.engine import backend


@functools.cache
def outcomes(instruction_set: str) -> list[backend.Outcome]:
    return [backend.run(case, instruction_set) for case in backend.claimed()]


@pytest.mark.parametrize("instruction_set", core.instruction_sets())
def test_no_node_of_onnx_gets_a_wrong_answer(instruction_set: str) -> None:
    found = outcomes(instruction_set)
    assert [each for each in found if each.state == "failed"] == []
    assert sum(each.state == "passed" for each in found) >= 640


def test_the_docs_have_a_row_for_each_op_that_is_claimed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine-ops.md").read_text()
    ops = re.findall(r"^\| (\w+) \| \d+ ", page, re.MULTILINE)
    assert sorted(set(ops) - {"all"}) == sorted(core.op_names())


def case(expected: np.ndarray) -> Case:
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (2,)) for name in "ab"],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (2,))],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    values = np.ones(2, np.float32)
    return Case("case", "case", None, None, made, [([values, values], [expected])], "node", 1e-3, 1e-7)


@pytest.mark.parametrize(
    ("expected", "state"),
    [
        (np.float32([2, 2]), "passed"),
        (np.float32([2, 3]), "failed"),
        (np.float64([2, 2]), "failed"),
        (np.float32([[2, 2]]), "failed"),
    ],
)
def test_the_harness_sees_values_types_and_shapes(expected: np.ndarray, state: str) -> None:
    assert backend.run(case(expected)).state == state
