"""A plausible run for the tests: a small CNN on handwritten digits, pruned to 90 % while it trains."""

import copy
import math
import random
from typing import Any

STEPS, END, EVERY = 2500, 2000, 100
LAYERS = [  # name, kind, shape, MACs, target
    ("stem.weight", "Conv2d", (16, 1, 3, 3), 9_216, None, "kept: the first layer reads raw inputs"),
    ("block1.depthwise.weight", "Conv2d", (16, 1, 3, 3), 9_216, None, "kept: depthwise, 9 weights a channel"),
    ("block1.pointwise.weight", "Conv2d", (32, 16, 1, 1), 32_768, 0.9, ""),
    ("block2.conv.weight", "Conv2d", (64, 32, 3, 3), 294_912, 0.9, ""),
    ("block3.conv.weight", "Conv2d", (64, 64, 3, 3), 147_456, 0.9, ""),
    ("fc1.weight", "Linear", (96, 256), 24_576, 0.9, ""),
    ("head.weight", "Linear", (10, 96), 960, None, "kept: the output layer"),
]


def cubic(step: float, final: float = 0.9) -> float:
    """Zhu and Gupta's schedule from 0 at step 0 to `final` at END, in updates every EVERY steps."""
    at = min(math.floor(step / EVERY) * EVERY, END)
    return final * (1 - (1 - at / END) ** 3)


def history(rng: random.Random) -> list[dict[str, Any]]:
    """Loss and learning rate every 10 steps; the metric just before and just after each mask update."""
    rows: list[dict[str, Any]] = []
    for step in range(10, STEPS + 1, 10):
        sparsity = cubic(step)
        since = (step % EVERY) / EVERY if step <= END else 1.0
        jolt = 0.25 * (sparsity / 0.9) ** 5 * math.exp(-6 * since) if step < END + EVERY else 0.0
        learnt = 1 - math.exp(-step / 220)
        row = {"step": step, "sparsity": round(sparsity, 4), "lr": 0.002 * (1 + math.cos(math.pi * step / STEPS)) / 2}
        row["loss"] = max(2.3 * (1 - learnt) + 0.03 + jolt + rng.gauss(0, 0.012), 0.008)
        if step % EVERY in (0, EVERY - 10) or (step > END and step % 50 == 0):
            row["metric"] = round(0.975 * learnt - jolt * 0.9 + rng.gauss(0, 0.003), 4)
        if step == STEPS:
            row["metric"] = 0.9722  # the scorecard measures the same weights
        rows.append(row)
    return rows


def latency(rng: random.Random, name: str, median: float) -> dict[str, Any]:
    samples = sorted(median * (1 + abs(rng.gauss(0, 0.035)) + (0.4 if rng.random() < 0.03 else 0)) for _ in range(200))
    rng.shuffle(order := list(samples))
    return {
        "name": name, "median_ms": samples[100], "p90_ms": samples[180], "iqr_ms": samples[150] - samples[50], "n": 200,
        "threads": 2, "batch": 1, "first_ms": median * 9, "throughput_per_s": 1000 / median, "samples_ms": order,
    }  # fmt: skip


def scorecard(rng: random.Random, dense: bool) -> dict[str, Any]:
    return {
        "parameters": 83_242, "nonzeros": 83_242 if dense else 9_873, "macs": 519_104,
        "bops": 531_562_496 if dense else 63_491_072, "dense_bytes": 336_120,
        "packed_bytes": 336_120 if dense else 50_318, "gzip_bytes": 309_774 if dense else 61_204,
        "peak_memory_bytes": 2_411_724, "metric": 0.9806 if dense else 0.9722, "metric_name": "accuracy", "samples": 360,
        "latency": {
            "torch": latency(rng, "torch", 0.412),
            "onnxruntime": latency(rng, "onnxruntime", 0.121 if dense else 0.1215),
            "openvino": latency(rng, "openvino", 0.155 if dense else 0.118),
        },
    }  # fmt: skip


def layer_rows() -> list[dict[str, Any]]:
    rows = []
    for name, kind, shape, macs, target, reason in LAYERS:
        n = math.prod(shape)
        dense = 4 * n
        packed = dense if target is None else round(dense * 0.1 + n / 8)
        rows.append(
            {
                "name": name.removesuffix(".weight"), "kind": kind, "shape_before": list(shape), "shape_after": list(shape), "parameters": n,
                "zeros": 0 if target is None else round(target * n), "macs": macs, "dense_bytes": dense,
                "packed_bytes": packed, "codec": "dense fp32" if target is None else "bitmask",
                "action": "kept" if target is None else "pruned",
                "reason": reason.removeprefix("kept: ") or "target 90 %, smallest magnitudes",
            }
        )  # fmt: skip
    return rows


def sample_report(seed: int = 0) -> dict[str, Any]:
    """A whole report with every part of the contract in it."""
    rng = random.Random(seed)
    before, after = scorecard(rng, dense=True), scorecard(rng, dense=False)
    selection = [
        {"name": name, "kind": kind, "shape": list(shape), "parameters": math.prod(shape), "sparsity": target or 0.0,
         "action": "kept" if target is None else "pruned", "reason": reason.removeprefix("kept: ")}
        for name, kind, shape, _, target, reason in LAYERS
    ]  # fmt: skip
    return {
        "version": 1,
        "tool": {"name": "featherweight", "version": "0.1.0"},
        "created": "2026-11-22T20:41:07+00:00",
        "title": "Digits CNN, pruned to 90 % while training",
        "verdict": {
            "sentence": "6.7x smaller on disk at 0.8 points less accuracy; faster in OpenVINO, no faster in PyTorch "
            "and ONNX Runtime, which do not skip zeros.",
            "numbers": [
                {"label": "on disk, packed", "before": "336 kB", "after": "50.3 kB", "change": "6.7x smaller", "good": True},
                {"label": "weights that are not zero", "before": "83,242", "after": "9,873", "change": "88.1 % zeros", "good": True},
                {"label": "accuracy, n = 360", "before": "0.9806", "after": "0.9722", "change": "0.0084 lower", "good": False},
                {"label": "MACs", "before": "519,104", "after": "519,104", "change": "same: zeros are multiplied", "good": None},
                {"label": "ONNX Runtime, median", "before": "0.124 ms", "after": "0.125 ms", "change": "no difference beyond noise", "good": None},
            ],
        },
        "stages": [
            {
                "name": "1 train", "method": "train", "seconds": 41.7, "scorecard": copy.deepcopy(after),
                "options": {"steps": STEPS, "optimizer": "adam", "lr": 0.002, "hooks": [
                    {"method": "gradual_pruning", "sparsity": 0.9, "begin": 0, "end": END, "every": EVERY}]},
                "messages": ["20 mask updates; masks stand still from step 2,000"],
                "history": history(rng), "selection": selection,
            }
        ],
        "before": before,
        "after": after,
        "comparisons": {
            "torch": {"ratio": 1.0, "low": 0.98, "high": 1.02, "faster": None,
                      "words": "no faster: 1.00x, within noise (95 % interval 0.98 to 1.02)"},
            "onnxruntime": {"ratio": 0.99, "low": 0.97, "high": 1.01, "faster": None,
                            "words": "no faster: 0.99x, within noise (95 % interval 0.97 to 1.01)"},
            "openvino": {"ratio": 1.31, "low": 1.27, "high": 1.36, "faster": True,
                         "words": "1.31x faster (95 % interval 1.27 to 1.36)"},
        },
        "layers": layer_rows(),
        "export": {
            "path": "model.onnx", "opset": 20, "bytes": 345_903, "dynamic_batch": True, "error": None,
            "notes": ["The ONNX file stores zeros in full: it is as large as the dense model."],
            "parity": {"max_abs_diff": 4.77e-06, "max_rel_diff": 1.1e-05, "argmax_agreement": 1.0, "n": 64,
                       "tolerance": 0.0001, "passed": True, "words": "ONNX Runtime gives the same answers."},
        },
        "gains": [
            "Smaller on disk: 336 kB became 50.3 kB, exactly the same numbers after loading.",
            "Not faster in ONNX Runtime or PyTorch: they multiply zeros like any other number.",
            "Not smaller in memory: after loading, the tensors are dense.",
        ],
        "warnings": ["360 test examples: a difference in accuracy below 1.5 points is within sampling error."],
        "reproduce": {
            "command": "featherweight compress digits.py:make_task --recipe recipe.toml --out run --seed 0",
            "recipe": '[[stage]]\nmethod = "train"\nsteps = 2500\n\n[[stage.hooks]]\nmethod = "gradual_pruning"\n'
            "sparsity = 0.9\nbegin = 0\nend = 2000\nevery = 100\n",
            "seed": 0,
            "versions": {"featherweight": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu", "onnxruntime": "1.32.0", "openvino": "2026.4.1"},
            "machine": {"cpu": "Intel Xeon @ 2.60 GHz", "flags": ["avx2", "avx512f", "avx512_vnni"], "cores": 2, "governor": None, "memory_bytes": 16_381_030_400, "versions": {"torch": "2.13.0+cpu"}},
            "data": {"train": {"batches": 23, "batch": "tuple(Tensor[64, 1, 8, 8] float32, Tensor[64] int64)", "sha256": "5f1c8a0e9b1d7c42"}, "calibration": None},
        },
        "load": {"class_hint": "digits:DigitsNet", "folder": "run"},
    }  # fmt: skip
