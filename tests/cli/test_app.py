# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: help that teaches, quick to start, plain where there is no terminal."""

import io
import re
import subprocess
import sys
from typing import Any

import pytest
import typer

import featherweight
from featherweight.cli import app, console
from featherweight.progress import watch
from tests.test_docs import parses

from .conftest import Run

COMMANDS = ("demo", "doctor", "inspect", "compress", "bench", "export", "report")


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_there_are_seven_commands_and_help_names_the_exit_codes(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = re.findall(r"^  ([a-z]+) {2,}\S", result.stdout.partition("Commands:")[2], re.MULTILINE)
    assert tuple(listed) == COMMANDS
    assert "5 an extra is missing" in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_in_an_example_that_the_parser_takes(run: Run, command: str) -> None:
    result = run(command, "--help")
    [example] = re.findall(r"Example: featherweight (.+)", result.stdout)
    assert example.split()[0] == command
    parses(example.split())
    assert "--json" in result.stdout and "\x1b" not in result.stdout


def test_version_and_bare_call(run: Run) -> None:
    assert run("--version").stdout == f"featherweight {featherweight.__version__}\n"
    assert "Commands:" in run().output


@pytest.mark.parametrize(
    ("words", "said"), [(["compres"], "'compress'"), (["demo", "--quik"], "--quick"), (["report"], "FOLDER")]
)
def test_a_slip_of_the_pen_is_answered_with_the_nearest_and_2(run: Run, words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and said in result.stderr


def test_help_and_version_load_neither_torch_nor_any_extra() -> None:
    program = (
        "import sys; from featherweight.cli import main; sys.argv = ['featherweight', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'onnx', 'jinja2', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n"), done.stdout


@pytest.mark.parametrize(
    ("stream", "no_color", "red"), [(Terminal, "", True), (Terminal, "1", False), (io.StringIO, "", False)]
)
def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, stream: Any, no_color: str, red: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stderr", stream())
    console.fail("OptionError", "wrong " * 60)
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("31m" in said) == red
    assert said.count("\n") == 1, "a message is one line however narrow the terminal, so that it can be searched for"


def test_a_table_in_a_pipe_is_plain_and_folds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("name", "n"), [["a" * 150, "1"], ["[b]", "1,000"]], right=[1])
    assert capsys.readouterr().out == f"name{' ' * 148}    n\n{'a' * 150}      1\n[b]{' ' * 149}1,000\n"


def test_a_log_gets_one_plain_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with watch(console.progress(), sys.stderr) as tell:
        tell({"kind": "stage", "name": "1 train", "index": 1, "of": 1})
        tell({"kind": "step", "step": 1, "total": 2})
        tell({"kind": "message", "text": "[b]"})
    assert capsys.readouterr().err == "1 train\n[b]\n"


def test_json_has_null_for_what_is_not_a_number() -> None:
    stream = io.StringIO()
    console.answer({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1, None)}}, stream)
    assert re.sub(r"\s+", "", stream.getvalue()) == '{"a":null,"b":[null,1.5],"c":{"d":[1,null]}}'


def test_every_command_answers_in_json() -> None:
    commands: Any = typer.main.get_command(app)
    for name in COMMANDS:
        assert "json" in {parameter.name for parameter in commands.commands[name].params}, name
