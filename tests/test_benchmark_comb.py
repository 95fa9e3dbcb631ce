# SPDX-License-Identifier: Apache-2.0
"""What pruning of channels is measured on: splits that do not leak, metrics, networks, runs that resume; nothing is fetched."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.comb import data as comb
from benchmarks.comb import pages, results, runs, tasks
from benchmarks.comb.networks import NETWORKS
from benchmarks.reconstruct import data
from safetensors.torch import save_file
from sklearn.metrics import jaccard_score
from torch import Tensor


@pytest.fixture
def land(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> comb.LandCover:
    """A planet of 8 x 12 tiles (not a whole number of blocks) on which every pixel has one of the 17 classes by chance."""
    chance = torch.Generator().manual_seed(0)
    shape = (8 * comb.TILE + 12, 12 * comb.TILE)
    labels = torch.randint(17, shape, generator=chance, dtype=torch.uint8)
    labels[: comb.TILE, : comb.TILE] = 0  # a tile of nothing but ocean
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    blocks = rows // (3 * comb.TILE) * 4 + columns // (3 * comb.TILE)
    picture = torch.stack([blocks, rows % 256, columns % 256]).byte()
    save_file({"picture": picture, "labels": labels}, tmp_path / "land-cover-1.safetensors")
    monkeypatch.setenv(data.FOLDER, str(tmp_path))
    comb.land_cover.cache_clear()
    yield comb.land_cover(7)
    comb.land_cover.cache_clear()


def colours(x: Tensor, channel: int) -> Tensor:
    return (x[:, channel] * 60 + 75).round().long()


def test_no_block_of_the_planet_is_in_two_splits_and_moved_tiles_stay_in_theirs(land: comb.LandCover) -> None:
    seen = [set(split.blocks.tolist()) for split in (land.train, land.validation, land.test)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 12
    for split, blocks in zip((land.train, land.validation, land.test), seen, strict=True):
        x, _ = split.cut(split.corners)
        assert set(colours(x, 0).flatten().tolist()) == blocks
    moved = torch.cat([land.train.batch(16, step)[0] for step in range(12)])
    assert set(colours(moved, 0).flatten().tolist()) <= seen[0]
    corners = set(zip(colours(moved, 1)[:, 0, 0].tolist(), colours(moved, 2)[:, 0, 0].tolist(), strict=True))
    assert len(corners) > 100


def test_a_batch_hangs_on_its_step_and_seed_and_labels_are_mirrored_with_their_picture(land: comb.LandCover) -> None:
    (x, y), (again, _), (other, _) = land.train.batch(8, 3), land.train.batch(8, 3), land.train.batch(8, 3, seed=1)
    assert torch.equal(x, again) and not torch.equal(x, other)
    # What stands at each pixel of the planet says which label belongs there.
    columns = colours(x, 2)[:, 0]
    mirrored = (columns[:, 1] - columns[:, 0]) % 256 == 255
    assert 0 < mirrored.sum() < 8
    for i in range(8):
        picture, labels = (x[i].flip(-1), y[i].flip(-1)) if mirrored[i] else (x[i], y[i])
        matches = [
            corner
            for corner in _corners(
                land.train, int(colours(picture[None], 1)[0, 0, 0]), int(colours(picture[None], 2)[0, 0, 0])
            )
            if torch.equal(land.train.cut(torch.tensor([corner]))[0][0], picture)
        ]
        assert any(torch.equal(land.train.cut(torch.tensor([corner]))[1][0], labels) for corner in matches)


def _corners(split: comb.Tiles, row: int, column: int) -> list[tuple[int, int]]:
    height, width = (length - comb.TILE + 1 for length in split.labels.shape)
    return [(i, j) for i in range(row, height, 256) for j in range(column, width, 256)]


def test_the_ocean_is_left_out_and_five_classes_are_the_seven_with_three_in_one(land: comb.LandCover) -> None:
    corners = torch.cat([split.corners for split in (land.train, land.validation, land.test)])
    assert len(corners) == 8 * 12 - 1 and [0, 0] not in corners.tolist()
    five = comb.land_cover(5)
    assert torch.equal(five.test.corners, land.test.corners)
    seven, fewer = land.test.labels.long(), five.test.labels.long()
    merged = {(a, b) for a, b in torch.stack([seven, fewer], -1).flatten(0, 1).unique(dim=0).tolist()}
    names = {(comb.SEVEN[a], comb.FIVE[b]) for a, b in merged if a != comb.IGNORED}
    assert {a for a, b in names if b == "open vegetation"} == {"shrub and savanna", "grass", "crops"}
    assert {a == b for a, b in names if b != "open vegetation"} == {True}


def test_rare_classes_weigh_more_and_the_mean_weight_of_a_pixel_is_one(land: comb.LandCover) -> None:
    weights = land.train.weights(7)
    _, y = land.train.cut(land.train.corners)
    assert float(weights[y[y != comb.IGNORED]].mean()) == pytest.approx(1, abs=1e-4)
    share = np.bincount(y[y != comb.IGNORED], minlength=7)
    assert (weights.numpy() * np.sqrt(share)).std() < 1e-3 * (weights.numpy() * np.sqrt(share)).mean()


def test_the_mean_iou_is_that_of_another_library(land: comb.LandCover) -> None:
    task = tasks._land("land 7", land)
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 7, 1)
    rows = task.rows(model, "test")
    assert rows.shape == (len(land.test.blocks.unique()), 3, 7)
    x, y = land.test.cut(land.test.corners)
    judged = y != comb.IGNORED
    found = model(x).argmax(1)
    expected = jaccard_score(y[judged], found[judged], average=None, labels=range(7))
    assert tasks.ious(rows) == pytest.approx(expected)
    assert task.summary(rows) == pytest.approx(expected.mean())


def test_a_paired_interval_covers_the_difference_and_equal_networks_differ_by_nothing(land: comb.LandCover) -> None:
    task = tasks._land("land 7", land)
    rows = task.rows(torch.nn.Conv2d(3, 7, 1), "train")
    assert tasks.paired(task, rows, rows) == {"change": 0, "low": 0, "high": 0, "n": len(rows)}
    better = rows.copy()
    better[:, 0] += (rows[:, 2] - rows[:, 0]) // 2  # half of what was missed is found
    better[:, 1] = np.maximum(better[:, 1], better[:, 0])
    change = tasks.paired(task, rows, better)
    assert change["low"] <= change["change"] == pytest.approx(100 * (task.summary(better) - task.summary(rows)))
    assert 0 < change["low"] < change["change"] < change["high"]


@pytest.mark.parametrize("rows", [np.arange(11) % 3 == 0, np.arange(24).reshape(4, 3, 2)])
def test_rows_come_back_from_json_as_they_were(rows: np.ndarray) -> None:
    found = tasks.unpacked(json.loads(json.dumps(tasks.packed(rows))), len(rows))
    assert found.dtype == rows.dtype and (found == rows).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_answers_in_the_shape_of_its_labels_and_all_of_it_learns(name: str) -> None:
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.build()
    fashion = network.task == "fashion"
    x = torch.randn(2, 1, 28, 28) if fashion else torch.randn(2, 3, 96, 96)
    scores = model(x)
    assert scores.shape == ((2, 10) if fashion else (2, int(network.task.split()[1]), 96, 96))
    scores.square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_what_was_run_is_not_run_again_and_two_experiments_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[runs.Setting] = []

    def measured(setting: runs.Setting) -> results.Row:
        asked.append(setting)
        return {**vars(setting), "test": setting.keep}

    monkeypatch.setattr(runs, "measured", measured)
    half, third = runs.Setting("unet", 0.5), runs.Setting("unet", 0.33)
    runs.run([half], tmp_path)
    rows = runs.run([third, half], tmp_path)
    assert asked == [half, third] and [row["test"] for row in rows] == [0.33, 0.5]
    assert len({half.name, third.name, runs.Setting("unet", 0.5, seed=1).name}) == 3


def test_a_tables_columns_say_what_they_show_of_a_row() -> None:
    assert pages.table({"a": str, "twice": lambda row: str(2 * row)}, [1]).splitlines()[::2] == [
        "| a | twice |",
        "| 1 | 2 |",
    ]
