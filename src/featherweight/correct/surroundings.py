# SPDX-License-Identifier: Apache-2.0
"""What a correction borrows and gives back: modes, hooks, random state, and values that a failed attempt had moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from featherweight.errors import OptionError, nearest
from featherweight.layers import unwrap

__all__ = [
    "Snapshot",
    "canonical",
    "evaluation",
    "restore",
    "seeded",
    "shared_parameters",
    "snapshot",
    "state_tensors",
    "undone_on_error",
]

Snapshot = list[tuple[Tensor, Tensor]]


@contextlib.contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, each in its own mode again afterwards.

    torch's fused attention is off meanwhile: it would call no submodule, and hooks would see nothing.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for model in models:
            model.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Torch's random state as `seed` makes it, the caller's own afterwards: shuffling and augmenting loaders repeat."""
    devices = {tensor.device for tensor in state_tensors(model) if tensor.is_cuda}
    with torch.random.fork_rng(devices=[device for device in devices if device.index is not None]):
        torch.manual_seed(seed)
        yield


def state_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*model.parameters(), *{id(buffer): buffer for buffer in model.buffers()}.values()]


def snapshot(tensors: Iterable[Tensor]) -> Snapshot:
    """The tensors with copies of their values."""
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


@torch.no_grad()
def restore(saved: Snapshot) -> None:
    """Puts the values back, to the last bit."""
    for tensor, values in saved:
        tensor.copy_(values)


@contextlib.contextmanager
def undone_on_error(tensors: Iterable[Tensor]) -> Iterator[Snapshot]:
    """Gives the tensors their values back where anything is raised, Ctrl-C included. Yields the copy of them."""
    saved = snapshot(tensors)
    try:
        yield saved
    except BaseException:
        restore(saved)
        raise


def canonical(model: nn.Module, names: Iterable[str], option: str = "frozen") -> set[int]:
    """Identities of parameters with these names, any of a tied one's. Raises `OptionError` with the nearest names."""
    known: Mapping[str, nn.Parameter] = dict(unwrap(model).named_parameters(remove_duplicate=False))
    wrong = [name for name in names if name not in known]
    if wrong:
        close = ", ".join(nearest(wrong[0], known)) or ", ".join(list(known)[:3]) or "none: it has no parameters"
        raise OptionError(f"{option}: {wrong[0]!r} is no parameter of the model. Nearest names: {close}.")
    return {id(known[name]) for name in names}


def shared_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that more than one module holds: what is right for one is not for the other."""
    owners: dict[int, int] = {}
    for module in unwrap(model).modules():
        for parameter in {id(p): p for p in module.parameters(recurse=False)}.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}
