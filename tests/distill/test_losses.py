# SPDX-License-Identifier: Apache-2.0
"""Oracle: the papers' formulas as plain loops in NumPy, and gradients by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.distill import losses
from tests.distill import formulas


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two(*shape: int) -> tuple[Tensor, Tensor]:
    return draw(*shape), draw(*shape, seed=1)


def equal(found: Tensor, wanted: float) -> None:
    assert found.ndim == 0
    assert float(found) == pytest.approx(wanted, rel=1e-10)
    assert wanted > 1e-3, "an oracle that gives zero shows nothing"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("shape", "axis"), [((5, 7), 1), ((2, 4, 3, 2), 1), ((2, 3, 6), -1), ((2, 6, 3), 1)])
def test_kl_is_its_formula(shape: tuple[int, ...], axis: int, temperature: float) -> None:
    student, teacher = two(*shape)
    wanted = formulas.kl(student.numpy(), teacher.numpy(), temperature, axis)
    equal(losses.kl(student, teacher, temperature, axis), wanted)


def test_kl_is_cross_entropy_against_the_teacher_less_its_entropy() -> None:
    student, teacher = two(6, 5)
    p = teacher.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    assert float(losses.kl(student, teacher, 1.0)) == pytest.approx(float(F.cross_entropy(student, p) - entropy))


def test_the_gradient_of_kl_does_not_fade_with_temperature() -> None:
    """T² is there for this: for large T the gradient tends to that of half the squared distance of centred logits."""
    student, teacher = two(1, 5)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.kl(student, teacher, 1e4), student)
    s, t = (x - x.mean() for x in (student.detach(), teacher))
    torch.testing.assert_close(gradient, (s - t) / 5, rtol=0, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 2, 6), (2, 2, 2, 3, 2)])
def test_cwd_is_its_formula(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = two(*shape)
    equal(losses.cwd(student, teacher, temperature), formulas.cwd(student.numpy(), teacher.numpy(), temperature))


def test_cwd_finds_channels_on_any_axis_and_flattens_all_others() -> None:
    student, teacher = two(2, 3, 4, 5)
    wanted = float(losses.cwd(student, teacher))
    assert float(losses.cwd(student.movedim(1, 3), teacher.movedim(1, 3), axis=3)) == pytest.approx(wanted)
    assert float(losses.cwd(student.flatten(2).mT, teacher.flatten(2).mT, axis=-1)) == pytest.approx(wanted)


def test_mse_and_cosine_are_their_formulas() -> None:
    student, teacher = two(2, 3, 4, 5)
    s, t = (np.moveaxis(x.numpy(), 1, -1).reshape(-1, 3) for x in (student, teacher))
    equal(losses.mse(student, teacher), float(((s - t) ** 2).mean()))
    equal(losses.cosine(student, teacher), formulas.cosine(s, t))
    equal(losses.cosine(10 * student, teacher), formulas.cosine(s, t))


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_maps_are_their_formula_at_any_width(power: float) -> None:
    student, teacher = draw(2, 3, 4, 5), draw(2, 7, 4, 5, seed=1)
    equal(
        losses.attention_map(student, teacher, power), formulas.attention_map(student.numpy(), teacher.numpy(), power)
    )


def test_attention_rows_are_their_formula_with_a_causal_mask() -> None:
    hidden = torch.ones(4, 4).triu(1).bool()
    student, teacher = (x.masked_fill(hidden, -math.inf).softmax(-1) for x in two(2, 3, 4, 4))
    equal(losses.attention_rows(student, teacher), formulas.attention_rows(student.numpy(), teacher.numpy()))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.attention_rows(student, teacher), student)
    assert gradient.isfinite().all()


def test_cross_image_is_its_formula_and_widths_may_differ() -> None:
    student, teacher = F.normalize(draw(3, 4, 5), dim=2), F.normalize(draw(3, 4, 6, seed=1), dim=2)
    wanted = formulas.cross_image(student.numpy(), teacher.numpy(), 0.1)
    equal(losses.cross_image(student, teacher, 0.1), wanted)


def test_memory_is_its_formula() -> None:
    student, teacher, contrast = (F.normalize(draw(n, 3, seed=seed), dim=1) for n, seed in ((6, 0), (6, 1), (9, 2)))
    wanted = formulas.memory(student.numpy(), teacher.numpy(), contrast.numpy(), 0.1)
    equal(losses.memory(student, teacher, contrast, 0.1), wanted)


def test_without_anchors_or_memory_there_is_no_loss_but_a_gradient_of_zero() -> None:
    for anchors, remembered in ((0, 3), (3, 0)):
        student = draw(anchors, 2).requires_grad_()
        loss = losses.memory(student, draw(anchors, 2), draw(remembered, 2))
        assert float(loss.detach()) == 0.0
        loss.backward()
        assert not student.grad.count_nonzero()


LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "kl": (lambda s, t: losses.kl(s, t, 2.0), (3, 4)),
    "kl of tokens": (lambda s, t: losses.kl(s, t, 2.0, axis=-1), (2, 3, 4)),
    "cwd": (lambda s, t: losses.cwd(s, t, 4.0), (2, 2, 3, 2)),
    "mse": (losses.mse, (3, 4)),
    "cosine": (losses.cosine, (2, 3, 2)),
    "attention map": (losses.attention_map, (2, 3, 2, 2)),
    "attention rows": (lambda s, t: losses.attention_rows(s.softmax(-1), t.softmax(-1)), (1, 2, 3, 3)),
    "cross image": (lambda s, t: losses.cross_image(F.normalize(s, dim=2), F.normalize(t, dim=2), 0.3), (2, 3, 4)),
    "memory": (lambda s, t: losses.memory(s, t, draw(5, 4, seed=9, scale=0.3), 0.3), (3, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss, shape = LOSSES[name]
    student, teacher = two(*shape)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student.requires_grad_(),))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "memory"])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name: str) -> None:
    loss, shape = LOSSES[name]
    teacher = draw(*shape)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert abs(float(value.detach())) < 1e-12
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_summed(dtype: torch.dtype) -> None:
    """A softmax over 10,000 positions: each is 1e-4, whose differences half precision does not hold."""
    student, teacher = (x.to(dtype) for x in two(1, 2, 100, 100))
    found = losses.cwd(student, teacher)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(losses.cwd(student.double(), teacher.double())), rel=1e-4)
    assert losses.kl(student[..., 0, 0], teacher[..., 0, 0]).dtype == torch.float32
