# SPDX-License-Identifier: Apache-2.0
"""Where in a model something went wrong: the layer, and the line of its code."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight.edits.exact import Exact, run
from featherweight.edits.zeroed import zeros

if TYPE_CHECKING:
    from featherweight.edits.verify import Oracle

__all__ = ["first_difference", "layer_of", "whereabouts"]

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parents[1])


def layer_of(error: BaseException, model: nn.Module) -> str | None:
    """The innermost layer of the model that was running when the error came up."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        me = frame.f_locals.get("self")
        if isinstance(me, nn.Module) and id(me) in names:
            found = names[id(me)]
    return found


def whereabouts(error: BaseException, model: nn.Module) -> str:
    """The layer, the line of the model's own code (of torch's, where there is none) and the message, in one phrase."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    frames = [(code, line) for code, line in frames if not code.co_filename.startswith(_OURS)]
    own = [(code, line) for code, line in frames if not code.co_filename.startswith(_TORCH)] or frames
    layer = layer_of(error, model)
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": .")
    place = f"in {layer}" if layer else "in the model"
    if own:
        code, line = own[-1]
        source = linecache.getline(code.co_filename, line).strip()
        place += f", {Path(code.co_filename).name}:{line} in {code.co_name}" + (f": `{source}`" if source else "")
    return f"{place}: {text}"


def first_difference(oracle: Oracle, after: nn.Module, tolerance: float) -> str:
    """The first layer whose output has the same shape in the masked and in the cut model, and other values."""
    exact = Exact(oracle.record)
    cut = _outputs(oracle, after, exact)
    with zeros(oracle.lost):
        masked = _outputs(oracle, oracle.base, Exact(oracle.record, frozenset(exact.held)))
    for (name, ours), (other, theirs) in zip(cut, masked, strict=False):
        if name != other:
            break
        if ours.shape == theirs.shape and ours.numel():
            scale = float(theirs.abs().amax()) or 1.0
            if not float((ours - theirs).abs().amax()) <= tolerance * scale:
                return f"; the first layer to differ is {name or 'the model itself'}"
    return ""


def _outputs(oracle: Oracle, model: nn.Module, exact: Exact) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                found.append((name, first.detach().clone()))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            run(model, oracle.inputs, exact, oracle.seed)
    finally:
        for handle in handles:
            handle.remove()
    return found
