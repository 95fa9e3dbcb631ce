# SPDX-License-Identifier: Apache-2.0
"""The options that all ways of cutting channels share: how far, by which score, in which order, and what stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from featherweight.errors import OptionError, check_strings, check_whole, check_word, is_number
from featherweight.prune.channels.choose import RANKINGS
from featherweight.prune.channels.gates import PLACES
from featherweight.prune.channels.importance import IMPORTANCES, OF_LOSS, Importance
from featherweight.prune.channels.targets import check_until

__all__ = ["ChannelOptions"]

PER = ("memory", "memory_left", "macs", "parameters", "bytes", "latency", "none")
NORMALIZE = ("none", "mean", "l2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """How far channels and heads are cut, by which score, in which order, and what stays.

    - until: what to come down to, `{"macs": "50 %"}`: macs, parameters, bytes, memory (elements of what layers give) or
      latency (timed on copies that are really cut), each absolute ("1.5 G", "2 MB", "8 ms") or the share kept; all of
      them, where there are several. Met within 2 %, or reported.
    - importance: see `IMPORTANCES`, or a function `(group, tensors) -> scores` of a group and the model's tensors by
      name, a score for each coupling. The lowest go first.
    - per: what a greedy or global ranking divides a score by: the memory (if nothing is said), macs, parameters or
      bytes that the cut frees, `memory_left` (what its layers still take), measured `latency` of each group, or none.
    - normalize: divides a group's scores by their mean or L2 norm first; `heads` does so by itself.
    - ranking: greedy (costs counted anew after every removal), global, local (the same share of each group) or
      isomorphic (unlike structures lose the same share). If nothing is said, greedy where scores say what the loss would
      lose (`OF_LOSS`) or `per` is given, and isomorphic elsewhere: sizes of weights, say, do not compare between unlike
      layers, and greedily the layers that cost most would lose nearly all.
    - grain: heads (whole attention heads) or dims (positions within heads too).
    - layers, keep, freeze: globs of layers whose outputs may be cut; whose outputs stay; that are not touched at all.
    - least: how many couplings of a group stay at least (below 1 a share), or `{glob: least}`.
    - multiple: kept counts are multiples of this, for hardware; what the group starts from may not be.
    - exact: leaves groups alone over which a norm or a mean is taken, whose statistics would change.
    - gates: where gates stand: inputs (of the layers that read) or outputs (of the layers that make).
    - seed: of random importance and of probes.
    """

    until: Mapping[str, str | int | float] = dataclasses.field(kw_only=False)
    importance: str | Importance = "cpd"
    per: str | None = None
    normalize: str | None = None
    ranking: str | None = None
    grain: str = "heads"
    layers: Sequence[str] = ("*",)
    keep: Sequence[str] = ()
    freeze: Sequence[str] = ()
    least: float | Mapping[str, float] = 1
    multiple: int = 1
    exact: bool = False
    gates: str = "inputs"
    seed: int = 0

    def __post_init__(self) -> None:
        me = type(self).__name__
        object.__setattr__(self, "until", check_until(me, self.until))
        for name in ("layers", "keep", "freeze"):
            object.__setattr__(self, name, check_strings(me, name, getattr(self, name)))
        if not callable(self.importance):
            check_word(me, "importance", self.importance, IMPORTANCES)
        if self.per is not None:
            check_word(me, "per", self.per, PER)
        if self.normalize is not None:
            check_word(me, "normalize", self.normalize, NORMALIZE)
        if self.ranking is not None:
            check_word(me, "ranking", self.ranking, RANKINGS)
        if self.per is not None and self.ranking in ("local", "isomorphic"):
            raise OptionError(
                f"{me}: ranking={self.ranking!r} compares no costs, and per={self.per!r} would do nothing: leave one out, or "
                "ranking='greedy'."
            )
        check_word(me, "grain", self.grain, ("heads", "dims"))
        check_word(me, "gates", self.gates, PLACES)
        check_whole(me, "multiple", self.multiple, least=1)
        check_whole(me, "seed", self.seed)
        for where, least in self.least.items() if isinstance(self.least, Mapping) else [("", self.least)]:
            name = f"least of {where!r}" if where else "least"
            if not is_number(least) or least < 0:
                raise OptionError(f"{me}: {name} is a count (16) or a share below 1 (0.25) that stays; got {least!r}.")
            if least >= 1 and least != int(least):
                raise OptionError(f"{me}: {name}={least!r} is neither a whole number nor a share below 1.")

    @property
    def order(self) -> str:
        """The ranking: as told, else as scores of this importance can be compared."""
        if self.ranking is not None:
            return self.ranking
        return "greedy" if self.importance in OF_LOSS or self.per is not None else "isomorphic"

    @property
    def cost(self) -> str:
        """What scores are divided by, where the ranking divides them."""
        return "memory" if self.per is None else self.per

    @property
    def scaling(self) -> str:
        """How a group's scores are normalized: as told, else as the importance is defined."""
        if self.normalize is not None:
            return self.normalize
        return "l2" if self.importance in ("heads", "michel") else "none"
