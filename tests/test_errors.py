# SPDX-License-Identifier: Apache-2.0
"""Errors can be caught as one, end in the documented exit codes, and say what to type next."""

import sys
from pathlib import Path

import pytest

from featherweight import errors
from featherweight.errors import FeatherweightError, MissingExtra, nearest, require

KINDS = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_a_value_error_of_ours_with_a_documented_exit_code(kind: type[FeatherweightError]) -> None:
    """2 what the user can mend, 3 budget not met, 4 parity or export, 5 a missing extra; 1 is for our own bugs."""
    assert issubclass(kind, FeatherweightError) and issubclass(kind, ValueError)
    codes = {"BudgetNotMet": 3, "ParityError": 4, "ExportError": 4, "StageError": 4, "MissingExtra": 5}
    assert kind.exit_code == codes.get(kind.__name__, 2)


def test_a_missing_package_is_answered_with_the_command_that_brings_it() -> None:
    with pytest.raises(
        MissingExtra, match=r'no_such_package is not installed. Run: pip install "featherweight\[onnx\]"'
    ):
        require("no_such_package", extra="onnx")
    with pytest.raises(ImportError):
        require("no_such_package.inside", extra="onnx")


def test_a_package_that_is_there_but_broken_shows_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Telling the user to install what is installed would send them in a circle."""
    (tmp_path / "half_there.py").write_text("import its_own_missing_dependency")
    (tmp_path / "unloadable.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_missing_dependency") as caught:
        require("half_there", extra="onnx")
    assert not isinstance(caught.value, MissingExtra)
    with pytest.raises(ImportError, match="libGL") as caught_too:
        require("unloadable", extra="onnx")
    assert not isinstance(caught_too.value, MissingExtra)


def test_a_package_that_is_there_is_given() -> None:
    assert require("json", extra="onnx") is sys.modules["json"]


def test_the_nearest_names_come_best_first() -> None:
    known = ["schedule", "sparsity", "sparsities", "begin"]
    assert nearest("sparsty", known)[0] == "sparsity"
    assert nearest("xyzzy", known) == []
    assert len(nearest("s", ["sa", "sb", "sc", "sd"], n=2)) <= 2
