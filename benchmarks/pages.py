# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and the marks in a page of docs that they are written between: no figure is copied by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int | None = None) -> str:
    """Markdown, or nothing without a row; the first `text` columns to the left (default: all), numbers to the right."""
    marks = ["---" if text is None or i < text else "---:" for i in range(len(head))]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)]
    return "\n".join(lines) if len(lines) > 2 else ""


def put(name: str, body: str, page: Path) -> None:
    """Writes a body, if there is any, between `<!-- name -->` and `<!-- end -->`, in a page that has these marks."""
    if body and page.exists():
        marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marks.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", page.read_text(encoding="utf-8"), count=1)
        page.write_text(text, encoding="utf-8")
