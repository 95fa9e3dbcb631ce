# SPDX-License-Identifier: Apache-2.0
"""Scores from data without training: gates, curvature, activations and Hessians over calibration batches.

The model runs in evaluation mode and is left as it was; what it computes is the user's loss on the user's batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.errors import NumericalError
from featherweight.graph import Group
from featherweight.layers import collect
from featherweight.prune.channels.activation import InputNorms
from featherweight.prune.channels.curvature import curvature
from featherweight.prune.channels.gates import PerSample, gate_gradient, gate_members, seen_by_hooks
from featherweight.prune.channels.importance import (
    OF_GATES,
    PER_SAMPLE,
    check_finite,
    normalized,
    of_weights,
    users,
)
from featherweight.prune.channels.obs import consumers, structured_obs
from featherweight.prune.channels.options import ChannelOptions
from featherweight.task import tensors_in

__all__ = ["NEEDS_LOSS", "Data", "batch_norm_scales", "finished", "gate_scores", "needs_data", "scores_of"]

NEEDS_LOSS = (*OF_GATES, "curvature")
_PROBES = 8
Loss = Callable[[Any], Tensor]


class Data:
    """What scores are measured on: batches, how the model is called on one, and its loss (None if none is needed)."""

    def __init__(
        self, batches: Sequence[Any], forward: Callable[[Any, Any], Any], loss: Callable[[Any, Any], Tensor] | None
    ) -> None:
        self.batches, self.forward, self.loss = batches, forward, loss

    def of(self, model: nn.Module) -> Iterator[Tensor]:
        """The loss of each batch. Raises `NumericalError` where one is not finite."""
        for i, batch in enumerate(self.batches):
            yield self.one(model, batch, f"batch {i}")

    def one(self, model: nn.Module, batch: Any, where: str) -> Tensor:
        if self.loss is None:
            raise NumericalError("This importance needs a loss, and there is none.")
        loss = self.loss(self.forward(model, batch), batch)
        if not bool(loss.isfinite()):
            raise NumericalError(f"The loss of {where} of the data is {loss.item()}; nothing was cut.")
        return loss


def needs_data(importance: object) -> bool:
    """Whether an importance asks for batches."""
    return importance in (*NEEDS_LOSS, "activation", "structured_obs")


def batch_norm_scales(model: nn.Module) -> frozenset[str]:
    """Names of the BatchNorms' weights."""
    return frozenset(
        f"{name}.weight".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.weight is not None
    )


def finished(found: Mapping[str, Tensor], scaling: str) -> dict[str, Tensor]:
    """Scores as they are ranked: finite, normalized by group, in float64 on the CPU."""
    return {name: normalized(check_finite(name, scores), scaling) for name, scores in found.items()}


def scores_of(
    model: nn.Module,
    groups: Sequence[Group],
    gone: Mapping[str, np.ndarray],
    options: ChannelOptions,
    data: Data | None,
    step: int = 0,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The score of each coupling (size,) by group, and the groups that this importance cannot rank, with the reason."""
    importance = options.importance
    tensors = model.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    if callable(importance):
        found = {group.name: users(group, tensors, importance) for group in groups}
    elif not needs_data(importance):
        scales = batch_norm_scales(model)
        for group in groups:
            one = of_weights(group, tensors, importance, options.seed, step, scales)
            if isinstance(one, str):
                reasons[group.name] = one
            else:
                found[group.name] = one
    elif data is not None:
        with _evaluating(model):
            found, reasons = _from_data(model, groups, gone, options, data)
    return finished(found, options.scaling), reasons


def _from_data(
    model: nn.Module, groups: Sequence[Group], gone: Mapping[str, np.ndarray], options: ChannelOptions, data: Data
) -> tuple[dict[str, Tensor], dict[str, str]]:
    importance = str(options.importance)
    if importance == "structured_obs":
        known, reasons = consumers(model, groups)
        wanted = {consumer.problem.name: consumer.problem for own in known.values() for consumer in own}
        statistics = collect(model, list(wanted.values()), list(data.batches), data.forward) if wanted else {}
        found, unreached = structured_obs(known, statistics, gone)
        return found, reasons | unreached
    if importance == "activation":
        norms = InputNorms(model, groups)
        with norms, torch.no_grad():
            for batch in data.batches:
                data.forward(model, batch)
        return norms.scores(), norms.reasons
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained, reasons = _with_gradients(parameters, groups, options)
    if importance == "curvature":
        gradients = _mean_gradients(model, parameters, trained, options, data)
        unused = [group for group in trained if gate_gradient(group, parameters, gradients(), options.gates) is None]
        reasons |= {group.name: "the loss does not depend on it" for group in unused}
        trained = [group for group in trained if group not in unused]
        return curvature(parameters, trained, gradients, _PROBES, options.gates, options.seed), reasons
    found = gate_scores(model, parameters, trained, importance, options.gates, data)
    return found, reasons | {g.name: "the loss does not depend on it" for g in trained if g.name not in found}


def gate_scores(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[Group],
    importance: str,
    where: str,
    data: Data,
) -> dict[str, Tensor]:
    """Taylor, CPD, Fisher or head scores by group, summed over batches; groups that no gradient reaches are absent.

    Per-sample scores of what hooks cannot see come sample by sample, one backward pass each.
    """
    per_sample = importance in PER_SAMPLE
    hooked = [group for group in groups if per_sample and seen_by_hooks(model, group, where) is None]
    others = [group for group in groups if group not in hooked]
    found: dict[str, Tensor] = {}

    def add(name: str, gradients: Tensor) -> None:
        own = OF_GATES[importance](gradients)
        found[name] = found[name] + own if name in found else own

    wanted = sorted({member.tensor for group in others for member in gate_members(group, where)})
    if hooked:
        with PerSample(model, hooked, where) as watch:
            for loss in data.of(model):
                torch.autograd.grad(loss, [p for p in parameters.values() if p.requires_grad], allow_unused=True)
                for name, own in watch.take().items():
                    add(name, own)
    if others:
        for i, batch in enumerate(data.batches):
            for one in _samples(batch) if per_sample else [batch]:
                gradients = _gradients(data.one(model, one, f"batch {i}"), parameters, wanted)
                for group in others:
                    found_here = gate_gradient(group, parameters, gradients, where)
                    if found_here is not None:
                        add(group.name, found_here[None])
    return found


def _with_gradients(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[Group], options: ChannelOptions
) -> tuple[list[Group], dict[str, str]]:
    trained, reasons = [], {}
    for group in groups:
        names = [member.tensor for member in gate_members(group, options.gates)]
        wrong = next((name for name in names if name not in parameters or not parameters[name].requires_grad), None)
        if wrong is None:
            trained.append(group)
        else:
            why = "is not trained" if wrong in parameters else "is computed by a parametrization"
            reasons[group.name] = f"{wrong} {why}, and importance={options.importance!r} needs its gradient"
    return trained, reasons


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    return dict(zip(names, found, strict=True))


def _mean_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[Group],
    options: ChannelOptions,
    data: Data,
) -> Callable[[], dict[str, Tensor | None]]:
    """Gradients of the mean loss of all batches."""
    names = sorted({member.tensor for group in groups for member in gate_members(group, options.gates)})

    def mean() -> dict[str, Tensor | None]:
        total: dict[str, Tensor | None] = dict.fromkeys(names)
        for loss in data.of(model):
            for name, gradient in _gradients(loss / len(data.batches), parameters, names).items():
                if gradient is not None:
                    before = total[name]
                    total[name] = gradient if before is None else before + gradient
        return total

    return mean


def _samples(batch: Any) -> Iterator[Any]:
    """A batch's samples as batches of one, cut along the first axis of all its tensors."""
    count = next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 1)
    return (_part(batch, slice(i, i + 1), count) for i in range(count))


def _part(value: Any, part: slice, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _part(item, part, count) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_part(item, part, count) for item in value)
    return value


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients; torch's fused attention, which calls no submodule, is off."""
    modes = {module: module.training for module in model.modules()}
    # cuDNN has no backward pass for recurrent layers in evaluation mode; torch's own has.
    recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.backends.cudnn.flags(enabled=not recurrent), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
