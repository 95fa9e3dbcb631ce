# SPDX-License-Identifier: Apache-2.0
"""BatchNorm's running statistics, estimated anew: compression moves what a layer gives, old statistics do not follow.

Exact over the calibration samples: sums over all batches, not torch's exponential average, nor the mean of the batches'
variances, which leaves out how far their means lie apart. The first pass normalizes by each batch's own statistics, as
training does; a further one by those that the pass before found, as evaluation will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from featherweight.correct.keep import Moved
from featherweight.correct.outputs import Forward, check_batches
from featherweight.correct.surroundings import evaluation, undone_on_error
from featherweight.correct.walk import Moments, Site, tokens
from featherweight.errors import NumericalError
from featherweight.layers import unwrap
from featherweight.layers.inputs import Call

__all__ = ["batch_norm_site", "reestimate_batch_norm", "running_statistics", "tracked_norms"]


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any], forward: Forward, passes: int = 2) -> Moved:
    """Sets `running_mean` and `running_var` of every BatchNorm of your model to those of its inputs on the batches.

    Mean and unbiased variance over all values of all batches, for BatchNorm1d, 2d, 3d and SyncBatchNorm; dropout and
    all else runs as in evaluation. Saves nothing. With more than one pass, layers see inputs that were normalized as
    they will be in evaluation. Norms that keep no statistics or that no batch reaches are left alone, and named.

    Raises `DataError` for no batch and `NumericalError` for values that are not finite; the model is then as it was.

    >>> norm = nn.BatchNorm1d(1)
    >>> reestimate_batch_norm(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]])], lambda m, x: m(x)).names
    ('running_mean', 'running_var')
    >>> norm.running_mean, norm.running_var
    (tensor([4.]), tensor([13.]))
    """
    batches = check_batches(batches)
    norms, left = tracked_norms(model)
    count = 0
    with undone_on_error(running_statistics(norms.values())), evaluation(model), torch.no_grad():
        for i in range(passes if norms else 0):
            found, count = _measure(model, norms, batches, forward, by_batch=i == 0)
            for name, moments in found.items():
                _set(norms[name], moments, count)
    for name in norms:
        if not count or found[name].count < 2:
            left[name] = "the calibration samples give it fewer than two values"
    names = [f"{name}.{part}".lstrip(".") for name in norms if name not in left for part in _PARTS]
    return Moved(tuple(names), left)


_PARTS = ("running_mean", "running_var")


def tracked_norms(model: nn.Module) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """The BatchNorm layers that keep running statistics, by name, and those that do not, with the reason."""
    norms: dict[str, _BatchNorm] = {}
    left: dict[str, str] = {}
    for name, module in unwrap(model).named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None or module.running_var is None:
            left[name] = "keeps no running statistics"
        elif is_lazy(module.running_mean):
            left[name] = "a lazy module that has not run yet"
        else:
            norms[name] = module
    return norms, left


def running_statistics(norms: Iterable[_BatchNorm]) -> list[Tensor]:
    """The buffers that re-estimation sets."""
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def batch_norm_site(name: str, norm: _BatchNorm) -> Site:
    """The same in a walk over layers: statistics of the inputs, all earlier layers being as they will be."""

    def read(call: Call) -> dict[str, Tensor]:
        return {"input": tokens(call.argument(0, "input").movedim(1, -1))}

    def fold(norm: nn.Module, dense: nn.Module, mine: Any, target: Any) -> Sequence[str] | str:
        if mine["input"].count < 2:
            return "the calibration samples give it fewer than two values"
        _set(cast(_BatchNorm, norm), mine["input"])
        return [f"{name}.{part}".lstrip(".") for part in _PARTS]

    return Site(name, name, running_statistics([norm]), read, fold)


def _measure(
    model: nn.Module, norms: dict[str, _BatchNorm], batches: Iterable[Any], forward: Forward, by_batch: bool
) -> tuple[dict[str, Moments], int]:
    """Moments of each norm's inputs, and the number of batches."""
    found = {name: Moments() for name in norms}

    def hook(name: str) -> Callable[..., None]:
        def look(norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = tokens(Call(norm, args, kwargs, None).argument(0, "input").movedim(1, -1))
            found[name].add(values)
            if not by_batch:
                return
            # What evaluation mode divides by is set to what training mode would: no mode to change, and a batch of one
            # value, which training mode refuses, is normalized by what was seen so far.
            own = Moments()
            own.add(values)
            source = own if own.count > 1 else found[name]
            if source.count > 1:
                _write(norm, source.mean, source.variance)

        return look

    count = 0
    hooks = [norm.register_forward_pre_hook(hook(name), with_kwargs=True) for name, norm in norms.items()]
    try:
        for batch in batches:
            forward(model, batch)
            count += 1
    finally:
        for one in hooks:
            one.remove()
    for name, moments in found.items():
        if not moments.finite:
            raise NumericalError(
                f"{name}: its inputs in the compressed model hold NaN or infinity on the calibration samples; its running "
                "statistics were left as they were."
            )
    return found, count


def _set(norm: _BatchNorm, moments: Moments, batches: int | None = None) -> None:
    if moments.count > 1:
        _write(norm, moments.mean, moments.unbiased)
        if norm.num_batches_tracked is not None and batches is not None:
            norm.num_batches_tracked.fill_(batches)


def _write(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    cast(Tensor, norm.running_mean).copy_(mean)
    cast(Tensor, norm.running_var).copy_(variance)
