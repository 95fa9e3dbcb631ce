# SPDX-License-Identifier: Apache-2.0
"""The picture of the network before and after: heights read back from the SVG, and what happens to strange data."""

import itertools
import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from featherweight.report import channels, render
from featherweight.report.limits import LIMITS, MAX_BYTES

from .html_page import Reader
from .sample import sample_report

ROWS: list[dict[str, Any]] = [
    {"layer": "stem", "before": 16, "after": 16, "heads": None},
    {"layer": "block.attention", "before": 96, "after": 24, "heads": {"before": 8, "after": 2}},
    {"layer": "block.mlp", "before": 192, "after": 96, "heads": None},
    {"layer": "dropped", "before": 64, "after": 0, "heads": None},
]


def heights(svg: str, kind: str) -> list[float]:
    """The heights of the columns of this class, as shares of the picture."""
    path = next(path for path in ET.fromstring(svg).iter("path") if path.get("class") == kind)
    return [(100 - float(top)) / 100 for top in re.findall(r"M[\d.]+ 100V([\d.]+)h", path.get("d") or "")]


def test_columns_are_as_high_as_layers_are_wide() -> None:
    svg = channels.skyline(channels.widths({"channels": ROWS}))
    assert np.allclose(heights(svg, "tower before"), np.array([16, 96, 192, 64]) / 192, atol=1e-3)
    assert np.allclose(heights(svg, "tower after"), np.array([16, 24, 96]) / 192, atol=1e-3)  # what is gone has none


@pytest.mark.parametrize("layers", [1, 5, 100, 1000])
def test_columns_stand_in_the_order_of_the_layers_and_do_not_touch(layers: int) -> None:
    found = [channels.Width(f"layer{i}", 64, 32) for i in range(layers)]
    path = next(p for p in ET.fromstring(channels.skyline(found)).iter("path") if p.get("class") == "tower before")
    left = [float(place) for place in re.findall(r"M([\d.]+) 100V", path.get("d") or "")]
    wide = float(re.findall(r"h([\d.]+)V100", path.get("d") or "")[0])
    assert len(left) == layers and left == sorted(left)
    assert all(b - a > wide for a, b in itertools.pairwise(left))
    assert left[0] >= 0 and left[-1] + wide <= 1000


def test_the_page_names_layers_with_what_was_and_what_is_left() -> None:
    page = Reader(render({**sample_report(), "channels": ROWS}))
    for said in (
        "2 of 4 layers are narrower, 1 is gone: 368 channels before, 136 after.",
        "8 → 2 heads",
        "192 → 96",
        "64 → gone",
    ):
        assert said in page.words, said


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"layer": "a", "before": 8, "after": 8}],
        "text",
        [
            None,
            {"layer": "a", "before": float("nan"), "after": 3},
            {"before": 0, "after": 0},
            {"layer": {}, "after": 1},
        ],
    ],
)
def test_where_nothing_was_cut_there_is_no_picture(rows: Any) -> None:
    html = render({**sample_report(), "channels": rows})
    assert "The network before and after" not in html


def test_a_report_of_before_there_was_such_a_picture_is_rendered() -> None:
    report = sample_report()
    report.pop("channels", None)
    assert "The network before and after" not in render(report)


def test_names_are_escaped_and_a_page_of_thousands_of_layers_fits() -> None:
    rows = [{"layer": f"<b>{i}</b>" + "x" * 200, "before": 512, "after": 512 - i % 500} for i in range(5000)]
    html = render({**sample_report(), "channels": rows})
    assert len(html.encode()) < MAX_BYTES
    assert "<b>4999" not in html and "more in report.json" in html
    shown = channels.view({"channels": rows}, LIMITS[0].rows)
    assert len(shown["bars"]) == LIMITS[0].rows and shown["more"] == 5000 - LIMITS[0].rows
