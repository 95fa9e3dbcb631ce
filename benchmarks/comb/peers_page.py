# SPDX-License-Identifier: Apache-2.0
"""The tables of the comparison with Torch-Pruning, from its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tests.graph.patterns import MEASURED, PATTERNS

from benchmarks import pages
from benchmarks.comb.pages import table
from benchmarks.results import Row

NETWORKS = [
    "alexnet",
    "vgg",
    "resnet",
    "resnext",
    "densenet",
    "inception",
    "shufflenet_v2",
    "mobilenet_v2",
    "efficientnet",
    "convnext",
    "yolo",
    "unet",
    "vit",
    "deit",
    "swin",
    "segformer",
    "levit",
    "xcit",
    "mlp_mixer",
    "vit_fused_qkv",
    "torch_transformer",
    "lstm_language_model",
    "bert",
    "gpt2",
    "t5",
    "llama",
    "qwen2",
    "whisper",
]
TOOLS = ("torch-pruning", "featherweight")

INTRODUCTION = """
`python -m benchmarks.comb.peers`: half of all channels cut by Torch-Pruning 1.6.1 and by featherweight out of the same
networks, one thread, 90 s each. The judge is one for both: the uncut network in float64, run with what is gone absent from
every sum, mean and norm. *Exact* answers as that does (1e-9); *wrong* runs and does not; *breaks* no longer runs; *stops*
gives up with an error and leaves the network as it was. Torch-Pruning is told the layers that make the outputs and the
numbers of heads; both are tried with heads and with their dimensions cut, and the better result counts. Featherweight's
time includes its own proof of the cut. Networks and patterns are small, with unequal sizes; a pattern that counts as
exact may have groups that were left out, which the parameters left show.
""".strip()


def page(rows: Mapping[str, Row]) -> str:
    def of(tool: str, names: list[str]) -> list[Row]:
        return [rows[key] for name in names if (key := f"{tool} {name}") in rows]

    sets = {
        f"{len(MEASURED)} patterns of comb's first list": [f"pattern/{name}" for name in MEASURED],
        f"{len(PATTERNS) - len(MEASURED)} more patterns": [
            f"pattern/{name}" for name in PATTERNS if name not in MEASURED
        ],
        f"{len(NETWORKS)} networks": [f"network/{name}" for name in NETWORKS],
    }
    verdicts = ("exact", "wrong", "breaks", "hangs", "stops", "nothing")
    head = ["", "tool", *("exact", "**wrong**", "breaks", "hangs", "stops", "nothing cut"), "seconds, median"]
    lines = []
    for title, names in sets.items():
        for tool in TOOLS:
            found = of(tool, names)
            counts = [str(sum(row["verdict"] == verdict for row in found)) for verdict in verdicts]
            times = [row["seconds"] for row in found if "seconds" in row]
            lines.append([title, tool, *counts, f"{np.median(times):.2f}" if times else ""])
    return "\n\n".join(
        [INTRODUCTION, pages.table(head, lines), details(rows, sets[f"{len(NETWORKS)} networks"]), differences(rows)]
    )


def details(rows: Mapping[str, Row], names: list[str]) -> str:
    def cell(tool: str) -> Callable[[str], str]:
        return lambda name: told(rows.get(f"{tool} {name}"))

    columns: dict[str, Callable[[Any], str]] = {"network": lambda name: name.partition("/")[2]}
    columns |= {f"{tool}: result, parameters left, seconds": cell(tool) for tool in TOOLS}
    return table(columns, names)


def told(row: Row | None) -> str:
    if row is None:
        return "not measured"
    if row["verdict"] == "exact":
        return f"exact, {100 * row['left']:.0f} %, {row['seconds']:.1f} s"
    if row["verdict"] == "wrong":
        return f"**wrong** by {row['error']:.0e}" if "error" in row else "**wrong** shape"
    return f"{row['verdict']} ({row['why'].partition(':')[0]})"


def differences(rows: Mapping[str, Row]) -> str:
    """The patterns on which the two do not agree, or both fall short."""
    names = [f"pattern/{name}" for name in PATTERNS]
    short_of = [
        name for name in names if any(rows.get(f"{tool} {name}", {}).get("verdict") != "exact" for tool in TOOLS)
    ]
    columns: dict[str, Callable[[Any], str]] = {"pattern": lambda name: name.partition("/")[2]}
    columns |= {tool: (lambda name, tool=tool: told(rows.get(f"{tool} {name}"))) for tool in TOOLS}
    return f"Patterns that one of the two does not get exact ({len(short_of)} of {len(names)}):\n\n{table(columns, short_of)}"
