# SPDX-License-Identifier: Apache-2.0
"""Small valid models, and what becomes of them when their bytes are damaged.

`python -m tests.engine.hostile FOLDER` writes the models for the fuzzer (engine/fuzz), with the cases of the onnx package.
Run by test_hostile.py as a process of its own: `python -m tests.engine.hostile - SEED ROUNDS`.
"""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import featherweight_engine as core

# One node a line: its op, its inputs (a shape is a float input, an array a constant, None is left out), its attributes.
Given = tuple[int, ...] | np.ndarray[Any, Any] | np.generic | None
I64 = np.int64


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, I64)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


NODES: list[tuple[str, list[Given], dict[str, Any]]] = [
    (
        "Conv",
        [(1, 3, 6, 6), floats(4, 3, 3, 3), floats(4)],
        {"pads": [1, 1, 1, 1], "strides": [2, 1], "dilations": [1, 2]},
    ),
    ("Conv", [(1, 4, 9), floats(4, 1, 3)], {"group": 4, "auto_pad": "SAME_UPPER"}),
    ("MatMul", [(2, 3, 4), floats(4, 5)], {}),
    ("MatMul", [(2, 3, 4), (2, 4, 5)], {}),
    ("Gemm", [(3, 4), floats(5, 4), floats(5)], {"transB": 1, "alpha": 0.5}),
    ("BatchNormalization", [(1, 3, 4), floats(3), floats(3), floats(3), np.abs(floats(3))], {"epsilon": 1e-3}),
    ("LayerNormalization", [(2, 3, 8), floats(8), floats(8)], {"axis": -1}),
    ("InstanceNormalization", [(2, 3, 8), floats(3), floats(3)], {}),
    ("GroupNormalization", [(2, 4, 8), floats(2), floats(2)], {"num_groups": 2}),
    ("Softmax", [(2, 3, 8)], {"axis": 1}),
    ("MaxPool", [(1, 2, 7, 7)], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    (
        "AveragePool",
        [(1, 2, 7, 7)],
        {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1, "dilations": [1, 2]},
    ),
    ("GlobalAveragePool", [(1, 2, 7, 7)], {}),
    ("Resize", [(1, 2, 4, 4), None, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}),
    (
        "Resize",
        [(1, 2, 4, 4), None, None, ints(1, 2, 7, 3)],
        {"mode": "nearest", "coordinate_transformation_mode": "align_corners"},
    ),
    ("ReduceMean", [(2, 3, 4), ints(1, -1)], {"keepdims": 0}),
    ("ReduceMax", [(2, 3, 4), ints(0)], {}),
    ("ArgMax", [(2, 3, 4)], {"axis": 1, "keepdims": 0}),
    ("CumSum", [(2, 3, 4), np.int64(1)], {"exclusive": 1, "reverse": 1}),
    ("Clip", [(2, 3), np.float32(-1), np.float32(1)], {}),
    ("Where", [np.array([True, False, True]), (2, 3), (1, 3)], {}),
    ("Cast", [(2, 3)], {"to": int(TensorProto.INT32)}),
    ("Pow", [(2, 3), np.float32(2)], {}),
    ("Mod", [ints(5, -7), ints(3, 4)], {"fmod": 0}),
    ("Div", [ints(5, -7), ints(3, 4)], {}),
    ("PRelu", [(2, 3, 4), floats(3, 1)], {}),
    ("Transpose", [(2, 3, 4)], {"perm": [2, 0, 1]}),
    ("Reshape", [(2, 3, 4), ints(0, -1, 2)], {"allowzero": 0}),
    ("Flatten", [(2, 3, 4)], {"axis": 2}),
    ("Squeeze", [(2, 1, 4), ints(1)], {}),
    ("Unsqueeze", [(2, 4), ints(0, 3)], {}),
    ("Slice", [(4, 9), ints(3, -1), ints(0, -100), ints(0, 1), ints(-1, -2)], {}),
    ("Split", [(2, 7), ints(3, 4)], {"axis": 1}),
    ("Split", [(2, 8)], {"axis": -1, "num_outputs": 2}),
    ("Concat", [(2, 3), (2, 4)], {"axis": 1}),
    ("Expand", [(2, 1, 4), ints(3, 2, 5, 4)], {}),
    ("Tile", [(2, 3), ints(2, 3)], {}),
    ("Pad", [(2, 3), ints(1, 0, 0, 2), np.float32(3)], {"mode": "constant"}),
    ("Pad", [(4, 5), ints(1, 2, 3, 2)], {"mode": "reflect"}),
    ("Gather", [(5, 3), ints(0, -1, 4)], {"axis": 0}),
    ("GatherElements", [(3, 3), np.array([[0, 1], [2, -1]])], {"axis": 1}),
    ("GatherND", [(3, 3), np.array([[0, 1], [2, 1]])], {}),
    ("ScatterND", [(4, 3), np.array([[1], [3]]), (2, 3)], {}),
    ("DepthToSpace", [(1, 8, 2, 2)], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [(1, 2, 4, 4)], {"blocksize": 2}),
    ("Shape", [(2, 3, 4)], {"start": 1, "end": -1}),
    ("Size", [(2, 3, 4)], {}),
    ("Range", [np.array(2, I64), np.array(11, I64), np.array(3, I64)], {}),
    ("ConstantOfShape", [ints(2, 3)], {"value": numpy_helper.from_array(np.array([7], I64))}),
    ("Trilu", [(4, 4), np.array(1, I64)], {"upper": 1}),
    ("OneHot", [ints(1, 0, 2), np.array(4, I64), np.array([0, 1], np.float32)], {"axis": -1}),
]
UNARY = [
    "Abs",
    "Ceil",
    "Cos",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "GlobalMaxPool",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "LogSoftmax",
    "LpNormalization",
    "Mish",
    "Neg",
    "Reciprocal",
    "Round",
    "Selu",
    "Sign",
    "Sin",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
    "Dropout",
]
BINARY = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Sub", "Sum", "CastLike"]
REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]
TRUTH = np.array([[True, False, True]])
NODES += [(op, [(1, 3, 4)], {}) for op in UNARY]
NODES += [(op, [(2, 3), (1, 3)], {}) for op in BINARY]
NODES += [(op, [(2, 3, 4), ints(1)], {"keepdims": 1}) for op in REDUCTIONS]
NODES += [(op, [TRUTH, TRUTH.T], {}) for op in ("And", "Or", "Xor")]
NODES += [
    ("Not", [TRUTH], {}),
    ("ArgMin", [(2, 3, 4)], {"axis": -1}),
    ("RMSNormalization", [(2, 3, 8), floats(8)], {"axis": -1}),
    ("Upsample", [(1, 2, 4, 4), np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}),
]
OUTPUTS = {"Split": 2}
OPSETS = {"RMSNormalization": 23, "Swish": 24, "Upsample": 9}  # others: 20


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[Any, ...]],
    constants: dict[str, Any],
    outputs: list[str],
    opset: int = 20,
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in constants.items()],
    )
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    ).SerializeToString()
    return made


def single(op: str, given: list[Given], attributes: dict[str, Any]) -> bytes:
    names = ["" if value is None else f"i{k}" for k, value in enumerate(given)]
    inputs = {name: value for name, value in zip(names, given, strict=True) if isinstance(value, tuple)}
    constants = {
        name: value for name, value in zip(names, given, strict=True) if isinstance(value, np.ndarray | np.generic)
    }
    outputs = [f"o{k}" for k in range(OUTPUTS.get(op, 1))]
    return model_of(
        [helper.make_node(op, names, outputs, **attributes)], inputs, constants, outputs, OPSETS.get(op, 20)
    )


def attention() -> bytes:
    """Shapes that are computed, as exporters write them, around the products of attention."""
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["batch"]),
        node("Unsqueeze", ["batch", "first"], ["batch1"]),
        node("Concat", ["batch1", "rest"], ["wanted"], axis=0),
        node("MatMul", ["x", "w"], ["qkv"]),
        node("Add", ["b", "qkv"], ["biased"]),
        node("Split", ["biased", "thirds"], ["q", "k", "v"], axis=-1),
        *(node("Reshape", [n, "wanted"], [f"{n}4"]) for n in "qkv"),
        *(node("Transpose", [f"{n}4"], [f"{n}t"], perm=[0, 2, 3, 1] if n == "k" else [0, 2, 1, 3]) for n in "qkv"),
        node("MatMul", ["qt", "kt"], ["scores"]),
        node("Mul", ["scores", "scale"], ["scaled"]),
        node("Softmax", ["scaled"], ["weights"], axis=-1),
        node("MatMul", ["weights", "vt"], ["heads"]),
        node("Transpose", ["heads"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "flat"], ["y"]),
    ]
    constants = {
        "zero": np.array(0, I64),
        "first": ints(0),
        "rest": ints(-1, 2, 4),
        "thirds": ints(8, 8, 8),
        "flat": ints(0, 0, -1),
        "scale": np.float32(0.5),
        "w": floats(8, 24),
        "b": floats(24),
    }
    return model_of(nodes, {"x": ("batch", 3, 8)}, constants, ["y"])


def block() -> bytes:
    """Convolutions with what is fused into them: folded normalisation, activations, a residual sum."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "s", "t", "m", "v"], ["n"]),
        node("Sigmoid", ["n"], ["g"]),
        node("Mul", ["n", "g"], ["a"]),
        node("Conv", ["a", "u"], ["d"]),
        node("Add", ["d", "x"], ["r"]),
        node("Relu", ["r"], ["e"]),
        node("GlobalAveragePool", ["e"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "h"], ["y"], transB=1),
    ]
    constants = {"w": floats(6, 4, 3, 3), "u": floats(4, 6, 1, 1), "h": floats(3, 4)}
    constants |= {"s": floats(6), "t": floats(6), "m": floats(6), "v": np.abs(floats(6))}
    return model_of(nodes, {"x": ("batch", 4, 5, 5)}, constants, ["y"])


def models() -> list[bytes]:
    """Of every op that the engine has, and of two groups that it fuses."""
    return [*(single(*each) for each in NODES), attention(), block()]


def cases() -> Iterator[bytes]:
    """The onnx package's own single-node models, small ones."""
    from onnx.backend.test.case.node import collect_testcases

    for case in collect_testcases(None):
        data = case.model.SerializeToString()
        if len(data) < 4000 and len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in core.op_names():
            yield data


def damaged(random: Random, originals: list[bytes]) -> bytes:
    """Bytes flipped, cut out, doubled, brought in from another model, and numbers put where they hurt."""
    data = bytearray(random.choice(originals))
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(data)) if data else 0
        kind = random.randrange(8)
        if kind == 0 and data:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1 and data:
            data[at] = random.choice((0, 1, 2, 0x7F, 0x80, 0xFF, random.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + random.randrange(1, 9)]
        elif kind == 4:
            data[at:at] = data[at : at + random.randrange(1, 40)]
        elif kind == 5:
            other = random.choice(originals)
            begin = random.randrange(len(other))
            data[at : at + random.randrange(16)] = other[begin : begin + random.randrange(40)]
        elif kind == 6:  # a number of ten bytes: -1, the largest, the smallest
            data[at : at + 1] = random.choice((b"\xff" * 9 + b"\x01", b"\xff" * 8 + b"\x7f", b"\x80" * 9 + b"\x01"))
        else:  # an element of a constant of 64 bits
            data[at : at + 8] = random.choice((-1, 1 << 40, -(1 << 63), (1 << 63) - 1, 1 << 31)).to_bytes(
                8, "little", signed=True
            )
    return bytes(data)


def edited(random: Random, originals: list[bytes]) -> bytes:
    """A sound file that asks for what makes no sense: attributes and constants of integers take other values."""
    odd = (
        -1,
        0,
        1,
        2,
        3,
        -2,
        7,
        64,
        -64,
        1 << 20,
        1 << 31,
        -(1 << 31),
        1 << 40,
        (1 << 62) + 1,
        (1 << 63) - 1,
        -(1 << 63),
    )
    model = onnx.load_from_string(random.choice(originals))
    lists: list[Any] = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.INT and random.random() < 0.3:
                attribute.i = random.choice(odd)
            elif attribute.type == onnx.AttributeProto.FLOAT and random.random() < 0.3:
                attribute.f = random.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
            elif attribute.type == onnx.AttributeProto.INTS:
                lists.append(attribute.ints)
        if node.attribute and random.random() < 0.1:
            del node.attribute[random.randrange(len(node.attribute))]
        if random.random() < 0.1:
            node.op_type = random.choice(core.op_names())
        if random.random() < 0.1 and node.input:
            node.input[random.randrange(len(node.input))] = random.choice(
                [*node.input, *(v.name for v in model.graph.initializer), ""]
            )
        if random.random() < 0.05:
            node.input.extend(random.choices([*node.input, ""], k=random.randrange(1, 3)))
    for each in lists:
        if each and random.random() < 0.4:
            each[random.randrange(len(each))] = random.choice(odd)
        elif random.random() < 0.1:
            each.append(random.choice(odd))
    for tensor in model.graph.initializer:
        if random.random() < 0.4:
            array = numpy_helper.to_array(tensor).copy()
            if array.dtype == I64 and array.size:
                array.flat[random.randrange(array.size)] = random.choice(odd)
            elif random.random() < 0.3:
                array = array.reshape(random.choice(((-1,), (1, *array.shape), (*array.shape, 1), array.T.shape)))
            elif random.random() < 0.3:
                array = array[:0] if array.ndim else array
            elif array.size and array.dtype == np.float32:
                array.flat[random.randrange(array.size)] = random.choice((np.nan, np.inf, -np.inf, 3e38, 0))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    if random.random() < 0.3:
        model.opset_import[0].version = random.randrange(1, 29)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if random.random() < 0.05:
                dim.dim_value = random.choice((0, 1, 2, 5))
    return bytes(model.SerializeToString())


def attempt(data: bytes, threads: int) -> str:
    """What becomes of a file: read, planned for small inputs, run where that is cheap."""
    try:
        engine = core.Engine(data, threads=threads)
        arrays = []
        for _, kind, shape in engine.inputs:
            dims = [size if isinstance(size, int) else 2 for size in shape or []]
            if kind not in (None, "float", "int64") or np.prod([float(d) for d in dims]) > 1 << 14:
                return "skipped"
            arrays.append(np.ones(dims, np.int64 if kind == "int64" else np.float32))
        if engine.arena_bytes(arrays) > 16 << 20:
            return "planned"
        engine.run(arrays)
    except core.Unsupported:
        return "unsupported"
    except core.Error:
        return "error"
    except MemoryError:
        return "memory"
    return "ran"


def hostile(seed: int, rounds: int) -> Iterator[bytes]:
    originals = models()
    generator = Random(seed)
    yield from originals
    for k in range(rounds):
        yield (damaged if k % 2 else edited)(generator, originals)


def write(folder: Path, files: Iterator[bytes] | list[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(files):
        (folder / f"{number}.onnx").write_bytes(data)


def main() -> None:
    if sys.argv[1] != "-":
        return write(Path(sys.argv[1]), [*models(), *cases()])
    seed, rounds = int(sys.argv[2]), int(sys.argv[3])
    last = Path(sys.argv[4])  # the file at work, for whoever finds the process dead
    if len(sys.argv) > 5:
        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[5]), int(sys.argv[5])))
    counts: dict[str, int] = {}
    for number, data in enumerate(hostile(seed, rounds)):
        last.write_bytes(data)
        result = attempt(data, 1 + number % 2)
        counts[result] = counts.get(result, 0) + 1
    print(counts)
    return None


if __name__ == "__main__":
    main()
