# SPDX-License-Identifier: Apache-2.0
"""Oracle: sentences written by hand for cards made by hand; what a reader may be told is part of the contract."""

import dataclasses
import json

import pytest

from featherweight.measure import Comparison, Latency, Scorecard, gains

DENSE = Scorecard(
    parameters=1_000_000, nonzeros=1_000_000, macs=4_600_000, bops=32 * 4_600_000, dense_bytes=4_000_000,
    packed_bytes=4_001_000, gzip_bytes=3_700_000, peak_memory_bytes=5_000_000, metric=0.98123, metric_name="accuracy",
    samples=10_000,
)  # fmt: skip
PRUNED = dataclasses.replace(
    DENSE, nonzeros=100_000, bops=DENSE.bops // 10, packed_bytes=482_000, gzip_bytes=700_000, metric=0.9799
)
SLICED = dataclasses.replace(
    DENSE, parameters=500_000, nonzeros=500_000, macs=2_000_000, bops=64_000_000, dense_bytes=2_000_000,
    packed_bytes=2_000_500, peak_memory_bytes=2_500_000,
)  # fmt: skip
SAME = Comparison(1.01, 0.98, 1.03, None, "no faster: 1.01x, within noise (95 % interval 0.98 to 1.03)")
FASTER = Comparison(1.84, 1.79, 1.9, True, "1.84x faster (95 % interval 1.79 to 1.90)")
SLOWER = Comparison(0.8, 0.78, 0.82, False, "1.25x slower (95 % interval 1.22 to 1.28)")


@pytest.mark.parametrize(
    ("before", "after", "comparisons", "headline"),
    [
        (
            DENSE,
            PRUNED,
            {"onnxruntime": SAME},
            "90 % zeros: 8.3x smaller on disk, no faster in ONNX Runtime, which does not skip zeros",
        ),
        (
            DENSE,
            PRUNED,
            {"torch": SAME, "onnxruntime": SAME, "openvino": SAME},
            "90 % zeros: 8.3x smaller on disk, no faster in PyTorch, ONNX Runtime and OpenVINO, which do not skip zeros",
        ),
        (
            DENSE,
            PRUNED,
            {"onnxruntime": SAME, "engine": FASTER},
            "90 % zeros: 8.3x smaller on disk, 1.8x faster in the engine, no faster in ONNX Runtime, which does not skip zeros",
        ),
        (DENSE, PRUNED, {"engine": SAME}, "90 % zeros: 8.3x smaller on disk, no faster in the engine"),
        (DENSE, PRUNED, {"torch": SLOWER}, "90 % zeros: 8.3x smaller on disk, 1.2x slower in PyTorch"),
        (
            DENSE,
            SLICED,
            {"torch": FASTER, "openvino": SAME},
            "2.0x fewer parameters: 2.0x smaller on disk, 1.8x faster in PyTorch, no faster in OpenVINO",
        ),
        (DENSE, DENSE, {"torch": SAME}, "The same parameters: no smaller on disk, no faster in PyTorch"),
        (DENSE, dataclasses.replace(DENSE, packed_bytes=None), {}, "The same parameters: nothing else was measured"),
        (
            DENSE,
            dataclasses.replace(SLICED, nonzeros=50_000),
            {"torch": SAME},
            "2.0x fewer parameters and 90 % zeros: 2.0x smaller on disk, no faster in PyTorch",
        ),
        (
            DENSE,
            dataclasses.replace(DENSE, bits=8.0, packed_bytes=1_010_000),
            {"torch": SAME},
            "8-bit weights: 4.0x smaller on disk, no faster in PyTorch",
        ),
        (
            dataclasses.replace(DENSE, bits=32.0),
            dataclasses.replace(DENSE, bits=5.28, input_bits=8, packed_bytes=1_010_000),
            {"torch": SLOWER, "onnxruntime": FASTER},
            "5.3-bit weights and 8-bit inputs: 4.0x smaller on disk, 1.8x faster in ONNX Runtime, 1.2x slower in PyTorch "
            "(which only simulates integers)",
        ),
        (
            DENSE,
            dataclasses.replace(SLICED, nonzeros=1_000),
            {},
            "2.0x fewer parameters and 99.80 % zeros: 2.0x smaller on disk",
        ),
    ],
)
def test_the_headline_says_what_was_and_was_not_gained(before, after, comparisons, headline: str) -> None:
    assert gains(before, after, comparisons)[0] == headline


def test_details_follow_with_their_numbers() -> None:
    assert gains(DENSE, PRUNED, {"onnxruntime": SAME})[1:] == [
        "ONNX Runtime: no faster: 1.01x, within noise (95 % interval 0.98 to 1.03)",
        "MACs: 4,600,000 as before, since a zero is multiplied like any number",
        "BOPs: 10.0x fewer, a proxy that no stock runtime turns into time",
        "Peak memory of a forward: the same (5 MB)",
        "On disk: 482 kB packed, 700 kB by gzip, 4 MB dense",
        "accuracy: 0.9812 before, 0.9799 after (n = 10,000)",
    ]
    assert gains(DENSE, SLICED, {})[1:4] == [
        "MACs: 2.3x fewer (4,600,000 to 2,000,000)",
        "BOPs: 2.3x fewer, a proxy that no stock runtime turns into time",
        "Peak memory of a forward: 2.0x less (2.5 MB)",
    ]


def test_integers_are_worth_their_bops_and_pytorchs_time_is_told_as_simulated() -> None:
    integers = dataclasses.replace(DENSE, bits=8.0, input_bits=8, bops=DENSE.bops // 16)
    assert gains(DENSE, integers, {"torch": SLOWER})[1:3] == [
        "PyTorch (which only simulates integers): 1.25x slower (95 % interval 1.22 to 1.28)",
        "BOPs: 16.0x fewer, a proxy: runtimes turn integers into time, and zeros not",
    ]


def test_nothing_within_noise_is_ever_claimed() -> None:
    lines = gains(DENSE, PRUNED, {"torch": dataclasses.replace(SAME, ratio=1.4)})
    assert not any("1.4" in line for line in lines)
    assert not any("x faster" in line for line in lines)


def test_what_was_not_measured_is_not_spoken_of() -> None:
    bare = Scorecard(parameters=10, nonzeros=10, macs=5, bops=160, dense_bytes=40)
    assert gains(bare, dataclasses.replace(bare, nonzeros=5, bops=80), {}) == [
        "50 % zeros: nothing else was measured",
        "MACs: 5 as before, since a zero is multiplied like any number",
        "BOPs: 2.0x fewer, a proxy that no stock runtime turns into time",
    ]


def test_shares_are_not_rounded_to_all_or_none() -> None:
    nearly = dataclasses.replace(DENSE, nonzeros=1_000)
    assert gains(DENSE, nearly, {})[0].startswith("99.90 % zeros")
    assert gains(DENSE, dataclasses.replace(DENSE, nonzeros=999_000), {})[0].startswith("0.10 % zeros")
    assert gains(DENSE, dataclasses.replace(DENSE, nonzeros=0), {})[0].startswith("100 % zeros")


def test_a_card_survives_json_with_its_samples() -> None:
    latency = Latency("torch", 1.25, 1.5, 0.5, 50, 1, 1, 3.0, 800.0, (1.25,) * 50, "2026-01-01")
    card = dataclasses.replace(DENSE, latency={"torch": latency})
    data = json.loads(json.dumps(card.to_dict()))
    assert len(data["latency"]["torch"]["samples_ms"]) == 50
    assert Scorecard.from_dict(data) == card
