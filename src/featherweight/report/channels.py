# SPDX-License-Identifier: Apache-2.0
"""The network before and after a cut: how wide each layer was and is, in the order in which data goes through.

Two looks at the same numbers. The skyline has all layers side by side on one scale, which is the network's shape. Below
it each layer has a bar of its own, full where nothing was cut, with its name and numbers; these flow into as many
columns as there is room for. What is too long for a page is left to `report.json`, and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.report import charts, words
from featherweight.report.tables import items, part, text

__all__ = ["Width", "skyline", "view", "widths"]


@dataclass(frozen=True)
class Width:
    """One layer: its channels before and after, and its attention heads where it is cut by them."""

    name: str
    before: int
    after: int
    heads: tuple[int, int] | None = None

    @property
    def words(self) -> str:
        """
        >>> Width("conv", 64, 31).words, Width("conv", 64, 64).words, Width("qkv", 64, 32, (8, 4)).words
        ('64 → 31', '64', '8 → 4 heads')
        >>> Width("conv", 64, 0).words
        '64 → gone'
        """
        before, after = self.heads or (self.before, self.after)
        unit = " heads" if self.heads else ""
        if not self.after:
            return f"{words.count(before)}{unit} → gone"
        return f"{words.count(before)}{'' if before == after else f' → {words.count(after)}'}{unit}"

    @property
    def share(self) -> float:
        return self.after / self.before


def widths(report: Mapping[str, Any]) -> list[Width]:
    """The layers that the report has widths of, in its order; what is not a width is left out."""
    found = []
    for row in items(report, "channels"):
        before, after = words.number(row.get("before")), words.number(row.get("after"))
        if before is None or after is None or before < 1 or after < 0:
            continue
        heads = part(row, "heads")
        pair = tuple(words.number(heads.get(key)) for key in ("before", "after"))
        told = (int(pair[0]), int(pair[1])) if pair[0] is not None and pair[1] is not None else None
        found.append(Width(text(row.get("layer")) or "(the model itself)", int(before), int(after), told))
    return found


def view(report: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The picture and at most `rows` bars, those that were cut most first to stay; empty where nothing was cut."""
    found = widths(report)
    if all(width.before == width.after for width in found):
        return {}
    ranked = sorted(range(len(found)), key=lambda i: found[i].share)
    kept = set(ranked[:rows])
    before, after = sum(width.before for width in found), sum(width.after for width in found)
    gone = sum(not width.after for width in found)
    cut = sum(0 < width.after < width.before for width in found)
    lost = f", {words.count(gone)} {'is' if gone == 1 else 'are'} gone" if gone else ""
    shown = found[: 4 * rows]  # a column of the skyline costs a tenth of a bar with its name
    return {
        "sentence": f"{words.count(cut)} of {words.count(len(found))} layers {'is' if cut == 1 else 'are'} narrower{lost}: "
        f"{words.count(before)} channels before, {words.count(after)} after.",
        "svg": skyline(shown),
        "beyond": len(found) - len(shown),
        "bars": [
            {"name": width.name, "words": width.words, "svg": charts.bar(width.share, "after")}
            for i, width in enumerate(found)
            if i in kept
        ],
        "more": max(0, len(found) - rows),
    }


def skyline(found: Sequence[Width]) -> str:
    """All layers side by side: a column for the channels before, and one in it for those that are left.

    >>> svg = skyline([Width("a", 8, 4), Width("b", 16, 16)])
    >>> svg.count("<path class="), 'aria-label="Channels of 2 layers: a 8 → 4, b 16"' in svg
    (3, True)
    """
    scale = charts.axis_for([0.0, *(float(width.before) for width in found)], ticks=3, tight=True)
    each = charts.WIDTH / max(len(found), 1)
    # Columns stand apart by a quarter of their width, and a network of three layers is not a wall.
    wide = min(0.8 * each, 60.0)
    said = ", ".join(f"{width.name} {width.words}" for width in found[:12])
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    towers = [
        ("tower before", [((i + 0.5) * each, float(width.before)) for i, width in enumerate(found)]),
        ("tower after", [((i + 0.5) * each, float(width.after)) for i, width in enumerate(found)]),
    ]
    return charts.columns(f"Channels of {len(found)} layers: {said}{more}", towers, wide, scale, words.count)
