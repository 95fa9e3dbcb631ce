# SPDX-License-Identifier: Apache-2.0
"""Every option out of range is refused at once, and the message says what to type instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import featherweight as fw
from featherweight.errors import OptionError

SHARED: list[tuple[dict[str, Any], str]] = [
    ({}, r"sparsity is missing.*sparsity=0.9"),
    ({"sparsity": 1.0}, r"sparsity must be at least 0 and below 1; got 1.0"),
    ({"sparsity": -0.1}, r"got -0.1"),
    ({"sparsity": "0.9"}, r"got '0.9'"),
    ({"sparsity": True}, r"got True"),
    ({"sparsity": float("nan")}, r"got nan"),
    ({"sparsity": {}}, r"empty mapping"),
    ({"sparsity": {"conv*": 2}}, r"sparsity of 'conv\*' must be at least 0 and below 1; got 2"),
    ({"sparsity": 0.9, "pattern": "2:4"}, r"sparsity=0.9 contradicts pattern='2:4', whose sparsity is 0.5. Leave"),
    ({"sparsity": {"a": 0.5, "b": 0.75}, "pattern": "2:4"}, r"sparsity of 'b'=0.75 contradicts"),
    ({"sparsity": 0.9, "pattern": "4:2"}, r"pattern '4:2' is none of"),
    ({"sparsity": 0.9, "pattern": 4}, r"pattern is text"),
    ({"sparsity": 0.9, "importance": "magnitud"}, r"importance 'magnitud' is none of.*Nearest: magnitude"),
    ({"sparsity": 0.9, "ranking": "globl"}, r"ranking 'globl' is none of layer, global. Nearest: global"),
    ({"sparsity": 0.9, "dense": ("last",)}, r"dense 'last' is none of first, depthwise, output"),
    ({"sparsity": 0.9, "dense": "output"}, r"dense is a list of strings.*got 'output'"),
    ({"sparsity": 0.9, "keep": "fc*"}, r"keep is a list of strings, keep=.* say; got 'fc\*'"),
    ({"sparsity": 0.9, "layers": [1]}, r"layers is a list of strings"),
    ({"sparsity": 0.9, "caps": 0.5}, r"caps limit what ranking='global' takes"),
    ({"sparsity": 0.9, "caps": {"a": 1.5}, "ranking": "global"}, r"caps of 'a' must be from 0 to 1.*got 1.5"),
    ({"sparsity": {"a": 0.9}, "ranking": "global"}, r"one target for all layers together"),
    ({"sparsity": 0.9, "feeds": {"a": "b"}}, r"feeds is for pattern='neuron'; the pattern is 'weight'"),
    ({"sparsity": 0.9, "feeds": ["a"], "pattern": "neuron"}, r"feeds maps a layer to the one that reads it"),
    ({"sparsity": 0.9, "seed": 1.5}, r"seed must be a whole number from 0 on; got 1.5"),
]
GRADUAL: list[tuple[dict[str, Any], str]] = [
    ({"begin": 10, "end": 9}, r"end=9 is before begin=10"),
    ({"begin": -1}, r"begin must be a whole number from 0 on; got -1"),
    ({"every": 0}, r"every must be a whole number from 1 on; got 0"),
    ({"end": 10.0}, r"end must be a whole number"),
    ({"schedule": "qubic"}, r"schedule 'qubic' is none of cubic, linear, constant, one_shot. Nearest: cubic"),
    ({"initial": 1.0}, r"initial must be at least 0 and below 1, or None; got 1.0"),
    ({"initial": 0.95}, r"initial=0.95 is more than the target 0.9"),
]


@pytest.mark.parametrize("method", [fw.GradualPruning, fw.Prune])
@pytest.mark.parametrize(("options", "message"), SHARED)
def test_shared_options(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as refusal:
        method(**options)
    assert str(refusal.value).startswith((f"{method.__name__}: ", "pattern "))


@pytest.mark.parametrize(("options", "message"), GRADUAL)
def test_options_of_the_schedule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^GradualPruning: .*{message}"):
        fw.GradualPruning(0.9, **options)


def test_options_of_pruning_at_once() -> None:
    with pytest.raises(OptionError, match=r"of 'remainig' is none of all, remaining. Nearest: remaining"):
        fw.Prune(0.5, of="remainig")
    with pytest.raises(OptionError, match=r"pattern='2:4' fixes the sparsity"):
        fw.Prune(pattern="2:4", of="remaining")


def test_options_are_facts_that_recipes_can_fill_in() -> None:
    """Lists as TOML gives them become tuples, and N:M needs no sparsity; a matching one is no contradiction."""
    options = fw.GradualPruning(0.5, keep=["a"], dense=[], layers=["*"])
    assert (options.keep, options.dense) == (("a",), ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.sparsity = 0.1  # type: ignore[misc]
    assert fw.GradualPruning(pattern="1:3").sparsity is None
    assert fw.GradualPruning(2 / 3, pattern="1:3") == fw.GradualPruning(sparsity=2 / 3, pattern="1:3")
    assert fw.GradualPruning(0.5, begin=7, schedule="one_shot").end == 7
