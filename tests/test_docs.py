# SPDX-License-Identifier: Apache-2.0
"""What the docs show is what the code does: every block runs, every command parses, every link leads somewhere."""

import dataclasses
import doctest
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")})
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block; `skip` is the reason of an HTML comment `<!-- skip: reason -->` on the line before."""

    page: Path
    line: int
    language: str
    text: str
    skip: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip()
        skip = re.search(r"<!-- skip: (.+?) -->\Z", before)
        body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, match["language"], body, skip[1] if skip else ""))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> Any:
    return pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in languages], ids=str)


def test_the_readme_and_the_docs_have_blocks_to_check() -> None:
    """Without this, a fence that the pattern above misses would leave nothing to run, and everything green."""
    written = sum(len(re.findall(r"^ *(?:```|~~~)[\w-]", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert written == sum(block.language != "" for block in BLOCKS)
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert any(block.language == "python" and block.page == page for block in BLOCKS), page


@of("python", "pycon")
def test_code_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a namespace and a folder of its own. Empty lines in front, so that a traceback has the page's own line."""
    monkeypatch.chdir(tmp_path)
    if block.text.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.text, {}, str(block), str(block.page), block.line - 1)
        said: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
        assert said == []
        return
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True)
    if block.skip:
        pytest.skip(f"compiled only: {block.skip}")
    exec(code, {"__name__": "__main__"})


@of("toml")
def test_toml_is_toml(block: Block) -> None:
    if block.skip:
        pytest.skip(block.skip)
    assert tomllib.loads(block.text)


@of("json")
def test_json_is_json(block: Block) -> None:
    if block.skip:
        pytest.skip(block.skip)
    assert json.loads(block.text)


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, split as a shell does, without variables set in front of them.

    In a console block (`$ command`, then what it prints) the lines with a prompt count.
    """
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                found.append(words)
                # After `>` comes a file, not a command; it may be parsed as one, and is none that we know.
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)
    return [words for words in found if words]


@of("bash", "sh", "shell", "console")
def test_commands_can_be_typed(block: Block) -> None:
    for words in commands(block):
        name, *arguments = words
        if Path(name).name == "featherweight":
            parses(arguments)
        elif name == "make":
            targets = re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in arguments if "=" not in word and not word.startswith("-")} <= set(targets)
        elif name == "pip" and arguments[:1] == ["install"]:
            asked = re.findall(r"featherweight\[([\w,]+)\]", " ".join(arguments))
            assert {extra for extras in asked for extra in extras.split(",")} <= set(PROJECT["optional-dependencies"])
        elif name in ("python", "torchrun") and arguments and arguments[-1].endswith((".py", "/")):
            # A script of this project must be there; one of the reader's has no folder in front.
            script = next(word for word in arguments if not word.startswith("-"))
            assert "/" not in script or (ROOT / script).exists(), script


def parses(arguments: list[str]) -> None:
    """Follows the words through the command line's own parser: known subcommands, options and number of arguments."""
    import typer

    from featherweight.cli import app

    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while True:
        context = command.make_context(command.name, [], resilient_parsing=True)
        values, rest, _ = command.make_parser(context).parse_args(list(words))
        children = getattr(command, "commands", None)
        if children is None:
            break
        if not rest:  # `featherweight --version`
            return
        assert rest[0] in children, f"no subcommand {rest[0]!r}; there are {', '.join(children)}"
        command, words = children[rest[0]], list(rest[1:])
    assert not rest, f"too many arguments: {rest}"
    for parameter in command.params:
        value = values.get(parameter.name)
        missing = value is None or value == () or type(value).__name__ == "Sentinel"
        assert not (parameter.required and missing), f"{parameter.name} is missing"


def anchors(page: Path) -> set[str]:
    """What a heading can be linked by: lower case, words joined by hyphens, punctuation dropped."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        assert ROOT in (file, *file.parents), f"{target} leaves the project"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: no such heading; there are {sorted(anchors(file))}"
