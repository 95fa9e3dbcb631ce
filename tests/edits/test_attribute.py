# SPDX-License-Identifier: Apache-2.0
"""Oracle: the layer as its constructor would build it with the other number."""

from typing import Any

import pytest
import torch
from torch import nn

from featherweight.edits import apply
from featherweight.errors import EditError
from featherweight.plan import Attribute
from tests.edits.snapshot import snapshot


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.splits = [2, 6]
        self.shape = torch.Size((2, 3))
        self.pair = (5, 7)
        self.flag = True
        self.rate = 0.5
        self.empty = ()
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("name", "value", "becomes"),
    [("heads", 3, 3), ("splits", (1, 6), [1, 6]), ("shape", (1, 3), torch.Size((1, 3))), ("pair", (4, 7), (4, 7))],
)
def test_the_value_is_set_and_keeps_its_type(name: str, value: Any, becomes: Any) -> None:
    model = nn.ModuleDict({"inner": Sizes()})
    old = getattr(model["inner"], name)
    apply(model, Attribute("inner", name, value))
    assert getattr(model["inner"], name) == becomes
    assert type(getattr(model["inner"], name)) is type(becomes)
    assert old != becomes  # a list is another list: whoever holds the old one keeps it


def test_a_group_norm_without_weights_answers_as_one_built_so() -> None:
    model = nn.Sequential(nn.GroupNorm(4, 8, affine=False))
    apply(model, Attribute("0", "num_channels", 4))
    apply(model, Attribute("0", "num_groups", 2))
    x = torch.randn(2, 4, 3)
    assert torch.equal(model(x), nn.GroupNorm(2, 4, affine=False)(x))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Attribute("inner", "head", 3), "no size 'head' of its own. Nearest: heads"),
        (Attribute("iner", "heads", 3), "no layer 'iner'. Nearest: inner"),
        (Attribute("inner", "heads", (3,)), r"is 4; it cannot become \(3,\)"),
        (Attribute("inner", "heads", True), "is 4; it cannot become True"),
        (Attribute("inner", "pair", 3), r"is \(5, 7\); it cannot become 3"),
        (Attribute("inner", "pair", (3,)), "takes 2 whole numbers"),
        (Attribute("inner", "pair", (3, True)), "takes 2 whole numbers"),
        (Attribute("inner", "flag", 1), "flag is a bool, not a size"),
        (Attribute("inner", "rate", 1), "rate is a float, not a size"),
        (Attribute("inner", "training", 1), "training is a bool, not a size"),
        (Attribute("inner", "empty", ()), "empty is a tuple, not a size"),
        (Attribute("", "heads", 1), "the model has no size 'heads' of its own"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(edit: Attribute, message: str) -> None:
    model = nn.ModuleDict({"inner": Sizes()})
    before = snapshot(model)
    with pytest.raises(EditError, match=message):
        apply(model, edit)
    assert snapshot(model) == before
