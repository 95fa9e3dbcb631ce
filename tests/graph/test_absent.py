# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against models that are cut by hand, each by another way of writing the smaller one down."""

import pytest
import torch
import torch.nn.functional as F

from tests.graph.absent import run, without
from tests.graph.patterns import PATTERNS, build

KEEP = [0, 2, 3, 5, 6]  # of seven
GONE = [1, 4]


def outputs(name, makers):
    model, inputs = build(name)
    return without(model, inputs, makers)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_mlp_without_two_units():
    (got,) = outputs("mlp", [("a.weight", 0, GONE), ("a.bias", 0, GONE)])
    m, (x,) = build("mlp")
    h = F.relu(F.linear(x, m.a.weight[KEEP], m.a.bias[KEEP]))
    close(got, m.head(torch.tanh(F.linear(h, m.b.weight[:, KEEP]))))


def test_a_residual_network_without_two_channels_whose_sigmoid_of_zero_is_not_zero():
    makers = [(f"{name}.{part}", 0, GONE) for name in ("stem", "b") for part in ("weight", "bias")]
    (got,) = outputs("residual", makers)
    m, (x,) = build("residual")
    n = m.norm
    y = F.conv2d(x, m.stem.weight[KEEP], m.stem.bias[KEEP], padding=1)
    y = F.batch_norm(y, n.running_mean[KEEP], n.running_var[KEEP], n.weight[KEEP], n.bias[KEEP], eps=n.eps)
    y = torch.sigmoid(y)
    z = F.relu(F.conv2d(y, m.a.weight[:, KEEP], padding=1))
    y = y + F.conv2d(z, m.b.weight[KEEP], m.b.bias[KEEP], padding=1)
    close(got, F.linear(y.mean((2, 3)), m.head.weight[:, KEEP], m.head.bias))


def test_a_norm_sees_the_channels_that_are_left():
    keep, gone = [0, 2, 4], [1, 3]
    (got,) = outputs("layernorm_without_affine", [("enter.weight", 0, gone), ("enter.bias", 0, gone)])
    m, (x,) = build("layernorm_without_affine")
    y = F.layer_norm(F.linear(x, m.enter.weight[keep], m.enter.bias[keep]), (3,))
    close(got, F.linear(y, m.head.weight[:, keep], m.head.bias))


def test_a_group_norm_sees_what_is_left_of_each_group():
    keep, gone = [0, 2, 3, 5], [1, 4]
    (got,) = outputs("groupnorm", [("a.weight", 0, gone), ("a.bias", 0, gone)])
    m, (x,) = build("groupnorm")
    y = F.conv2d(x, m.a.weight[keep], m.a.bias[keep], padding=1)
    y = F.relu(F.group_norm(y, 2, m.norm.weight[keep], m.norm.bias[keep], m.norm.eps))
    close(got, F.conv2d(y, m.head.weight[:, keep], m.head.bias, padding=1))


@pytest.mark.parametrize("name", ["attn_sep_matmul", "attn_sep_sdpa", "attn_static_attrs"])
def test_attention_without_its_middle_head(name):
    gone, keep = list(range(4, 8)), [0, 1, 2, 3, 8, 9, 10, 11]
    makers = [(f"{p}.weight", 0, gone) for p in "qkv"] + [(f"{p}.bias", 0, gone) for p in "qk"]
    (got,) = outputs(name, makers)
    m, (x,) = build(name)
    heads = []
    for rows in (keep[:4], keep[4:]):
        q, k = (F.linear(x, part.weight[rows], part.bias[rows]) for part in (m.q, m.k))
        heads.append(torch.softmax(q @ k.mT / 2, -1) @ F.linear(x, m.v.weight[rows]))
    close(got, F.linear(torch.cat(heads, -1), m.o.weight[:, keep], m.o.bias))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_layer_without_two_units(kind):
    gates = 4 if kind == "lstm" else 3
    rows = [g * 7 + i for g in range(gates) for i in GONE]
    makers = [(f"rnn.{part}_l0", 0, rows) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    (got,) = outputs(kind, makers)
    m, (x,) = build(kind)
    keep = [g * 7 + i for g in range(gates) for i in KEEP]
    small = type(m.rnn)(9, 5, batch_first=True).double()
    with torch.no_grad():
        for name, p in small.named_parameters():
            p.copy_(getattr(m.rnn, name)[keep][:, KEEP] if "weight_hh" in name else getattr(m.rnn, name)[keep])
    y = small(x)[0] if kind == "lstm" else small(x)[0][:, -1]
    close(got, F.linear(y, m.head.weight[:, KEEP], m.head.bias))


def test_a_softmax_over_channels_is_of_those_that_are_left():
    (got,) = outputs("softmax_over_channels", [("a.weight", 0, GONE), ("a.bias", 0, GONE)])
    m, (x,) = build("softmax_over_channels")
    y = F.conv2d(x, m.a.weight[KEEP], m.a.bias[KEEP], padding=1).softmax(1)
    close(got, F.conv2d(y, m.head.weight[:, KEEP], m.head.bias, padding=1))


def test_what_is_left_of_a_sum_of_branches_is_absent_where_one_of_them_is():
    """Two summands, and one is gone: no number can be right, so none is made up."""
    m, (x,) = build("output_is_hidden_too")
    assert without(m, (x,), [("a.bias", 0, [2])])[1][..., 2].isnan().all()


@pytest.mark.parametrize("name", list(PATTERNS))
def test_with_nothing_absent_it_is_the_model(name):
    model, inputs = build(name)
    expected = run(model, inputs)
    close(outputs(name, []), expected)
