# SPDX-License-Identifier: Apache-2.0
"""CIRKD: relations between pixels of different images, and a memory of the teacher's pixels and regions by class.

A segmentation network that is told what each pixel is sees one image at a time; how pixels of one image lie to those of
others, and to what was seen before, is what this takes over from the teacher. It needs labels, and costs the square of
positions times images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.distill import losses, terms
from featherweight.distill.options import check_loss, is_finite
from featherweight.distill.queues import Queues
from featherweight.distill.reading import Layers, labels_of
from featherweight.errors import DataError, OptionError, check_whole
from featherweight.task import describe

__all__ = ["CIRKD"]


@dataclasses.dataclass(frozen=True)
class CIRKD:
    """Relations between pixels across images, for segmentation (Yang et al. 2022, arXiv 2204.06986).

    `batch` x pixel-to-pixel within the mini-batch + `pixel` x pixel-to-pixel and `region` x pixel-to-region against a
    memory of the teacher's embeddings, all softmaxes at `temperature` (τ). `layers` names the module that makes the
    embeddings, before the classifier; they are brought to length 1. Logit KL stays in the sum: `[KL(1.0), CIRKD(...)]`.
    Saves nothing by itself.

    The memory holds `pixel_queue` pixels and `region_queue` regions (the mean of a class in an image) of each of
    `classes` classes, first in, first out (the paper has 20,000 and 2,000; a number is four bytes, and embeddings of
    width 256 at the defaults take 4 MB a class). Of each class in an image `pixels_per_class` pixels are drawn; an
    anchor is compared with about `pixel_contrast` and `region_contrast` of what is remembered, the batch included.

    Labels are the batch's (`labels` gives others), taken at the nearest position of the features; `ignore` is no class.
    Time and memory grow with (images x positions)²: `pool` averages so many positions a side before images are compared
    with one another. Each labelled position is an anchor of the memory losses, and costs what it is compared with.
    Where widths differ, or with `project` True, the student is projected by one linear map, without the normalization
    and second layer of the authors' code.

    Raises `OptionError` for an option out of range, and `DataError` at a label that is no class and not ignored.

    >>> CIRKD("decoder", classes=19).weight
    1.0
    """

    layers: Layers
    classes: int
    temperature: float = 0.1
    weight: float = 1.0
    batch: float = 1.0
    pixel: float = 0.1
    region: float = 0.1
    pixel_queue: int = 2000
    region_queue: int = 2000
    pixel_contrast: int = 4096
    region_contrast: int = 1024
    pixels_per_class: int = 16
    pool: int = 1
    ignore: int = 255
    axis: int | None = None
    item: int | str | None = None
    project: bool | None = None
    labels: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        check_loss(self, "temperature", "weight")
        queues = ("pixel_queue", "region_queue", "pixel_contrast", "region_contrast")
        for name in ("classes", *queues, "pixels_per_class", "pool"):
            check_whole("CIRKD", name, getattr(self, name), least=1)
        for name in ("batch", "pixel", "region"):
            if not is_finite(getattr(self, name)) or getattr(self, name) < 0:
                raise OptionError(f"CIRKD: {name} is a weight, at least 0; got {getattr(self, name)!r}.")
        if self.labels is not None and not callable(self.labels):
            raise OptionError(f"CIRKD: labels is a function of the batch, or left out; got {self.labels!r}.")

    def start(self, where: str, student: Tensor, teacher: Tensor) -> nn.Module:
        """The loss at work on features such as these; see `Loss`."""
        return _CrossImage(self, where, student, teacher)


class _CrossImage(nn.Module):
    """The three relations with their projection and queues; `losses` has the formulas."""

    def __init__(self, options: CIRKD, where: str, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        if student.ndim < 3:
            raise OptionError(f"{where}: CIRKD compares positions, and {describe(student)} has none.")
        self.options, self.where = options, where
        self.axis = terms.channel_axis(where, student, options.axis)
        self.projection = terms.projection(where, student, teacher, self.axis, options.project)
        self.wide = student.shape[self.axis]
        width, dtype = teacher.shape[self.axis], torch.promote_types(teacher.dtype, torch.float32)
        self.pixels = Queues(options.classes, options.pixel_queue, width, dtype)
        self.regions = Queues(options.classes, options.region_queue, width, dtype)

    def forward(self, student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
        """The weighted sum of the three. The teacher's embeddings of this batch are remembered first."""
        o = self.options
        terms.refuse_cut(self.where, student.shape[self.axis], self.wide)
        terms.refuse_other(self.where, student, teacher, but=(self.axis,))
        if self.projection is not None:
            student = self.projection(student)
        s, t = self._channels_first(student), self._channels_first(teacher)
        labels = resized(self._labels(batch, s), s.shape[2:]).flatten(1)
        loss = s.sum() * 0.0
        if o.batch:
            pooled = embeddings(_pooled(s, o.pool)), embeddings(_pooled(t, o.pool))
            loss = loss + o.batch * losses.cross_image(*pooled, o.temperature)
        s, t = embeddings(s), embeddings(t)
        self._remember(t, labels)
        anchors = labels != o.ignore
        for weight, queues, total in (
            (o.pixel, self.pixels, o.pixel_contrast),
            (o.region, self.regions, o.region_contrast),
        ):
            if weight:
                loss = loss + weight * losses.memory(s[anchors], t[anchors], queues.sample(total), o.temperature)
        return loss

    def _channels_first(self, x: Tensor) -> Tensor:
        return x.to(self.pixels.items.dtype).movedim(self.axis, 1)

    def _labels(self, batch: Any, features: Tensor) -> Tensor:
        labels = (self.options.labels or labels_of)(batch)
        if labels.ndim != features.ndim - 1 or len(labels) != len(features):
            raise DataError(
                f"{self.where}: labels are {describe(labels)}, features {describe(features)} (channels on axis 1); labels "
                "have the features' axes without that of the channels, and are taken at the nearest position."
            )
        ignore, classes = self.options.ignore, self.options.classes
        known = (labels == ignore) | ((labels >= 0) & (labels < classes))
        if not bool(known.all()):
            raise DataError(
                f"{self.where}: a label is {int(labels[~known][0])}, which is none of the {classes} classes from 0 on and "
                f"not ignore={ignore}. Set classes= and ignore=."
            )
        return labels.to(features.device)

    @torch.no_grad()
    def _remember(self, teacher: Tensor, labels: Tensor) -> None:
        """Of each class in each image a region, its mean embedding, and some pixels that are drawn."""
        for image, here in zip(teacher, labels, strict=True):
            for label in here.unique().tolist():
                if label != self.options.ignore:
                    of_class = image[here == label]
                    self.regions.push(label, F.normalize(of_class.mean(0, keepdim=True), dim=1))
                    drawn = torch.randperm(len(of_class))[: self.options.pixels_per_class]
                    self.pixels.push(label, of_class[drawn.to(of_class.device)])


def embeddings(features: Tensor) -> Tensor:
    """(N, C, ...) to (N, positions, C), each of length 1."""
    return F.normalize(features.flatten(2).transpose(1, 2), dim=2)


def _pooled(features: Tensor, size: int) -> Tensor:
    """Means of `size` positions a side; at the border of as many as there are."""
    if size == 1:
        return features
    pool: Any = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[features.ndim]
    return pool(features, size, stride=size, ceil_mode=True)  # type: ignore[no-any-return]


def resized(labels: Tensor, shape: torch.Size) -> Tensor:
    """Labels (N, ...) at the nearest positions of another resolution: floor(i * before / after), on each axis.

    >>> resized(torch.arange(6)[None], torch.Size([3]))
    tensor([[0, 2, 4]])
    """
    for axis, after in enumerate(shape, start=1):
        places = torch.arange(after, device=labels.device) * labels.shape[axis] // after
        labels = labels.index_select(axis, places)
    return labels
