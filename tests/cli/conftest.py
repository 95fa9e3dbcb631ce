# SPDX-License-Identifier: Apache-2.0
"""A folder with a user's module and recipe in it, and the command line to call there."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from featherweight.cli import app

RECIPE = """
[[stages]]
method = "train"
steps = 30
lr = 0.01
checkpoint_every = 5
hooks = [{ method = "gradual_pruning", sparsity = 0.75, end = 20, every = 5 }]
"""


def write_project(folder: Path) -> Path:
    """The user's module `tasks.py` and `recipe.toml`."""
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("user_tasks.py"), folder / "tasks.py")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a user; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(write_project(tmp_path / "project"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    before = set(sys.modules)
    yield Path.cwd()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Calls the command line in this process; with `--json` the answer is checked to be one document and put on `answer`."""

    def call(*words: Any) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words])
        result.answer = json.loads(result.stdout) if "--json" in words and result.stdout else None  # type: ignore[attr-defined]
        return result

    return call
