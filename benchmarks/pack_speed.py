# SPDX-License-Identifier: Apache-2.0
"""Speed and size of packing, on one core: MB of dense data a second, coding (choice, check and fsync included) and back.

    python benchmarks/pack_speed.py [--megabytes 32] [--repeat 5] [--json]

Coding is `save_file`, decoding `load_file`, of one tensor, into a temporary folder; the best of the repeats counts,
since what else runs on the machine only ever slows it down. Wall time waits for the disk (and for a busy machine);
processor time does not. The size is of the file, header included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from featherweight.pack import load_file, save_file


def tensors(megabytes: int) -> Iterator[tuple[str, Tensor, str]]:
    """Name, tensor and hint: every codec, and the types that make more words a byte."""
    generator = torch.Generator().manual_seed(0)
    rows = megabytes * 250_000 // 4096
    weight = torch.randn(rows, 4096, generator=generator)
    for sparsity in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0):
        zeros = torch.rand(rows, 4096, generator=generator) < sparsity
        yield f"float32, {sparsity:.0%} zeros", weight.masked_fill(zeros, 0), ""
        if sparsity in (0.5, 0.9):
            half = weight.masked_fill(zeros, 0).bfloat16()
            yield f"float32 of bf16 values, {sparsity:.0%} zeros", half.float(), ""
            yield f"bfloat16, {sparsity:.0%} zeros", torch.cat([half, half]), ""
            bytes_ = (weight * 40).clamp(1, 127).to(torch.int8).masked_fill(zeros, 0)
            yield f"int8, {sparsity:.0%} zeros", torch.cat([bytes_] * 4), ""
    for n, m in ((2, 4), (4, 8), (8, 16)):
        groups = weight.reshape(-1, m)
        least = groups.abs().topk(m - n, dim=1, largest=False).indices
        yield f"float32, {n}:{m}", groups.scatter(1, least, 0).reshape(rows, 4096), f"nm:{n}:{m}:1"
    for bits, sparsity in ((4, 0.0), (4, 0.9), (8, 0.0)):
        scale = torch.rand(rows, 1, generator=generator) + 0.5
        most = 2 ** (bits - 1) - 1
        zeros = torch.rand(rows, 4096, generator=generator) < sparsity
        integers = (weight * (most / 3)).round().clamp(-most, most).masked_fill(zeros, 0)
        grid = integers * scale + 0.0  # no -0.0: it is on no grid
        yield f"float32 on a grid, {bits} bits, {sparsity:.0%} zeros", grid, ""
    entries = torch.randn(15, generator=generator).sort().values
    zeros = torch.rand(rows, 4096, generator=generator) < 0.95
    yield "float32 of 16 entries, 95% zeros", entries[(weight * 2 + 7).long().clamp(0, 14)].masked_fill(zeros, 0), ""


def measure(name: str, tensor: Tensor, hint: str, repeat: int) -> dict[str, object]:
    coding, decoding = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "f")
        for _ in range(repeat):
            start = time.perf_counter(), time.process_time()
            coded = save_file(path, {"w": tensor}, {"w": hint})["w"]
            between = time.perf_counter(), time.process_time()
            loaded, _ = load_file(path)
            end = time.perf_counter(), time.process_time()
            coding.append([b - a for a, b in zip(start, between, strict=True)])
            decoding.append([b - a for a, b in zip(between, end, strict=True)])
        size = os.path.getsize(path)
    if not torch.equal(loaded["w"].view(torch.uint8), tensor.view(torch.uint8)):
        raise SystemExit(f"{name}: what was loaded is not what was saved")
    megabytes = tensor.nbytes / 1e6
    return {
        "tensor": name,
        "codec": coded.codec,
        "share_of_dense": round(size / tensor.nbytes, 4),
        "coding_mb_per_s": round(megabytes / min(wall for wall, _ in coding)),
        "coding_mb_per_processor_s": round(megabytes / min(cpu for _, cpu in coding)),
        "decoding_mb_per_s": round(megabytes / min(wall for wall, _ in decoding)),
        "decoding_mb_per_processor_s": round(megabytes / min(cpu for _, cpu in decoding)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=32, help="dense size of each tensor")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(*item, options.repeat) for item in tensors(options.megabytes)]
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'MB/s, wall and processor time':36} {'codec':26} {'of dense':>8} {'coding':>13} {'decoding':>13}")
    for row in found:
        *facts, share, coding, coding_cpu, decoding, decoding_cpu = row.values()
        name, codec = facts
        print(f"{name:36} {codec:26} {share:8} {coding:>6} {coding_cpu:>6} {decoding:>6} {decoding_cpu:>6}")


if __name__ == "__main__":
    main()
