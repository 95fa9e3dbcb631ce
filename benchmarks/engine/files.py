# SPDX-License-Identifier: Apache-2.0
"""The ONNX files of a network: as this project exports it, in integers, and for a runtime that reads only older files."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.onnx import symbolic_opset14

import featherweight as fw
from benchmarks.engine.networks import NETWORKS, pruned
from benchmarks.reconstruct.data import cache
from featherweight import deploy


def folder() -> Path:
    made = cache() / "engine"
    made.mkdir(parents=True, exist_ok=True)
    return made


def plain(name: str, sparsity: float) -> Path:
    """The network in float32, any batch."""
    path = folder() / f"{name}-{sparsity}.onnx"
    if not path.exists():
        deploy.export_onnx(pruned(name, sparsity), NETWORKS[name].inputs(2), path)
    return path


def integers(name: str, sparsity: float) -> Path:
    """The network with 8-bit weights and static grids between its layers."""
    path = folder() / f"{name}-{sparsity}-int8.onnx"
    if not path.exists():
        model, batches = pruned(name, sparsity), [NETWORKS[name].inputs(2)]
        made = copy.deepcopy(model)
        fw.Quantize(8, activations="static")(made, fw.Task(model, batches[0], calibration=batches), fw.Stage())
        deploy.export_onnx(made, batches[0], path, calibration=batches)
    return path


def older(name: str, sparsity: float, batch: int) -> Path:
    """The network in float32 by PyTorch's former exporter, opset 13, one batch: what DeepSparse 1.8 reads."""
    path = folder() / f"{name}-{sparsity}-{batch}-opset13.onnx"
    if not path.exists():
        inputs = NETWORKS[name].inputs(batch)
        partial = path.with_suffix(".partial")
        # Written for opset 14 and of ops that opset 13 has.
        torch.onnx.register_custom_op_symbolic(
            "aten::scaled_dot_product_attention", symbolic_opset14.scaled_dot_product_attention, 13
        )
        torch.onnx.export(
            pruned(name, sparsity), inputs, str(partial), dynamo=False, opset_version=13, input_names=["x"]
        )
        partial.rename(path)
    return path
