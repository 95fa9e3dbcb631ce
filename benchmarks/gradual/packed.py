# SPDX-License-Identifier: Apache-2.0
"""What a pruned network weighs: a network of a million weights, pruned to each sparsity, as the file that is written.

The zeros are where magnitude pruning of an untrained network puts them, which is anywhere; the files of trained
networks are in the accuracy table. Formulas, in bits a weight at sparsity s: dense 32, bitmask 1 + 32 (1 - s), CSR with
b-bit offsets (1 - s) (32 + b) / (1 - s^(2^b)), the denominator counting the fillers; the best b is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import featherweight as fw
from benchmarks.gradual.training import weigh

SPARSITIES = (0.0, 0.1, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 0.99)
LIMIT = 0.122  # of the dense fp32 bytes, at 90 %, header and biases included


def packed(sparsities: Iterable[float] = SPARSITIES) -> dict[str, Any]:
    """One row a sparsity, of all the weights of the network."""
    return {"limit": LIMIT, "rows": [_measure(sparsity) for sparsity in sparsities]}


def _measure(sparsity: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 640), nn.ReLU(), nn.Linear(640, 768), nn.ReLU(), nn.Linear(768, 10))
    fw.Prune(sparsity, dense=())(model, fw.Task(model, (torch.zeros(1, 784),)), fw.Stage())
    facts = weigh(model)
    ratio = facts["packed_bytes"] / facts["dense_bytes"]
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    formula = {name: bits / 32 for name, bits in formulas(sparsity).items()}
    return {"sparsity": sparsity, "weights": weights, **facts, "ratio": ratio, "formula": formula}


def formulas(sparsity: float) -> dict[str, float]:
    """Bits a weight of each codec, for zeros anywhere, without header and biases."""
    csr = [(1 - sparsity) * (32 + b) / (1 - sparsity ** (2**b)) for b in range(1, 17)]
    return {"dense": 32.0, "bitmask": 1 + 32 * (1 - sparsity), "csr": min(csr)}
