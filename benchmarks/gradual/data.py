# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST (Xiao et al. 2017, MIT licence), from Debian's package or from a folder that you name.

60,000 training and 10,000 test images of 28 x 28. The last twelfth of the training images is held out: every choice of
this benchmark (learning rate, schedule, width of the network) was made there, and the test images were never looked at.
"""

from __future__ import annotations

import functools
import gzip
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.splits import Data, Split

FOLDER = "FASHION_MNIST"  # the environment variable that names a folder with the four files
PACKAGE = "dataset-fashion-mnist"
CACHE = Path(__file__).parents[2] / ".cache"
INSIDE = Path("usr/share/datasets/fashion-mnist")  # where Debian's package has them


@functools.cache
def load() -> Data:
    """The three splits, images as bytes. Fetches 31 MB the first time, unless the environment variable FASHION_MNIST names a folder."""
    folder = Path(os.environ[FOLDER]) if FOLDER in os.environ else _fetched()
    images, labels = _idx(folder / "train-images-idx3-ubyte.gz"), _idx(folder / "train-labels-idx1-ubyte.gz")
    test = Split(_idx(folder / "t10k-images-idx3-ubyte.gz")[:, None], _idx(folder / "t10k-labels-idx1-ubyte.gz").long())
    cut = len(images) - len(images) // 12
    train, validation = ((images[part, None], labels[part].long()) for part in (slice(cut), slice(cut, None)))
    return Data(Split(*train), Split(*validation), test)


def _fetched() -> Path:
    folder = CACHE / INSIDE
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=CACHE, check=True, capture_output=True)
            subprocess.run(["dpkg", "-x", max(CACHE.glob(f"{PACKAGE}_*.deb")), CACHE], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"Debian's package {PACKAGE} could not be fetched ({error}). After `apt-get update` it may be; on a "
                f"system without apt-get, set {FOLDER} to a folder with the four *-ubyte.gz files of its authors."
            ) from error
    return folder


def _idx(path: Path) -> Tensor:
    """The bytes of an idx file: two zeros, the type (8 for bytes), the number of axes, each length in four bytes."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", axes, 4)
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * axes + shape.prod():
        raise SystemExit(f"{path} is no idx file of bytes, or is cut short.")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def as_input(images: Tensor) -> Tensor:
    """Bytes as floats of about zero mean and unit variance."""
    return (images.float() - 72.9) / 90.0


def batches(split: Split, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches in an order that the seed fixes, every second image (at random) mirrored left to right."""
    chance = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(split.labels), generator=chance)
        chosen, order = order[:size], order[size:]
        x = as_input(split.images[chosen])
        mirrored = torch.rand(len(x), 1, 1, 1, generator=chance) < 0.5
        yield torch.where(mirrored, x.flip(-1), x), split.labels[chosen]
