# SPDX-License-Identifier: Apache-2.0
"""The part of the zoo that runs with every change: eight networks that stay, and four that change with the week.

Each is combed, cut by 30 % everywhere, compared with the uncut network that has zeros there, and trained for a step.
ZOO_WEEK=202648 picks the four of that week again.
"""

import copy
import datetime
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import FeatherweightError
from featherweight.graph import trace
from tests.zoo import check, run
from tests.zoo.architectures import architectures, find
from tests.zoo.page import write

FIXED = (
    "densenet",
    "shufflenet_v2",
    "yolo",
    "unet",
    "lstm_language_model",
    "torch_transformer",
    "llama",
    "swin",
)
ROTATING = 4


def week() -> int:
    year, number, _ = datetime.date.today().isocalendar()
    return int(os.environ.get("ZOO_WEEK", 100 * year + number))


def of_the_week(seed: int) -> list[str]:
    others = [architecture.label for architecture in architectures() if architecture.label not in FIXED]
    return [others[index] for index in np.random.default_rng(seed).choice(len(others), size=ROTATING, replace=False)]


@pytest.mark.parametrize("label", FIXED)
def test_a_network_that_loses_30_percent_everywhere_is_the_network_with_zeros_there_and_trains(label: str) -> None:
    model, inputs = find(label).make()
    found = trace(model, inputs)
    assert check.coverage(model, found) >= 0.6
    pruned = copy.deepcopy(model)
    made, couplings = check.cut_share(pruned, inputs, found)
    assert made.verified is not None
    assert check.against_zeros(model, pruned, inputs, found, couplings).get("outcome") != "wrong"
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, pruned))
    assert after < 0.9 * before
    check.train_one_step(pruned, inputs)


@pytest.mark.parametrize("label", [pytest.param(label, id=f"{label}-week{week()}") for label in of_the_week(week())])
def test_the_networks_of_the_week_are_cut_rightly_or_left_as_they_were(label: str) -> None:
    model, inputs = find(label).make()
    found = trace(model, inputs)
    pruned = copy.deepcopy(model)
    try:
        _, couplings = check.cut_share(pruned, inputs, found)
    except FeatherweightError:
        assert check.untouched(model, pruned)
        return
    assert check.against_zeros(model, pruned, inputs, found, couplings).get("outcome") != "wrong"
    check.train_one_step(pruned, inputs)


def test_the_oracle_of_zeros_sees_a_cut_of_other_channels() -> None:
    model, inputs = find("vgg").make()
    found = trace(model, inputs)
    pruned = copy.deepcopy(model)
    _, couplings = check.cut_share(pruned, inputs, found)
    assert check.against_zeros(model, pruned, inputs, found, couplings)["zeros"] < 1e-9
    other = [found[coupling.group][(coupling.index + 1) % found[coupling.group].size] for coupling in couplings]
    assert check.against_zeros(model, pruned, inputs, found, other)["outcome"] == "wrong"


class Experts(nn.Module):
    """Rows in blocks, each for the matrices of one expert. Their kernel asks for rows of whole 16 bytes: 28 of 40 are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 40)), nn.Parameter(torch.randn(3, 40, 8))
        self.register_buffer("ends", torch.tensor([4, 4, 12], dtype=torch.int32))

    def forward(self, rows: Tensor) -> Tensor:
        hidden = F.grouped_mm(rows, self.up, offs=self.ends).relu()
        return F.grouped_mm(hidden, self.down, offs=self.ends)


class Queries(nn.Module):
    """Zeros as large as learned positions, as detectors start their queries."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.content, self.place = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions(x)
        return self.content(torch.zeros_like(positions)) * self.place(positions)


@pytest.mark.parametrize(
    ("network", "inputs", "members"),
    [
        (Experts, (torch.randn(12, 8),), {("up", 2), ("down", 1)}),
        (
            Queries,
            (torch.randn(3, 6),),
            {("positions.weight", 0), ("positions.bias", 0), ("content.weight", 1), ("place.weight", 1)},
        ),
    ],
)
def test_what_the_zoo_asked_for_is_one_group_and_cut_as_one(
    network: type[nn.Module], inputs: tuple[Tensor, ...], members: set[tuple[str, int]]
) -> None:
    torch.manual_seed(0)
    model = network()
    found = trace(model, inputs)
    assert [{(member.tensor, member.axis) for member in group.members} for group in found.groups] == [members]
    pruned = copy.deepcopy(model)
    _, couplings = check.cut_share(pruned, inputs, found)
    assert check.against_zeros(model, pruned, inputs, found, couplings).get("outcome") != "wrong"


def test_there_are_at_least_sixty_architectures_each_with_a_label_of_its_own() -> None:
    labels = [architecture.label for architecture in architectures()]
    assert len(labels) == len(set(labels)) >= 60
    assert set(FIXED) <= set(labels)


def test_a_network_is_the_same_each_time_that_it_is_made_and_its_norms_are_not_trivial() -> None:
    (one, inputs), (two, _) = find("vgg").make(), find("vgg").make()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    norm = one.features[1]
    for tensor, trivial in ((norm.weight, 1.0), (norm.bias, 0.0), (norm.running_mean, 0.0), (norm.running_var, 1.0)):
        assert (tensor - trivial).abs().min() > 0 and tensor.std() > 0.05
    assert check.outputs(one, inputs)[0].std() > 0.05


def test_a_process_that_does_not_answer_in_time_has_hung_and_one_that_dies_has_crashed(tmp_path: Path) -> None:
    assert run._process("vgg", tmp_path, 1.0, [])["process"]["outcome"] == "hung"
    facts = run._process("no such network", tmp_path, 60.0, [])
    assert facts["process"]["outcome"] == "crashed" and "no such network" in facts["process"]["reason"]


def test_the_verdict_is_the_worst_step_and_blames_no_cut_for_what_the_uncut_network_fails_as_well() -> None:
    good, bad = {"outcome": "passed"}, {"outcome": "crashed", "reason": "boom"}
    wrong = {"outcome": "wrong", "reason": "differs"}
    assert run.verdict({"trace": good, "onnx": good})["outcome"] == "passed"
    assert run.verdict({"trace": good, "training": bad, "groups": [{"name": "a", "one": good, "share": wrong}]}) == {
        "outcome": "wrong",
        "reason": "a, share: differs",
    }
    assert run.verdict({"trace": good, "training": bad, "training_uncut": bad})["outcome"] == "passed"
    assert run.verdict({"trace": good, "training": bad, "training_uncut": good})["outcome"] == "crashed"


def test_the_page_counts_what_was_reached(tmp_path: Path) -> None:
    page = tmp_path / "zoo.md"
    page.write_text("<!-- goals -->\n<!-- end -->\n<!-- table -->\n<!-- end -->\n<!-- frozen -->\nold\n<!-- end -->\n")
    group = {"name": "a", "one": {"outcome": "passed"}, "share": {"outcome": "refused", "reason": "no"}}
    group["exported"] = {"outcome": "passed"}
    good = {
        "label": "good",
        "outcome": "passed",
        "reason": "",
        "parameters": 100,
        "trace": {
            "outcome": "passed",
            "front": "export",
            "coverage": 0.9,
            "in_code": 0.7,
            "groups": 1,
            "seconds": 0.5,
            "frozen": [],
        },
        "groups": [group],
        "everything": {"outcome": "passed", "parameters": 51},
        "training": {"outcome": "passed"},
        "loaded": {"outcome": "passed"},
        "onnx": {"outcome": "refused"},
        "onnx_uncut": {"outcome": "refused"},
        "program": {"outcome": "passed"},
    }
    hung = {"label": "bad", "outcome": "hung", "reason": "no answer", "process": {"outcome": "hung"}}
    write(json.loads(json.dumps([good, hung])), page)
    text = page.read_text()
    assert "| good | export | 90 % | 70 % | 1 | 1 of 2 | yes | 51 % | yes | yes | nor uncut | yes |" in text
    assert "2 architectures; 1 (50 %) prunable" in text and "1 (50 %) without a wrong" in text
    assert "**bad**, hung: no answer" in text and "old" not in text
