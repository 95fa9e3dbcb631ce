# SPDX-License-Identifier: Apache-2.0
"""Layers to measure solvers on: of real networks, of a small one trained on scikit-learn's digits, and synthetic ones.

Each layer comes with two Hessians, of the samples that it is solved on and of samples that no solver saw.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.reconstruct.subjects import SUBJECTS
from featherweight.layers import collect, passes, problems

# What exact elimination is asked to do at most: rows d³.
MOST_WORK = 1e13


class Layer(NamedTuple):
    name: str
    W: Tensor
    H: Tensor
    held_out: Tensor
    run: int


def network_layers(name: str, globs: list[str], budget_bytes: int = 1 << 30) -> Iterator[Layer]:
    """The layers of a subject whose rows d³ is at most `MOST_WORK`; every fourth calibration batch is held out.

    What is left out is printed with its reason. Statistics come in passes, so that all layers' Hessians are never in
    memory at once.
    """
    subject = SUBJECTS[name]()
    found, left = problems(subject.model)
    chosen = []
    for problem in found:
        if not any(fnmatch.fnmatch(problem.name, glob) for glob in globs):
            continue
        if problem.height * problem.d**3 > MOST_WORK or problem.weight.kind == "embedding":
            left[problem.name] = f"{problem.height} x {problem.d} ({problem.weight.kind})"
        else:
            chosen.append(problem)
    for skipped, reason in left.items():
        print(f"left out: {skipped}: {reason}", flush=True)
    kept = [batch for i, batch in enumerate(subject.calibration) if i % 4 != 3]
    held = [batch for i, batch in enumerate(subject.calibration) if i % 4 == 3]
    for group in passes(chosen, budget_bytes // 2, reference=False):
        ours, other = (collect(subject.model, group, batches, subject.forward) for batches in (kept, held))
        for problem in group:
            if problem.name in ours and problem.name in other:
                W = problem.matrix().double()
                label = f"{name}.{problem.name} {problem.height}x{problem.d}"
                yield Layer(label, W, ours[problem.name].H, other[problem.name].H, problem.run)


def digits_layers(seed: int = 0) -> list[Layer]:
    """Three convolutions and a linear layer of a CNN trained for 12 epochs on 1200 digits; the other 597 are held out."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images, labels = (images - images.mean()) / images.std(), torch.tensor(data.target)
    order = torch.randperm(len(images))
    train, test = order[:1200], order[1200:]
    network = _train(images[train], labels[train])
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "0" and module.weight.shape[0] > 10:
            weight = module.weight.detach()
            run = weight.shape[1]
            W = weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight
            H, held_out = (_hessian(network, module, images[part]) for part in (train, test))
            layers.append(Layer(f"digits.{name} {W.shape[0]}x{W.shape[1]}", W.double(), H, held_out, run))
    return layers


def synthetic_layer(rows: int, d: int, seed: int = 0) -> Layer:
    """Rectified mixtures of few strong and many weak sources; rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = draw(d, d) * torch.arange(1, d + 1) ** -0.5
    W = draw(rows, d) * torch.rand(rows, 1, generator=generator, dtype=torch.float64) / d**0.5
    X, other = (mixing @ draw(d, 4 * d)).relu_(), (mixing @ draw(d, 4 * d)).relu_()
    return Layer(f"synthetic {rows}x{d}", W, 2 * X @ X.T / (4 * d), 2 * other @ other.T / (4 * d), d)


def _train(images: Tensor, labels: Tensor) -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    network = nn.Sequential(
        *block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64),
        nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
    for _ in range(12):
        for batch in torch.randperm(len(images)).split(64):
            shift = tuple(torch.randint(-1, 2, (2,)).tolist())
            loss = functional.cross_entropy(network(torch.roll(images[batch], shift, (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def _hessian(network: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """2 X Xᵀ / samples with columns (kernel position, input channel)."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        network(images)
    hook.remove()
    X = seen[0]
    if isinstance(module, nn.Conv2d):
        taps = module.kernel_size[0] * module.kernel_size[1]
        patches = functional.unfold(X, module.kernel_size, padding=module.padding)
        X = (
            patches.view(len(X), module.in_channels, taps, -1)
            .permute(2, 1, 0, 3)
            .reshape(taps * module.in_channels, -1)
        )
    else:
        X = X.T
    X = X.double()
    return 2 * X @ X.T / X.shape[1]
