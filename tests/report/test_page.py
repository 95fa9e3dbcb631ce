"""The page shows what the dict holds, whatever it holds: nothing missing breaks it, nothing hostile gets out."""

import copy
import json
import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featherweight.errors import MissingExtra
from featherweight.report import MAX_BYTES, page, render
from tests.report.html_page import Reader
from tests.report.sample import LAYERS, sample_report

SECTIONS = [
    "Verdict", "Gained, and not gained", "Before and after each stage", "Training curves", "Size on disk", "Latency",
    "Layer by layer", "Export and parity", "Load and run", "Reproduce", "Warnings",
]  # fmt: skip


def small_report() -> dict[str, Any]:
    """A whole report with short series, for tests that render it many times."""
    report = sample_report()
    report["stages"][0]["history"] = report["stages"][0]["history"][::25]
    for card in (report["before"], report["after"], report["stages"][0]["scorecard"]):
        for timed in card["latency"].values():
            timed["samples_ms"] = timed["samples_ms"][:12]
    return report


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested data, one row of each long list standing for all."""
    if here:
        yield here
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, (*here, key))
    elif isinstance(value, list) and value:
        yield from paths(value[-1], (*here, len(value) - 1))


def with_value(report: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


# Scorecards and timings occur many times; one place for each kind of place is enough.
PATHS = list({p[-2:]: p for p in paths(small_report()) if not {"onnxruntime", "openvino"} & set(p)}.values())


def test_all_sections_are_there_in_order() -> None:
    headings = [words for tag, words in Reader(render(sample_report())).headings if tag == "h2"]
    assert headings == SECTIONS


def test_the_five_numbers_and_the_sentence_stand_as_they_came() -> None:
    report = sample_report()
    words = Reader(render(report)).words
    assert report["verdict"]["sentence"] in words
    for number in report["verdict"]["numbers"]:
        assert all(number[key] in words for key in ("label", "before", "after", "change"))


def test_stage_table_has_a_column_for_before_each_stage_and_after() -> None:
    table = Reader(render(sample_report())).tables[0]
    assert table[0][1:] == ["before", "1 train", "after all"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["accuracy"] == ["0.9806", "0.9722", "0.9722"]
    assert rows["zeros"] == ["0 %", "88.1 %", "88.1 %"]  # 1 - 9,873 / 83,242 = 0.8814
    assert rows["packed"] == ["336 kB", "50.3 kB", "50.3 kB"]


def test_layer_table_has_every_layer_its_reason_and_the_sums() -> None:
    table = Reader(render(sample_report())).tables[-1]
    assert len(table) == 1 + len(LAYERS) + 1
    assert "depthwise, 9 weights a channel" in table[2][-1] and table[2][-1].startswith("kept")
    parameters = sum(math.prod(shape) for _, _, shape, _, _, _ in LAYERS)
    assert table[-1][:3] == ["all 7 layers", "", f"{parameters:,}"]


def test_rendering_is_pure_and_the_same_from_report_json() -> None:
    report = sample_report()
    before = copy.deepcopy(report)
    first = render(report)
    assert report == before
    assert render(report) == first
    assert render(json.loads(json.dumps(report))) == first


def test_nothing_on_the_page_can_run_or_load() -> None:
    for tag, attributes in Reader(render(sample_report())).tags:
        assert tag not in ("script", "iframe", "object", "embed", "img", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    page_text = render(sample_report())
    assert "@import" not in page_text and "url(" not in page_text and "http" not in page_text.replace("http-equiv", "")


HOSTILE = "<script>alert(1)</script>\"' onload=x {{7*7}} {% raw %} </style></svg><img src=x onerror=y> &amp; | pipe \u202e \x00 \ud800"


def poisoned(value: Any) -> Any:
    if isinstance(value, str):
        return HOSTILE + value
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    return [poisoned(item) for item in value] if isinstance(value, list) else value


def test_hostile_strings_are_shown_as_text() -> None:
    report = poisoned(small_report())
    report["before"]["latency"][HOSTILE] = report["before"]["latency"]["torch"]
    html = render(report)
    html.encode()  # lone surrogates would raise
    reader = Reader(html)
    assert {tag for tag, _ in reader.tags} == {tag for tag, _ in Reader(render(small_report())).tags}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert reader.words.count("<script>alert(1)</script>") > 50
    assert "{{7*7}}" in reader.words


def test_an_empty_report_still_reads() -> None:
    words = Reader(render({})).words
    assert "This run has no verdict." in words and "Not exported." in words


@pytest.mark.parametrize("value", [None, "text", 3, [], {}, math.nan, [None], True], ids=repr)
def test_any_part_may_be_missing_or_of_another_type(value: Any) -> None:
    report = small_report()
    for path in PATHS[:: 1 if value is None else 5]:
        Reader(render(with_value(report, path, value)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([str(p[-1]) for p in PATHS]), inner),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PATHS), json_values), min_size=1, max_size=4))
def test_any_json_in_any_place_gives_a_whole_page(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    report = small_report()
    for path, value in changes:
        try:
            report = with_value(report, path, value)
        except (TypeError, KeyError, IndexError):
            continue  # an earlier change took this place away
    html = render(report)
    for _, attributes in Reader(html).tags:  # a picture must never be drawn at a place that is not a number
        assert not any(
            bad in (attributes.get(name) or "") for name in ("d", "x", "y", "width") for bad in ("nan", "inf")
        )


def test_numbers_that_are_none_or_nan_say_so() -> None:
    report = small_report()
    report["before"]["metric"], report["after"]["packed_bytes"] = math.nan, None
    rows = {row[0]: row for row in Reader(render(report)).tables[0]}
    assert rows["accuracy"][1] == "NaN" and rows["packed"][3] == "–"


def long_layers(report: dict[str, Any]) -> None:
    row = report["layers"][3]
    report["layers"] = [{**row, "name": f"encoder.{i}.projection", "parameters": i} for i in range(5000)]


def long_series(report: dict[str, Any]) -> None:
    rng = random.Random(0)
    report["stages"][0]["history"] = [
        {"step": i, "loss": rng.random(), "lr": rng.random(), "metric": rng.random(), "sparsity": i / 1e5}
        for i in range(30_000)
    ]
    for card in (report["before"], report["after"]):
        for timed in card["latency"].values():
            timed["samples_ms"] = [rng.gauss(1, 0.1) for _ in range(20_000)]


def many_stages(report: dict[str, Any]) -> None:
    report["stages"] = [{**small_report()["stages"][0], "name": f"{i} & {'long ' * 50}"} for i in range(120)]


def long_texts(report: dict[str, Any]) -> None:
    report["reproduce"]["recipe"] = "<&>" * 300_000
    report["warnings"] = ["&" * 20_000] * 3000
    report["reproduce"]["versions"] = {f"package{i}": "1.0" * 50 for i in range(20_000)}
    report["title"] = report["verdict"]["sentence"] = "long " * 50_000


def many_runtimes(report: dict[str, Any]) -> None:
    for card in (report["before"], report["after"]):
        card["latency"] = {f"runtime {i}": card["latency"]["torch"] for i in range(100)}
    report["comparisons"] = {f"runtime {i}": {"words": "&" * 900} for i in range(100)}


def everything_at_once(report: dict[str, Any]) -> None:
    for stretch in (long_layers, many_stages, long_texts, many_runtimes):
        stretch(report)
    for row in report["layers"]:
        row["reason"] = row["name"] = row["codec"] = row["kind"] = row["action"] = "&" * 5000
    report["stages"][0]["selection"] = [{"name": "&" * 2000, "reason": "<" * 2000} for _ in range(600)]
    report["verdict"]["numbers"] = [{"label": "&" * 9000, "after": "&" * 9000}] * 9000


@pytest.mark.parametrize(
    "stretch",
    [long_layers, long_series, many_stages, long_texts, many_runtimes, everything_at_once],
    ids=lambda stretch: stretch.__name__,
)
def test_the_page_stays_small_and_says_that_it_was_cut(stretch: Any) -> None:
    report = sample_report()
    stretch(report)
    html = render(report)
    assert len(html.encode()) < MAX_BYTES
    words = Reader(html).words
    assert "report.json has all" in words or "thinned" in words


def test_of_thousands_of_layers_the_largest_are_shown_and_the_rest_summed() -> None:
    report = sample_report()
    long_layers(report)
    table = Reader(render(report)).tables[-1]
    rest, total = table[-2], table[-1]
    assert rest[0] == "4,600 smaller layers" and total[0] == "all 5,000 layers"
    assert rest[2] == "10.6 M"  # 0 + 1 + ... + 4599 = 10,577,700
    assert total[2] == "12.5 M"  # 0 + 1 + ... + 4999 = 12,497,500
    assert [row[0].split()[0] for row in table[1:3]] == ["encoder.4600.projection", "encoder.4601.projection"]


def test_tables_lists_and_pictures_can_be_read_without_seeing() -> None:
    reader = Reader(render(sample_report()))
    pictures = [a for tag, a in reader.tags if tag == "svg" and a.get("class") == "plot"]
    assert len(pictures) == 4 + 6 and all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert any("from 0 % to 90.0 %" in (a["aria-label"] or "") for a in pictures)
    regions = [a for _, a in reader.tags if a.get("role") == "region"]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    ids = {a["id"] for _, a in reader.tags if "id" in a}
    sections = [a.get("aria-labelledby") for tag, a in reader.tags if tag == "section"]
    assert len(sections) == len(SECTIONS) and set(sections) <= ids
    assert all(a.get("scope") for tag, a in reader.tags if tag == "th")
    assert {"better", "worse", "no real change"} <= {word.strip(": ") for word in reader.text}


@pytest.mark.parametrize(("faster", "said"), [(True, "faster"), (False, "slower"), (None, "no difference claimed")])
def test_a_latency_difference_is_claimed_only_where_the_comparison_claims_it(faster: bool | None, said: str) -> None:
    report = small_report()
    report["comparisons"] = {"torch": {"ratio": 1.3, "low": 1.2, "high": 1.4, "faster": faster, "words": ""}}
    section = Reader(render(report)).words.split("Each dot is one timed run")[1].split("ONNX Runtime")[0]
    claims = [claim for claim in ("faster", "slower", "no difference claimed") if claim in section]
    assert claims == [said]


def test_a_failed_export_is_told_and_all_else_is_there() -> None:
    report = small_report()
    report["export"] = {"path": None, "error": "torch.export: data-dependent branch at net.py:88"}
    reader = Reader(render(report))
    assert "data-dependent branch at net.py:88" in reader.words and "export failed" in reader.words
    assert "onnxruntime.InferenceSession" not in reader.words
    assert [words for tag, words in reader.headings if tag == "h2"] == SECTIONS


@pytest.mark.parametrize(("passed", "said"), [(True, "parity passed"), (False, "parity failed")])
def test_parity_says_whether_it_passed(passed: bool, said: str) -> None:
    report = small_report()
    report["export"]["parity"]["passed"] = passed
    assert said in Reader(render(report)).words


def test_without_jinja2_the_error_is_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    page._environment.cache_clear()
    with pytest.raises(MissingExtra, match=r'pip install "featherweight\[report\]"'):
        render({})
    monkeypatch.undo()
    assert "no verdict" in render({})


def test_layers_that_were_solved_are_a_table_with_a_column_for_each_solver() -> None:
    losses = {"magnitude": 0.5, "admm": 0.1, "admm, damping 0.01": 0.09}
    row = {"name": "fc.weight", "rows": 4, "d": 8, "solver": "admm, damping 0.01", "error": 0.09, "simple": 0.5}
    row |= {"losses": losses, "samples": 64, "tokens": 640, "damping": 0.01, "seconds": 1.5, "peak_bytes": 10**9}
    report = sample_report()
    report["stages"][0]["solved"] = [row]
    html = render(report)
    assert f"Layer errors of {report['stages'][0]['name']}" in html
    assert html.count("admm</th>") == 1
    assert html.count("admm, damping") == 0
    assert "0.09" in html
