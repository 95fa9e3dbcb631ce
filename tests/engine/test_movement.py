# SPDX-License-Identifier: Apache-2.0
"""Ops that move elements, against ONNX Runtime and NumPy: views of views, copies between any two orders, indices."""

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import featherweight_engine as core
from tests.engine.nodes import Arrays, check, engine, model, node

KINDS = [np.float32, np.float64, np.float16, np.uint8, np.int64, np.bool_]


def array(*dims: int, kind: Any = np.float32, seed: int = 0) -> NDArray[Any]:
    return (100 * np.random.default_rng(seed).standard_normal(dims)).astype(kind)


def checked(op: str, arrays: Arrays, constants: Arrays | None = None, opset: int = 22, **attributes: Any) -> None:
    names = [*arrays, *(constants or {})]
    check(model([node(op, names, **attributes)], arrays, ["y"], constants, opset=opset), arrays, tolerance=0)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@pytest.mark.parametrize("kind", [*KINDS, np.int16, np.int8])
@pytest.mark.parametrize(
    ("dims", "perm"),
    [
        ((128, 300), (1, 0)),
        ((300, 129), (1, 0)),
        ((1, 64, 28, 29), (0, 2, 3, 1)),
        ((2, 28, 29, 64), (0, 3, 1, 2)),
        ((1, 3, 50, 51), (0, 2, 3, 1)),
        ((1, 50, 51, 3), (0, 3, 1, 2)),
        ((20, 12, 64), (1, 0, 2)),
        ((5, 6, 7, 8), (3, 2, 1, 0)),
        ((64, 1024), (1, 0)),
        ((17, 1), (1, 0)),
        ((15, 16, 17), (2, 0, 1)),
    ],
)
def test_transposes(kind: type, dims: tuple[int, ...], perm: tuple[int, ...]) -> None:
    x = array(*dims, kind=kind)
    made = model([node("Transpose", ["x"], perm=perm)], {"x": x}, ["y"])
    for threads in (1, 3):
        assert np.array_equal(engine(made, {"x": x}, threads)["y"], x.transpose(perm), equal_nan=False)


def held(name: str, values: NDArray[Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))


class Chain:
    """Nodes in a row, each drawn for the array that the one before leaves, and the array that NumPy makes of it."""

    def __init__(self, x: NDArray[Any]) -> None:
        self.value, self.nodes, self.name = x, list[onnx.NodeProto](), "x"

    def add(self, op: str, value: NDArray[Any], *parameters: NDArray[Any], **attributes: Any) -> None:
        given, made = self.name, f"t{len(self.nodes)}"
        names = [f"{made}_{i}" for i in range(len(parameters))]
        self.nodes += [held(name, each) for name, each in zip(names, parameters, strict=True)]
        self.nodes.append(node(op, [given, *names], outputs=[made], **attributes))
        self.value, self.name = value, made

    def draw(self, data: st.DataObject) -> None:
        x = self.value
        ops = ["Reshape", "Unsqueeze", "Expand", "Tile"]
        if x.ndim:
            ops += ["Transpose", "Slice", "Slice", "Concat", "Gather", "Gather2", "Pad", "Flatten", "Cut"]
        op = data.draw(st.sampled_from(ops))
        axis = data.draw(st.integers(0, x.ndim - 1)) if x.ndim else 0
        if op == "Reshape":
            sizes = [p for p in range(1, 9) if x.size % p == 0]
            first = data.draw(st.sampled_from(sizes)) if x.size else 0
            rest = [s for s in (2, 3, 4, 1) if first and (x.size // first) % s == 0]
            dims = [first, data.draw(st.sampled_from(rest)), -1] if x.size else [0, 3]
            self.add("Reshape", x.reshape(dims), ints(*dims), allowzero=int(not x.size))
        elif op == "Unsqueeze" and x.ndim < 5:
            self.add("Unsqueeze", np.expand_dims(x, axis), ints(axis))
        elif op == "Expand" and x.ndim < 5:
            self.add("Expand", np.broadcast_to(x, (2, *x.shape)), ints(2, *(1 for _ in x.shape)))
        elif op == "Tile":
            repeats = [data.draw(st.integers(1, 2)) for _ in x.shape]
            self.add("Tile", np.tile(x, repeats) if repeats else x, ints(*repeats))
        elif op == "Transpose":
            perm = data.draw(st.permutations(range(x.ndim)))
            self.add("Transpose", x.transpose(perm), perm=list(perm))
        elif op == "Slice":
            bound = st.sampled_from([0, 1, 2, 3, -1, -2, -3, 2**63 - 1, -(2**63)])
            start, end = data.draw(bound), data.draw(bound)
            step = data.draw(st.sampled_from([1, 2, -1, -2, -(2**63), 2**62]))
            made = x[(*[slice(None)] * axis, slice(start, None if end == -(2**63) and step < 0 else end, step))]
            self.add("Slice", made, ints(start), ints(end), ints(axis), ints(step))
        elif op == "Concat":
            self.add("Concat", np.concatenate([x, x[..., :0].astype(x.dtype), x][::2], axis), axis=axis)
            self.nodes[-1].input.append(self.nodes[-1].input[0])
        elif op == "Gather" and x.shape[axis]:
            index = data.draw(st.integers(-x.shape[axis], x.shape[axis] - 1))
            self.add("Gather", np.take(x, index, axis), np.array(index), axis=axis)
        elif op == "Gather2" and x.shape[axis] and x.ndim < 5:
            index = ints(*data.draw(st.lists(st.integers(-x.shape[axis], x.shape[axis] - 1), min_size=1, max_size=4)))
            index = index.reshape(-1, 1) if data.draw(st.booleans()) else index
            self.add("Gather", np.take(x, index, axis), index, axis=axis)
        elif op == "Pad":
            pads = [data.draw(st.integers(-(x.shape[i % x.ndim] // 2), 2)) for i in range(2 * x.ndim)]
            cut = x[tuple(slice(max(-b, 0), n - max(-e, 0)) for n, b, e in self.sides(pads))]
            mode = data.draw(st.sampled_from(["constant", "edge", "reflect", "wrap"]))
            grown = [(max(b, 0), max(e, 0)) for _, b, e in self.sides(pads)]
            for pair, size in zip(grown, cut.shape, strict=True):
                if mode != "constant" and max(pair) > size - (mode == "reflect"):
                    mode = "constant"
            self.add("Pad", np.pad(cut, grown, mode=mode), ints(*pads), mode=mode)
        elif op == "Flatten":
            self.add("Flatten", x.reshape(int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:]))), axis=axis)
        elif op == "Cut" and x.shape[axis] > 1:
            at = data.draw(st.integers(1, x.shape[axis] - 1))
            parts = np.split(x, [at], axis)
            self.add("Split", parts[1], ints(at, x.shape[axis] - at), axis=axis)
            self.nodes[-1].output[:] = ["", self.name]

    def sides(self, pads: list[int]) -> list[tuple[int, int, int]]:
        return list(zip(self.value.shape, pads[: self.value.ndim], pads[self.value.ndim :], strict=True))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_chains(data: st.DataObject) -> None:
    """Each op stands on whatever view the ones before left."""
    dims = data.draw(
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 16, 18]), max_size=4).filter(
            lambda d: np.prod([max(n, 1) for n in d]) < 4000
        )
    )
    chain = Chain(array(*dims, kind=data.draw(st.sampled_from(KINDS))))
    for _ in range(data.draw(st.integers(1, 6))):
        if np.prod(np.maximum(chain.value.shape, 1)) < 2_000:  # a pad makes something of nothing
            chain.draw(data)
    if not chain.nodes:
        return
    start = array(*dims, kind=chain.value.dtype)
    for inputs, constants in (({"x": start}, {}), ({}, {"x": start})):  # at run time, and while planning
        made = model([*chain.nodes, node("Identity", [chain.name])], inputs, ["y"], constants, opset=19)
        for threads in (1, 3):
            found = engine(made, inputs, threads)["y"]
            assert found.shape == chain.value.shape
            assert np.array_equal(found, chain.value)


def test_forms_of_early_opsets() -> None:
    x = array(2, 1, 6, 5)
    checked("Slice", {"x": x}, opset=9, starts=[1, -3], ends=[2, 2**31 - 1], axes=[2, 3])
    checked("Slice", {"x": x}, opset=9, starts=[0, 0], ends=[1, 1])
    checked("Squeeze", {"x": x}, opset=11, axes=[1])
    checked("Squeeze", {"x": x}, opset=11)
    checked("Squeeze", {"x": x})
    checked("Unsqueeze", {"x": x}, opset=11, axes=[0, -1])
    checked("Split", {"x": x}, opset=11, axis=2, split=[6])
    checked("Pad", {"x": x}, opset=10, pads=[0, 0, 1, 1, 0, 0, -2, 1], value=1.5)
    checked("Pad", {"x": x}, opset=10, pads=[0, 0, 1, 1, 0, 0, 2, 1], mode="reflect")
    checked("Pad", {"x": x}, opset=10, pads=[0, 0, 1, 1, 0, 0, 2, 1], mode="edge")


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("perm", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_pads(mode: str, perm: tuple[int, ...]) -> None:
    x = array(2, 30, 31, 32)
    pads = ints(1, 2, 3, 0, 0, 1, 4, 5)
    nodes = [node("Transpose", ["x"], outputs=["t"], perm=perm), node("Pad", ["t", "pads"], mode=mode)]
    check(model(nodes, {"x": x}, ["y"], {"pads": pads}), {"x": x}, tolerance=0)


def test_pads_with_a_value_and_axes() -> None:
    x, value = array(2, 30, 31), np.array(7.5, np.float32)
    names = ["x", "pads", "value", "axes"]
    constants = {"pads": ints(1, -2, 3, 4), "axes": ints(-1, 0)}
    check(model([node("Pad", names)], {"x": x}, ["y"], {**constants, "value": value}), {"x": x}, tolerance=0)
    check(
        model([node("Pad", names)], {"x": x, "value": value}, ["y"], constants), {"x": x, "value": value}, tolerance=0
    )


@pytest.mark.parametrize(("mode", "pad"), [("reflect", 4), ("wrap", 5), ("edge", 1)])
def test_pads_that_find_too_little_are_refused(mode: str, pad: int) -> None:
    x = array(2, 0 if mode == "edge" else 4)
    made = model([node("Pad", ["x", "p"], mode=mode)], {"x": x}, ["y"], {"p": ints(0, pad, 0, 0)})
    with pytest.raises(core.Unsupported, match=f"Pad 'Pad_of_x_p': mode '{mode}' with a pad of {pad}"):
        engine(made, {"x": x})


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_concat(axis: int) -> None:
    dims = [[40, 50, 30] for _ in range(4)]
    for i, size in enumerate((1, 40, 0, 7)):
        dims[i][axis] = size
    arrays = {f"x{i}": array(*each, seed=i) for i, each in enumerate(dims)}
    checked("Concat", arrays, axis=axis)
    turned = [node("Transpose", [name], outputs=["t" + name], perm=[1, 2, 0]) for name in list(arrays)[::2]]
    names = ["t" + name if i % 2 == 0 else name for i, name in enumerate(arrays)]
    arrays |= {
        name: array(*[each[i] for i in (2, 0, 1)], seed=9) for name, each in list(zip(arrays, dims, strict=True))[::2]
    }
    check(model([*turned, node("Concat", names, axis=axis)], arrays, ["y"]), arrays, tolerance=0)


def test_concat_of_what_it_was_split_into_is_the_same() -> None:
    x = array(2, 12, 7)
    parts = ["a", "b", "c"]
    nodes = [node("Split", ["x"], outputs=parts, axis=1, num_outputs=3), node("Concat", parts[::-1], axis=1)]
    check(model(nodes, {"x": x}, ["y"]), {"x": x}, tolerance=0)
    uneven = [node("Split", ["x"], outputs=parts, axis=2, num_outputs=3)]
    check(model(uneven, {"x": x}, parts), {"x": x}, tolerance=0)


@pytest.mark.parametrize("op", ["DepthToSpace", "SpaceToDepth"])
@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("perm", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_blocks(op: str, mode: str, perm: tuple[int, ...]) -> None:
    x = array(2, 12, 24, 36)
    attributes = {"mode": mode} if op == "DepthToSpace" else {}
    nodes = [node("Transpose", ["x"], outputs=["t"], perm=perm), node(op, ["t"], blocksize=2, **attributes)]
    check(model(nodes, {"x": x}, ["y"]), {"x": x}, tolerance=0)


@pytest.mark.parametrize("kind", [np.int64, np.int32])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dims", [(), (3,), (4, 500)])
@pytest.mark.parametrize("perm", [(0, 1, 2), (2, 0, 1)])
def test_gather(kind: type, axis: int, dims: tuple[int, ...], perm: tuple[int, ...]) -> None:
    x = array(11, 12, 13)
    index = np.random.default_rng(1).integers(-11, 11, dims).astype(kind)
    nodes = [node("Transpose", ["x"], outputs=["t"], perm=perm), node("Gather", ["t", "i"], axis=axis)]
    check(model(nodes, {"x": x, "i": index}, ["y"]), {"x": x, "i": index}, tolerance=0)
    check(model(nodes, {"x": x}, ["y"], {"i": index}), {"x": x}, tolerance=0)


def test_rows_of_a_table() -> None:
    table, index = array(500, 96), np.random.default_rng(0).integers(0, 500, (2, 300))
    check(model([node("Gather", ["e", "i"])], {"i": index}, ["y"], {"e": table}), {"i": index}, tolerance=0)


@pytest.mark.parametrize("index", [[5], [-6], [0, 9]])
@pytest.mark.parametrize("op", ["Gather", "GatherElements", "GatherND", "ScatterND"])
@pytest.mark.parametrize("constant", [False, True])
def test_indices_are_checked(index: list[int], op: str, constant: bool) -> None:
    x = array(5)
    i = np.array(index).reshape((-1, 1) if op.endswith("ND") else -1)
    inputs: dict[str, NDArray[Any]] = {"x": x, "i": i}
    if op == "ScatterND":
        inputs["u"] = array(len(index))
    given = {name: value for name, value in inputs.items() if name != "i" or not constant}
    made = model([node(op, list(inputs))], given, ["y"], {"i": i} if constant else {})
    with pytest.raises(core.Error, match=f"{op} '{op}_of.*': index {index[-1]} lies outside of an axis of 5"):
        engine(made, inputs)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_elements(axis: int) -> None:
    x = array(20, 30, 40)
    dims = [15, 30, 40]
    dims[axis] = 50
    dims[0] = min(dims[0], 20) if axis else dims[0]
    index = np.random.default_rng(0).integers(-x.shape[axis], x.shape[axis], dims)
    checked("GatherElements", {"x": x, "i": index}, axis=axis)
    turned = [node("Transpose", ["x"], outputs=["t"]), node("GatherElements", ["t", "i"], axis=axis)]
    x = x.transpose(2, 1, 0).copy()
    check(model(turned, {"x": x, "i": index}, ["y"]), {"x": x, "i": index}, tolerance=0)


@pytest.mark.parametrize(("batch", "length"), [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)])
def test_gather_nd(batch: int, length: int) -> None:
    x = array(4, 5, 60)
    sizes = np.array(x.shape[batch : batch + length])
    index = np.random.default_rng(0).integers(-sizes, sizes, (*x.shape[:batch], 7, length))
    checked("GatherND", {"x": x, "i": index}, batch_dims=batch)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_scatter_nd(length: int) -> None:
    x = array(4, 5, 60)
    sizes = x.shape[:length]
    flat = np.random.default_rng(0).permutation(int(np.prod(sizes)))[:3]
    index = np.stack(np.unravel_index(flat, sizes), -1).astype(np.int64)
    update = array(3, *x.shape[length:], seed=1)
    checked("ScatterND", {"x": x, "i": index, "u": update})
    turned = [node("Transpose", ["x"], outputs=["t"]), node("ScatterND", ["t", "i", "u"])]
    arrays = {"x": x.transpose(2, 1, 0).copy(), "i": index, "u": update}
    check(model(turned, arrays, ["y"]), arrays, tolerance=0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_hot(axis: int) -> None:
    index = np.int64([[0, 3, -1], [7, -9, 2]])
    values = np.float32([0.5, 2])
    checked("OneHot", {"i": index}, {"depth": np.int64(8), "v": values}, axis=axis)
    made = model([node("OneHot", ["i", "d", "v"], axis=axis)], {"i": index, "v": values}, ["y"], {"d": np.int64(8)})
    check(made, {"i": index, "v": values}, tolerance=0)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.int64])
@pytest.mark.parametrize("dims", [(5,), (7, 40), (3, 4, 50), (2, 0, 3), (0,), (1, 1)])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
def test_running_sums(kind: type, dims: tuple[int, ...], reverse: int, exclusive: int) -> None:
    x = array(*dims, kind=kind)
    for axis in range(-1, len(dims)):
        made = [
            node("Transpose", ["x"], outputs=["t"]),
            node("CumSum", ["t", "axis"], reverse=reverse, exclusive=exclusive),
        ]
        for nodes in ([node("CumSum", ["x", "axis"], reverse=reverse, exclusive=exclusive)], made):
            check(model(nodes, {"x": x}, ["y"], {"axis": np.array(axis)}), {"x": x}, tolerance=1e-6)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [0, 1, -1, 3, -3, 100, -100, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dims", [(4, 4), (2, 3, 5), (6, 2), (2, 0, 3)])
def test_triangles(upper: int, k: int, dims: tuple[int, ...]) -> None:
    x = array(*dims, kind=np.int64)
    made = model([node("Trilu", ["x", "k"], upper=upper)], {"x": x}, ["y"], {"k": np.array(k)})
    near = int(np.clip(k, -1000, 1000))
    np.testing.assert_array_equal(engine(made, {"x": x})["y"], (np.triu if upper else np.tril)(x, near))


def test_views_cost_no_step() -> None:
    """What a transformer does to its heads moves nothing until they are one again."""
    x = array(1, 20, 3 * 4 * 8)
    nodes = [
        node("Reshape", ["x", "heads"], outputs=["h"]),
        node("Transpose", ["h"], outputs=["t"], perm=[2, 0, 3, 1, 4]),
        node("Gather", ["t", "one"], outputs=["q"], axis=0),
        node("Slice", ["q", "zero", "two", "two"], outputs=["s"]),
        node("Unsqueeze", ["s", "zero"], outputs=["u"]),
        node("Neg", ["u"]),
    ]
    constants = {"heads": ints(1, 20, 3, 4, 8), "one": np.array(1), "zero": ints(0), "two": ints(2)}
    made = model(nodes, {"x": x}, ["y"], constants)
    check(made, {"x": x}, tolerance=0)
    session = core.Engine(made.SerializeToString())
    assert [step["op"] for step in session.profile([x])] == ["Neg"]


@pytest.mark.parametrize(
    ("op", "constants", "attributes"),
    [
        ("Reshape", {"s": ints(5, -1)}, {}),
        ("Reshape", {"s": ints(-1, -1)}, {}),
        ("Reshape", {"s": ints(3, 0, 0)}, {}),
        ("Reshape", {"s": ints(2**62, 2**62)}, {}),
        ("Reshape", {"s": ints(-2, -3)}, {}),
        ("Transpose", {}, {"perm": [0, 0]}),
        ("Transpose", {}, {"perm": [0, 7]}),
        ("Transpose", {}, {"perm": [0]}),
        ("Slice", {"a": ints(0), "b": ints(1), "c": ints(0), "d": ints(0)}, {}),
        ("Slice", {"a": ints(0), "b": ints(1, 2)}, {}),
        ("Slice", {"a": ints(0), "b": ints(1), "c": ints(5)}, {}),
        ("Slice", {"a": ints(0, 0), "b": ints(1, 1), "c": ints(1, -1)}, {}),
        ("Squeeze", {"a": ints(0)}, {}),
        ("Unsqueeze", {"a": ints(0, 0)}, {}),
        ("Unsqueeze", {"a": ints(9)}, {}),
        ("Split", {"a": ints(1, 1)}, {"axis": 0}),
        ("Split", {"a": ints(5)}, {"axis": 0}),
        ("Split", {"a": ints(-1)}, {"axis": 0}),
        ("Expand", {"a": ints(5)}, {}),
        ("Expand", {"a": ints(-2)}, {}),
        ("Tile", {"a": ints(2)}, {}),
        ("Tile", {"a": ints(2, -2)}, {}),
        ("Pad", {"a": ints(1, 1)}, {}),
        ("Pad", {"a": ints(-4, 0, -4, 0)}, {}),
        ("Pad", {"a": ints(2**40, 0, 2**40, 0)}, {}),
        ("Flatten", {}, {"axis": 5}),
        ("Concat", {"a": array(3, 3)}, {"axis": 0}),
        ("Concat", {"a": array(2)}, {"axis": 0}),
        ("DepthToSpace", {}, {"blocksize": 2}),
        ("Gather", {"a": array(2)}, {}),
        ("GatherND", {"a": ints(1, 1, 1)}, {}),
        ("GatherND", {"a": ints(1)}, {"batch_dims": 1}),
        ("GatherElements", {"a": ints(1)}, {}),
    ],
)
def test_what_is_wrong_is_an_error(op: str, constants: Arrays, attributes: dict[str, Any]) -> None:
    x = array(4, 6)
    graph = helper.make_graph(
        [node(op, ["x", *constants], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UNDEFINED, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(core.Error, match=op) as caught:
        engine(made, {"x": x})
    assert caught.type is core.Error
