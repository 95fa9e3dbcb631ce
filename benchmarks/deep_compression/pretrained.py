# SPDX-License-Identifier: Apache-2.0
"""Pretrained networks without training: weights pruned and reconstructed, or put on a grid, then clustered and coded.

The networks, their calibration samples and their metrics are those of `benchmarks.reconstruct.subjects`. Four ways of each:
pruned weights and a codebook; pruned weights on a grid, both decided together; a codebook alone; a grid alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import featherweight as fw
from benchmarks.deep_compression.sizes import nncodec, sizes
from benchmarks.reconstruct.subjects import SUBJECTS, Subject, difference

# How many zeros each network bears after training, and how much work the solvers may take (1e9 multiply-adds a layer).
SPARSITY = {"crepe_tiny": 0.5, "crepe_full": 0.7, "minilm": 0.25}
WORK = {"crepe_tiny": 100.0, "crepe_full": 30.0, "minilm": 30.0}

# Numbers that a layer's weights become. A transformer's rows differ more, and its embeddings are rounded row by row.
NUMBERS = {"crepe_tiny": 16, "crepe_full": 16, "minilm": 32}
RATE = {"crepe_tiny": 0.002, "crepe_full": 0.002, "minilm": 0.0}
EMBEDDINGS = ("*embeddings*",)
LARGER: dict[str, dict[str, int]] = {"minilm": {"pools": 2}}


def recipes(name: str) -> dict[str, list[Any]]:
    """The ways of a network: its stages by what they are called."""
    share, work, numbers = SPARSITY[name], WORK[name], NUMBERS[name]
    cluster = {"start": "exact", "importance": "hessian"}
    rest: list[Any] = []
    if name == "minilm":
        cluster["keep"], rest = EMBEDDINGS, [fw.Quantize(6, layers=EMBEDDINGS)]
    return {
        f"pruned, {numbers} numbers": [
            fw.Reconstruct(share, work=work, samples=512),
            fw.Cluster(numbers, rate=RATE[name], **cluster),
            *rest,
        ],
        "pruned, 4 bits": [fw.Reconstruct(share, bits=4, work=work, samples=512), *rest],
        f"{numbers} numbers": [fw.Cluster(numbers, **cluster), *rest],
        "4 bits": [fw.Reconstruct(bits=4, symmetric=True, solver="gptq", samples=512), *rest],
    }


def measure(name: str, way: str, python: Path | None = None) -> dict[str, Any]:
    """One row of the results: the metric before and after with the interval of their difference, and all sizes.

    With an interpreter that has nncodec, its bytes as well: of these weights and of the dense ones, at no lower a metric.
    """
    subject = SUBJECTS[name](**LARGER.get(name, {}))
    task = subject.task()
    model, plan = copy.deepcopy(subject.model), fw.Plan()
    began = time.perf_counter()
    for method in recipes(name)[way]:
        plan += method(model, task, fw.Stage())
    seconds = time.perf_counter() - began
    model.eval()
    before, after = subject.per_sample(subject.model), subject.per_sample(model)
    change = difference(subject, before, after)
    coded = {}
    if python is not None:
        for key, given in (("nncodec", model), ("nncodec_of_dense", subject.model)):
            coded[key] = nncodec(python, given, _judge(subject), subject.summary(after), halving=True)
    return {
        "subject": name,
        "title": subject.name,
        "way": way,
        "metric": subject.metric,
        "dense": subject.summary(before),
        "compressed": subject.summary(after),
        **change,
        "zeros": _zeros(model),
        "sizes": sizes(model, plan),
        **coded,
        "seconds": round(seconds, 1),
    }


def _judge(subject: Subject) -> Callable[[dict[str, Tensor]], float]:
    """The metric of the network with other values of its tensors."""

    def judged(tensors: dict[str, Tensor]) -> float:
        other = copy.deepcopy(subject.model)
        other.load_state_dict(tensors, strict=False)
        return subject.evaluate(other)

    return judged


def _zeros(model: nn.Module) -> float:
    tensors = [parameter.detach() for parameter in model.parameters()]
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
