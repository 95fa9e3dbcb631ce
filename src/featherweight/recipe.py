# SPDX-License-Identifier: Apache-2.0
"""Recipes: an ordered list of methods, in Python or as flat TOML, by the same names.

    [[stages]]
    method = "train"
    steps = 2500
    hooks = [{ method = "gradual_pruning", sparsity = 0.9, end = 2000 }]

A method's name is its class's in snake case, its keys are the class's fields: nothing is written down twice. What is
made of parts (hooks, losses to distill by) takes them as a list of such tables, or by name:

    distill = { kl = { temperature = 4.0 }, cwd = {} }

Third parties add methods by an entry point of the group `featherweight.methods` that names their class, and losses by
one of the group `featherweight.losses`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherweightError, RecipeError, nearest

__all__ = ["Recipe", "load_recipe", "method_names", "methods", "to_dict", "to_toml"]

_BUILT_IN = {
    "apply": "featherweight.run:Apply",
    "cluster": "featherweight.quantize:Cluster",
    "drop_blocks": "featherweight.prune.channels:DropBlocks",
    "factorize": "featherweight.factorize:Factorize",
    "gradual_channel_pruning": "featherweight.prune.channels:GradualChannelPruning",
    "gradual_pruning": "featherweight.prune:GradualPruning",
    "iterative": "featherweight.budget:Iterative",
    "mixed_quantize": "featherweight.quantize:MixedQuantize",
    "prune": "featherweight.prune:Prune",
    "prune_channels": "featherweight.prune.channels:PruneChannels",
    "qat": "featherweight.quantize:QAT",
    "quantize": "featherweight.quantize:Quantize",
    "reconstruct": "featherweight.reconstruct:Reconstruct",
    "train": "featherweight.train:Train",
    "tune_centroids": "featherweight.quantize:TuneCentroids",
}
_LOSSES = {
    "attention": "featherweight.distill:Attention",
    "cirkd": "featherweight.distill:CIRKD",
    "cwd": "featherweight.distill:CWD",
    "distill": "featherweight.distill:Distill",
    "features": "featherweight.distill:Features",
    "kl": "featherweight.distill:KL",
}
# Options whose items are methods, hooks or losses themselves, and which of these.
_NESTED = {"hooks": "methods", "step": "methods", "distill": "losses", "losses": "losses"}


def method_names() -> dict[str, str]:
    """All methods and hooks that are installed: name -> `module:Class`.

    >>> method_names()["train"]
    'featherweight.train:Train'
    """
    return _names("methods")


def _names(kind: str) -> dict[str, str]:
    found = dict(_BUILT_IN if kind == "methods" else _LOSSES)
    for point in importlib.metadata.entry_points(group=f"featherweight.{kind}"):
        found.setdefault(_snake(point.value.rpartition(":")[2]), point.value)
    return dict(sorted(found.items()))


def methods() -> dict[str, type]:
    """All methods and hooks that are installed, as classes.

    Raises `RecipeError` for an entry point whose class cannot be imported or is not a dataclass.
    """
    return {name: _class(name, value) for name, value in method_names().items()}


def _class(name: str, value: str) -> type:
    module, _, leaf = value.partition(":")
    try:
        found = getattr(importlib.import_module(module), leaf)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"method {name!r} names {value}, which cannot be imported: {error}.") from error
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise RecipeError(f"method {name!r} names {value}, which is not a dataclass.")
    return found


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe file says: the methods in order, and the seed."""

    stages: tuple[Any, ...]
    seed: int = 0


def load_recipe(path: str | Path) -> Recipe:
    """Reads a TOML recipe: `seed`, and tables `[[stages]]` with `method` and that method's options.

    Raises `RecipeError` that names file, line, the wrong key or value and the nearest right one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "recipe.toml"
    ...     _ = path.write_text('[[stages]]\\nmethod = "train"\\nsteps = 10\\n')
    ...     load_recipe(path).stages[0].steps
    10
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path} could not be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}.") from error
    reader = _Reader(path, text)
    reader.known(data, ("seed", "stages"), "a recipe", 0)
    stages, seed = data.get("stages"), data.get("seed", 0)
    if not isinstance(stages, list) or not stages:
        raise RecipeError(f"{path}: a recipe needs at least one table [[stages]] with a key method.")
    if type(seed) is not int:
        raise RecipeError(f"{path}, line {reader.line(0, 'seed')}: seed must be a whole number; got {seed!r}.")
    return Recipe(tuple(reader.build(stage, i + 1) for i, stage in enumerate(stages)), seed)


class _Reader:
    """One recipe's text, so that an error can name the line; TOML readers keep none."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines = path, text.splitlines()

    def line(self, stage: int, key: str) -> int:
        """The line in which `key` stands within the stage (from 1; 0 is the head of the file)."""
        current = first = 0
        for number, line in enumerate(self.lines, start=1):
            if re.match(r"\s*\[\[\s*stages\s*\]\]", line):
                current += 1
                first = number if current == stage else first
            if current == stage and re.search(rf"(?<![\w-])[\"']?{re.escape(key)}[\"']?\s*=", line.partition("#")[0]):
                return number
        return first

    def known(self, table: Mapping[str, Any], keys: Sequence[str], whose: str, stage: int) -> None:
        for key in table:
            if key not in keys:
                close = nearest(key, keys, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(keys)}."
                raise RecipeError(f"{self.path}, line {self.line(stage, key)}: {whose} has no key {key!r}; {hint}")

    def build(self, table: Any, stage: int, of: str = "methods") -> Any:
        if not isinstance(table, dict) or not isinstance(table.get("method"), str):
            line = self.line(stage, "method")
            raise RecipeError(
                f"{self.path}, line {line}: each stage, hook and loss is a table with a key method; got {table!r}."
            )
        name, names = table["method"], _names(of)
        if name not in names:
            hint = ", ".join(nearest(name, names)) or ", ".join(names)
            what, key = ("method", "method") if of == "methods" else ("loss to distill by", "distill")
            raise RecipeError(f"{self.path}, line {self.line(stage, key)}: no {what} {name!r}. Nearest: {hint}.")
        kind = _class(name, names[name])
        fields = [field.name for field in dataclasses.fields(kind) if field.init]
        self.known({k: v for k, v in table.items() if k != "method"}, fields, f"method {name!r}", stage)
        options = {key: self._value(key, value, stage) for key, value in table.items() if key != "method"}
        try:
            return kind(**options)
        except (FeatherweightError, TypeError) as error:
            wrong = next((key for key in options if re.search(rf"\b{key}\b", str(error))), "method")
            raise RecipeError(f"{self.path}, line {self.line(stage, wrong)}: {error}") from error

    def _value(self, key: str, value: Any, stage: int) -> Any:
        of = _NESTED.get(key)
        if of is not None and isinstance(value, list):
            return tuple(self.build(item, stage, of) for item in value)
        if of is not None and isinstance(value, dict):
            if isinstance(value.get("method"), str):
                return self.build(value, stage, of)
            return tuple(self.build(item, stage, of) for item in self._by_name(key, value, stage))
        return tuple(value) if isinstance(value, list) else value

    def _by_name(self, key: str, table: dict[str, Any], stage: int) -> list[dict[str, Any]]:
        """The tables of `{ kl = { temperature = 4.0 }, cwd = {} }` as a list of them would have them."""
        for name, options in table.items():
            if not isinstance(options, dict):
                raise RecipeError(
                    f"{self.path}, line {self.line(stage, name)}: {key} maps names to tables of options, "
                    f"{{ {name} = {{}} }} say; got {name} = {options!r}."
                )
        return [{"method": name, **options} for name, options in table.items()]


def to_dict(method: Any) -> dict[str, Any]:
    """A method with the options that differ from their defaults, as JSON has them; a function is named, not stored.

    >>> from featherweight.train import Train
    >>> to_dict(Train(steps=10, lr=0.1))
    {'method': 'train', 'steps': 10, 'lr': 0.1}
    """
    if not dataclasses.is_dataclass(method) or isinstance(method, type):
        return {"method": getattr(method, "__qualname__", type(method).__qualname__)}
    entry: dict[str, Any] = {"method": _snake(type(method).__name__)}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.init and value != field.default:
            entry[field.name] = _plain(value)
    return entry


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    return f"<{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}>"


def to_toml(stages: Sequence[Any], seed: int = 0) -> str:
    """The recipe as TOML. What is a function in Python stands as its name in angle brackets, for you to put back.

    >>> from featherweight.train import Train
    >>> print(to_toml([Train(steps=10)], seed=3), end="")
    seed = 3
    <BLANKLINE>
    [[stages]]
    method = "train"
    steps = 10
    """
    parts = [f"seed = {seed}\n"]
    for stage in stages:
        lines = [f"{key} = {_toml(value)}\n" for key, value in to_dict(stage).items() if value is not None]
        parts.append("[[stages]]\n" + "".join(lines))
    return "\n".join(parts)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        items = ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items() if item is not None)
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    # JSON's numbers, booleans and strings are TOML's, but for floats that are not finite.
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
