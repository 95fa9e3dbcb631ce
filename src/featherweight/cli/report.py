# SPDX-License-Identifier: Apache-2.0
"""`featherweight report`: a run's report made again, or several runs side by side. Measures nothing."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.cli.console import Json, say
from featherweight.errors import ArtefactError

__all__ = ["command", "read_report"]


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders of finished runs.")],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page to write; by default report.html in the folder, if it is one."),
    ] = None,
    md: Annotated[bool, typer.Option("--md", help="Print Markdown in place of writing a page.")] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Renders the report of a run again from its report.json, or sets several runs side by side.

    \b
    Example: featherweight report run-75 run-90 --html compared.html
    """
    from featherweight.report import compare_markdown, compare_reports, render, to_markdown

    reports = [read_report(folder) for folder in folders]
    one = len(reports) == 1
    if md and not json:
        say((to_markdown(reports[0]) if one else compare_markdown(reports)).rstrip("\n"))
    if html is None and one and not md and not json:
        html = folders[0] / "report.html"
    if html is not None:
        _write(html, render(reports[0]) if one else compare_reports(reports))
    if html is not None and not json:
        say(f"report  {html}")
    elif not md and not json:
        say(compare_markdown(reports).rstrip("\n"))
    return {"html": None if html is None else str(html), "reports": reports}


def read_report(folder: Path) -> dict[str, Any]:
    """The `report.json` of a run's folder. Raises `ArtefactError` where there is none, or it cannot be read as one."""
    path = folder / "report.json"
    try:
        report = json_module.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "it is not a folder" if not folder.is_dir() else "no run of featherweight has finished there"
        raise ArtefactError(f"{folder} has no report.json: {hint}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} could not be read: {error}.") from error
    if not isinstance(report, dict) or "verdict" not in report:
        raise ArtefactError(f"{path} is not a report of featherweight.")
    return report


def _write(path: Path, page: str) -> None:
    from featherweight.artefact import write_text

    write_text(path, page)
