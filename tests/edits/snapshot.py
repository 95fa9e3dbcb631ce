# SPDX-License-Identifier: Apache-2.0
"""All that an edit could have changed about a model, for comparing before with after a refusal."""

from typing import Any

import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Structure and size attributes (`repr` and plain attributes), identity of parameters, hooks, and every bit."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "repr": repr(model),
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "bits": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items() if not _lazy(tensor)},
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "attributes": [
            {k: v for k, v in vars(m).items() if isinstance(v, int | float | str | tuple | bool | None)}
            for m in model.modules()
        ],
    }


def _lazy(tensor: torch.Tensor) -> bool:
    return torch.nn.parameter.is_lazy(tensor)
