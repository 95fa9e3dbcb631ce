"""Strips of timings: the distribution that was measured, on an axis on which it can be seen."""

import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from featherweight.report.timings import strips


def report(before: Any, after: Any) -> dict[str, Any]:
    def timed(samples: Any) -> dict[str, Any]:
        low, high = np.percentile(samples, [50, 90])
        return {
            "median_ms": float(low),
            "p90_ms": float(high),
            "n": len(samples),
            "samples_ms": list(map(float, samples)),
        }

    return {"before": {"latency": {"torch": timed(before)}}, "after": {"latency": {"torch": timed(after)}}}


def ticks(shown: dict[str, Any]) -> list[float]:
    return [float((text.text or "").split()[0]) for text in ET.fromstring(shown["scale"]).iter("text")]


def dots(svg: str) -> np.ndarray:
    path = next(p for p in ET.fromstring(svg).iter("path") if (p.get("class") or "").startswith("sample"))
    return np.array([float(part.split()[0]) for part in (path.get("d") or "").split("M")[1:]])


def test_thousands_of_samples_are_thinned_to_the_same_distribution() -> None:
    rng = np.random.default_rng(0)
    samples = rng.gamma(9.0, 0.1, 5000)
    shown = strips(report(samples, samples), "torch", 200)
    low, high = ticks(shown)[0], ticks(shown)[-1]
    seen = dots(shown["strips"][0]["svg"]) / 1000 * (high - low) + low
    assert len(seen) == 200
    quantiles = [0.0, 0.1, 0.5, 0.9]
    assert np.allclose(np.quantile(seen, quantiles), np.quantile(samples, quantiles), atol=0.02)


def test_both_strips_share_one_axis() -> None:
    shown = strips(report(np.full(20, 4.0), np.full(20, 2.0)), "torch", 100)
    first, second = (dots(strip["svg"]) for strip in shown["strips"])
    low, high = ticks(shown)[0], ticks(shown)[-1]
    assert np.allclose(first / 1000 * (high - low) + low, 4.0) and np.allclose(second / 1000 * (high - low) + low, 2.0)


@pytest.mark.parametrize(("fast", "slow", "zero"), [(1.0, 1.1, False), (1.0, 5.0, True)])
def test_the_axis_starts_at_zero_where_the_two_differ_that_much_and_else_says_so(
    fast: float, slow: float, zero: bool
) -> None:
    shown = strips(report(np.full(20, slow), np.full(20, fast)), "torch", 100)
    assert shown["from_zero"] == zero == (ticks(shown)[0] == 0)


def test_one_hiccup_does_not_stretch_the_axis_and_is_told() -> None:
    rng = np.random.default_rng(0)
    samples = [*rng.normal(1.0, 0.01, 99), 50.0]
    shown = strips(report(samples, samples), "torch", 200)
    assert ticks(shown)[-1] < 1.5 and shown["beyond"] == 2


def test_without_samples_median_and_p90_are_still_drawn() -> None:
    shown = strips({"after": {"latency": {"torch": {"median_ms": 1.0, "p90_ms": 1.2}}}}, "torch", 100)
    assert [strip["kind"] for strip in shown["strips"]] == ["after"]
    assert 'class="median after"' in shown["strips"][0]["svg"] and 'class="p90 after"' in shown["strips"][0]["svg"]
