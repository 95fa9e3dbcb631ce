# SPDX-License-Identifier: Apache-2.0
"""Solvers on layers and peers on weights, as benchmarks: rows that are not measured twice, ratios, and a search by halving."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.deep_compression import sizes
from benchmarks.reconstruct import solvers, tables
from benchmarks.reconstruct.layers import synthetic_layer
from benchmarks.results import read
from torch import nn


def test_a_run_goes_on_where_it_was_and_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "_layers", lambda _: iter([synthetic_layer(4, 8)]))
    command = ["solvers", "pruning", "--solvers", "magnitude", "exact_obs", "--results", str(tmp_path), "--cases"]
    for cases in (["weight 50%"], ["weight 50%", "2:4"]):
        monkeypatch.setattr(sys, "argv", [*command, *cases])
        solvers.main()
    rows = read(tmp_path / "pruning.jsonl")
    assert [(row["case"], row["solver"]) for row in rows] == [
        (case, solver) for case in ("weight 50%", "2:4") for solver in ("magnitude", "exact_obs")
    ]


def row(layer: str, solver: str, error: float, held_out: float, seconds: float) -> dict[str, object]:
    return {"layer": layer, "case": "2:4", "solver": solver, "error": error, "held_out": held_out, "seconds": seconds}


def test_ratios_are_geometric_means_over_layers_where_both_lose_something() -> None:
    found = [
        *(row("a", "base", 0.4, 0.5, 3.0), row("a", "best", 0.1, 0.25, 1.0)),
        *(row("b", "base", 0.1, 0.2, 1.0), row("b", "best", 0.1, 0.1, 2.0)),
        *(row("nothing lost", "base", 1e-15, 1e-15, 9.0), row("nothing lost", "best", 1e-17, 1e-17, 9.0)),
        *(row("one loses nothing", "base", 0.1, 0.1, 9.0), row("one loses nothing", "best", 1e-17, 0.1, 9.0)),
        row("not by both", "best", 0.9, 0.9, 9.0),
    ]
    assert solvers.ratios(found, "base", "best", ["2:4"]) == pytest.approx((0.5, 0.5, 0.75))
    assert tables.ratio(found, "base", "best", "2:4") == "0.500 (0.75)"
    assert all(math.isnan(one) for one in solvers.ratios(found, "base", "best", ["3 bit"]))
    assert tables.ratio(found, "base", "best", "3 bit") == ""


def test_tables_say_how_ours_compares_and_layers_in_blocks_are_held_against_sparsegpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compressed(case: str, method: str, output: float, *errors: float) -> dict[str, object]:
        found = {"subject": "net", "case": case, "method": method, "metric": 0.5, "output_error": output}
        found |= {"layer_errors": dict(zip(("wide", "narrow"), errors, strict=True))}
        found |= {"layer_shapes": {"wide": [8, 9000], "narrow": [8, 90]}}
        return found | {"layer_solvers": {"wide": "any, 5 blocks", "narrow": "any"}}

    dense = {"subject": "net", "case": "dense", "method": "dense", "metric": 0.6, "name": "accuracy", "n": 10}
    some = [compressed("80%", "SparseGPT", 0.9, 0.4, 0.4), compressed("80%", "magnitude", 1.0, 0.8, 0.2)]
    rest = [compressed("80%", "ExactOBS", 0.4, 0.3, 0.3), compressed("80%", "ours", 0.1, 0.1, 0.4)]
    bits = [compressed("2 bit", "OBQ", 0.1, 0.3, 0.3), compressed("2 bit", "ours", 0.4, 0.1, 0.4)]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    path = tmp_path / "metric.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [dense, *some]))
    assert not tables.output().startswith("Ours over")
    path.write_text("".join(json.dumps(one) + "\n" for one in [dense, *some, *rest, *bits]))
    assert "in 2 settings of 1 networks: 1.00 in the geometric mean, lower in 1." in tables.output()
    *_, only = tables.wide().splitlines()
    assert only == "| net | 80% | wide 8x9000 | 0.4 | 2.000 | 0.750 | 0.250 |  |"


@pytest.mark.parametrize("bearable", [-44, -31, -10, None])
def test_halving_finds_what_trying_all_finds(bearable: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coder whose values say how coarse they are, and whose bytes are fewer the coarser."""
    calls: list[int] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder, qps = Path(command[3]), [int(text) for text in command[4:]]
        calls.extend(qps)
        for qp in qps:
            np.savez(folder / f"{qp}.npz", weight=np.float32(qp))
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps({str(qp): 1000 - qp for qp in qps}))

    monkeypatch.setattr(sizes.subprocess, "run", run)

    def judge(tensors: dict[str, torch.Tensor]) -> float:
        return 1.0 if bearable is not None and float(tensors["weight"]) <= bearable else 0.0

    found = {}
    for halving in (False, True):
        calls.clear()
        found[halving] = sizes.nncodec(Path("python"), nn.Linear(2, 2), judge, 1.0, halving)["bytes"]
        assert len(calls) <= (4 if halving else len(sizes.QPS))
    coarsest = max((qp for qp in sizes.QPS if bearable is not None and qp <= bearable), default=None)
    assert found[True] == found[False] == (None if coarsest is None else 1000 - coarsest)
