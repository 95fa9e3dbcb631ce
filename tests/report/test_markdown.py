"""Markdown and the model card, read back by parsers that are not ours: markdown-it, PyYAML, Python's compiler."""

import ast
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from featherweight.card import card
from featherweight.report import render, to_markdown
from featherweight.report.markdown import code, escape, fence
from featherweight.report.tables import load_snippets
from tests.report.html_page import Reader
from tests.report.sample import sample_report
from tests.report.test_page import HOSTILE, PATHS, poisoned, small_report, with_value

MARKDOWN = MarkdownIt("commonmark").enable("table")


def tokens(source: str) -> list[Token]:
    """All tokens, inline ones included."""
    return [inner for token in MARKDOWN.parse(source) for inner in (token, *(token.children or []))]


def body(source: str) -> str:
    """A card without its front matter."""
    return source.split("---\n", 2)[2]


def shown(source: str) -> str:
    """What a reader of rendered Markdown sees."""
    return "".join(token.content for token in tokens(source) if token.type in ("text", "code_inline", "fence"))


@given(st.text(max_size=60))
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    wanted = " ".join(text.encode("utf-8", "replace").decode().split()).replace("\x00", "\ufffd")
    parsed = tokens(f"x {escape(wanted)} x")
    seen = "".join(token.content for token in parsed if token.type in ("text", "text_special"))
    assert not {token.type for token in parsed} & {"html_inline", "html_block", "link_open", "image", "code_inline"}
    if not set("_&~") & set(wanted):  # emphasis within words and entities are harmless and left readable
        assert seen == f"x {wanted} x".replace("x  x", "x  x")


@given(st.text(alphabet="`|ab \n*<", max_size=20))
def test_code_spans_and_fences_hold_any_text(text: str) -> None:
    wanted = " ".join(text.split())
    if wanted and "|" not in wanted:
        spans = [token.content for token in tokens(code(wanted)) if token.type == "code_inline"]
        assert spans == [wanted]
    fences = [token.content for token in MARKDOWN.parse(fence(text)) if token.type == "fence"]
    assert len(fences) == 1 and fences[0].rstrip() == text.rstrip()


def test_hostile_strings_make_no_markup() -> None:
    for source in (to_markdown(poisoned(small_report())), body(card(poisoned(small_report())))):
        source.encode()
        kinds = {token.type for token in tokens(source)}
        assert not kinds & {"html_block", "html_inline", "link_open", "image"}
        clean = to_markdown(small_report()), body(card(small_report()))
        assert kinds - {"text_special"} <= {token.type for some in clean for token in tokens(some)} | {"softbreak"}
        assert "<script>alert(1)</script>" in "".join(t.content for t in tokens(source) if t.type == "inline").replace(
            "\\", ""
        )


def test_markdown_and_page_have_the_same_headings_but_for_the_pictures() -> None:
    parsed = MARKDOWN.parse(to_markdown(sample_report()))
    headings = [
        parsed[i + 1].content for i, token in enumerate(parsed) if token.type == "heading_open" and token.tag == "h2"
    ]
    page = [words for tag, words in Reader(render(sample_report())).headings if tag == "h2"]
    assert headings == [words for words in page if words not in ("Verdict", "Training curves")]


def test_cells_read_back_as_they_were_whatever_is_in_them() -> None:
    """GitHub drops what stands in cells beyond the head's, so a stray pipe would lose the numbers behind it."""
    report = {"verdict": {"numbers": [{"label": "a | b", "before": "`|`", "after": "<i>", "change": "1 \\| 2"}]}}
    cells = [token.children or [] for token in MARKDOWN.parse(to_markdown(report)) if token.type == "inline"]
    words = ["".join(child.content for child in children) for children in cells]
    assert words[-6:-2] == ["a | b", "`|`", "<i>", "1 \\| 2"]  # then the heading and words on the export


@pytest.mark.parametrize("value", [None, "text", 3, [], {}, [None]], ids=repr)
def test_any_part_may_be_missing_or_of_another_type(value: Any) -> None:
    for path in PATHS[:: 1 if value is None else 5]:
        report = with_value(small_report(), path, value)
        to_markdown(report)
        assert body(card(report)).startswith("\n# ")


def test_the_card_has_front_matter_that_hubs_read() -> None:
    yaml = pytest.importorskip("yaml")
    front = yaml.safe_load(card(sample_report()).split("---\n")[1])
    assert front == {
        "library_name": "featherweight",
        "tags": ["featherweight", "model-compression", "gradual_pruning", "train", "onnx"],
        "metrics": ["accuracy"],
    }


def test_the_front_matter_of_a_hostile_report_stays_data() -> None:
    yaml = pytest.importorskip("yaml")
    report = poisoned(small_report())
    report["after"]["metric_name"] = "x\n---\nlicense: mit"
    front = yaml.safe_load(card(report).split("\n---\n")[0].removeprefix("---\n"))
    assert set(front) == {"library_name", "tags", "metrics"}


def test_the_card_leaves_the_licence_to_the_user_and_says_what_was_not_gained() -> None:
    source = card(sample_report())
    assert "\nlicense:" not in source and "# license: fill in" in source
    assert "Not faster in ONNX Runtime or PyTorch" in source and 'fw.load(DigitsNet(), "run")' in source


FOLDERS = ["run", 'a "quoted" \\ folder', "new\nline", "ünïcode/🪶", "'; import os; os.remove('x') #"]
HINTS = [
    "digits:DigitsNet",
    "a.b.c:Outer.Inner",
    "__main__:Net",
    "Net",
    "x:f.<locals>.Net",
    "os; import sys",
    "",
    HOSTILE,
]


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_snippets_are_python_that_only_loads(folder: str, hint: str) -> None:
    """Oracle: Python's own parser. The folder is one string in it, and nothing but imports and calls of ours stand there."""
    report = {"load": {"folder": folder, "class_hint": hint}, "export": {"path": "model.onnx"}}
    with_class, without = (ast.parse(source) for _, _, source in load_snippets(report))
    call = next(node for node in ast.walk(with_class) if isinstance(node, ast.Call) and len(node.args) == 2)
    assert isinstance(call.args[1], ast.Constant) and call.args[1].value == folder
    assert isinstance(call.args[0], ast.Call) and not call.args[0].args
    imports = [node for node in ast.walk(with_class) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) <= 2 and len(with_class.body) == len(imports) + 2
    paths = [node.value for node in ast.walk(without) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert paths == [f"{folder}/model.onnx"]


@pytest.mark.parametrize(
    ("hint", "imported", "made"),
    [("digits:DigitsNet", "from digits import DigitsNet", "DigitsNet()"),
     ("a.b:Outer.Inner", "from a.b import Outer", "Outer.Inner()"),
     ("a.b.Net", "from a.b import Net", "Net()"),
     ("__main__:Net", "", "Net()"),
     ("nets:make.<locals>.Net", "", "make_model()")],
)  # fmt: skip
def test_the_class_is_imported_from_where_it_lives(hint: str, imported: str, made: str) -> None:
    source = load_snippets({"load": {"folder": "run", "class_hint": hint}})[0][2]
    assert f"fw.load({made}, " in source
    assert [line for line in source.splitlines() if line.startswith("from")] == ([imported] if imported else [])


def test_the_same_from_report_json() -> None:
    report = sample_report()
    again = json.loads(json.dumps(report))
    assert to_markdown(again) == to_markdown(report) and card(again) == card(report)
