# SPDX-License-Identifier: Apache-2.0
"""The networks that post-training compression is measured on, by name: `SUBJECTS["resnet"]()`."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.reconstruct.subjects import crepe, minilm, resnet, silero
from benchmarks.reconstruct.subjects.subject import Subject, difference

__all__ = ["SUBJECTS", "Subject", "difference"]

SUBJECTS: dict[str, Callable[[], Subject]] = {
    "crepe_tiny": crepe.tiny,
    "crepe_full": crepe.full,
    "minilm": minilm.subject,
    "silero": silero.subject,
    "resnet": resnet.subject,
}
