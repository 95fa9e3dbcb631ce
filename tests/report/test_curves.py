"""The training curves tell the story of gradual pruning: where masks changed, how deep the metric fell, what came next."""

from typing import Any

import pytest

from featherweight.report.curves import _dip, curves
from tests.report.sample import sample_report


def run(*histories: list[dict[str, Any]]) -> dict[str, Any]:
    return {"stages": [{"name": f"stage {i}", "history": history} for i, history in enumerate(histories, 1)]}


def titles(report: dict[str, Any]) -> dict[str, str]:
    drawn = curves(report, 500)
    return {} if drawn is None else {title: sentence for title, sentence, _ in drawn.panels}


def test_the_sample_run_has_its_four_panels_and_twenty_updates() -> None:
    drawn = curves(sample_report(), 500)
    assert drawn is not None
    assert [title for title, _, _ in drawn.panels] == ["sparsity", "accuracy", "loss", "learning rate"]
    assert drawn.updates == 20 and drawn.ruled


def test_a_series_that_was_not_recorded_has_no_panel() -> None:
    assert list(titles(run([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]))) == ["loss"]
    assert titles(run([{"step": 1}, {"loss": 3.0}])) == {} and titles({}) == {}


def test_what_distillation_makes_of_the_loss_has_a_panel_of_its_own() -> None:
    history = [{"step": s, "loss": 30.0 / s, "distill_loss": 20.0 / s} for s in range(1, 30)]
    found = titles(run(history))
    assert list(found) == ["loss", "distillation loss"]
    assert found["distillation loss"] == "from 20 to 0.6897; logarithmic"
    assert list(titles(run([{"step": 1, "loss": 2.0}]))) == ["loss"]


def test_the_deepest_dip_at_a_mask_update_is_named() -> None:
    """Oracle: the dips are put there by hand; the deeper fall at step 45 has no mask update and must not count."""
    history = [{"step": s, "sparsity": 0.1 * (s // 10), "metric": 0.97} for s in range(5, 60, 5)]
    for row in history:
        row["metric"] = {20: 0.90, 30: 0.81, 35: 0.97, 40: 0.95, 45: 0.5}.get(row["step"], 0.97)
    assert "deepest dip at a mask update: 0.9700 to 0.8100 at step 30" in titles(run(history))["metric"]


def test_readings_before_and_after_an_update_of_one_step_make_a_dip() -> None:
    history = [{"step": s, "sparsity": 0.1 * (s // 10), "metric": 0.97} for s in range(5, 60, 5)]
    history.insert(4, {"step": 25, "sparsity": 0.25, "metric": 0.7})  # step 25 again, after an update of its own
    assert "0.9700 to 0.7000 at step 25" in titles(run(history))["metric"]


def test_where_less_is_better_the_dip_is_a_peak() -> None:
    history = [{"step": s, "sparsity": 0.1 * (s // 10), "metric": 100.0} for s in range(5, 100, 5)]
    history[5]["metric"] = 180.0  # step 30, an update
    assert "100.0 to 180.0 at step 30" in titles(run(history))["metric"]


def test_what_the_report_says_of_better_and_worse_decides() -> None:
    """The tail is longer above, where a reader would guess that more is worse."""
    points = [(0.0, 0.5), (10.0, 0.9), (20.0, 0.4), (30.0, 0.5)]
    assert _dip(points, [5.0, 15.0], True) == ((20.0, 0.4), 0.9)
    assert _dip(points, [5.0, 15.0], False) == ((10.0, 0.9), 0.5)


def test_a_metric_that_only_rises_has_no_dip() -> None:
    history = [{"step": s, "sparsity": 0.1 * (s // 10), "metric": 1 - 1 / s} for s in range(5, 100, 5)]
    assert "dip" not in titles(run(history))["metric"]


@pytest.mark.parametrize("points", [[], [(1.0, 0.5)], [(1.0, 0.5), (2.0, None), (3.0, 0.1)]])
def test_too_few_readings_make_no_dip(points: list[Any]) -> None:
    assert _dip(points, [2.0]) is None


def test_a_stage_that_counts_from_one_again_is_set_behind_the_last() -> None:
    first = [{"step": s, "loss": 1.0} for s in (0, 50, 100)]
    drawn = curves(run(first, [{"step": s, "loss": 1.0} for s in (0, 50, 100)]), 500)
    assert drawn is not None and drawn.stages == ("stage 1", "stage 2")
    assert ">200</text>" in drawn.scale
    svg = drawn.panels[0][2]
    assert 'class="border" d="M500 0V100"' in svg and svg.count('class="curve loss"') == 2


def test_values_that_are_no_numbers_leave_gaps_that_are_told() -> None:
    history = [{"step": s, "loss": float("nan") if s == 3 else 1.0 / s} for s in range(1, 6)]
    assert "1 value is not a number" in titles(run(history))["loss"]
    drawn = curves(run(history), 500)
    assert drawn is not None and drawn.panels[0][2].count('class="curve loss"') == 2


def test_very_many_updates_are_counted_but_not_ruled() -> None:
    drawn = curves(run([{"step": s, "sparsity": s / 1000} for s in range(1000)]), 500)
    assert drawn is not None and drawn.updates == 999 and not drawn.ruled
    assert 'class="update"' not in drawn.panels[0][2] and drawn.thinned
