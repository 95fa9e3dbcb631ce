# SPDX-License-Identifier: Apache-2.0
"""Looking up and replacing what an edit names, with one wording for what is not there."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.errors import EditError, nearest

__all__ = ["find_module", "find_tensor", "replace_module"]


def find_module(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if not name:
        raise EditError("the model itself cannot be replaced; wrap it: torch.nn.Sequential(model).")
    if name not in modules:
        raise EditError(f"the model has no layer {name!r}. Nearest: {', '.join(nearest(name, modules)) or 'none'}.")
    return modules[name]


def find_tensor(model: nn.Module, name: str) -> tuple[nn.Module, str, Tensor]:
    """The module that holds the tensor, its name there, and the parameter or buffer itself."""
    layer, _, leaf = name.rpartition(".")
    module = find_module(model, layer) if layer else model
    tensor: Tensor | None = module._parameters.get(leaf)
    if tensor is None:
        tensor = module._buffers.get(leaf)
    if tensor is None:
        known = [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
        raise EditError(f"the model has no tensor {name!r}. Nearest: {', '.join(nearest(name, known)) or 'none'}.")
    return module, leaf, tensor


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` stands: a shared module stays shared."""
    new.train(old.training)
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, leaf, new)
