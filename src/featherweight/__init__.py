# SPDX-License-Identifier: Apache-2.0
"""featherweight makes PyTorch models smaller and faster, and proves it.

Names load on first use, so that `import featherweight` costs next to nothing beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherweight import engine
    from featherweight.artefact import load, save
    from featherweight.budget import Iterative, Until
    from featherweight.deploy import export_onnx
    from featherweight.distill import CIRKD, CWD, KL, Attention, Distill, Features
    from featherweight.edits import Cut, Verified, apply, cut, cut_exported, saturation, verify
    from featherweight.factorize import Factorize
    from featherweight.graph import Coupling, Group, Trace, trace
    from featherweight.measure import Scorecard, count
    from featherweight.plan import Attribute, Factor, FakeQuant, Fold, Plan, Slice, Swap, Tie
    from featherweight.prune import GradualPruning, Prune
    from featherweight.prune.channels import DropBlocks, GradualChannelPruning, PruneChannels
    from featherweight.quantize import (
        QAT,
        Cluster,
        MixedQuantize,
        Quantize,
        Sensitivity,
        TuneCentroids,
        mixed_bits,
        sensitivity,
    )
    from featherweight.recipe import Recipe, load_recipe
    from featherweight.reconstruct import Reconstruct
    from featherweight.run import Apply, Result, compress
    from featherweight.task import Stage, Task
    from featherweight.train import Train

__version__ = "0.1.0"

__all__ = [
    "CIRKD",
    "CWD",
    "KL",
    "QAT",
    "Apply",
    "Attention",
    "Attribute",
    "Cluster",
    "Coupling",
    "Cut",
    "Distill",
    "DropBlocks",
    "Factor",
    "Factorize",
    "FakeQuant",
    "Features",
    "Fold",
    "GradualChannelPruning",
    "GradualPruning",
    "Group",
    "Iterative",
    "MixedQuantize",
    "Plan",
    "Prune",
    "PruneChannels",
    "Quantize",
    "Recipe",
    "Reconstruct",
    "Result",
    "Scorecard",
    "Sensitivity",
    "Slice",
    "Stage",
    "Swap",
    "Task",
    "Tie",
    "Trace",
    "Train",
    "TuneCentroids",
    "Until",
    "Verified",
    "apply",
    "compress",
    "count",
    "cut",
    "cut_exported",
    "engine",
    "export_onnx",
    "load",
    "load_recipe",
    "mixed_bits",
    "saturation",
    "save",
    "sensitivity",
    "trace",
    "verify",
]

_HOMES = {
    "artefact": ("load", "save"),
    "budget": ("Iterative", "Until"),
    "run": ("Apply", "Result", "compress"),
    "deploy": ("export_onnx",),
    "distill": ("CIRKD", "CWD", "KL", "Attention", "Distill", "Features"),
    "edits": ("Cut", "Verified", "apply", "cut", "cut_exported", "saturation", "verify"),
    "factorize": ("Factorize",),
    "graph": ("Coupling", "Group", "Trace", "trace"),
    "measure": ("Scorecard", "count"),
    "plan": ("Attribute", "Factor", "FakeQuant", "Fold", "Plan", "Slice", "Swap", "Tie"),
    "prune": ("GradualPruning", "Prune"),
    "prune.channels": ("DropBlocks", "GradualChannelPruning", "PruneChannels"),
    "quantize": (
        "QAT",
        "Cluster",
        "MixedQuantize",
        "Quantize",
        "Sensitivity",
        "TuneCentroids",
        "mixed_bits",
        "sensitivity",
    ),
    "recipe": ("Recipe", "load_recipe"),
    "reconstruct": ("Reconstruct",),
    "task": ("Stage", "Task"),
    "train": ("Train",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "engine":  # a room that is used by its own name: fw.engine.load
        return importlib.import_module("featherweight.engine")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'featherweight' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"featherweight.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
