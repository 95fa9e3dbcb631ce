# SPDX-License-Identifier: Apache-2.0
"""Silero VAD, pretrained voice activity detection in 0.31 million numbers, on prompts of a telephone system in noise.

The weights come from the package silero-vad (MIT), out of its TorchScript file, into plain PyTorch: an STFT, four
convolutions, an LSTM cell that steps through chunks of 32 ms. Each build compares the two on real sound. Speech comes
from Debian's asterisk-core-sounds-en-wav (CC-BY-SA), one speaker, 8 kHz made 16. A clip is four seconds of prompts and
pauses with coloured noise at 0 to 15 dB; a chunk is speech where the clean sound is within 35 dB of the loudest tenth.
"""

from __future__ import annotations

import io
import warnings
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad

from benchmarks.reconstruct.data import deb, kept, wheel
from benchmarks.reconstruct.subjects.subject import Model, Subject, answers

RATE, CHUNK, CONTEXT, CHUNKS = 16_000, 512, 64, 125
TEST, CALIBRATION, BATCH = 240, 128, 16
QUIETEST, TOLERANCE = -35.0, 1e-6


class Silero(nn.Module):
    """Sound [n, chunks * 512] at 16 kHz in, the probability of speech [n, chunks] out."""

    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(258, 1, 256))  # cosines and sines under a window: nothing learned
        shapes = (129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)
        self.encoder = nn.Sequential(
            *(layer for i, o, stride in shapes for layer in (nn.Conv1d(i, o, 3, stride, 1), nn.ReLU()))
        )
        self.rnn = nn.LSTMCell(128, 128)
        self.output = nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor) -> Tensor:
        chunks = pad(sound, (CONTEXT, 0)).unfold(1, CHUNK + CONTEXT, CHUNK)
        spectrum = conv1d(pad(chunks.flatten(0, 1)[:, None], (0, 64), "reflect"), self.basis, stride=128)
        magnitude = (spectrum[:, :129].square() + spectrum[:, 129:].square()).sqrt()
        features = self.encoder(magnitude).squeeze(2).view(*chunks.shape[:2], -1)
        state, hidden = None, []
        for moment in features.unbind(1):
            state = self.rnn(moment, state)
            hidden.append(state[0])
        return torch.sigmoid(self.output(torch.stack(hidden, 2).relu())).squeeze(1)


def subject() -> Subject:
    """Silero VAD: the area under its ROC curve over chunks of 240 clips; a bootstrap draws clips, not chunks."""
    model = network()
    clips = kept("silero-clips-1", _clips)
    sound, speech = (clips[f"test.{key}"] for key in ("sound", "speech"))

    def per_sample(candidate: Model) -> np.ndarray:
        heard = torch.cat(list(answers(candidate, sound.split(BATCH))))
        return torch.stack([heard, speech.to(heard)], 2).double().numpy()

    calibration = list(clips["calibration.sound"].split(BATCH))
    return Subject("silero", model, calibration, (sound[:1],), "AUC", len(sound), per_sample, area)


def area(rows: np.ndarray) -> float:
    """The area under the ROC curve of rows [clips, chunks, (score, speech)]: the rank sum, ties at their mean rank."""
    from scipy.stats import rankdata

    scores, speech = rows.reshape(-1, 2).T
    yes = speech > 0
    n = int(yes.sum())
    return float((rankdata(scores)[yes].sum() - n * (n + 1) / 2) / (n * (len(yes) - n)))


def network() -> Silero:
    """The pretrained network. Stops where it does not answer as the packaged one does."""
    path = wheel("silero-vad==6.2.3") / "silero_vad" / "data" / "silero_vad.jit"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of TorchScript
        packaged = torch.jit.load(path, map_location="cpu")
    theirs = {key[7:]: value for key, value in packaged.state_dict().items() if key.startswith("_model.")}
    names = {"stft.forward_basis_buffer": "basis", "decoder.decoder.2.weight": "output.weight",
             "decoder.decoder.2.bias": "output.bias"}  # fmt: skip
    for i in range(4):
        names |= {f"encoder.{i}.reparam_conv.{kind}": f"encoder.{2 * i}.{kind}" for kind in ("weight", "bias")}
    model = Silero().eval()
    model.load_state_dict({names.get(key, key.removeprefix("decoder.")): value for key, value in theirs.items()})
    sound = kept("silero-clips-1", _clips)["test.sound"][:1]
    with torch.no_grad():
        expected = [packaged(chunk, RATE) for chunk in sound.split(CHUNK, 1)]
        error = float((model(sound) - torch.cat(expected, 1)).abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"Silero rebuilt differs from the packaged network by {error:.1e}, more than {TOLERANCE:g}.")
    return model


def _clips() -> dict[str, Tensor]:
    """Sound [clips, 64000] and which chunks are speech [clips, 125], for testing and, of other prompts, calibrating."""
    chance = np.random.default_rng(0)
    folder = deb("asterisk-core-sounds-en-wav") / "usr/share/asterisk/sounds"
    paths = sorted(
        path for path in folder.rglob("*.wav") if path.stat().st_size > 2 * 8000 and "silence" not in path.parts
    )
    prompts = [_prompt(paths[i]) for i in chance.permutation(len(paths))]
    cut = 2 * len(prompts) // 3
    made = {}
    for kind, chosen, count in (("test", prompts[:cut], TEST), ("calibration", prompts[cut:], CALIBRATION)):
        clips = [_clip(chosen, chance) for _ in range(count)]
        made[f"{kind}.sound"] = torch.tensor(np.stack([sound for sound, _ in clips]), dtype=torch.float32)
        made[f"{kind}.speech"] = torch.tensor(np.stack([speech for _, speech in clips]))
    return made


def _prompt(path: Path) -> np.ndarray:
    from scipy.signal import resample_poly

    with wave.open(io.BytesIO(path.read_bytes())) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return np.asarray(resample_poly(raw / 32768.0, RATE // file.getframerate(), 1))


def _clip(prompts: Sequence[np.ndarray], chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pauses of 0.3 to 1.5 s and prompts of at most 2 s by turns, and noise whose spectrum falls by 0 to 6 dB an octave."""
    clean, place = np.zeros(CHUNKS * CHUNK), 0
    while (place := place + int(chance.uniform(0.3, 1.5) * RATE)) < len(clean):
        prompt = prompts[chance.integers(len(prompts))][: 2 * RATE][: len(clean) - place]
        clean[place : place + len(prompt)] = prompt
        place += len(prompt)
    level = 10 * np.log10(np.square(clean).reshape(CHUNKS, CHUNK).mean(1) + 1e-12)
    speech = level > np.percentile(level, 90) + QUIETEST
    spectrum = np.fft.rfft(chance.standard_normal(len(clean)))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** -chance.uniform(0, 1)
    noise = np.fft.irfft(spectrum, len(clean))
    loud = np.square(clean.reshape(CHUNKS, CHUNK)[speech]).mean() / np.square(noise).mean()
    return clean + noise * np.sqrt(loud * 10 ** (-chance.uniform(0, 15) / 10)), speech
