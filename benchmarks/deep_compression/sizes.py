# SPDX-License-Identifier: Apache-2.0
"""What one set of weights weighs: the artefact that the library writes, beside gzip, zstd and nncodec on the same tensors."""

from __future__ import annotations

import gzip
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

import featherweight as fw

QPS = (-44, -40, -36, -32, -30, -28, -26, -24, -22, -20, -18, -16, -14, -12, -10)


def sizes(model: nn.Module, plan: fw.Plan) -> dict[str, Any]:
    """Bytes of the artefact's files, of each tensor in them, and of the dense fp32 tensors plain, by gzip -9 and by zstd -19.

    The general compressors get one ordinary safetensors file with the same values; `dense` is its tensors alone.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    whole = save(tensors)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "artefact"
        coded = fw.save(model, plan, folder)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {
        "dense": sum(tensor.nbytes for tensor in tensors.values()),
        "file": files["model.safetensors"],
        "files": files,
        "codecs": {name: [one.codec, one.coded_bytes] for name, one in coded.items()},
        "gzip": len(gzip.compress(whole, 9)),
        "zstd": _zstd(whole),
    }


def _zstd(data: bytes) -> int | None:
    """By the command `zstd -19`; None where it is not installed."""
    try:
        return len(subprocess.run(["zstd", "-19", "-q", "-c"], input=data, capture_output=True, check=True).stdout)
    except FileNotFoundError:
        return None


def nncodec(
    python: Path, model: nn.Module, judge: Callable[[dict[str, Tensor]], float], least: float, halving: bool = False
) -> dict[str, Any]:
    """nncodec's smallest bitstream of the model's tensors whose decoded values `judge` rates `least` or better.

    `python` is an interpreter that has nncodec. It quantizes by itself: its parameter is searched, coarsest last; by
    halving where trying all would take too long. It gets the tensors of floating point, and no others are counted.
    """
    tensors = {name: t.detach().numpy() for name, t in model.state_dict().items() if t.is_floating_point()}
    tried: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.savez(folder / "tensors.npz", **tensors)

        def code(*qps: int) -> None:
            script = Path(__file__).with_name("nncodec_side.py")
            command = [str(python), str(script), str(folder / "tensors.npz"), str(folder), *map(str, qps)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for qp, size in json.loads(said.splitlines()[-1]).items():
                back = {name: torch.from_numpy(value) for name, value in np.load(folder / f"{qp}.npz").items()}
                tried.append({"qp": int(qp), "bytes": size, "metric": judge(back)})

        if halving:
            low, high = 0, len(QPS)
            while low < high:
                middle = (low + high) // 2
                code(QPS[middle])
                low, high = (middle + 1, high) if tried[-1]["metric"] >= least else (low, middle)
        else:
            code(*QPS)
    good = [one for one in tried if one["metric"] >= least]
    return {"tried": tried, "bytes": min((one["bytes"] for one in good), default=None)}
