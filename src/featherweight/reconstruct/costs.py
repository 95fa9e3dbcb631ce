# SPDX-License-Identifier: Apache-2.0
"""What each weight costs when it is dense: the MACs of one forward, op by op as `measure` counts them.

A module's products are credited to its weights by their size, each being used as often as the others (the gates of an
LSTM, say). MultiheadAttention multiplies activations too, so its weights are counted from the tokens that it is called
with. Whatever is left over is no weight's and nobody can prune it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from featherweight.layers import unwrap, weights
from featherweight.measure import eval_copy
from featherweight.measure.macs import count_work

__all__ = ["dense_macs"]


def dense_macs(model: nn.Module, forward: Callable[[Any, Any], Any], batch: Any) -> tuple[dict[str, float], float]:
    """Multiply-adds of each weight, by its canonical name, and of the whole model, in one forward of a batch.

    A weight that is only looked up (an embedding) costs none; one that is tied costs what all its modules do with it.

    >>> import torch
    >>> from featherweight.task import default_forward
    >>> dense_macs(nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1)), default_forward, torch.zeros(3, 4))
    ({'0.weight': 96.0}, 96.0)
    """
    twin = _Called(eval_copy(unwrap(model)), forward)
    attention: Counter[str] = Counter()
    _watch_attention(twin.model, attention)
    work = count_work(twin, (batch,))
    found: Counter[str] = Counter()
    names = {id(weight.parameter): weight.name for weight in weights(twin.model)[0]}
    inside = {id(child) for module in _attentions(twin.model).values() for child in module.modules()}
    for name, module in twin.model.named_modules():
        own = {names[id(p)]: p.numel() for p in module.parameters(recurse=False) if id(p) in names}
        if id(module) in inside or not own:
            continue
        macs = work.macs[f"model.{name}" if name else "model"]
        for weight, entries in own.items():
            found[weight] += macs * entries / sum(own.values())
    for weight, macs in attention.items():
        found[weight] += macs
    return {name: float(found[name]) for name in names.values()}, float(sum(work.macs.values()))


class _Called(nn.Module):
    """The model as the task's `forward` calls it, so that a batch of any kind can be counted."""

    def __init__(self, model: nn.Module, forward: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model, self.call = model, forward

    def forward(self, batch: Any) -> Any:
        return self.call(self.model, batch)


def _attentions(model: nn.Module) -> Mapping[str, nn.MultiheadAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}


def _watch_attention(model: nn.Module, found: Counter[str]) -> None:
    names = {id(weight.parameter): weight.name for weight in weights(model)[0]}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        words = ("query", "key", "value")
        tokens = [_tokens(args[i] if len(args) > i else kwargs[word]) for i, word in enumerate(words)]
        of = dict(module.named_parameters())
        if "in_proj_weight" in of:
            found[names[id(of["in_proj_weight"])]] += sum(tokens) * of["in_proj_weight"].numel() // 3
        else:
            for leaf, n in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True):
                found[names[id(of[leaf])]] += n * of[leaf].numel()
        found[names[id(of["out_proj.weight"])]] += tokens[0] * of["out_proj.weight"].numel()

    for module in _attentions(model).values():
        module.register_forward_pre_hook(count, with_kwargs=True)


def _tokens(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]
