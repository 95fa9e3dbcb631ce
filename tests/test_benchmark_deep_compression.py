# SPDX-License-Identifier: Apache-2.0
"""The benchmark of pruning, clustering and coding runs in its tiniest form, on made-up digits, and its page is written."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.deep_compression import compressing, data, settings, tables, training
from benchmarks.deep_compression.__main__ import main
from benchmarks.deep_compression.networks import NETWORKS
from benchmarks.deep_compression.sizes import nncodec

TINY = dataclasses.replace(settings.SETTINGS[1], prune_steps=20, tune_steps=4)


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten classes, each a bright row of its own; everything that is kept goes to a folder of this test."""
    torch.manual_seed(0)

    def split(count: int) -> data.Split:
        labels = torch.randint(10, (count,))
        images = torch.rand(count, 1, 28, 28) / 3
        images[torch.arange(count), 0, 2 * labels + 4] += 0.6
        return data.Split(images, labels)

    made = data.Data(split(400), split(80), split(80))
    monkeypatch.setattr(data, "load", lambda split: made)
    monkeypatch.setattr(data, "Batches", Unmoved)
    monkeypatch.setenv("FEATHERWEIGHT_BENCHMARKS", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "STEPS", dict.fromkeys(NETWORKS, 30))
    monkeypatch.setattr("benchmarks.deep_compression.__main__.SETTINGS", (TINY,))
    return tmp_path


class Unmoved(data.Batches):
    def __iter__(self):
        for chosen in torch.randperm(len(self.split.labels)).split(self.size):
            yield self.split.images[chosen], self.split.labels[chosen]


def test_a_run_leaves_a_line_and_the_page_its_tables(digits: Path) -> None:
    results, page = digits / "results", digits / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in tables.TABLES))
    main(["train", "--networks", TINY.network, "--seeds", "1"])
    for _ in range(2):  # the second finds it done
        main(["compress", "--networks", TINY.network, "--seeds", "1", "--results", str(results)])
    [row] = [json.loads(line) for line in (results / "runs.jsonl").read_text().splitlines()]
    assert row["sizes"]["dense"] == 1_066_440 and row["sizes"]["dense"] / row["sizes"]["file"] > 30
    assert row["zeros"] >= row["pruned_zeros"] > 0.88
    right = np.unpackbits(np.frombuffer(bytes.fromhex(row["test"]["right"]), np.uint8))
    assert right.mean() == pytest.approx(row["test"]["compressed"])
    main(["tables", "--results", str(results), "--page", str(page)])
    text = page.read_text()
    assert "LeNet-300-100 | 90 % pruned" in text and f"{row['sizes']['gzip']:,}" in text


def test_the_networks_are_those_of_the_papers() -> None:
    counts = {name: sum(p.numel() for p in make().parameters()) for name, make in NETWORKS.items()}
    assert counts == {"lenet_300_100": 266_610, "lenet_5": 431_080}


def test_the_other_coder_is_judged_by_what_it_gives_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that rounds: of the streams that are good enough the smallest counts."""
    stand_in = tmp_path / "nncodec"
    stand_in.mkdir()
    (stand_in / "__init__.py").touch()
    (stand_in / "nn.py").write_text(
        "import numpy as np, pickle\n"
        "def encode(tensors, options):\n"
        "    step = 2.0 ** (options['qp'] / 4)\n"
        "    rounded = {name: np.round(value / step) * step for name, value in tensors.items()}\n"
        "    return pickle.dumps(rounded) + bytes(-10 * options['qp'])\n"
        "def decode(coded):\n"
        "    return pickle.loads(bytes(coded))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model = torch.nn.Linear(4, 4)
    found = nncodec(
        Path(sys.executable), model, lambda back: -float((back["weight"] - model.weight.detach()).abs().max()), -0.05
    )
    assert len({one["bytes"] for one in found["tried"]}) == len(found["tried"])
    good = [one["bytes"] for one in found["tried"] if one["metric"] >= -0.05]
    assert found["bytes"] == min(good) > min(one["bytes"] for one in found["tried"])


def test_pruned_networks_are_shared_by_settings(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = training.task_of(training.dense(TINY.network, 0, 1), 1)
    first = compressing.pruned(TINY, 0, 1, task)
    monkeypatch.setattr("featherweight.Train", None)  # nothing is trained again
    again = compressing.pruned(dataclasses.replace(TINY, clusters=8), 0, 1, task)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
