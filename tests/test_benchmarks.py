# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, in their tiniest form and on made-up data, and their statistics are right."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.gradual import data, paired
from benchmarks.gradual.__main__ import main
from benchmarks.gradual.overhead import CASES, overhead
from benchmarks.gradual.packed import packed
from benchmarks.gradual.tables import TABLES


def write_idx(path: Path, values: np.ndarray) -> None:
    """The idx format, as its authors describe it."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(length.to_bytes(4, "big") for length in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), 1))


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the four files of Fashion-MNIST: ten classes, each a bright row of its own."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 480), ("t10k", 80)):
        labels = chance.integers(10, size=count)
        pictures = chance.integers(60, size=(count, 28, 28))
        pictures[np.arange(count), 2 * labels + 4] += 180
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", pictures)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setenv(data.FOLDER, str(tmp_path))
    data.load.cache_clear()
    yield tmp_path
    data.load.cache_clear()


def test_the_data_are_read_as_they_were_written(images: Path) -> None:
    splits = data.load()
    assert [len(split.labels) for split in splits] == [440, 40, 80]
    brightest = torch.cat([split.images for split in splits]).float().mean((1, 3)).argmax(1)
    assert torch.equal(brightest, 2 * torch.cat([split.labels for split in splits]) + 4)


def test_a_file_that_is_cut_short_is_refused(images: Path) -> None:
    path = images / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(SystemExit, match="cut short"):
        data.load()


def test_every_experiment_on_trained_networks_runs_and_is_drawn(images: Path, tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    (docs / "gradual-pruning.md").write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in TABLES))
    tiny = ["--steps", "12", "--seeds", "1", "--workers", "1", "--results", str(results), "--docs", str(docs)]
    for name in ("accuracy", "small", "dip"):
        main([name, *tiny])
        assert (docs / "img" / f"gradual-{name}.svg").stat().st_size > 1000
    rows = json.loads((results / "accuracy.json").read_text())["rows"]
    assert [row["layer_sparsity"] for row in rows] == pytest.approx([0, 0.5, 0.75, 0.875, 0.95], abs=1e-4)
    for row in json.loads((results / "small.json").read_text())["rows"]:
        assert row["wide"]["nonzeros"] <= row["nonzeros"] < 1.25 * row["wide"]["nonzeros"]
    assert [
        line.count("|") for line in (docs / "gradual-pruning.md").read_text().splitlines() if "| 87.5 %" in line
    ] == [8, 8]


def test_overhead_runs() -> None:
    (row,) = overhead(40, list(CASES)[:1])["rows"]
    assert row["with_ms"] > 0 and row["low"] <= row["overhead"] <= row["high"]


def test_a_million_weights_with_nine_tenths_zeros_pack_to_an_eighth() -> None:
    """CONTRIBUTING's promise and the paper's arithmetic: 3.2 bits of values and 0.6 of offsets a weight, and a header."""
    (row,) = packed((0.9,))["rows"]
    assert row["weights"] >= 1e6
    assert row["ratio"] <= 0.122
    assert row["ratio"] == pytest.approx(38.04 * 0.1 / 32, rel=0.02)


def test_a_paired_interval_is_narrower_than_that_of_two_accuracies_and_has_the_difference_inside() -> None:
    chance = np.random.default_rng(1)
    easy = chance.random(8000) < 0.9
    worse = easy & ~(chance.random(8000) < 0.01)
    found = paired.drop([np.packbits(easy).tobytes().hex()], [np.packbits(worse).tobytes().hex()])
    expected = 100 * (easy.mean() - worse.mean())
    assert found["points"] == pytest.approx(expected)
    # The variance of a difference that is 0 or 1, by the textbook; an interval is 2 x 1.96 standard errors wide.
    width = 2 * 1.96 * 100 * np.sqrt(expected / 100 * (1 - expected / 100) / 8000)
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.1)
    assert found["low"] < expected < found["high"]
