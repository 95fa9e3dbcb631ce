# SPDX-License-Identifier: Apache-2.0
"""`featherweight compress`: a task and a recipe go in, a smaller and verified model comes out."""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featherweight.cli import console, sources
from featherweight.cli.console import Json, say, show, table
from featherweight.errors import OptionError
from featherweight.report import tables, words

if TYPE_CHECKING:
    from featherweight.recipe import Recipe
    from featherweight.task import Task

__all__ = ["command", "exit_code", "show_failures", "show_result", "show_warnings", "with_keep"]


def command(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="package.module:factory, for recipes that need no data; with --input."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="package.module:function that returns a featherweight.Task: model, data, loss, evaluate.",
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="The recipe, in TOML.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The folder to write.")] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="SHAPE", help="With MODEL, an input's shape: 1x3x224x224. One option an input."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="A glob of layers to leave as they are; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="In place of the recipe's seed.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what matches, and estimate time, disk and memory; write nothing.")
    ] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Runs a recipe on a copy of the model, measures before and after each stage, and writes one verified folder.

    Each stage and epoch is checkpointed: a run that was stopped, however, goes on by the same command with --resume.

    \b
    Example: featherweight compress --task my_project.tasks:digits --recipe recipe.toml --out run
    """
    if recipe is None or (out is None and not dry_run):
        raise OptionError(f"Give {'--recipe FILE.toml' if recipe is None else '--out FOLDER'}.")
    from featherweight.recipe import load_recipe

    chosen = with_keep(load_recipe(recipe), keep or ())
    if seed is not None:
        chosen = dataclasses.replace(chosen, seed=seed)
    found = _task(model, task, input or ())
    if dry_run:
        return _dry_run(found, chosen, out, json)
    from featherweight.run import compress

    said = ctx.meta.get("featherweight.command")
    try:
        result = compress(
            found, chosen, out, resume=resume, overwrite=overwrite, progress=console.progress(), command=said
        )
    except KeyboardInterrupt as stop:
        again = shlex.join(word for word in shlex.split(str(said)) if word not in ("--resume", "--overwrite"))
        stop.add_note(f"Finished stages and the last checkpoint are kept. Go on with: {again} --resume")
        raise
    code = exit_code(result.report, result.unmet)
    if not json:
        show_result(result.report, out)
    show_failures(result.report, result.unmet)
    return {"folder": str(out), "exit_code": code, "unmet": list(result.unmet), "report": result.report}


def _task(model: str | None, task: str | None, inputs: Sequence[str]) -> Task:
    from featherweight.task import Task

    if task is not None and model is None and not inputs:
        return sources.make_task(task)
    if task is not None and inputs:
        raise OptionError("--input goes with MODEL; a task brings its own example inputs.")
    net, example_inputs = sources.model_and_inputs(model, task, inputs)
    if example_inputs is None:
        raise OptionError("Give --input, the shape that the model takes: --input 1x3x224x224, say.")
    return Task(net, example_inputs)


def with_keep(recipe: Recipe, globs: Sequence[str]) -> Recipe:
    """The recipe with these globs added to `keep` of every method and hook that has it.

    Raises `OptionError` where none has.

    >>> from featherweight.prune import Prune
    >>> from featherweight.recipe import Recipe
    >>> with_keep(Recipe((Prune(sparsity=0.5, keep=["fc"]),)), ["stem*"]).stages[0].keep
    ('fc', 'stem*')
    """
    if not globs:
        return recipe
    stages = tuple(_keeping(method, tuple(globs)) for method in recipe.stages)
    if stages == recipe.stages:
        raise OptionError("--keep: no method of the recipe has an option keep.")
    return dataclasses.replace(recipe, stages=stages)


def _keeping(method: Any, globs: tuple[str, ...]) -> Any:
    changes: dict[str, Any] = {}
    if hasattr(method, "keep"):
        changes["keep"] = (*method.keep, *globs)
    for nested in ("hooks", "step"):
        if isinstance(getattr(method, nested, None), list | tuple):
            changes[nested] = tuple(_keeping(inner, globs) for inner in getattr(method, nested))
    return dataclasses.replace(method, **changes) if changes else method


def exit_code(report: Mapping[str, Any], unmet: Sequence[str]) -> int:
    """3 where a budget was missed, 4 where the export failed or does not answer as the model does, else 0."""
    if unmet:
        return 3
    return 4 if export_failure(report) else 0


def export_failure(report: Mapping[str, Any]) -> str:
    """What is wrong with the export, or nothing. Packages not installed were not asked for: that is a warning."""
    export = report.get("export") or {}
    if export.get("path"):
        return "" if export["parity"]["passed"] else str(export["parity"]["words"])
    from featherweight.doctor import extras

    return str(export["error"]) if export and extras()["onnx"]["installed"] else ""


def show_result(report: Mapping[str, Any], folder: Path | None) -> None:
    """The verdict, one table, what was not gained, warnings, and where to look."""
    say(report["verdict"]["sentence"], "bold")
    say()
    show(tables.stages(report))
    say()
    for text in report["gains"][1:]:
        say(f"  {text}")
    export = report["export"]
    if export and export.get("path"):
        say(f"  {export['path']}: {export['parity']['words']}")
    say()
    show_warnings(report)
    if folder is not None:
        page = folder / "report.html"
        say(f"artefact  {folder}")
        say(f"report    {page if page.exists() else folder / 'report.json'}")


def show_warnings(report: Mapping[str, Any]) -> None:
    """The report's warnings, but for those that end in an exit code: `show_failures` says these."""
    failed = export_failure(report)
    for text in report["warnings"]:
        if not failed or failed not in text:
            say(f"Warning: {text}", "yellow")


def show_failures(report: Mapping[str, Any], unmet: Sequence[str]) -> None:
    """On stderr, why the exit code is not 0."""
    for text in unmet:
        console.fail("BudgetNotMet", text)
    if failed := export_failure(report):
        console.fail("ExportError", f"Everything but a model.onnx that can be trusted was delivered. {failed}")


def _dry_run(task: Task, recipe: Recipe, out: Path | None, json: bool) -> dict[str, Any]:
    from featherweight.preview import preview

    found = preview(task, recipe)
    found["disk_free_bytes"] = None if out is None else _free(out)
    if not json:
        _show_preview(found)
    return found


def _free(out: Path) -> int:
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(folder).free


def _show_preview(found: Mapping[str, Any]) -> None:
    for stage in found["stages"]:
        options = tables.text(stage["options"])
        say(f"{stage['name']}  {options}", "bold")
        for match in stage["matches"]:
            say(f"  {match['method']} matches {match['pruned']} of {match['of']} weights")
            rows = [_selected(line) for line in match["selection"]]
            table(("  weight", "shape", "parameters", "to", "why"), rows, right=(2, 3))
        for part in stage["training"]:
            rounds = f", at most {part['rounds_at_most']} rounds" if part["rounds_at_most"] > 1 else ""
            per_step = words.milliseconds(1000 * part["seconds_per_step"])
            say(
                f"  {words.count(part['steps'])} steps{rounds} at {per_step} (median of {part['timed_steps']} on a copy)"
            )
    estimate = found["estimate"]
    say()
    say("Estimates, not measurements", "bold")
    say(f"  time    {words.seconds(estimate['seconds'])}, besides {estimate['not_included']}")
    say(f"  memory  {words.size(estimate['memory_bytes'])}, besides Python, torch and the data")
    free = "" if found["disk_free_bytes"] is None else f"; {words.size(found['disk_free_bytes'])} are free"
    disk, peak = words.size(estimate["disk_bytes"]), words.size(estimate["disk_peak_bytes"])
    say(f"  disk    {disk} at the end at most, {peak} while it runs{free}")
    if (found["disk_free_bytes"] or math.inf) < estimate["disk_peak_bytes"]:
        say("  The disk is too small for that.", "yellow")
    say("Nothing was written.")


def _selected(line: Mapping[str, Any]) -> list[str]:
    pruned = line["action"] == "pruned"
    target = words.percent(line["sparsity"]) if pruned else "kept"
    return [
        f"  {line['name']}",
        "x".join(map(str, line["shape"])),
        words.count(line["parameters"]),
        target,
        line["reason"],
    ]
