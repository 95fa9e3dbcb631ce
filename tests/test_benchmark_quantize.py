# SPDX-License-Identifier: Apache-2.0
"""Networks in fewer bits: a made-up network through both experiments, and the tables of their rows. Nothing is fetched."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from benchmarks.quantize import networks, tables
from benchmarks.reconstruct.subjects import Subject
from torch import nn

from featherweight.errors import ArtefactError


def made_up() -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()
    images = torch.randn(48, 1, 8, 8)
    right = model(images).argmax(1)

    def per_sample(network):
        with torch.no_grad():
            return (network(images).argmax(1) == right).double().numpy()

    calibration = list(torch.randn(6, 16, 1, 8, 8))
    return Subject("made up", model, calibration, (images[:1],), "accuracy", len(images), per_sample)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(networks, "SUBJECTS", {"made up": made_up})
    return argparse.Namespace(subjects=["made up"], threads=1, runs=50, results=tmp_path)


def test_weights_lose_more_and_take_less_room_at_fewer_bits(options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "BITS", (8, 2))
    monkeypatch.setattr(tables, "BITS", (8, 2))
    rows = list(networks.weights(options, {("made up", "GPTQ", 2)}))
    assert [(row["way"], row["bits"]) for row in rows] == [("nearest", 8), ("nearest", 2), ("GPTQ", 8)]
    assert rows[0]["dense"] == 1.0 and rows[0]["quantized"] >= rows[1]["quantized"]
    assert rows[1]["file_bytes"] < rows[0]["file_bytes"] < rows[0]["dense_bytes"] == 4 * (72 + 8 + 8 * 36 * 3 + 3)
    (options.results / "weights.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head, _, first, second = tables.weights(options.results).splitlines()
    assert head.endswith("| rounding | 8 bits | 2 bits |") and second.endswith(" | – |")
    assert f"{(rows[0]['quantized'] - 1) * 100:+.2f}" in first and f"{rows[0]['file_bytes'] / 1000:,.0f} kB" in first


def test_the_exported_files_are_judged_on_the_same_samples_and_timed(options) -> None:
    rows = list(networks.integers(options, {("made up", "dynamic", 8)}))
    assert [row["way"] for row in rows] == ["static"] and "integers" in rows[0]
    for file in rows[0]["runtimes"].values():
        assert file["n"] == 48 and file["dense"] == 1.0 and file["quantized"] > 0.8
        assert file["float32_ms"] > 0 and file["integers_ms"] > 0
    (options.results / "integers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(tables.integers(options.results).splitlines()) == len(tables.latency(options.results).splitlines()) == 3


def test_a_runtime_that_refuses_a_file_is_told_of_in_the_row(options, monkeypatch: pytest.MonkeyPatch) -> None:
    real = networks.session

    def refusing(path, runtime, **more):
        if runtime == "openvino":
            raise ArtefactError(f"{path}: OpenVINO refuses it: expects Constant for port 4")
        return real(path, runtime, **more)

    monkeypatch.setattr(networks, "session", refusing)
    rows = list(networks.integers(options, {("made up", "dynamic", 8)}))
    assert list(rows[0]["runtimes"]["openvino"]) == ["error"]
    assert "expects Constant for port 4" in rows[0]["runtimes"]["openvino"]["error"]
    assert rows[0]["runtimes"]["onnxruntime"]["n"] == 48
    (options.results / "integers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tables.latency(options.results).endswith("| – | – |")


@pytest.mark.parametrize(
    ("higher", "dense", "low", "high", "worse"),
    [(True, 0.9, -0.004, 0.0, False), (True, 0.9, -0.006, 0.1, True), (False, 70.0, 0.0, 0.3, False), (False, 70.0, 0.0, 0.4, True)],
)  # fmt: skip
def test_worse_is_half_a_point_at_the_intervals_end(higher, dense, low, high, worse) -> None:
    assert tables.worse({"higher_is_better": higher, "dense": dense, "low": low, "high": high}) is worse
