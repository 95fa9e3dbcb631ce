# SPDX-License-Identifier: Apache-2.0
"""The networks that post-training compression is measured on, by name: `SUBJECTS["resnet"]()`; and COSTS, to time."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.reconstruct.subjects import cost, crepe, lstm, minilm, resnet, silero
from benchmarks.reconstruct.subjects.subject import Subject, difference

__all__ = ["COSTS", "SUBJECTS", "Subject", "difference"]

SUBJECTS: dict[str, Callable[..., Subject]] = {
    "crepe_tiny": crepe.tiny,
    "crepe_full": crepe.full,
    "minilm": minilm.subject,
    "silero": silero.subject,
    "resnet": resnet.subject,
    "lstm": lstm.subject,
}
# Without a metric: what compression takes of them is all that is asked.
COSTS: dict[str, Callable[[], Subject]] = {"resnet50": cost.resnet50, "llama_block": cost.llama_block}
