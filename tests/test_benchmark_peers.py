# SPDX-License-Identifier: Apache-2.0
"""The judge of two tools sees what was cut from values alone, and lets nothing wrong pass; the page says what it saw."""

import pytest
import torch
from benchmarks.comb.peers import by_featherweight, judge, judged, makers_gone, network
from benchmarks.comb.peers_page import NETWORKS, page
from torch import nn


def cut_by_hand(rows: list[int], columns: list[int]) -> nn.Module:
    model = network("pattern/mlp")[0]
    model.a.weight = nn.Parameter(model.a.weight.detach()[rows])
    model.a.bias = nn.Parameter(model.a.bias.detach()[rows])
    model.b.weight = nn.Parameter(model.b.weight.detach()[:, columns])
    return model


@pytest.mark.parametrize(
    ("columns", "verdict"),
    [([0, 2, 5], "exact"), ([0, 2, 4], "wrong"), ([2, 0, 5], "wrong"), ([0, 2], "breaks")],
    ids=["those that read the rows", "one that does not", "another order", "too few"],
)
def test_a_cut_by_hand_is_judged_by_whether_columns_fit_rows(columns, verdict):
    assert judge("pattern/mlp", cut_by_hand([0, 2, 5], columns))["verdict"] == verdict


def test_a_network_that_was_left_alone_is_not_exact():
    assert judge("pattern/mlp", network("pattern/mlp")[0])["verdict"] == "nothing"


def test_what_is_gone_is_read_off_the_values():
    gone = makers_gone(network("pattern/mlp")[0], cut_by_hand([0, 2, 5], [0, 2, 5]))
    assert gone == [("a.weight", 0, [1, 3, 4, 6]), ("a.bias", 0, [1, 3, 4, 6])]


def test_a_tool_that_gives_up_is_told_by_what_it_leaves():
    def leaves_it(models, inputs, outputs):
        raise RuntimeError("no")

    def leaves_half(models, inputs, outputs):
        models[0].a.weight.data = models[0].a.weight.data[:3]
        raise RuntimeError("no")

    assert judged("pattern/mlp", leaves_it)["verdict"] == "stops"
    assert judged("pattern/mlp", leaves_half)["verdict"] == "breaks"


def test_ours_is_judged_and_its_row_stands_in_the_table():
    row = judged("pattern/attn_static_attrs", by_featherweight)
    assert row["verdict"] == "exact" and row["left"] < 1
    text = page({"featherweight pattern/attn_static_attrs": {"tool": "featherweight", **row}})
    assert "| attn_static_attrs | not measured | exact," in text
    assert all(f"| {name} |" in text for name in NETWORKS)
    assert torch.get_default_dtype() == torch.float32
