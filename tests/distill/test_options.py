# SPDX-License-Identifier: Apache-2.0
"""Options are refused when they are made, and tensors that cannot be compared when a loss starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.distill import CIRKD, CWD, KL, Attention, Distill, Features, Loss
from featherweight.errors import OptionError


@pytest.mark.parametrize(
    "loss", [KL(), CWD(), Features("a"), Attention("a"), CIRKD("a", 2)], ids=lambda x: type(x).__name__
)
def test_every_loss_keeps_the_one_contract(loss: Loss) -> None:
    assert isinstance(loss, Loss)
    assert Distill(loss).losses == Distill([loss]).losses == (loss,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KL(temperature=0), "KL: temperature must be a number above 0"),
        (lambda: KL(temperature="4"), "KL: temperature"),
        (lambda: CWD(weight=-1.0), "CWD: weight"),
        (lambda: CWD(weight=float("nan")), "CWD: weight"),
        (lambda: KL(axis=1.0), "KL: axis is a whole number"),
        (lambda: KL(layers=3), "KL: layers names modules"),
        (lambda: KL(layers=""), "KL: layers names modules"),
        (lambda: Features([]), "Features: layers names modules"),
        (lambda: Features(None), "Features: layers names modules"),
        (lambda: Features({"a": 3}), "Features: layers names modules"),
        (lambda: Features("a", kind="mae"), "Nearest: mse"),
        (lambda: Attention("a", kind="maps"), "Nearest: map"),
        (lambda: Attention("a", power=0), "Attention: power"),
        (lambda: CIRKD("a", classes=0), "CIRKD: classes must be a whole number from 1"),
        (lambda: CIRKD("a", 3, pool=0), "CIRKD: pool"),
        (lambda: CIRKD("a", 3, pixel=-0.1), "CIRKD: pixel is a weight"),
        (lambda: CIRKD("a", 3, labels="labels"), "CIRKD: labels is a function"),
        (lambda: Distill([]), "there is no loss"),
        (lambda: Distill(KL), "is no loss"),
        (lambda: Distill([KL(), "cwd"]), "'cwd' is no loss"),
        (lambda: Distill(KL(), teacher="bert"), "teacher is 'bert', not a torch.nn.Module"),
        (lambda: Distill(KL(), outputs=1), "outputs is a function"),
    ],
)
def test_an_option_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


IMAGE, NARROW = torch.randn(2, 6, 4, 4), torch.randn(2, 4, 4, 4)


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "message"),
    [
        (KL(), torch.randn(2, 5), torch.randn(2, 6), r"student gives Tensor\[2, 5\].*teacher Tensor\[2, 6\]"),
        (KL(), IMAGE, torch.randn(2, 6, 8, 8), "interpolate in Task.forward"),
        (KL(), torch.randn(2, 5, 3), torch.randn(2, 5, 3), "Give axis=-1"),
        (KL(axis=2), torch.randn(2, 5), torch.randn(2, 5), "no axis 2"),
        (KL(axis=0), torch.randn(2, 5), torch.randn(2, 5), "no axis 0"),
        (KL(), torch.randn(5), torch.randn(5), "no axis 1"),
        (CWD(), torch.randn(2, 5), torch.randn(2, 5), "has none. KL compares"),
        (CWD(project=False), NARROW, IMAGE, "project=False"),
        (Features("x"), torch.randn(2, 3, 6), torch.randn(2, 3, 4), "Give axis=-1"),
        (Features("x", kind="cosine"), torch.randn(2, 3, 6), torch.randn(2, 3, 6), "Give axis=-1"),
        (Features("x"), NARROW, torch.randn(2, 6, 2, 2), "cannot be compared"),
        (Attention("x"), torch.randn(2, 5), torch.randn(2, 5), "has none"),
        (Attention("x"), IMAGE, torch.randn(2, 6, 2, 2), "cannot be compared"),
        (Attention("x", kind="rows"), torch.randn(2, 5, 6), torch.randn(2, 5, 6), r"\(batch, heads, queries, keys\)"),
    ],
)
def test_tensors_that_cannot_be_compared_are_refused_at_the_start(
    loss: Loss, student: Tensor, teacher: Tensor, message: str
) -> None:
    with pytest.raises(OptionError, match=f"^here: .*{message}"):
        loss.start("here", student, teacher)


@pytest.mark.parametrize("loss", [CWD(), Features("x"), Features("x", kind="cosine")])
def test_widths_that_differ_are_projected_by_a_map_that_learns(loss: Loss) -> None:
    torch.manual_seed(0)
    term = loss.start("here", NARROW, IMAGE)
    parameters = list(term.parameters())
    assert sum(p.numel() for p in parameters) == 4 * 6 + 6
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = term(NARROW, IMAGE, None)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0]


def test_a_projection_is_a_convolution_of_one_by_one() -> None:
    term = Features("x").start("here", NARROW, IMAGE)
    conv = nn.Conv2d(4, 6, 1)
    with torch.no_grad():
        conv.weight.copy_(term.projection.map.weight[:, :, None, None])
        conv.bias.copy_(term.projection.map.bias)
    wanted = (conv(NARROW) - IMAGE).square().mean()
    torch.testing.assert_close(term(NARROW, IMAGE, None), wanted)


@pytest.mark.parametrize("loss", [KL(), CWD(), Features("x"), Attention("x")])
def test_equal_widths_learn_nothing_unless_told_to(loss: Loss) -> None:
    assert not list(loss.start("here", IMAGE, IMAGE).parameters())
    if hasattr(loss, "project"):
        assert list(type(loss)(layers="x", project=True).start("here", IMAGE, IMAGE).parameters())


def test_a_channel_that_is_cut_while_distilling_is_named() -> None:
    for loss, message in (
        (CWD(), "was 4 wide when .* is 3 wide now"),
        (Features("x"), "was 4 wide"),
        (CIRKD("x", 2), "4"),
    ):
        term = loss.start("here", NARROW, IMAGE)
        with pytest.raises(OptionError, match=f"^here: .*{message}"):
            term(NARROW[:, :3], IMAGE, (None, torch.zeros(2, 4, 4).long()))
    with pytest.raises(OptionError, match="cannot be compared"):
        Features("x").start("here", IMAGE, IMAGE)(NARROW, IMAGE, None)


def test_each_head_of_the_teacher_is_imitated_by_a_mean_of_the_students() -> None:
    teacher = torch.rand(2, 4, 3, 3).softmax(-1)
    student = teacher[:, [2, 0]].clone()
    term = Attention("x", kind="rows").start("here", student, teacher)
    with torch.no_grad():  # heads 2 and 0 of the teacher are the student's first and second
        term.mix.shares.copy_(torch.tensor([[-50.0, 50.0], [0.0, 0.0], [50.0, -50.0], [0.0, 0.0]]))
    mixed = term.mix(student)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(2, 4, 3))
    torch.testing.assert_close(mixed[:, [0, 2]], teacher[:, [0, 2]])
    torch.testing.assert_close(mixed[:, 1], student.mean(1))


def test_half_precision_is_projected_in_full() -> None:
    term = Features("x").start("here", NARROW.bfloat16(), IMAGE.bfloat16())
    assert {p.dtype for p in term.parameters()} == {torch.float32}
    assert term(NARROW.bfloat16(), IMAGE.bfloat16(), None).dtype == torch.float32
