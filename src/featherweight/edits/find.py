# SPDX-License-Identifier: Apache-2.0
"""Looking up and replacing what an edit names, with one wording for what is not there or may not be replaced."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from featherweight.errors import EditError, nearest

__all__ = ["call_children", "find_module", "find_replaceable", "find_tensor", "replace_module"]


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name; the empty name is the model itself."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise EditError(f"the model has no layer {name!r}. Nearest: {', '.join(nearest(name, modules)) or 'none'}.")
    return modules[name]


def find_tensor(model: nn.Module, name: str) -> tuple[nn.Module, str, Tensor]:
    """The module that holds the tensor, its name there, and the parameter or buffer itself."""
    layer, _, leaf = name.rpartition(".")
    module = find_module(model, layer)
    tensor: Tensor | None = module._parameters.get(leaf)
    if tensor is None:
        tensor = module._buffers.get(leaf)
    if tensor is None:
        known = [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
        raise EditError(f"the model has no tensor {name!r}. Nearest: {', '.join(nearest(name, known)) or 'none'}.")
    if is_lazy(tensor):
        raise EditError(f"{name} has no shape yet: it is of a lazy module; call the model once first.")
    return module, leaf, tensor


def find_replaceable(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, after making sure that another in its place would take over all that it does.

    Raises `EditError` for the model itself, for a layer that carries hooks, and for one that a module also keeps in a
    plain attribute or list, where nothing registered tells of it and the old one would go on being called.
    """
    layer = find_module(model, name)
    if layer is model:
        raise EditError("the model itself cannot be replaced; wrap it: torch.nn.Sequential(model).")
    if "input_grid" in layer._modules:
        raise EditError(f"{name} has a grid on its input, which would be lost; replace it before fake quantization.")
    if any(is_lazy(parameter) for parameter in layer.parameters()):
        raise EditError(f"{name} is a lazy module, which has no shape yet; call the model once first.")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise EditError(f"{name} has hooks, which would be lost with it; remove them first.")
    for owner, module in model.named_modules():
        for attribute, value in vars(module).items():
            kept = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            if attribute != "_modules" and any(item is layer for item in kept):
                raise EditError(
                    f"{name} is also in {owner or 'the model'}.{attribute}, which is not registered and would keep the "
                    "old one; make that a torch.nn.ModuleList."
                )
    return layer


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` stands: a shared module stays shared."""
    new.train(old.training)
    call_children(model, old)
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new


def call_children(model: nn.Module, layer: nn.Module) -> None:
    """Makes torch's transformer encoders that hold `layer` call it.

    In eval mode they read the weights of their children and compute with a fused kernel, past any module or hook that
    an edit put there. These two attributes are what they look at before they do, and serve nothing else.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(child is layer for child in module.modules()):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and any(child is layer for child in module.modules()):
            module.activation_relu_or_gelu = 0
