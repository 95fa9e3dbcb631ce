# SPDX-License-Identifier: Apache-2.0
"""A model's tensors, each once, with the names that are the same tensor: what is stored, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from featherweight.errors import ArtefactError

__all__ = ["fill", "tensors_and_ties"]


def tensors_and_ties(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state dict, each once under its first name, and for every other name the first one.

    Raises `ArtefactError` for state that is not a tensor (`get_extra_state`): it cannot be stored without pickle.

    >>> model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    >>> model["b"].weight = model["a"].weight
    >>> tensors, ties = tensors_and_ties(model)
    >>> list(tensors), ties
    (['a.weight'], {'b.weight': 'a.weight'})
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ArtefactError(
                f"{name} is {type(value).__name__}, not a tensor (get_extra_state of its module): it cannot be stored "
                "without pickle. Turn it into a buffer, or leave it to the module's constructor."
            )
        if id(value) in first:
            ties[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value.detach()
    return tensors, ties


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors into your model in place, on its own device, with their own dtype; each name must be the model's.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> import torch
    >>> fill(layer, {"weight": torch.tensor([[1.0, 2.0]])})
    >>> layer.weight.tolist()
    [[1.0, 2.0]]
    """
    state = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        state[name].data = tensor.to(state[name].device)
