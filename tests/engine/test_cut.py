# SPDX-License-Identifier: Apache-2.0
"""Graphs cut between the core and ONNX Runtime. Oracle: the whole graph in ONNX Runtime, and brute force over all orders."""

import collections
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import featherweight_engine as core
from featherweight.runtime import Engine, cut, load, open_onnxruntime, parts
from tests.engine import backend
from tests.engine.nodes import model, node, onnxruntime

RNG = np.random.default_rng(0)
WIDE = 8


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def same(made: onnx.ModelProto, inputs: Mapping[str, Any], threads: int = 2) -> Engine:
    """Loaded and asked twice, it answers as ONNX Runtime does with the whole."""
    engine = load(made.SerializeToString(), threads)
    expected = onnxruntime(made, inputs)
    for _ in range(2):
        found = engine.run(inputs)
        assert list(found) == list(expected)
        for name, want in expected.items():
            have = found[name]
            if isinstance(want, list):
                assert len(have) == len(want)
                assert all(np.allclose(a, b) for a, b in zip(have, want, strict=True))
            elif want.dtype == object:
                assert have.tolist() == want.tolist()
            else:
                assert (have.dtype, have.shape) == (want.dtype, want.shape), name
                np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
    return engine


def pieces(engine: Engine) -> list[tuple[bool, list[str]]]:
    """(own, ops) of each part, in order."""
    division = engine._division
    if division is None:
        return [(True, [op for _, op, _, _ in engine._steps[0].part.session.nodes])]
    return [(piece.own, [division._ops[i] for i in piece.nodes]) for piece in division._pieces]


def lstm(x: str, y: str, last: str = "") -> onnx.NodeProto:
    return node("LSTM", [x, "lw", "lr"], outputs=[y, last] if last else [y], hidden_size=4)


WEIGHTS = {"w": normal(WIDE, WIDE), "v": normal(4, 3), "lw": normal(1, 16, WIDE), "lr": normal(1, 16, 4)}


def test_a_model_of_the_cores_ops_is_not_cut() -> None:
    made = model(
        [node("MatMul", ["x", "w"], outputs=["a"]), node("Relu", ["a"])], {"x": normal(2, WIDE)}, ["y"], WEIGHTS
    )
    engine = same(made, {"x": normal(2, WIDE)})
    assert engine.whole
    assert "the engine runs all of it itself: MatMul" in engine.describe()


def test_an_lstm_in_the_middle_leaves_both_sides_in_the_core() -> None:
    x = normal(5, 2, WIDE)
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        node("Relu", ["a"], outputs=["b"]),
        lstm("b", "sequence", "last"),
        node("MatMul", ["last", "v"]),
    ]
    engine = same(model(nodes, {"x": x}, ["y", "sequence"], WEIGHTS), {"x": x})
    assert [own for own, _ in pieces(engine)] == [True, False, True]
    assert pieces(engine)[1] == (False, ["LSTM"])
    told = engine.describe()
    assert "In ONNX Runtime: LSTM." in told and "the engine has no such op" in told


def test_an_lstm_alone_goes_whole() -> None:
    x = normal(5, 2, WIDE)
    engine = same(model([lstm("x", "y")], {"x": x}, ["y"], WEIGHTS), {"x": x})
    assert pieces(engine) == [(False, ["LSTM"])]
    assert "all of it runs in ONNX Runtime: LSTM." in str(engine)


def branch(name: str, made: str, of: str, weight: str) -> onnx.GraphProto:
    """Reads values from around it: an activation and a constant."""
    inside = [helper.make_node("MatMul", [of, weight], [f"{made}_{name}"])]
    return helper.make_graph(
        inside, name, [], [helper.make_tensor_value_info(f"{made}_{name}", TensorProto.FLOAT, None)]
    )


@pytest.mark.parametrize("yes", [True, False])
def test_if_sees_what_its_branches_take_from_around_it(yes: bool) -> None:
    x = {"x": normal(2, WIDE), "yes": np.array(yes)}
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        node("Relu", ["a"], outputs=["b"]),
        node(
            "If",
            ["yes"],
            outputs=["c"],
            then_branch=branch("then", "t", "b", "w"),
            else_branch=branch("else", "e", "x", "u"),
        ),
        node("MatMul", ["c", "w"]),
    ]
    made = model(nodes, x, ["y"], {**WEIGHTS, "u": normal(WIDE, WIDE)})
    engine = same(made, x)
    assert [own for own, _ in pieces(engine)] == [True, False, True]


def test_a_loop_and_a_scan_between_products() -> None:
    x = normal(3, WIDE)
    count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    going = helper.make_tensor_value_info("going", TensorProto.BOOL, [])
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, None)
    body = helper.make_graph(
        [helper.make_node("Add", ["state", "b"], ["next"]), helper.make_node("Identity", ["going"], ["on"])],
        "body",
        [count, going, state],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    step = helper.make_graph(
        [helper.make_node("Add", ["sum", "row"], ["total"]), helper.make_node("Identity", ["total"], ["shown"])],
        "step",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [WIDE]) for n in ("sum", "row")],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [WIDE]) for n in ("total", "shown")],
    )
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        node("Loop", ["times", "", "a"], outputs=["c"], body=body),
        node("Scan", ["zero", "c"], outputs=["last", "all"], body=step, num_scan_inputs=1),
        node("MatMul", ["all", "w"]),
    ]
    constants = {**WEIGHTS, "times": np.array(3), "b": normal(WIDE), "zero": np.zeros(WIDE, np.float32)}
    made = model(nodes, {"x": x}, ["y", "last"], constants)
    assert [own for own, _ in pieces(same(made, {"x": x}))] == [True, False, True]


def test_what_a_foreign_op_makes_is_read_by_two_parts_and_is_an_output_too() -> None:
    x = normal(3, 1, WIDE)
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        lstm("a", "l", "h"),
        node("MatMul", ["h", "v"], outputs=["b"]),
        node("Squeeze", ["b"], outputs=["s"]),
        node("MatMul", ["a", "w"], outputs=["again"]),
        lstm("again", "m", "k"),
        node("MatMul", ["k", "v"], outputs=["c"]),
        node("Add", ["c", "b"], outputs=["d"]),
        node("Concat", ["d", "h"], axis=2),
    ]
    engine = same(model(nodes, {"x": x}, ["h", "y", "s", "l"], WEIGHTS), {"x": x})
    assert [own for own, _ in pieces(engine)] == [True, False, True], "both LSTMs wait for one part, and go together"


def test_nodes_may_stand_in_any_order_in_the_file() -> None:
    x = normal(5, 2, WIDE)
    nodes = [node("MatMul", ["x", "w"], outputs=["a"]), lstm("a", "l", "h"), node("MatMul", ["h", "v"])]
    made = model(nodes, {"x": x}, ["y"], WEIGHTS)
    expected = onnxruntime(made, {"x": x})["y"]
    del made.graph.node[:]
    made.graph.node.extend(reversed(nodes))
    np.testing.assert_allclose(load(made.SerializeToString()).run({"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


def test_an_input_of_foreign_nodes_alone_and_optional_ones_that_are_left_out() -> None:
    x, lengths, start = normal(4, 2, WIDE), np.array([4, 2], np.int32), normal(1, 2, 4)
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        helper.make_node("LSTM", ["a", "lw", "lr", "", "lengths", "start"], ["", "h"], hidden_size=4),
        node("MatMul", ["h", "v"], outputs=["b"]),
        helper.make_node("Clip", ["b", "", "most"], ["y"]),
    ]
    inputs = {"x": x, "lengths": lengths, "start": start}
    same(model(nodes, inputs, ["y"], {**WEIGHTS, "most": np.float32(0.1)}), inputs)


def test_outputs_that_are_inputs_constants_or_made_of_constants() -> None:
    x = normal(2, 3, WIDE)
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        lstm("a", "y"),
        node("Add", ["v", "v"], outputs=["twice"]),
    ]
    made = model(nodes, {"x": x}, ["y", "twice"], WEIGHTS)
    made.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape))
    made.graph.output.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, (4, 3)))
    engine = same(made, {"x": x})
    found = engine.run({"x": x})
    for name in ("x", "v"):
        found[name][:] = 0  # the caller's own, to write on
    assert x.any() and engine.run({"x": x})["v"].any()


def test_initializers_that_both_sides_read() -> None:
    x = normal(3, 2, WIDE)
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        node("Gather", ["lw", "first"], outputs=["row"], axis=1),
        node("Add", ["a", "row"], outputs=["b"]),
        lstm("b", "l", "h"),
        node("MatMul", ["h", "v"]),
    ]
    same(model(nodes, {"x": x}, ["y", "l"], {**WEIGHTS, "first": np.array(0)}), {"x": x})


def test_shapes_that_one_part_computes_are_constants_of_the_next() -> None:
    """Reshape's target must be known when a plan is made; the batch is open, and its plans are one for each."""
    x = normal(5, 2, WIDE)
    nodes = [
        node("Shape", ["x"], outputs=["shape"]),
        node("Gather", ["shape", "one"], outputs=["batch"]),
        node("MatMul", ["x", "w"], outputs=["a"]),
        node("Concat", ["batch", "rest"], outputs=["target"], axis=0),
        lstm("a", "l", "h"),
        node("Reshape", ["h", "target"], outputs=["flat"]),
        node("MatMul", ["flat", "v"]),
    ]
    constants = {**WEIGHTS, "one": np.array([1]), "rest": np.array([4])}
    made = model(nodes, {"x": x}, ["y"], constants)
    for value in made.graph.input:
        value.type.tensor_type.shape.dim[1].dim_param = "batch"
    for value in made.graph.output:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    engine = load(made.SerializeToString(), 1)
    for batch in (2, 1, 7, 2):
        x = normal(5, batch, WIDE)
        np.testing.assert_allclose(engine.run({"x": x})["y"], onnxruntime(made, {"x": x})["y"], rtol=1e-5, atol=1e-5)
    assert pieces(engine)[-1][1] == ["Reshape", "MatMul"]


def test_what_a_shape_or_a_type_makes_the_core_refuse_is_handed_over_when_it_comes() -> None:
    """Only when it is planned does it show that a product of vectors is none of the core's, and the rest stays there."""
    made = model(
        [
            node("MatMul", ["x", "w"], outputs=["a"]),
            node("MatMul", ["a", "t"], outputs=["b"]),
            node("MatMul", ["u", "w"]),
        ],
        {"x": normal(WIDE, WIDE), "t": normal(WIDE), "u": normal(2, WIDE)},
        ["b", "y"],
        WEIGHTS,
    )
    inputs = {"x": normal(WIDE, WIDE), "t": normal(WIDE), "u": normal(2, WIDE)}
    engine = same(made, inputs)
    assert not engine.whole
    assert sum(ops.count("MatMul") for own, ops in pieces(engine) if own) == 2
    assert "one of its inputs has one axis" in engine.describe()


def test_an_op_that_is_refused_again_and_again_goes_as_a_whole() -> None:
    """Each refusal costs a plan; forty of them would take minutes in a large model."""
    count = 12
    nodes = [node("MatMul", ["x", "w"], outputs=["a0"])]
    nodes += [helper.make_node("MatMul", [f"a{i}", f"t{i}"], [f"b{i}"], name=f"refused{i}") for i in range(count)]
    nodes += [helper.make_node("Mul", [f"a{i}", f"b{i}"], [f"a{i + 1}"]) for i in range(count)]
    inputs = {"x": normal(WIDE, WIDE), **{f"t{i}": normal(WIDE) for i in range(count)}}
    calls = []
    real = parts.open_core
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "open_core", lambda *a: calls.append(a) or real(*a))
        engine = same(model(nodes, inputs, [f"a{count}"], WEIGHTS), inputs)
    assert not engine.whole
    assert len(calls) < count


def test_types_that_inference_does_not_know_are_learned_from_values() -> None:
    """ONNX's inference stops at an op of ONNX Runtime's own; what comes behind it is of unknown type until it is run."""
    x = normal(2, WIDE)
    nodes = [
        node("MatMul", ["x", "w"], outputs=["a"]),
        helper.make_node("BiasGelu", ["a", "bias"], ["g"], domain="com.microsoft"),
        node("MatMul", ["g", "w"], outputs=["b"]),
        helper.make_node("FastGelu", ["b"], ["y"], domain="com.microsoft"),
    ]
    graph = helper.make_graph(
        nodes,
        "unknown",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, WIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHTS["w"], "w"), numpy_helper.from_array(normal(WIDE), "bias")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    engine = same(helper.make_model(graph, opset_imports=opsets, ir_version=10), {"x": x})
    assert [own for own, _ in pieces(engine)] == [True, False, True, False]


def test_local_functions_strings_and_sequences() -> None:
    """Functions are put in where they are called; what is no tensor of numbers never meets the core."""
    function = helper.make_function(
        "house", "Twice", ["p"], ["q"], [helper.make_node("Add", ["p", "p"], ["q"])], [helper.make_opsetid("", 20)]
    )
    nodes = [
        helper.make_node("Twice", ["x"], ["t"], domain="house"),
        node("MatMul", ["t", "w"], outputs=["a"]),
        node("SplitToSequence", ["a"], outputs=["s"], axis=0),
        node("SequenceAt", ["s", "one"], outputs=["row"]),
        node("MatMul", ["row", "w"]),
        node("StringConcat", ["words", "words"], outputs=["said"]),
    ]
    graph = helper.make_graph(
        nodes,
        "kinds",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, WIDE]),
            helper.make_tensor_value_info("words", TensorProto.STRING, [2]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("said", TensorProto.STRING, None),
            helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(WEIGHTS["w"], "w"), numpy_helper.from_array(np.array(1), "one")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("house", 1)]
    made = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    engine = same(made, {"x": normal(3, WIDE), "words": np.array(["a", "b"], object)})
    assert [own for own, _ in pieces(engine)] == [False, True, False, True] or [own for own, _ in pieces(engine)] == [
        True,
        False,
        True,
    ]


def test_weights_too_large_for_one_message_go_by_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one byte is too large already."""
    monkeypatch.setattr(parts, "_MESSAGE_BYTES", 1)
    saved: list[str] = []
    save = onnx.save_model
    monkeypatch.setattr(onnx, "save_model", lambda made, path, **how: saved.append(path) or save(made, path, **how))
    x = normal(5, 2, 40)
    weights = {**WEIGHTS, "w": normal(40, WIDE)}
    nodes = [node("MatMul", ["x", "w"], outputs=["a"]), lstm("a", "l", "h"), node("MatMul", ["h", "v"])]
    same(model(nodes, {"x": x}, ["y"], weights), {"x": x})
    assert len(saved) == 3 and not any(Path(path).parent.exists() for path in saved)


def orders(nodes: Sequence[int], needs: Mapping[int, set[int]]) -> Any:
    for order in itertools.permutations(nodes):
        at = {each: i for i, each in enumerate(order)}
        if all(at[a] < at[b] for b in nodes for a in needs[b]):
            yield order


@pytest.mark.parametrize("seed", range(40))
def test_parts_are_as_few_as_any_order_allows(seed: int) -> None:
    """Against all orders of a small graph."""
    draw = random.Random(seed)
    nodes = list(range(6))
    needs = {i: {j for j in range(i) if draw.random() < 0.35} for i in nodes}
    own = {i: draw.random() < 0.5 for i in nodes}
    groups = cut._alternate(nodes, needs, own)
    fewest = min(sum(1 for _ in itertools.groupby(order, key=own.__getitem__)) for order in orders(nodes, needs))
    assert len(groups) == fewest
    flat = [each for group in groups for each in group]
    assert sorted(flat) == nodes
    assert all(flat.index(a) < flat.index(b) for b in nodes for a in needs[b])
    assert all(len({own[each] for each in group}) == 1 for group in groups)


def alike(have: Any, want: Any) -> bool:
    if want is None or isinstance(want, list):
        return type(have) is type(want) and (want is None or all(map(alike, have, want)))
    have, want = np.asarray(have), np.asarray(want)
    if have.dtype != want.dtype or have.shape != want.shape:
        return False
    if want.dtype.kind != "f":
        return have.tolist() == want.tolist()
    return np.allclose(have.astype(float), want.astype(float), rtol=1e-3, atol=1e-4, equal_nan=True)


def test_whatever_onnxruntime_runs_the_engine_runs_to_the_same_answer() -> None:
    """On one in four of ONNX's own tests of nodes, of every op that it has: most of them are none of the core's."""
    counts = collections.Counter[str]()
    for case in backend.cases()[::4]:
        inputs = dict(zip((value.name for value in case.model.graph.input), case.data_sets[0][0], strict=False))
        raw = case.model.SerializeToString()
        try:
            session = open_onnxruntime(raw, 1)
            expected = session.run(None, inputs)
        except Exception:  # what it has no kernel for, whatever it says of it
            counts["refused"] += 1
            continue
        engine = load(raw, 1)
        found = engine.run(inputs)
        counts["whole" if engine.whole else "foreign"] += 1
        assert list(found) == [port.name for port in session.get_outputs()]
        assert all(map(alike, found.values(), expected)), case.name
    assert counts["whole"] > 100 and counts["foreign"] > 150, counts


def test_a_plan_is_made_for_the_elements_of_what_is_known() -> None:
    """The target of a Reshape as an input: refused as such, and a constant of the plan where it is told to be known."""
    x = np.arange(12, dtype=np.float32)
    made = model([node("Reshape", ["x", "target"])], {"x": x, "target": np.array([3, 4])}, [])
    made.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    raw = made.SerializeToString()
    with pytest.raises(core.Unsupported, match="must be a constant") as refusal:
        core.Engine(raw).run([x, np.array([3, 4])])
    assert refusal.value.makes == ("y",)
    session = core.Engine(raw, known=["target"])
    for shape in ((3, 4), (4, 3), (3, 4), (2, 6)):
        np.testing.assert_array_equal(session.run([x, np.array(shape)])[0], x.reshape(shape))


def test_weights_that_follow_from_a_shape_are_packed_for_each() -> None:
    """Packed weights are kept from plan to plan; these are cut to the length of the input, and differ."""
    weights = normal(6, 5)
    nodes = [
        node("Shape", ["x"], outputs=["shape"]),
        node("Gather", ["shape", "one"], outputs=["length"]),
        node("Slice", ["w", "zero", "length"], outputs=["first"]),
        node("MatMul", ["x", "first"]),
    ]
    constants = {"w": weights, "one": np.array([1]), "zero": np.array([0])}
    made = model(nodes, {"x": normal(2, 6)}, [], constants)
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    made.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    session = core.Engine(made.SerializeToString())
    for length in (6, 3, 4, 6):
        x = normal(2, length)
        np.testing.assert_allclose(session.run([x])[0], x @ weights[:length], rtol=1e-5, atol=1e-5)
