# SPDX-License-Identifier: Apache-2.0
"""How a pattern is written down: a small network, inputs that it takes, and what must be true of its couplings.

What must be true follows from reading the forward, not from running a resolver. Sizes are unequal and mostly prime, so
that no axis passes for another; every parameter and statistic is random, so that nothing passes for the identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Sizes = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """`groups`: the layers (or tensors) that make one axis together, joined by `+`, to how many couplings they are.

    A layer that makes two groups by itself has a tuple of their sizes. `dims` is the same at the grain of dimensions
    where that differs, `norms` the groups whose cut changes what a norm or a mean sees, `frozen` tensors to a pattern
    of the op or reason. `loose`: freezing more than `groups` says is as good, a wrong result is not.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    groups: Mapping[str, Sizes]
    dims: Mapping[str, Sizes] | None = None
    norms: tuple[str, ...] = ()
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    front: str = "export"
    loose: bool = False


PATTERNS: dict[str, Pattern] = {}


class Net(nn.Module):
    """Parts by name: modules, parameters, tensors (as buffers) and plain attributes. Patterns give it a forward."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)


def pattern(
    name: str,
    inputs: tuple[Any, ...],
    groups: Mapping[str, Sizes],
    parts: Callable[[], Mapping[str, Any]],
    **facts: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the function below it as the forward of a network of `parts`."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        forward.__code__ = forward.__code__.replace(co_name="forward")  # where torch notes the line of an operation
        kind = type(name, (Net,), {"forward": forward, "__module__": forward.__module__})
        add(name, inputs, groups, lambda: kind(parts()), **facts)
        return forward

    return register


def add(
    name: str, inputs: tuple[Any, ...], groups: Mapping[str, Sizes], make: Callable[[], nn.Module], **facts: Any
) -> None:
    if name in PATTERNS:
        raise ValueError(f"two patterns are called {name}")
    PATTERNS[name] = Pattern(lambda: randomised(make), inputs, groups, **facts)


def randomised(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode whose every value is random: also affines, biases and statistics that start as 0 and 1."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + 0.7)
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0.0, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def fixed(*shape: int) -> Tensor:
    """Random and always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **{"padding": k // 2, **options})


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The pattern's model and inputs in float64, where that is its type."""
    one = PATTERNS[name]
    return one.make().double(), tuple(x.double() if x.is_floating_point() else x for x in one.inputs)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors in whatever a model gives or takes."""
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


IMAGE = (fixed(2, 3, 8, 6),)
TOKENS = (fixed(2, 5, 9),)
WORDS = (torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]),)
