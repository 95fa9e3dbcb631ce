# SPDX-License-Identifier: Apache-2.0
"""The report of a run: pure functions from the dict that `report.json` holds to a page, to Markdown, to words.

Nothing in the library calls these but the command line and `compress` at its very end, with a finished dict: a report
is a sink. They read no file but their templates and write none.
"""

from __future__ import annotations

from featherweight.report.compare import compare_reports
from featherweight.report.limits import MAX_BYTES
from featherweight.report.markdown import compare_markdown, to_markdown
from featherweight.report.page import render

__all__ = ["MAX_BYTES", "compare_markdown", "compare_reports", "render", "to_markdown"]
