# SPDX-License-Identifier: Apache-2.0
"""Selection by globs on qualified names, the one way in which users name layers and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from featherweight.errors import NothingToCompress, nearest

__all__ = ["matches", "select"]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a glob names this tensor, its layer, or a module that holds it.

    `fc` and `fc.weight` both match the tensor `fc.weight`; `encoder` matches all that is in `encoder`.

    >>> matches("encoder.0.fc.weight", ["encoder.*.fc"]), matches("fc2.weight", ["fc"])
    (True, False)
    """
    parts = name.split(".")
    prefixes = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)


def select(names: Sequence[str], patterns: Sequence[str], option: str = "layers") -> list[str]:
    """The names that any of the globs matches, in model order. Each glob must match something.

    Raises `NothingToCompress` for a glob that matches nothing, with the nearest names.

    >>> select(["conv1.weight", "fc.weight"], ["conv*"])
    ['conv1.weight']
    """
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            close = ", ".join(nearest(pattern.strip("*"), names)) or ", ".join(names[:3]) or "none: it has no weights"
            raise NothingToCompress(
                f"{option}: {pattern!r} matches none of the model's {len(names)} weights. Nearest names: {close}."
            )
    return [name for name in names if matches(name, patterns)]
