# SPDX-License-Identifier: Apache-2.0
"""What is tapped is what the module answered, and nothing is found by guessing."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featherweight.distill.reading import Taps, labels_of, logits_of, pairs, tensor_of
from featherweight.errors import DataError, OptionError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(stem=nn.Linear(3, 4), act=nn.ReLU(inplace=True), body=nn.Linear(4, 4), head=nn.Linear(4, 2))
    )


def test_names_globs_and_mappings_make_pairs() -> None:
    student, teacher = network(), network()
    assert pairs("me", "body", student, teacher) == [("body", "body")]
    assert pairs("me", ["head", "*e*"], student, teacher) == [("stem", "stem"), ("head", "head")]
    assert pairs("me", {"stem": "body"}, student, teacher) == [("stem", "body")]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("bodi", "the student has no module 'bodi'. Nearest: 'body'"),
        ("head.*", "the student has no module"),
        ({"boddy": "body"}, "the student has no module 'boddy'. Nearest: 'body'"),
        ({"body": "boddy"}, "the teacher has no module 'boddy'. Nearest: 'body'"),
        ({"bod*": "bod*"}, r"the student has no module 'bod\*'"),
        ("extra", "the teacher has no module 'extra'.*give layers={student's: teacher's}"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_the_nearest(layers: Any, message: str) -> None:
    student = network()
    student.add_module("extra", nn.Identity())
    with pytest.raises(OptionError, match=message):
        pairs("me", layers, student, network())


def test_a_tap_has_the_answer_before_what_follows_changes_it_in_place() -> None:
    model, x = network(), torch.randn(5, 3)
    taps = Taps(model, ["stem", "body"])
    model(x)
    found = taps.take()
    torch.testing.assert_close(found["stem"], [model.stem(x)], rtol=0, atol=0)
    assert (found["stem"][0] < 0).any()
    torch.testing.assert_close(found["body"], [model.body(model.stem(x).relu())], rtol=0, atol=0)
    assert taps.take() == {}


def test_each_call_of_a_shared_module_is_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.same(self.same(x))

    model, x = Twice(), torch.randn(1, 2)
    taps = Taps(model, ["same"])
    out = model(x)
    first, second = taps.take()["same"]
    assert torch.equal(second, out)
    assert torch.equal(first, model.same(x))


def test_only_the_last_forward_with_gradients_counts() -> None:
    model = network()
    taps = Taps(model, ["stem"])
    model(torch.zeros(1, 3))
    model(torch.ones(1, 3))
    with torch.no_grad():
        model(torch.full((4, 3), 7.0))
    model.stem(torch.zeros(9, 3))  # a call of the module outside of the model's forward
    (found,) = taps.take()["stem"]
    assert torch.equal(found, model.stem(torch.ones(1, 3)))
    watched = Taps(model, ["stem"], watched=True)
    with torch.no_grad():
        model(torch.ones(4, 3))
    assert len(watched.take()["stem"][0]) == 4


def test_what_a_backward_pass_computes_again_is_not_looked_at() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model = Checkpointed()
    taps = Taps(model, ["inner"])
    (2 * model(torch.ones(1, 3))).sum().backward()
    assert len(taps.take()["inner"]) == 1


def test_a_copy_of_a_tapped_model_is_not_taken_for_it() -> None:
    model, x = network(), torch.randn(2, 3)
    taps = Taps(model, ["stem"])
    model(x)
    average = copy.deepcopy(model)
    average(torch.zeros(7, 3))
    assert len(taps.take()["stem"][0]) == 2


def test_a_forward_that_fails_does_not_leave_the_tap_open() -> None:
    model = network()
    taps = Taps(model, ["stem"])
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5))
    model.stem(torch.zeros(1, 3))
    assert taps.take() == {}


def test_released_taps_leave_no_hook() -> None:
    model = network()
    taps = Taps(model, ["stem", "head"])
    taps.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@dataclasses.dataclass
class Answer:
    logits: Tensor
    loss: float = 0.0


LOGITS = torch.randn(2, 3)


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        (LOGITS,),
        [LOGITS],
        {"loss": torch.ones(()), "logits": LOGITS},
        {"aux": torch.zeros(2, 3), "out": LOGITS},
        Answer(LOGITS),
    ],
    ids=["tensor", "tuple of one", "list of one", "logits", "out", "dataclass"],
)
def test_logits_are_found_by_rule(outputs: Any) -> None:
    assert logits_of(outputs) is LOGITS


@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        ((torch.ones(()), LOGITS), r"tuple\(Tensor\[\].*Tensor\[2, 3\]"),
        ({"scores": LOGITS}, r"dict\(scores="),
        (LOGITS.long(), "int64"),
        ({"logits": "text"}, r"dict\(logits=str\)"),
        (None, "NoneType"),
    ],
)
def test_logits_that_no_rule_finds_are_asked_for(outputs: Any, named: str) -> None:
    with pytest.raises(OptionError, match=rf"the teacher answers .*{named}.*outputs="):
        logits_of(outputs, "teacher")


@pytest.mark.parametrize(
    ("output", "item"),
    [
        (LOGITS, None),
        ((LOGITS, "cache"), None),
        (("cache", LOGITS), 1),
        (["cache", LOGITS], -1),
        ({"hidden": LOGITS}, None),
        ({"a": 1, "hidden": LOGITS}, "hidden"),
        ({"a": 1, "hidden": LOGITS}, 1),
    ],
)
def test_an_item_of_an_answer_is_found(output: Any, item: Any) -> None:
    assert tensor_of(output, item, "here") is LOGITS


@pytest.mark.parametrize(
    ("output", "item"), [((LOGITS,), 1), (("text", LOGITS), None), ({"a": LOGITS}, "b"), (3, None), ((LOGITS,), "a")]
)
def test_an_item_that_is_no_tensor_is_named(output: Any, item: Any) -> None:
    with pytest.raises(OptionError, match=r"^here answers .*floating-point"):
        tensor_of(output, item, "here")


def test_labels_are_found_by_rule_or_asked_for() -> None:
    labels = torch.zeros(2).long()
    for batch in (
        (LOGITS, labels),
        [LOGITS, LOGITS, labels],
        {"labels": labels},
        {"label": labels},
        {"target": labels},
    ):
        assert labels_of(batch) is labels
    for batch in (LOGITS, (labels,), {"x": labels}, (LOGITS, LOGITS), {"labels": [1, 2]}):
        with pytest.raises(DataError, match="labels=lambda batch"):
            labels_of(batch)
