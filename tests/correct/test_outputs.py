# SPDX-License-Identifier: Apache-2.0
"""The judge of corrections: relative squared errors of nested answers, against sums by NumPy."""

import contextlib
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.correct import output_error
from featherweight.errors import DataError, NumericalError, OptionError
from tests.correct.surroundings import Stopped, call


@dataclasses.dataclass
class Answer:
    logits: Tensor
    states: tuple[Tensor, ...]
    words: Tensor
    cache: Any = None


class Nested(nn.Module):
    """Answers with tensors of very different scales, integers, and an object that holds nothing to compare."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> dict[str, Any]:
        states = (1e4 * x + self.by, torch.full((2,), self.by))
        return {"answer": Answer(x * (1 + self.by), states, torch.arange(3), cache=object()), "loss": None}


def test_each_output_counts_alike_whatever_its_scale() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3), torch.randn(2, 3)]
    x = np.concatenate([batch.double().numpy() for batch in batches])
    got = output_error(Nested(1.5), Nested(1.0), batches, call)
    want = [
        (((2.5 - 2.0) * x) ** 2).sum() / ((2 * x) ** 2).sum(),
        (0.5**2 * x.size) / ((1e4 * x + 1) ** 2).sum(),
        0.5**2 / 1.0,
    ]
    assert got == pytest.approx(np.mean(want), rel=1e-3)


def test_an_output_that_is_zero_throughout_agrees_with_zeros_alone() -> None:
    batches = [torch.ones(4, 3)]
    assert output_error(Nested(0.0), Nested(0.0), batches, call) == 0.0
    assert output_error(Nested(0.5), Nested(0.0), batches, call) == math.inf


def test_padding_does_not_count_where_the_batch_has_a_mask() -> None:
    """Errors are put at padding alone: tokens' answers agree then, one number an item still differs."""

    class Tokens(nn.Module):
        def __init__(self, at_padding: float, pooled: float) -> None:
            super().__init__()
            self.values = at_padding, pooled

        def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
            padded = (attention_mask == 0)[..., None] * self.values[0]
            return x + padded, x.mean(1) + self.values[1]

    torch.manual_seed(0)
    batch = {"x": torch.randn(2, 5, 3), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    assert output_error(Tokens(7.0, 0.0), Tokens(0.0, 0.0), [batch], call) == 0.0
    pooled = batch["x"].mean(1).double()
    expected = 0.5 * (0.25 * pooled.numel() / float(pooled.square().sum()))
    assert output_error(Tokens(7.0, 0.5), Tokens(0.0, 0.0), [batch], call) == pytest.approx(expected, rel=1e-5)
    in_tuple = lambda model, item: model(**item[0])  # noqa: E731
    assert output_error(Tokens(7.0, 0.0), Tokens(0.0, 0.0), [(batch, torch.zeros(2))], in_tuple) == 0.0


def test_logits_that_both_models_mask_by_infinity_agree() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, -math.inf)

    assert output_error(Masked(), Masked(), [torch.tensor([-1.0, 2.0])], call) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["the compressed model", "the dense reference"])
def test_an_answer_that_is_not_finite_is_named_with_its_model(whose: str, bad: float) -> None:
    fine, broken = nn.Linear(2, 2), nn.Linear(2, 2)
    broken.bias.data[0] = bad
    model, reference = (broken, fine) if whose == "the compressed model" else (fine, broken)
    with pytest.raises(NumericalError, match=whose):
        output_error(model, reference, [torch.ones(3, 2)], call)


@pytest.mark.parametrize(
    ("model", "batches", "error"),
    [
        (nn.Linear(2, 3), [torch.ones(1, 2)], OptionError),
        (nn.Linear(2, 2), [], DataError),
        (nn.Linear(2, 2), iter([torch.ones(1, 2)]), DataError),
        (nn.Linear(2, 2), 3, DataError),
    ],
)
def test_what_cannot_be_compared_is_refused(model: nn.Module, batches: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        output_error(model, nn.Linear(2, 2), batches, call)


def test_an_answer_of_integers_alone_is_refused() -> None:
    with pytest.raises(DataError, match="floating-point"):
        output_error(nn.Identity(), nn.Identity(), [torch.arange(3)], call)


@pytest.mark.parametrize("error", [None, RuntimeError(), Stopped()])
def test_modes_of_every_module_are_the_callers_again(error: BaseException | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[0].eval()
    reference = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    reference[1].train()
    seen = []

    def forward(one: nn.Module, batch: Any) -> Any:
        seen.append([module.training for module in one.modules()])
        if error is not None:
            raise error
        return one(batch)

    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        output_error(model, reference, [torch.ones(3, 2)], forward)
    assert seen and not any(flag for flags in seen for flag in flags)
    assert [module.training for module in model.modules()] == [True, False, True]
    assert [module.training for module in reference.modules()] == [False, False, True]
    assert torch.backends.mha.get_fastpath_enabled()
