# SPDX-License-Identifier: Apache-2.0
"""What is drawn for calibration: how much, what is set apart, and that it is the same at every pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from featherweight.errors import DataError
from featherweight.layers.calibration import Calibration, draw, numbered, size_of
from featherweight.task import Task


def task(data: object) -> Task:
    return Task(nn.Linear(2, 1), (torch.zeros(1, 2),), calibration=data)  # type: ignore[arg-type]


def numbers(*parts: tuple[torch.Tensor, ...]) -> list[list[int]]:
    return [sorted(int(x) for batch in part for x in batch.flatten()) for part in parts]


def test_whole_batches_up_to_the_number_asked_for_and_a_share_set_apart() -> None:
    data = [torch.arange(4.0) + 4 * i for i in range(10)]
    drawn = draw(task(data), samples=30, held_out=0.25, seed=0)
    assert (drawn.samples, drawn.held_out_samples) == (24, 8)
    fit, held_out = numbers(drawn.fit, drawn.held_out)
    assert sorted(fit + held_out) == list(range(32))
    assert held_out != list(range(24, 32)), "held-out batches are spread, not the last ones"
    assert drawn.notes == ()


def test_batches_know_their_numbers_in_the_loader() -> None:
    data = [torch.full((4,), float(i)) for i in range(10)]
    drawn = draw(task(data), samples=30, held_out=0.4, seed=0)
    for part in (drawn.fit, drawn.held_out):
        assert [(number, int(batch[0])) for number, batch in numbered(part)] == [(n, n) for n in part.numbers]
    assert sorted(drawn.fit.numbers + drawn.held_out.numbers) == list(range(8))
    cut = draw(task(data[:1]), samples=4, held_out=0.4, seed=0)
    assert cut.fit.numbers == cut.held_out.numbers == (0,)
    assert list(numbered(iter("ab"))) == [(0, "a"), (1, "b")]


def test_one_batch_is_cut_in_two_whatever_its_form() -> None:
    for batch in (torch.zeros(10, 2), (torch.zeros(10, 2), torch.zeros(10)), {"x": torch.zeros(10, 2)}):
        drawn = draw(task([batch]), samples=5, held_out=0.2, seed=0)
        assert (drawn.samples, drawn.held_out_samples) == (8, 2)
        assert type(drawn.fit[0]) is type(batch)


def test_a_batch_that_cannot_be_cut_is_all_solved_on_and_that_is_said() -> None:
    drawn = draw(task([(torch.zeros(10, 2), torch.zeros(3))]), samples=5, held_out=0.2, seed=0)
    assert drawn.held_out == ()
    assert "nothing is held out" in drawn.notes[0]


def test_a_loader_that_ends_early_is_used_as_it_is_and_that_is_said() -> None:
    drawn = draw(task([torch.zeros(4, 2)] * 3), samples=100, held_out=0.0, seed=0)
    assert drawn.samples == 12
    assert "held 12 samples of the 100 asked for" in drawn.notes[0]
    with pytest.raises(DataError, match=r"Task\.calibration is empty"):
        draw(task([]), samples=100, held_out=0.0, seed=0)
    with pytest.raises(DataError, match=r"give Task\(train="):
        draw(task(None), samples=100, held_out=0.0, seed=0)


def test_a_loader_that_shuffles_is_read_once_and_alike_for_one_seed() -> None:
    loader = DataLoader(TensorDataset(torch.arange(40.0)), batch_size=4, shuffle=True)

    shuffled = task(loader)

    def pick(seed: int) -> Calibration:
        return draw(shuffled, samples=20, held_out=0.2, seed=seed)

    before = torch.get_rng_state()
    first, again, other = pick(0), pick(0), pick(1)
    assert torch.equal(before, torch.get_rng_state())
    read = [numbers(*([t for (t,) in part] for part in (c.fit, c.held_out))) for c in (first, again, other)]  # type: ignore[arg-type]
    assert read[0] == read[1] != read[2]
    assert not set(read[0][0]) & set(read[0][1])


@pytest.mark.parametrize(
    ("batch", "size"), [(torch.zeros(3, 2), 3), ({"a": torch.zeros(5)}, 5), (("x", torch.zeros(2)), 2)]
)
def test_samples_are_counted_along_the_first_axis(batch: object, size: int) -> None:
    assert size_of(batch) == size
