"""Several runs side by side: each number in its own run's column, nothing claimed across machines."""

from typing import Any

import pytest

from featherweight.report import MAX_BYTES, compare_markdown, compare_reports
from tests.report.html_page import Reader
from tests.report.sample import sample_report
from tests.report.test_page import HOSTILE, small_report


def runs() -> list[dict[str, Any]]:
    found = []
    for title, metric, packed in (("half", 0.9778, 188_000), ("most", 0.953, 36_800)):
        report = sample_report()
        report["title"], report["after"]["metric"], report["after"]["packed_bytes"] = title, metric, packed
        found.append(report)
    return found


def test_each_run_has_its_column() -> None:
    table = Reader(compare_reports(runs())).tables[-1]
    assert table[0][1:] == ["1 half", "2 most"]
    rows = {row[0]: row[1:] for row in table}
    assert rows["accuracy"] == ["0.9806 → 0.9778", "0.9806 → 0.9530"]
    assert rows["packed"] == ["336 kB → 188 kB", "336 kB → 36.8 kB"]
    assert rows["MACs"] == ["519,104", "519,104"]
    assert rows["faster in OpenVINO?"] == ["faster", "faster"] and rows["faster in PyTorch?"] == [
        "no claim",
        "no claim",
    ]


def test_runs_of_different_metrics_share_no_row() -> None:
    first, second = runs()
    second["after"]["metric_name"] = second["before"]["metric_name"] = "perplexity"
    second["stages"] = []
    rows = {row[0]: row[1:] for row in Reader(compare_reports([first, second])).tables[-1]}
    assert rows["accuracy"][1] == "–" and rows["perplexity"][0] == "–"


def test_the_scatter_has_a_spot_a_run_and_one_for_their_common_baseline() -> None:
    html = compare_reports(runs())
    assert html.count('class="spot after"') == 2 and html.count('class="spot before"') == 1


def test_markdown_has_the_same_table() -> None:
    lines = compare_markdown(runs()).splitlines()
    assert lines[0] == "|  | 1 half | 2 most |" and "| packed | 336 kB → 188 kB | 336 kB → 36.8 kB |" in lines


@pytest.mark.parametrize("reports", [[], [{}], [{}, {"title": HOSTILE, "before": None, "after": 3}]], ids=["none", "empty", "odd"])  # fmt: skip
def test_whatever_is_compared_the_page_is_whole(reports: list[dict[str, Any]]) -> None:
    Reader(compare_reports(reports))
    compare_markdown(reports)


def test_very_many_runs_stay_small_and_say_how_many_are_shown() -> None:
    html = compare_reports([{**small_report(), "title": "&" * 300}] * 300)
    assert len(html.encode()) < MAX_BYTES and "300 runs side by side" in html
    assert "are shown" in Reader(html).words
