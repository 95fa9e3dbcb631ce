# SPDX-License-Identifier: Apache-2.0
"""`plan.json` is frozen: what is written today must be read by every later version, and nothing else be accepted."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight.errors import ArtefactError
from featherweight.plan import EDITS, Attribute, Factor, FakeQuant, Fold, Plan, Slice, Swap, Tie

NAMES = st.text(max_size=12)
EDIT = st.one_of(
    st.builds(Slice, NAMES, st.integers(), st.lists(st.integers(), max_size=4).map(tuple)),
    st.builds(Factor, NAMES, st.integers()),
    st.builds(Swap, NAMES, NAMES),
    st.builds(Tie, st.lists(NAMES, max_size=3).map(tuple)),
    st.builds(FakeQuant, NAMES, st.integers(), st.booleans(), st.booleans()),
    st.builds(Fold, NAMES, NAMES),
    st.builds(Attribute, NAMES, NAMES, st.integers() | st.lists(st.integers(), max_size=3).map(tuple)),
)
PLAN = st.builds(Plan, st.lists(EDIT, max_size=6).map(tuple), st.dictionaries(NAMES, NAMES, max_size=3))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)

WRITTEN = """{
 "version": 1,
 "edits": [
  {"kind": "slice", "tensor": "conv.weight", "axis": 0, "keep": [0, 2]},
  {"kind": "factor", "layer": "fc", "rank": 8},
  {"kind": "swap", "layer": "attention", "to": "attention"},
  {"kind": "tie", "names": ["words.weight", "head.weight"]},
  {"kind": "fake_quant", "layer": "conv", "bits": 8, "symmetric": true},
  {"kind": "fake_quant", "layer": "fc", "bits": 8, "symmetric": false, "dynamic": true},
  {"kind": "fold", "layer": "conv", "norm": "norm"},
  {"kind": "attribute", "layer": "attention", "name": "num_heads", "value": 3},
  {"kind": "attribute", "layer": "split", "name": "sizes", "value": [4, 2]}
 ],
 "formats": {"fc.0.weight": "nm:2:4"}
}"""
READ = Plan(
    (
        Slice("conv.weight", 0, (0, 2)),
        Factor("fc", 8),
        Swap("attention", "attention"),
        Tie(("words.weight", "head.weight")),
        FakeQuant("conv", 8, True),
        FakeQuant("fc", 8, False, dynamic=True),
        Fold("conv", "norm"),
        Attribute("attention", "num_heads", 3),
        Attribute("split", "sizes", (4, 2)),
    ),
    {"fc.0.weight": "nm:2:4"},
)


def test_the_first_version_is_read_and_written_to_the_letter() -> None:
    """Written by hand. If this turns red, `VERSION` must go up and the old form must still be read."""
    assert Plan.from_json(WRITTEN) == READ
    assert json.loads(READ.to_json()) == json.loads(WRITTEN)
    assert {edit.kind for edit in READ.edits} == set(EDITS)


@given(PLAN)
def test_any_plan_survives_being_written_down(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert all(type(a) is type(b) for a, b in zip(again.edits, plan.edits, strict=True))


# Three names only, so that both plans often hint at the same tensor.
HINTED = st.builds(Plan, st.lists(EDIT, max_size=3).map(tuple), st.dictionaries(st.sampled_from("abc"), NAMES))


@given(HINTED, HINTED)
def test_plans_add_up_in_order_and_the_later_hint_wins(first: Plan, second: Plan) -> None:
    both = first + second
    assert both.edits == (*first.edits, *second.edits)
    for name in {*first.formats, *second.formats}:
        assert both.formats[name] == (second.formats[name] if name in second.formats else first.formats[name])


@given(JSON)
def test_any_other_json_is_refused_and_nothing_else_happens(data: Any) -> None:
    with pytest.raises(ArtefactError):
        Plan.from_dict(data)


@given(st.data())
def test_a_plan_with_one_thing_replaced_is_read_as_it_stands_or_refused(data: st.DataObject) -> None:
    """What is accepted must be what was written: no quiet conversion, no key that is dropped."""
    written = json.loads(WRITTEN)
    entry = data.draw(st.sampled_from(written["edits"]))
    entry[data.draw(st.sampled_from([*entry, "extra"]))] = data.draw(JSON)
    try:
        read = Plan.from_dict(written)
    except ArtefactError:
        return
    assert json.loads(read.to_json()) == written


def entry(**changes: Any) -> dict[str, Any]:
    good = {"kind": "slice", "tensor": "conv.weight", "axis": 0, "keep": [0, 2]}
    return {"version": 1, "edits": [good | changes], "formats": {}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "version None is not 1"),
        ({}, "version None is not 1"),
        ({"version": 2, "edits": [], "formats": {}}, "version 2 is not 1"),
        ({"version": "1", "edits": [], "formats": {}}, "version '1' is not 1"),
        ({"version": True, "edits": [], "formats": {}}, "version True is not 1"),
        ({"version": 1, "formats": {}}, "needs a list 'edits'"),
        ({"version": 1, "edits": {}, "formats": {}}, "needs a list 'edits'"),
        ({"version": 1, "edits": []}, "a dict 'formats'"),
        ({"version": 1, "edits": [], "formats": {"a": 1}}, "both strings"),
        ({"version": 1, "edits": ["slice"], "formats": {}}, "edit 0: unknown kind None"),
        (entry(kind="slise"), "unknown kind 'slise'; known: slice"),
        (entry(kind=["slice"]), "edit 0: unknown kind ['slice']"),
        (entry(rank=3), "'slice' has the keys tensor, axis, keep; got axis, keep, rank, tensor"),
        ({"version": 1, "edits": [{"kind": "tie"}], "formats": {}}, "'tie' has the keys names; got none"),
        (entry(tensor=3), "tensor: expected str, got 3"),
        (entry(axis="0"), "edit 0, axis: expected int, got '0'"),
        (entry(axis=0.0), "edit 0, axis: expected int, got 0.0"),
        (entry(axis=False), "edit 0, axis: expected int, got False"),
        (entry(keep=3), "edit 0, keep: expected a list, got 3"),
        (entry(keep=[0, 1.5]), "edit 0, keep: expected int, got 1.5"),
        (entry(keep=[[0]]), "edit 0, keep: expected int, got [0]"),
        (entry(keep=None), "edit 0, keep: expected a list, got None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_plan_is_refused_by_the_entry(data: Any, message: str) -> None:
    with pytest.raises(ArtefactError, match=rf"^run/plan\.json[,:] .*?{re.escape(message)}"):
        Plan.from_json(json.dumps(data), where="run/plan.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", WRITTEN[:-1], "nul", "\x00", "[" * 100_000, '{"version": ' + "1" * 5000 + "}"],
    ids=["empty", "brace", "truncated", "nul", "zero byte", "nested without end", "a number of 5000 digits"],
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ArtefactError, match="not JSON"):
        Plan.from_json(text)
