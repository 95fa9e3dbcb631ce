# SPDX-License-Identifier: Apache-2.0
"""Losses at work: a loss with what it learns (projections) and remembers (queues), for one student and teacher tensor.

Modules, so that devices, checkpoints and optimizers see what is in them. None of it is part of the student: it is
dropped when training ends. Shapes are checked at every call, since a batch or a cut channel may change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.distill import losses
from featherweight.errors import OptionError
from featherweight.task import describe

__all__ = ["Heads", "Matching", "channel_axis", "projection", "refuse_cut", "refuse_other"]


def channel_axis(where: str, tensor: Tensor, axis: int | None) -> int:
    """The axis of classes or channels, counted from the front.

    None is axis 1, as in `cross_entropy`, of tensors of two, four and more axes. Three axes may be (batch, tokens,
    channels) or (batch, channels, length): that is not guessed. Raises `OptionError`.
    """
    if axis is None and tensor.ndim == 3:
        raise OptionError(
            f"{where}: which axis of {describe(tensor)} holds the channels cannot be known. Give axis=-1 for (batch, "
            "tokens, channels), as transformers have it, or axis=1 for (batch, channels, length)."
        )
    found = 1 if axis is None else axis + tensor.ndim * (axis < 0)
    if not 1 <= found < tensor.ndim:
        raise OptionError(
            f"{where}: {describe(tensor)} has no axis {1 if axis is None else axis} for classes or channels besides the "
            "batch, which is axis 0."
        )
    return found


def refuse_other(where: str, student: Tensor, teacher: Tensor, but: tuple[int, ...] = (), advice: str = "") -> None:
    """Raises where shapes differ on any axis that is not in `but`."""
    same = student.ndim == teacher.ndim and all(
        a == b for axis, (a, b) in enumerate(zip(student.shape, teacher.shape, strict=True)) if axis not in but
    )
    if not same:
        raise OptionError(
            f"{where}: the student gives {describe(student)}, the teacher {describe(teacher)}, which cannot be compared. "
            + (advice or "Positions must agree: interpolate in Task.forward or outputs=, or tap other modules.")
        )


class Projection(nn.Module):
    """A learned linear map from the student's width to the teacher's, on one axis: a 1x1 convolution."""

    def __init__(self, student: Tensor, teacher: Tensor, axis: int) -> None:
        super().__init__()
        # Half precision is widened before it is compared; a projection in it would not train.
        dtype = torch.promote_types(student.dtype, torch.float32)
        self.axis = axis
        self.map = nn.Linear(student.shape[axis], teacher.shape[axis], device=student.device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.map(x.to(self.map.weight.dtype).movedim(self.axis, -1))
        return moved.movedim(-1, self.axis)


def projection(where: str, student: Tensor, teacher: Tensor, axis: int, wanted: bool | None) -> nn.Module | None:
    """A projection where widths differ (None), always (True) or never (False)."""
    refuse_other(where, student, teacher, but=(axis,))
    if wanted or (wanted is None and student.shape[axis] != teacher.shape[axis]):
        return Projection(student, teacher, axis)
    refuse_other(where, student, teacher, advice="project=False leaves widths that differ as they are; leave it out.")
    return None


class Matching(nn.Module):
    """A pure function of student and teacher tensor, after a projection if there is one."""

    def __init__(
        self,
        where: str,
        compare: Callable[[Tensor, Tensor], Tensor],
        student: Tensor,
        projection: nn.Module | None = None,
        free: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.where, self.compare, self.projection, self.free = where, compare, projection, free
        self.wide = student.shape[projection.axis] if isinstance(projection, Projection) else None

    def forward(self, student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
        if isinstance(self.projection, Projection):
            refuse_cut(self.where, student.shape[self.projection.axis], self.wide)
            student = self.projection(student)
        refuse_other(self.where, student, teacher, but=self.free)
        return self.compare(student, teacher)


def refuse_cut(where: str, width: int, before: int | None) -> None:
    if width != before:
        raise OptionError(
            f"{where}: the student's tensor was {before} wide when distillation began and is {width} wide now, which the "
            "learned projection does not fit. Cut channels before training or after it, or attach anew after a cut."
        )


class MixedHeads(nn.Module):
    """Each head of the teacher is imitated by a learned mean of the student's heads, which is again a distribution."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(student.dtype, torch.float32)
        self.shares = nn.Parameter(torch.zeros(teacher.shape[1], student.shape[1], dtype=dtype, device=student.device))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ts,bsqk->btqk", self.shares.softmax(1), x.to(self.shares.dtype))


class Heads(nn.Module):
    """Attention probabilities, row by row; heads are mixed where their numbers differ."""

    def __init__(self, where: str, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        if student.ndim != 4 or teacher.ndim != 4:
            raise OptionError(
                f"{where}: attention probabilities are (batch, heads, queries, keys); the student gives "
                f"{describe(student)}, the teacher {describe(teacher)}. Of a tuple, item= says which item they are; "
                'kind="map" compares feature maps.'
            )
        refuse_other(where, student, teacher, but=(1,))
        differ = student.shape[1] != teacher.shape[1]
        self.where, self.heads = where, student.shape[1]
        self.mix = MixedHeads(student, teacher) if differ else None

    def forward(self, student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
        refuse_cut(self.where, student.shape[1], self.heads)
        student = student if self.mix is None else self.mix(student)
        refuse_other(self.where, student, teacher)
        return losses.attention_rows(student, teacher)
