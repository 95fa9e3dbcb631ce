# SPDX-License-Identifier: Apache-2.0
"""Oracle: the same in NumPy with lists for queues, where sampling takes everything so that no draw matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.distill import CIRKD
from featherweight.distill.cirkd import resized
from featherweight.errors import DataError, OptionError
from tests.distill import formulas

CLASSES, IGNORE = 3, 255


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch_of(seed: int, n: int = 2, side: int = 4) -> Any:
    labels = torch.randint(0, CLASSES, (n, side, side), generator=torch.Generator().manual_seed(seed))
    labels[0, 0, 0] = IGNORE
    return torch.zeros(n), labels


def everything(**options: Any) -> CIRKD:
    """Compares with all that is remembered, and remembers every pixel."""
    return CIRKD("x", CLASSES, pixel_contrast=10**6, region_contrast=10**6, pixels_per_class=10**6, **options)


class Restated:
    """CIRKD over several batches; queues are lists."""

    def __init__(self, pixel_queue: int, region_queue: int) -> None:
        self.sizes = pixel_queue, region_queue
        self.pixels: list[list[Any]] = [[] for _ in range(CLASSES)]
        self.regions: list[list[Any]] = [[] for _ in range(CLASSES)]

    def terms(self, student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> Sequence[float]:
        """Of embeddings (N, A, d) and labels (N, A)."""
        s, t = formulas.unit(student), formulas.unit(teacher)
        for image, here in zip(t, labels, strict=True):
            for label in sorted(set(here.tolist()) - {IGNORE}):
                of_class = image[here == label]
                self.pixels[label] = (self.pixels[label] + list(of_class))[-self.sizes[0] :]
                self.regions[label] = (self.regions[label] + [formulas.unit(of_class.mean(0))])[-self.sizes[1] :]
        anchors = labels != IGNORE
        kept = [np.array([row for queue in queues for row in queue]) for queues in (self.pixels, self.regions)]
        remembered = [formulas.memory(s[anchors], t[anchors], contrast, 0.1) for contrast in kept]
        return formulas.cross_image(s, t, 0.1), *remembered


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.1, 0.1)])
def test_three_batches_are_the_formulas_with_lists_for_queues(weights: tuple[float, float, float]) -> None:
    # Queues that hold all: the order in which drawn pixels enter does not matter then. The region queue overflows.
    options = everything(
        pixel_queue=1000, region_queue=3, **dict(zip(("batch", "pixel", "region"), weights, strict=True))
    )
    shape = (2, 4, 4, 4)
    term = options.start("here", draw(*shape, seed=0), draw(*shape, seed=1))
    restated = Restated(1000, 3)
    for step in range(3):
        student, teacher, batch = draw(*shape, seed=2 * step), draw(*shape, seed=2 * step + 1), batch_of(step)
        s, t = (np.moveaxis(x.numpy(), 1, -1).reshape(2, 16, 4) for x in (student, teacher))
        terms = restated.terms(s, t, batch[1].numpy().reshape(2, 16))
        found = term(student, teacher, batch)
        assert float(found) == pytest.approx(sum(w * x for w, x in zip(weights, terms, strict=True)), rel=1e-9)
        assert float(found) > 1e-3


def test_gradients_are_those_of_finite_differences() -> None:
    student, teacher, batch = draw(2, 3, 2, 2, seed=0), draw(2, 4, 2, 2, seed=1), batch_of(0, side=2)
    term = everything(temperature=0.5).start("here", student, teacher)
    assert torch.autograd.gradcheck(lambda s: _afresh(term)(s, teacher, batch), (student.requires_grad_(),))
    loss = term(student, teacher, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters()), "the projection learns"


def _afresh(term: Any) -> Any:
    for queues in (term.pixels, term.regions):
        queues.pushed.zero_()
    return term


def test_of_each_class_in_an_image_some_pixels_of_that_class_and_one_region_are_remembered() -> None:
    """Each pixel's embedding says its class, so that one in a wrong queue is seen."""
    labels = torch.tensor([[[0, 0, 0, 0], [0, 1, 1, IGNORE]]] * 2)
    teacher = F.one_hot(labels.clamp(max=CLASSES), CLASSES + 1).movedim(-1, 1).double()
    term = CIRKD("x", CLASSES, pixels_per_class=3).start("here", teacher, teacher)
    term(teacher, teacher, (None, labels))
    assert term.pixels.pushed.tolist() == [6, 4, 0]
    assert term.regions.pushed.tolist() == [2, 2, 0]
    for queues in (term.pixels, term.regions):
        for label in range(2):
            assert (queues.of(label).argmax(1) == label).all()
            torch.testing.assert_close(queues.of(label).norm(dim=1), torch.ones(len(queues.of(label))).double())


def test_a_batch_without_labels_of_a_class_is_no_error() -> None:
    features = draw(1, 3, 2, 2, seed=0)
    term = CIRKD("x", CLASSES, batch=0.0).start("here", features, features)
    found = term(features.clone().requires_grad_(), features, (None, torch.full((1, 2, 2), IGNORE)))
    assert float(found.detach()) == 0.0
    assert found.requires_grad


@pytest.mark.parametrize(("before", "after"), [((6, 4), (3, 2)), ((5, 7), (2, 3)), ((3, 3), (5, 7)), ((4, 4), (4, 4))])
def test_labels_are_taken_at_the_nearest_position(before: tuple[int, int], after: tuple[int, int]) -> None:
    labels = torch.randint(0, 200, (2, *before))
    wanted = F.interpolate(labels[:, None].double(), after, mode="nearest")[:, 0].long()
    assert torch.equal(resized(labels, torch.Size(after)), wanted)


def test_pooling_averages_positions_before_images_are_compared() -> None:
    student, teacher = draw(2, 3, 5, 4, seed=0), draw(2, 3, 5, 4, seed=1)
    labels = torch.zeros(2, 5, 4).long()

    def pooled(x: Tensor) -> np.ndarray:
        rows = [(0, 2), (2, 4), (4, 5)]
        means = [x[:, :, a:b, c : c + 2].mean((2, 3)) for a, b in rows for c in (0, 2)]
        return formulas.unit(torch.stack(means, 1).numpy())

    term = CIRKD("x", 1, pool=2, pixel=0.0, region=0.0).start("here", student, teacher)
    wanted = formulas.cross_image(pooled(student), pooled(teacher), 0.1)
    assert float(term(student, teacher, (None, labels))) == pytest.approx(wanted, rel=1e-9)


def test_tokens_are_positions_too() -> None:
    student, teacher = draw(2, 6, 3, seed=0), draw(2, 6, 3, seed=1)
    batch = {"labels": torch.randint(0, CLASSES, (2, 6))}
    values = []
    for axis, move in ((-1, lambda x: x), (1, lambda x: x.mT)):
        term = everything(axis=axis).start("here", move(student), move(teacher))
        values.append(float(term(move(student), move(teacher), batch)))
    assert values[0] == pytest.approx(values[1])


def test_labels_that_do_not_fit_are_named() -> None:
    features = draw(2, 3, 4, 4, seed=0)
    term = CIRKD("x", CLASSES, ignore=-100).start("CIRKD, layer 'x'", features, features)
    for label in (255, -1, CLASSES):
        with pytest.raises(DataError, match=rf"a label is {label}, .*the 3 classes.*ignore=-100"):
            term(features, features, (None, torch.full((2, 4, 4), label)))
    with pytest.raises(DataError, match=r"labels are Tensor\[2\] int64"):
        term(features, features, (None, torch.zeros(2).long()))
    with pytest.raises(DataError, match="labels are needed"):
        term(features, features, features)
    with pytest.raises(OptionError, match="has none"):
        CIRKD("x", CLASSES).start("here", draw(2, 3, seed=0), draw(2, 3, seed=1))
