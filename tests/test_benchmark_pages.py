# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: tables between their marks in a page, and results as lines of a file."""

from pathlib import Path

from benchmarks.pages import put, table
from benchmarks.results import add, last, read


def test_a_table_has_text_to_the_left_and_is_nothing_without_rows() -> None:
    assert table(["a", "b"], [["1", ""]]) == "| a | b |\n| --- | --- |\n| 1 |  |"
    assert table(["a", "b", "c"], ([cell] * 3 for cell in "xy"), text=1).splitlines() == [
        "| a | b | c |", "| --- | ---: | ---: |", "| x | x | x |", "| y | y | y |"
    ]  # fmt: skip
    assert table(["a"], [], text=1) == ""


def test_a_body_is_written_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    page, text = tmp_path / "page.md", "before\n<!-- kd -->\nold\n<!-- end -->\nbetween\n<!-- curve -->\n<!-- end -->\n"
    page.write_text(text)
    put("kd", "", page)
    put("other", "new", page)
    assert page.read_text() == text
    for _ in range(2):
        put("kd", r"new \1", page)
        assert page.read_text() == text.replace("old", "\nnew \\1\n")
    put("kd", "new", tmp_path / "absent.md")
    assert not (tmp_path / "absent.md").exists()


def test_rows_are_added_and_the_last_of_a_kind_counts(tmp_path: Path) -> None:
    path = tmp_path / "results" / "runs.jsonl"
    rows = [{"network": "µ", "bits": 8, "x": 1}, {"network": "µ", "x": 2}, {"network": "µ", "bits": 8, "x": 3}]
    assert read(path) == []
    for row in rows:
        add(path, row)
    assert read(path) == rows and len(path.read_text().splitlines()) == 3
    assert last(rows, "network", "bits") == [rows[2], rows[1]] and last(rows, "network") == [rows[2]]
