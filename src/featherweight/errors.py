# SPDX-License-Identifier: Apache-2.0
"""Every error that featherweight raises on purpose, and the one gate to optional packages.

A message names the layer or file, says what happened, what was done instead and what to type next.
All derive from `FeatherweightError`, a `ValueError`; `exit_code` is what the command line returns.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TypeGuard, cast

__all__ = [
    "ArtefactError",
    "BudgetNotMet",
    "DataError",
    "EditError",
    "ExportError",
    "FeatherweightError",
    "GraphError",
    "MissingExtra",
    "NothingToCompress",
    "NumericalError",
    "OptionError",
    "ParityError",
    "RecipeError",
    "StageError",
    "VerifyError",
    "check_strings",
    "check_whole",
    "check_word",
    "is_number",
    "nearest",
    "require",
]


class FeatherweightError(ValueError):
    """The root: `except FeatherweightError` catches every error that is the user's to mend."""

    exit_code = 2


class OptionError(FeatherweightError):
    """An option is outside its range, or two options contradict each other."""


class NothingToCompress(FeatherweightError):
    """A selection matched no layer, or rules kept every matched layer as it is."""


class DataError(FeatherweightError):
    """A loader or batch that cannot be used: empty, one-shot, or of the wrong shape."""


class NumericalError(FeatherweightError):
    """NaN or infinity where a number is needed: weights, loss or importance."""


class RecipeError(FeatherweightError):
    """A recipe file that cannot be read as one; names file, line and key."""


class EditError(FeatherweightError):
    """A structural edit that does not fit the model; the model is left as it was."""


class VerifyError(EditError):
    """A cut that does not compute what the model computes with the same channels set to zero; it was undone."""


class GraphError(FeatherweightError):
    """A model could not be traced, or a trace does not hold what was asked of it."""


class ArtefactError(FeatherweightError):
    """A folder or file that is missing, damaged, foreign, in use or not writable."""


class ExportError(FeatherweightError):
    """The model could not be exported; everything else is still delivered."""

    exit_code = 4


class StageError(FeatherweightError):
    """A stage broke what an earlier one had made: its zeros, ties or grids. The earlier stages' work is kept."""

    exit_code = 4


class ParityError(FeatherweightError):
    """An exported or reloaded model does not answer as the PyTorch model does."""

    exit_code = 4


class BudgetNotMet(FeatherweightError):
    """No state met the budget; the best one found is still written."""

    exit_code = 3


class MissingExtra(FeatherweightError, ImportError):
    """An optional package is not installed; the message is the command that installs it."""

    exit_code = 5


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional package, or says which extra brings it.

    >>> require("json", extra="onnx").__name__
    'json'
    """
    try:
        with _out_of_sight(_TELEMETRY.get(module)):
            return importlib.import_module(module)
    except ImportError as error:
        # A package that is there but broken (a missing shared library, say) is not a missing extra.
        if (
            not isinstance(error, ModuleNotFoundError)
            or (error.name or "").partition(".")[0] != module.partition(".")[0]
        ):
            raise
        raise MissingExtra(f'{module} is not installed. Run: pip install "featherweight[{extra}]"') from None


# What reports its import over the network, and the package without which it does not (it then takes a stub of its own).
_TELEMETRY = {"openvino": "openvino_telemetry"}


@contextlib.contextmanager
def _out_of_sight(package: str | None) -> Iterator[None]:
    """Makes Python's import of a package fail in here, and restores what was imported of it before."""
    if package is None:
        yield
        return
    seen = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    sys.modules[package] = cast(ModuleType, None)
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(seen)


def nearest(wrong: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names that look most like `wrong`, best first.

    >>> nearest("sparsty", ["sparsity", "schedule", "begin"], n=1)
    ['sparsity']
    """
    return difflib.get_close_matches(wrong, list(known), n=n, cutoff=0.3)


def check_word(me: str, option: str, value: object, known: Iterable[str]) -> None:
    """Raises `OptionError` with the nearest of the known words."""
    known = tuple(known)
    if value not in known:
        close = ", ".join(nearest(str(value), known)) or known[0]
        raise OptionError(f"{me}: {option} {value!r} is none of {', '.join(known)}. Nearest: {close}.")


def check_whole(me: str, option: str, value: object, least: int = 0) -> None:
    """Raises `OptionError` for what is not a whole number from `least` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{me}: {option} must be a whole number from {least} on; got {value!r}.")


def check_strings(me: str, option: str, value: object) -> tuple[str, ...]:
    """A list of texts as a tuple. Raises `OptionError` for one text, which would be taken letter by letter."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        found = None
    else:
        found = tuple(value)
    if found is None or not all(isinstance(item, str) for item in found):
        example = [value] if isinstance(value, str) else ["fc*"]
        raise OptionError(f"{me}: {option} is a list of strings, {option}={example} say; got {value!r}.")
    return found


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is an int or a float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
