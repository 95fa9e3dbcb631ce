# SPDX-License-Identifier: Apache-2.0
"""The zoo: at least one small network of each family, by label, with the inputs it takes and random weights.

Small, so that the whole zoo runs in minutes; of unequal sizes, so that no axis is taken for another because they happen
to be as long. Weights are drawn anew after building: norms that scale by one and shift by nothing, layer scales of 1e-6
and weights of 0.02 would let a wrong cut pass for a right one.
"""

from __future__ import annotations

import dataclasses
import importlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Architecture", "Inputs", "architectures", "find"]

Inputs = tuple[Any, ...] | dict[str, Any]

# One module a shelf; each has `SHELF`, a tuple of architectures.
SHELVES = ("networks", "vision", "maps", "text", "decoders", "pairs")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One family: `build` makes the network, `example` its inputs (positional, or a dict of keyword arguments)."""

    label: str
    build: Callable[[], nn.Module]
    example: Callable[[], Inputs]
    source: str = "written out"

    def make(self) -> tuple[nn.Module, Inputs]:
        """The network in eval mode with random weights, and its inputs: the same ones at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.label.encode()))
            model = self.build()
            _randomize(model)
            return model.eval(), self.example()


def architectures() -> tuple[Architecture, ...]:
    """All of them, in the order of the shelves. Importing this imports no transformers; building from them does.

    >>> len({each.label for each in architectures()}) >= 60
    True
    """
    shelves = [importlib.import_module(f"tests.zoo.{shelf}") for shelf in SHELVES]
    return tuple(architecture for shelf in shelves for architecture in shelf.SHELF)


def find(label: str) -> Architecture:
    found = {each.label: each for each in architectures()}
    return found[label]


def transformers_model(
    label: str, model: str, config: str, example: Callable[[], Inputs], **options: Any
) -> Architecture:
    """An architecture of the library `transformers`, from its configuration: nothing is downloaded."""

    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        made = getattr(library, config)(**options)
        made.use_cache = False  # a cache is an output: it would freeze every key and value
        return getattr(library, model)(made)

    return Architecture(label, build, example, f"transformers: {model}")


def image(height: int = 32, width: int | None = None, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, channels, height, width or height),)


def signal(length: int, channels: int | None = None) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, channels, length) if channels else torch.randn(2, length),)


def tokens(length: int = 9, vocabulary: int = 97) -> Callable[[], Inputs]:
    return lambda: (words(length, vocabulary),)


def words(length: int = 9, vocabulary: int = 97) -> Tensor:
    return torch.randint(3, vocabulary - 3, (2, length))  # clear of padding and other special ids


def named(**inputs: Callable[[], Tensor]) -> Callable[[], Inputs]:
    return lambda: {name: make() for name, make in inputs.items()}


def _randomize(model: nn.Module) -> None:
    """Weights as large as their fan-in asks for, norms and biases away from one and zero, and statistics of a BatchNorm."""
    done: set[int] = set()
    for module in model.modules():
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in done and parameter.is_floating_point():
                done.add(id(parameter))
                _draw(parameter.data, convolution)
        for name, buffer in _statistics(module).items():
            buffer.uniform_(0.5, 1.5) if name == "running_var" else buffer.normal_(0.0, 0.3)


def _draw(values: Tensor, convolution: bool) -> None:
    if values.dim() < 2:
        values.add_(torch.randn_like(values) * 0.2)
        return
    fan_in = values[0].numel() if convolution else values.shape[-1]
    values.normal_(0.0, fan_in**-0.5)


def _statistics(module: nn.Module) -> Mapping[str, Tensor]:
    buffers = dict(module.named_buffers(recurse=False))
    return {name: buffers[name] for name in ("running_mean", "running_var") if buffers.get(name) is not None}
