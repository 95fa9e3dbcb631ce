"""Pictures are drawn where the numbers are: read back from the SVG and set beside NumPy and brute force."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight.report import charts
from featherweight.report.charts import Axis, Panel

finite = st.floats(allow_nan=False, allow_infinity=False)


def places(svg: str, kind: str) -> list[tuple[float, float]]:
    """The corners of the path of this class, in the nested 1000 x 100 box."""
    found = next(path for path in ET.fromstring(svg).iter("path") if path.get("class") == kind)
    return [(float(a), float(b)) for a, b in re.findall(r"[ML]([\d.]+) ([\d.]+)", found.get("d") or "")]


def paths(svg: str, kind: str) -> list[str]:
    return [path.get("d") or "" for path in ET.fromstring(svg).iter("path") if path.get("class") == kind]


@given(st.lists(finite, min_size=1, max_size=8), st.booleans(), st.integers(1, 6))
def test_an_axis_holds_its_values_and_rises_in_equal_steps(values: list[float], tight: bool, ticks: int) -> None:
    axis = charts.axis_for(values, ticks=ticks, tight=tight)
    assert axis.low < axis.high and math.isfinite(axis.low) and math.isfinite(axis.high)
    for value in values:
        assert 0 <= axis.at(value) <= 1
        if abs(value) < 1e99:
            assert axis.low <= value <= axis.high or math.isclose(axis.at(value), round(axis.at(value)), abs_tol=1e-6)
    steps = np.diff(axis.ticks)
    assert len(axis.ticks) <= 2 * ticks + 3
    assert (steps > 0).all() and (len(steps) < 2 or np.allclose(steps, steps[0], rtol=1e-3))


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_a_logarithmic_axis_has_powers_of_ten_and_places_them_evenly(values: list[float]) -> None:
    axis = charts.axis_for(values, log=True)
    assert axis.low <= min(values) * (1 + 1e-12) and axis.high >= max(values) * (1 - 1e-12)
    logs = np.log10(axis.ticks)
    assert np.allclose(logs, np.round(logs)) and len(axis.ticks) <= 9
    middle = math.sqrt(axis.low * axis.high)
    assert axis.at(middle) == pytest.approx(0.5)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=300), st.integers(4, 60))
def test_thinning_keeps_order_ends_extremes_and_gaps(values: list[float | None], limit: int) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    kept = charts.thin(points, limit)
    assert kept == sorted(kept, key=lambda point: point[0]) and set(kept) <= set(points)
    assert len(kept) <= max(2 * limit, 5)
    known, shown = ([v for _, v in some if v is not None] for some in (points, kept))
    if points:
        assert kept[0] == points[0] and kept[-1] == points[-1]
        assert (None in values) == any(v is None for _, v in kept)
    if known:
        assert min(shown) == min(known) and max(shown) == max(known)


def panel(points: list[tuple[float, float | None]], **options: object) -> Panel:
    return Panel("a <label>", points, Axis(0.0, 10.0, (0.0, 5.0, 10.0)), str, **options)  # type: ignore[arg-type]


X = Axis(0.0, 200.0, (0.0, 100.0, 200.0))


def test_a_curve_goes_through_its_points() -> None:
    svg = charts.curve(panel([(0, 0.0), (50, 10.0), (200, 2.5)]), X)
    assert places(svg, "curve line") == [(0, 100), (250, 0), (1000, 75)]


def test_a_value_that_is_no_number_breaks_the_curve_in_two() -> None:
    svg = charts.curve(panel([(0, 1.0), (50, 2.0), (60, None), (100, 3.0), (150, 4.0)]), X)
    assert len(paths(svg, "curve line")) == 2


def test_a_step_curve_holds_its_value_until_the_next() -> None:
    svg = charts.curve(panel([(0, 0.0), (100, 5.0), (200, 10.0)], step=True), X)
    assert paths(svg, "curve line") == ["M0 100H500V50H1000V0"]


def test_a_filled_curve_has_its_area_down_to_the_bottom() -> None:
    svg = charts.curve(panel([(50, 5.0), (200, 10.0)], fill=True), X)
    assert paths(svg, "area line") == ["M250 50L1000 0V100H250Z"]


def test_mask_updates_and_stage_borders_are_ruled_where_they_happened() -> None:
    svg = charts.curve(panel([(0, 1.0), (200, 2.0)]), X, rules=[20, 40], borders=[100])
    assert paths(svg, "update") == ["M100 0V100M200 0V100"] and paths(svg, "border") == ["M500 0V100"]


def test_the_last_value_is_written_at_its_height() -> None:
    root = ET.fromstring(charts.curve(panel([(0, 0.0), (200, 2.5)]), X))
    last = next(text for text in root.iter("text") if text.get("class") == "last line")
    assert last.text == "2.5" and (last.get("x"), last.get("y")) == ("100.00%", "75.00%")


@pytest.mark.parametrize("n", [4, 11, 200])
def test_a_strip_has_every_sample_and_its_box_holds_the_middle_half(n: int) -> None:
    rng = np.random.default_rng(0)
    samples = rng.gamma(2.0, 1.0, n)
    axis = Axis(0.0, 10.0, (0.0, 10.0))
    svg = charts.strip(samples.tolist(), axis, "label", "after", float(np.median(samples)), 8.0)
    xs = [x for x, _ in places(svg, "sample after")]
    assert np.allclose(xs, samples * 100, atol=0.06)
    box = next(rect for rect in ET.fromstring(svg).iter("rect"))
    left, width = float(box.get("x") or 0), float(box.get("width") or 0)
    inside = ((samples * 100 >= left - 0.1) & (samples * 100 <= left + width + 0.1)).mean()
    assert 0.5 <= inside <= 0.5 + 2.5 / n + 0.25 * (n < 8)
    assert paths(svg, "median after") == [f"M{charts._n(float(np.median(samples)) * 100)} 0V100"]
    assert paths(svg, "p90 after") == ["M800 6V94"]


@pytest.mark.parametrize(("share", "width"), [(0.5, "50.00%"), (0.0, "0.30%"), (2.0, "100.00%"), (-1.0, "0.30%")])
def test_a_bar_fills_its_share_and_is_never_lost_from_sight(share: float, width: str) -> None:
    assert [rect.get("width") for rect in ET.fromstring(charts.bar(share, "after")).iter("rect")][1] == width


def test_scatter_places_points_and_names_them_inside() -> None:
    svg = charts.scatter([(50, 5.0, "left <b>", "after"), (190, 10.0, "right", "before")], X, Axis(0, 10, (0, 10)), str)
    assert places(svg, "spot after") == [(250, 50)] and places(svg, "spot before") == [(950, 0)]
    names = {text.text: text.get("text-anchor") for text in ET.fromstring(svg).iter("text") if text.get("class")}
    assert names == {"left <b>": "start", "right": "end"}
