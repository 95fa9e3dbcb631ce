# SPDX-License-Identifier: Apache-2.0
"""Tables between `<!-- name -->` and `<!-- end -->` of docs/comb.md, and pictures in docs/img, from results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import pages
from benchmarks.comb.results import Row
from benchmarks.gradual.plot import STYLE
from benchmarks.pages import DOCS

Columns = dict[str, Callable[[Any], str]]


def table(columns: Columns, rows: Sequence[Any]) -> str:
    return pages.table(list(columns), ([cell(row) for cell in columns.values()] for row in rows))


def put(name: str, body: str) -> None:
    pages.put(name, body, DOCS / "comb.md")


def picture(name: str, draw: Callable[[], Figure], folder: Path | None = None) -> Path:
    """Draws in the style of the other pages; the same results give the same bytes."""
    path = (folder or DOCS / "img") / f"comb-{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path


def percent(key: str, digits: int = 1) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[key]:.{digits}f}"


def points(row: Row) -> str:
    """The paired difference from the dense network, with its interval."""
    return interval(row["test_points"])


def interval(found: dict[str, float]) -> str:
    return f"{found['change']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def left(what: str) -> Callable[[Row], str]:
    """The share of MACs or parameters that is left."""
    return lambda row: f"{100 * row[what] / row[f'dense_{what}']:.1f} %"


def fewer(row: Row) -> str:
    return f"{row['dense_macs'] / row['macs']:.2f}x"
