# SPDX-License-Identifier: Apache-2.0
"""The program `featherweight`: its commands, and the options that stand before or after any of them."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from featherweight import __version__
from featherweight.cli import console, failures
from featherweight.cli.bench import command as bench
from featherweight.cli.compress import command as compress
from featherweight.cli.demo import command as demo
from featherweight.cli.doctor import command as doctor
from featherweight.cli.export import command as export
from featherweight.cli.inspect import command as inspect
from featherweight.cli.report import command as report

__all__ = ["app", "main"]

EPILOG = (
    "Exit codes: 0 done, 1 internal error, 2 bad input, 3 budget not met (the best artefact is still written), 4 parity "
    "or another check failed, 5 an extra is missing, 130 interrupted. NO_COLOR is respected."
)


class _Commands(TyperGroup):
    """Takes --debug wherever it stands, keeps stdout clean for --json, and explains whatever a command raises."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["featherweight.json"] = "--json" in args
        ctx.meta["featherweight.command"] = shlex.join(["featherweight", *args])
        if "--debug" in args:
            args = ["--debug", *(word for word in args if word != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, which returns what it has to say as a dict, with an `exit_code` where that is not 0."""
        stdout, as_json = sys.stdout, ctx.meta["featherweight.json"]
        with failures.explained(debug=ctx.params["debug"], answer=stdout if as_json else None):
            # With --json, what the user's own functions print must not mix with the answer.
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                result = super().invoke(ctx)
            if as_json and result is not None:
                console.answer(result, stdout)
            if result is not None and result.get("exit_code"):
                raise typer.Exit(result["exit_code"])
        return result


app = typer.Typer(
    name="featherweight",
    cls=_Commands,
    help="Makes PyTorch models smaller and faster, and proves it. Start with: featherweight demo",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"featherweight {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand after the command too.")
    ] = False,
) -> None:
    """Makes PyTorch models smaller and faster, and proves it. Start with: featherweight demo"""


app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("inspect")(inspect)
app.command("compress")(compress)
app.command("bench")(bench)
app.command("export")(export)
app.command("report")(report)


def main() -> None:
    """Runs the command line; what the script `featherweight` calls."""
    app(prog_name="featherweight")
