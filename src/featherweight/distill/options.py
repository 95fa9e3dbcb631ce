# SPDX-License-Identifier: Apache-2.0
"""What a student is to imitate of its teacher, as frozen options; each `start`s a loss on the tensors that it is for.

`layers` names modules, `None` the model's logits. A glob or name stands for that name in student and teacher, a mapping
gives the teacher's name for the student's; over several layers the loss is a mean, so that `weight` does not depend on
how many there are. `axis` is that of the classes or channels (`channel_axis` says what None means).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from featherweight.distill import losses, terms
from featherweight.distill.reading import Layers
from featherweight.errors import OptionError, check_word, is_number
from featherweight.task import describe

__all__ = ["CWD", "KL", "Attention", "Features", "Loss", "check_loss", "is_finite"]


@runtime_checkable
class Loss(Protocol):
    """What can be distilled: its weight in the sum, the layers that it compares, and how it starts. No base class."""

    @property
    def weight(self) -> float: ...

    @property
    def layers(self) -> Layers | None: ...

    @property
    def item(self) -> int | str | None: ...

    def start(self, where: str, student: Tensor, teacher: Tensor) -> nn.Module:
        """The loss at work on tensors such as these: a module called as (student, teacher, batch), giving a scalar.

        `where` begins its errors. Raises `OptionError` for tensors that cannot be compared.
        """


@dataclasses.dataclass(frozen=True)
class KL:
    """KL divergence of softened logits: T² KL(softmax(z_t / T) || softmax(z_s / T)), mean over batch and positions.

    Saves nothing by itself: it makes a smaller student better (Hinton et al. 2015). `temperature` 1 is plain
    cross-entropy against the teacher, up to a constant; higher ones show how the teacher ranks wrong answers.

    >>> KL(temperature=2.0).weight
    1.0
    """

    temperature: float = 4.0
    weight: float = 1.0
    layers: Layers | None = None
    axis: int | None = None
    item: int | str | None = None

    def __post_init__(self) -> None:
        check_loss(self, "temperature", "weight")

    def start(self, where: str, student: Tensor, teacher: Tensor) -> nn.Module:
        axis = terms.channel_axis(where, student, self.axis)
        compare = functools.partial(losses.kl, temperature=self.temperature, axis=axis)
        terms.refuse_other(where, student, teacher, but=(axis,))
        advice = "KL compares the same classes in the same order; CWD, CIRKD and Features learn a map between widths."
        terms.refuse_other(where, student, teacher, advice=advice)
        return terms.Matching(where, compare, student)


@dataclasses.dataclass(frozen=True)
class CWD:
    """Channel-wise distillation of logits or feature maps: T² / C Σ_c KL of the channels' softmax over all positions.

    For dense prediction, segmentation above all (Shu et al. 2021, arXiv 2011.13256): it says where each class or
    channel answers. Saves nothing by itself. The paper's weights are 3 on logits, which is the default, and 50 on
    feature maps. Where channels differ, a projection is learned (`project` False refuses, True always has one).

    >>> CWD(layers="backbone.layer4", weight=50.0).temperature
    4.0
    """

    temperature: float = 4.0
    weight: float = 3.0
    layers: Layers | None = None
    axis: int | None = None
    item: int | str | None = None
    project: bool | None = None

    def __post_init__(self) -> None:
        check_loss(self, "temperature", "weight")

    def start(self, where: str, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim < 3:
            raise OptionError(
                f"{where}: a softmax over positions needs positions, and {describe(student)} has none. KL compares the "
                "logits of a classifier; layers= names feature maps."
            )
        axis = terms.channel_axis(where, student, self.axis)
        compare = functools.partial(losses.cwd, temperature=self.temperature, axis=axis)
        return terms.Matching(where, compare, student, terms.projection(where, student, teacher, axis, self.project))


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of tapped modules: mean squared error (FitNets, arXiv 1412.6550), or 1 - cosine on the channel axis.

    Saves nothing by itself. `mse` depends on the scale of the features, `cosine` does not. Where widths differ, a
    linear map from the student's to the teacher's is trained along and dropped at the end.

    >>> Features({"layer3": "layer3"}, kind="cosine", weight=0.5).kind
    'cosine'
    """

    layers: Layers
    kind: str = "mse"
    weight: float = 1.0
    axis: int | None = None
    item: int | str | None = None
    project: bool | None = None

    def __post_init__(self) -> None:
        check_loss(self, "weight")
        check_word("Features", "kind", self.kind, ("mse", "cosine"))

    def start(self, where: str, student: Tensor, teacher: Tensor) -> nn.Module:
        plain = self.kind == "mse" and self.axis is None and student.shape == teacher.shape and not self.project
        axis = 1 if plain else terms.channel_axis(where, student, self.axis)
        compare = losses.mse if self.kind == "mse" else functools.partial(losses.cosine, axis=axis)
        return terms.Matching(where, compare, student, terms.projection(where, student, teacher, axis, self.project))


@dataclasses.dataclass(frozen=True)
class Attention:
    """Where the network looks: maps of feature activity (`kind="map"`), or attention probabilities (`kind="rows"`).

    `map` sums |F|^`power` over channels and compares the maps' directions (attention transfer, Zagoruyko & Komodakis
    2017, arXiv 1612.03928): widths may differ. `rows` is the KL of each query's distribution over keys, of modules that
    answer (batch, heads, queries, keys), by default in a tuple's second item, as Hugging Face attention has it where
    `attn_implementation="eager"`, and `nn.MultiheadAttention` with `average_attn_weights=False`. Where the student has
    fewer heads, each head of the teacher is imitated by a learned mean of the student's. Saves nothing by itself.

    >>> Attention("blocks.*.attn", kind="rows").item
    1
    """

    layers: Layers
    kind: str = "map"
    weight: float = 1.0
    power: float = 2.0
    axis: int | None = None
    item: int | str | None = None

    def __post_init__(self) -> None:
        check_loss(self, "weight", "power")
        check_word("Attention", "kind", self.kind, ("map", "rows"))
        if self.kind == "rows" and self.item is None:
            object.__setattr__(self, "item", 1)

    def start(self, where: str, student: Tensor, teacher: Tensor) -> nn.Module:
        if self.kind == "rows":
            return terms.Heads(where, student, teacher)
        axis = terms.channel_axis(where, student, self.axis)
        if student.ndim < 3:
            raise OptionError(f"{where}: a map needs positions, and {describe(student)} has none.")
        compare = functools.partial(losses.attention_map, power=self.power, axis=axis)
        terms.refuse_other(where, student, teacher, but=(axis,))
        return terms.Matching(where, compare, student, free=(axis,))


def is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def check_loss(loss: Any, *positive: str) -> None:
    """The options that all losses share, and those that must be above zero."""
    me = type(loss).__name__
    for name in positive:
        value = getattr(loss, name)
        if not is_finite(value) or not value > 0:
            raise OptionError(f"{me}: {name} must be a number above 0; got {value!r}.")
    layers = loss.layers
    if isinstance(layers, Mapping):
        names: Any = [*layers, *layers.values()]
        object.__setattr__(loss, "layers", dict(layers))
    elif isinstance(layers, list | tuple):
        names = list(layers)
        object.__setattr__(loss, "layers", tuple(layers))
    else:
        names = [] if layers is None else [layers]
    optional = layers is None and isinstance(loss, KL | CWD)
    if not all(isinstance(name, str) and name for name in names) or not (names or optional):
        raise OptionError(
            f'{me}: layers names modules, "layer4" or ["layer3", "layer4"], or maps the student\'s to the teacher\'s, '
            f'{{"layer4": "stages.3"}}; got {layers!r}.'
        )
    if loss.axis is not None and (not isinstance(loss.axis, int) or isinstance(loss.axis, bool)):
        raise OptionError(f"{me}: axis is a whole number, 1 or -1 say; got {loss.axis!r}.")
