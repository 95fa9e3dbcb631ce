# SPDX-License-Identifier: Apache-2.0
"""The options that all ways of pruning share: what is pruned, in which pattern, by which score. Checked at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from featherweight.errors import OptionError, check_strings, check_whole, check_word, is_number
from featherweight.layers import RULES
from featherweight.patterns import Pattern, parse_pattern
from featherweight.prune.importance import IMPORTANCES, Importance

__all__ = ["PruningOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """What is pruned, in which pattern and by which score.

    - sparsity: the share to reach in the layers that are pruned, of weights, or of the pattern's tiles, rows, columns
      or neurons; or `{glob: share}` for targets of their own (a later glob overrides an earlier one). N:M patterns say
      it themselves.
    - pattern: weight, N:M (`2:4` keeps 2 of 4 along the input channels), tiles (`1x4`: rows x input channels), row,
      column or neuron (a row, its bias, and the columns that it feeds in the next layer).
    - importance: magnitude, group_l2, gradient, movement, random, or a function `(name, weight) -> scores` of the
      weight's shape; the lowest go first.
    - ranking: `layer` gives each layer its target; `global` ranks all layers together, with at most `caps` (a share, or
      `{glob: share}`) of each gone.
    - layers, keep: globs on qualified names of what is pruned and of what is not. A parameter of a module of an unknown
      type is pruned only where a glob other than `*` names it.
    - dense: rules for what stays dense: `first` (the first layer that runs, if it is a convolution), `depthwise`, and
      `output` (the last that runs).
    - feeds: for neurons, which layer feeds which, `{"fc1": "fc2"}`; else this is read from the exported graph.
    - seed: of the random importance.

    At least one unit of a layer always stays, whatever the target.
    """

    sparsity: float | Mapping[str, float] | None = dataclasses.field(default=None, kw_only=False)
    pattern: str = "weight"
    importance: str | Importance = "magnitude"
    ranking: str = "layer"
    layers: Sequence[str] = ("*",)
    caps: float | Mapping[str, float] = 1.0
    keep: Sequence[str] = ()
    dense: Sequence[str] = RULES
    feeds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("layers", "keep", "dense"):
            object.__setattr__(self, name, check_strings(me, name, getattr(self, name)))
        if not isinstance(self.pattern, str):
            raise OptionError(f"{me}: pattern is text, '2:4' say; got {self.pattern!r}.")
        parse_pattern(self.pattern)
        if not callable(self.importance):
            check_word(me, "importance", self.importance, IMPORTANCES)
        check_word(me, "ranking", self.ranking, ("layer", "global"))
        for rule in self.dense:
            check_word(me, "dense", rule, RULES)
        check_whole(me, "seed", self.seed)
        _check_feeds(me, self.feeds, self.pattern)
        _check_sparsity(me, self.sparsity, self.parsed)
        _check_caps(me, self.caps, self.ranking, self.sparsity)

    @property
    def parsed(self) -> Pattern:
        """The pattern as data."""
        return parse_pattern(self.pattern)


def _is_share(value: object) -> TypeGuard[float]:
    return is_number(value) and 0 <= value <= 1


def _check_sparsity(me: str, sparsity: object, pattern: Pattern) -> None:
    if sparsity is None and pattern.kind != "n:m":
        raise OptionError(f"{me}: sparsity is missing, the share of zeros to reach: sparsity=0.9 say.")
    if sparsity is None:
        return
    if isinstance(sparsity, Mapping) and not sparsity:
        raise OptionError(f"{me}: sparsity is an empty mapping; give {{glob: share}}, {{'conv*': 0.5}} say.")
    for where, share in sparsity.items() if isinstance(sparsity, Mapping) else [("", sparsity)]:
        name = f"sparsity of {where!r}" if where else "sparsity"
        if not _is_share(share) or share == 1.0:
            raise OptionError(f"{me}: {name} must be at least 0 and below 1; got {share!r}. 0.9 leaves a tenth.")
        if pattern.kind == "n:m" and abs(share - (1 - pattern.n / pattern.m)) > 1e-6:
            raise OptionError(
                f"{me}: {name}={share} contradicts pattern='{pattern}', whose sparsity is {1 - pattern.n / pattern.m:g}. "
                "Leave sparsity out."
            )


def _check_caps(me: str, caps: object, ranking: str, sparsity: object) -> None:
    for where, share in caps.items() if isinstance(caps, Mapping) else [("", caps)]:
        if not _is_share(share):
            name = f"caps of {where!r}" if where else "caps"
            raise OptionError(f"{me}: {name} must be from 0 to 1, the most that may go of a layer; got {share!r}.")
    if ranking == "layer" and caps != 1.0:
        raise OptionError(
            f"{me}: caps limit what ranking='global' takes from a layer; with ranking='layer' give each layer its "
            "target: sparsity={'conv*': 0.5, 'fc*': 0.9}."
        )
    if ranking == "global" and isinstance(sparsity, Mapping):
        raise OptionError(
            f"{me}: ranking='global' has one target for all layers together; give sparsity=0.9 and, where a layer may "
            "not lose as much, caps={'conv1': 0.5}."
        )


def _check_feeds(me: str, feeds: object, pattern: str) -> None:
    if not isinstance(feeds, Mapping) or not all(isinstance(name, str) for pair in feeds.items() for name in pair):
        raise OptionError(f"{me}: feeds maps a layer to the one that reads it, {{'fc1': 'fc2'}}; got {feeds!r}.")
    if feeds and pattern != "neuron":
        raise OptionError(f"{me}: feeds is for pattern='neuron'; the pattern is {pattern!r}.")
