# SPDX-License-Identifier: Apache-2.0
"""ONNX's own tests of nodes, run through the engine. `python -m tests.engine.backend` prints docs/engine-ops.md's table.

The `onnx` package carries a model, inputs and expected outputs for each. A case belongs to those that the engine claims if
it has a rule for every op in it. Such a case passes, or is refused, or fails: nothing is left out. Those that are refused
and have elements other than the engine computes with (float, int32, int64, bool) are counted by themselves.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

import featherweight_engine as core

STATES = ("passed", "refused", "other types", "failed")
COMPUTED = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case, one of STATES, and why."""

    case: str
    op: str
    state: str
    why: str = ""


@functools.cache
def cases() -> list[TestCase]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the making of the cases
        return [case for case in load_model_tests(kind="node") if case.model is not None]


def claimed() -> Iterator[TestCase]:
    ops = set(core.op_names())
    for case in cases():
        nodes = case.model.graph.node
        if nodes and all(node.domain in ("", "ai.onnx") and node.op_type in ops for node in nodes):
            yield case


def with_constants(model: onnx.ModelProto, inputs: Sequence[NDArray[Any]], kept: int) -> onnx.ModelProto:
    """The same model with every input but the first few an initializer."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value, array in list(zip(model.graph.input, inputs, strict=True))[kept:]:
        made.graph.initializer.append(numpy_helper.from_array(array, value.name))
    del made.graph.input[kept:]
    return made


def answer(model: onnx.ModelProto, inputs: Sequence[NDArray[Any]], instruction_set: str) -> list[NDArray[Any]]:
    engine = core.Engine(model.SerializeToString(), threads=2, instruction_set=instruction_set)
    return engine.run([np.asarray(array, order="C") for array in inputs])


def arrays(values: Sequence[Any]) -> list[NDArray[Any]] | None:
    """The values of a data set, or None where some are no tensors of numbers: sequences, texts."""
    made = [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for v in values]
    if not all(isinstance(v, np.ndarray | np.generic) and np.asarray(v).dtype.kind not in "OUS" for v in made):
        return None
    return [np.asarray(v) for v in made]


def run(case: TestCase, instruction_set: str = "") -> Outcome:
    op = case.model.graph.node[0].op_type if len(case.model.graph.node) == 1 else "several"
    for data in case.data_sets:
        state, why = compared(case, data, instruction_set)
        if state != "passed":
            return Outcome(case.name, op, "other types" if state == "refused" and of_other_types(case) else state, why)
    return Outcome(case.name, op, "passed")


def of_other_types(case: TestCase) -> bool:
    values = [*case.model.graph.input, *case.model.graph.output]
    return any(value.type.tensor_type.elem_type not in COMPUTED for value in values)


def compared(case: TestCase, data: tuple[Sequence[Any], Sequence[Any]], instruction_set: str) -> tuple[str, str]:
    inputs, outputs = arrays(data[0]), arrays(data[1])
    # Parameters are inputs in these models. What the engine wants as constants is given as such: first all but the first
    # input, then all, as those must be that NumPy has no type of its own for.
    counts = [0] if inputs is None or any(array.dtype.kind == "V" for array in inputs) else [len(inputs), 1, 0]
    why = ""
    for kept in counts:
        try:
            if inputs is None or outputs is None:
                core.Engine(case.model.SerializeToString())
                return "failed", "it is read, though its values are no tensors"
            found = answer(with_constants(case.model, inputs, kept), inputs[:kept], instruction_set)
            break
        except core.Unsupported as refusal:
            why = str(refusal)
            if "must be a constant" not in why:
                return "refused", why
        except (core.Error, TypeError) as error:
            return "failed", f"{type(error).__name__}: {error}"
    else:
        return "refused", why
    for value, expected in zip(found, outputs, strict=True):
        if value.dtype != expected.dtype or value.shape != expected.shape:
            return "failed", f"{value.dtype} {value.shape}, not {expected.dtype} {expected.shape}"
        if not np.allclose(value, expected, rtol=case.rtol, atol=case.atol, equal_nan=value.dtype.kind == "f"):
            return "failed", "another answer"
    return "passed", ""


def reason(why: str) -> str:
    """Without the node, and the names and numbers of this one case."""
    said = why.split(": ")[-1]
    return re.sub(r" is [0-9.]+$", " other than the default", said)


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by op, in Markdown, with the reasons for what is refused; an op with no case of its own has a row too."""
    found: dict[str, list[Outcome]] = {op: [] for op in core.op_names()}
    for each in outcomes:
        found.setdefault(each.op, []).append(each)
    several = found.pop("several", [])
    rows = [*sorted(found.items()), ("several in one graph", several), ("all", list(outcomes))]
    lines = [f"| op | {' | '.join(STATES[:3])} | refused because |", "| --- | ---: | ---: | ---: | --- |"]
    for op, here in rows:
        counts = [sum(each.state == state for each in here) for state in STATES[:3]]
        why = {reason(each.why) for each in here if each.state == "refused" and op != "all"}
        lines.append(f"| {op} | {' | '.join(map(str, counts))} | {'; '.join(sorted(why))} |")
    lines += [f"failed: {each.case}: {each.why}" for each in outcomes if each.state == "failed"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([run(case) for case in claimed()]))
