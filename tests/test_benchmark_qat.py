# SPDX-License-Identifier: Apache-2.0
"""Training on grids against rounding: one network in its tiniest form, rows that say what was run, and a table of them."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.quantize import qat


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat, "RESULTS", tmp_path / "qat.jsonl")
    monkeypatch.setattr(qat, "TRAINING", {"lstm": qat.Training(30, 8, 1e-2, 1e-3)})
    qat.dense.cache_clear()
    yield
    qat.dense.cache_clear()


def test_all_start_from_one_network_and_rows_hold_which_images_are_right() -> None:
    settings = [qat.Setting("lstm", "dense"), qat.Setting("lstm", "ptq", 4, 8), qat.Setting("lstm", "qat", 4, 8)]
    rows = [qat.measured(setting) for setting in settings]
    qat.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [qat.of(row) for row in rows] == settings
    assert [row["grids"] for row in rows] == [0, 2, 2]
    for row in rows:
        bits = torch.tensor(list(bytes.fromhex(row["right"])))
        assert sum(int(b).bit_count() for b in bits) == round(row["accuracy"] * row["n"]) and row["n"] == 400
    lines = qat.table().splitlines()
    assert lines[2].startswith("| lstm | 32 / 32 |") and "| lstm | 4 / 8 | " in qat.table()
    assert f"{100 * rows[2]['accuracy']:.2f} %" in qat.table()


def test_batches_hang_on_their_seed_alone() -> None:
    (one, _), (other, _), (third, _) = (next(iter(qat.Batches("lstm", 2, seed))) for seed in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)
