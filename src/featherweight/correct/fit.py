# SPDX-License-Identifier: Apache-2.0
"""All remaining weights together, trained to answer as the reference does: the paper's global AdaPrune, without labels.

Minimizes Σ ||y - y_ref||² / ||y_ref||² over layers' outputs and the model's own, with Adam ("Optimal Brain
Compression", Frantar and Alistarh, 2022, section 6 and appendix). Layers that were solved one by one make errors that
add up; here they make up for each other's. With few samples this can fit noise, so held-out samples say when to stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from featherweight.correct.keep import Moved
from featherweight.correct.outputs import (
    Forward,
    attention_mask,
    check_batches,
    energy,
    float_tensors,
    output_error,
    squared_error,
)
from featherweight.correct.surroundings import (
    Snapshot,
    canonical,
    evaluation,
    restore,
    seeded,
    snapshot,
    undone_on_error,
)
from featherweight.correct.zeros import standing_zeros
from featherweight.errors import NumericalError, OptionError, nearest
from featherweight.layers import Zeros, unwrap, weights

__all__ = ["MATCH", "check_fit", "fit_outputs", "movable"]

MATCH = ("both", "layers", "outputs")
_CUT, _CUTS = 1 / 3, 4


def fit_outputs(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    held_out_batches: Iterable[Any],
    forward: Forward,
    *,
    frozen: Collection[str] = (),
    lr: float = 1e-2,
    epochs: int = 20,
    patience: int = 3,
    match: str = "both",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda step, total: None,
) -> Moved:
    """Trains what remains of your model on the reference's outputs and leaves it in its best state on held-out samples.

    Adam, `epochs` passes over the batches, its step falling as a cosine from `lr` times the root mean square of each
    tensor's non-zeros, so that weights of any scale move alike. After `patience` epochs without a lower held-out
    `output_error` it goes on from the best state with a third of the step, and the fourth time it stops. `match` says
    whose outputs count: `layers`, the model's (`outputs`), or `both`. Zeros of weights stay zero, ties stay ties,
    `frozen` parameters (weights on a grid) do not move, BatchNorm runs on its statistics; gradients and `requires_grad`
    are the caller's again afterwards. The reference's outputs are computed batch by batch. Saves nothing; holds two
    copies of the parameters, besides their gradients and Adam's two.

    Raises `OptionError`, `DataError` or `NumericalError`; the model is then as it was.

    >>> reference, model = nn.Linear(4, 2), nn.Linear(4, 2)
    >>> data = [torch.randn(32, 4) for _ in range(4)]
    >>> def call(model: nn.Module, batch: Tensor) -> Tensor:
    ...     return model(batch)
    >>> before = output_error(model, reference, data, call)
    >>> fit_outputs(model, reference, data, data, call, lr=0.1).names
    ('weight', 'bias')
    >>> output_error(model, reference, data, call) < 0.1 * before
    True
    """
    check_fit(lr, epochs, patience, match)
    check_batches(batches), check_batches(held_out_batches, "held-out")
    free, left = movable(model, frozen)
    if not free:
        return Moved((), left)
    held = standing_zeros(model, reference)
    with (
        undone_on_error(free.values()) as start,
        seeded(seed, model),
        evaluation(model, reference),
        _training(model, free),
    ):
        target = _target(model, reference, batches, forward, match)
        optimizer = torch.optim.Adam([{"params": [p], "lr": lr * size} for p, size in _sizes(free.values())])
        zeros = Zeros(optimizer)
        for parameter in free.values():
            if id(parameter) in held:
                zeros.hold(parameter, held[id(parameter)])
        try:
            error = lambda: output_error(model, reference, held_out_batches, forward)  # noqa: E731
            better = _train(model, target, batches, zeros, start, error, epochs, patience, progress)
        finally:
            zeros.release()
    return Moved(tuple(free), left) if better else Moved((), left | {"all": "no epoch lowered the held-out error"})


def check_fit(lr: float, epochs: int, patience: int, match: str) -> None:
    """Raises `OptionError` for options that make no sense."""
    if not isinstance(lr, int | float) or not 0 < lr < 1:
        raise OptionError(f"lr is relative to the size of each tensor's values, above 0 and below 1; got {lr!r}.")
    for name, value in (("epochs", epochs), ("patience", patience)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name} must be a whole number from 1 on; got {value!r}.")
    if match not in MATCH:
        close = ", ".join(nearest(str(match), MATCH)) or MATCH[0]
        raise OptionError(f"match {match!r} is none of {', '.join(MATCH)}. Nearest: {close}.")


def movable(model: nn.Module, frozen: Collection[str]) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The parameters that may be trained, by canonical name, and those that may not, with the reason."""
    fixed = canonical(model, frozen)
    left = dict(weights(unwrap(model))[1])  # computed by a parametrization: zeros could not be held
    free: dict[str, nn.Parameter] = {}
    for name, parameter in unwrap(model).named_parameters():
        if id(parameter) in fixed:
            left[name] = "is frozen"
        elif is_lazy(parameter) or not parameter.is_floating_point():
            left.setdefault(name, "does not hold real numbers")
        elif name not in left:
            free[name] = parameter
    return free, left


@dataclasses.dataclass(frozen=True, eq=False)
class _Target:
    """What the model shall answer to: the reference's outputs of these layers (none: the model's own alone)."""

    reference: nn.Module
    forward: Forward
    layers: tuple[str, ...]
    own: bool
    energies: dict[str, float] = dataclasses.field(default_factory=dict)
    batches: int = 0

    @torch.no_grad()
    def outputs(self, batch: Any) -> dict[str, list[Tensor]]:
        """Copies, by layer, in the order of its calls: what follows a layer may work in place."""
        given: dict[str, list[Tensor]] = {}
        self.listen(self.reference, batch, lambda name, tensor: given.setdefault(name, []).append(tensor.clone()))
        return given

    def listen(self, model: nn.Module, batch: Any, hear: Callable[[str, Tensor], None]) -> None:
        """Runs the model on a batch and hands on the outputs that count, each under its name."""

        def hook(name: str) -> Callable[..., None]:
            def look(module: nn.Module, args: Any, output: Any) -> None:
                for _, tensor in float_tensors(output):
                    hear(name, tensor)
                    break

            return look

        modules = dict(unwrap(model).named_modules())
        hooks = [modules[name].register_forward_hook(hook(name)) for name in self.layers]
        try:
            answer = self.forward(model, batch)
        finally:
            for one in hooks:
                one.remove()
        for path, tensor in float_tensors(answer) if self.own else ():
            hear(f"output{path}", tensor)


def _target(model: nn.Module, reference: nn.Module, batches: Iterable[Any], forward: Forward, match: str) -> _Target:
    """With the energies of all outputs over all batches, so that each weighs alike."""
    names = dict(unwrap(reference).named_modules())
    # What the model as a whole gives counts as its own output; where it is one layer, as the layer's.
    own = [w.layer for w in weights(unwrap(model))[0] if w.layer or match == "layers"]
    found = dict.fromkeys(layer for layer in own if layer in names)
    target = _Target(reference, forward, () if match == "outputs" else tuple(found), match != "layers")
    energies: dict[str, float] = {}
    count = 0
    for batch in batches:
        mask = attention_mask(batch)
        for name, tensors in target.outputs(batch).items():
            energies[name] = energies.get(name, 0.0) + math.fsum(energy(tensor, mask) for tensor in tensors)
        count += 1
    for name, value in energies.items():
        if not math.isfinite(value):
            raise NumericalError(f"{name}: the dense reference gives NaN on the calibration samples.")
    return dataclasses.replace(target, energies=energies, batches=count)


def _loss(model: nn.Module, target: _Target, batch: Any) -> Tensor:
    """Σ ||y - y_ref||² / ||y_ref||² of this batch, times the number of batches."""
    given, mask = target.outputs(batch), attention_mask(batch)
    terms: list[Tensor] = []

    def hear(name: str, tensor: Tensor) -> None:
        wanted = given.get(name, [])
        size = target.energies.get(name, 0.0)
        y_ref = wanted.pop(0) if wanted else None
        # A layer of other channels than the reference's (it was cut) has nothing to answer to.
        if y_ref is not None and y_ref.shape == tensor.shape and size > 0:
            terms.append(squared_error(tensor, y_ref, mask) / size)

    with torch.enable_grad():
        target.listen(model, batch, hear)
        device = terms[0].device if terms else None
        return sum((term.to(device) for term in terms), torch.zeros((), device=device)) * target.batches


def _train(
    model: nn.Module,
    target: _Target,
    batches: Iterable[Any],
    zeros: Zeros,
    best: Snapshot,
    error: Callable[[], float],
    epochs: int,
    patience: int,
    progress: Callable[[int, int], None],
) -> bool:
    """Leaves the parameters of `best` in their best state; whether that is better than the first."""
    free, total = [parameter for parameter, _ in best], epochs * target.batches
    optimizer = cast(torch.optim.Optimizer, zeros.optimizer)
    full = [group["lr"] for group in optimizer.param_groups]
    start = least = error()
    done = waited = cuts = 0
    for epoch in range(epochs):
        now = math.inf
        with contextlib.suppress(NumericalError):  # it diverged
            for batch in batches:
                fall = (1 + math.cos(math.pi * min(done / total, 1.0))) / 2 * _CUT**cuts
                for group, lr in zip(optimizer.param_groups, full, strict=True):
                    group["lr"] = lr * fall
                _step(_loss(model, target, batch), free, optimizer, zeros)
                done += 1
            now = error()
        progress(epoch + 1, epochs)
        waited = 0 if now < least else waited + 1
        if now < least:
            best, least = snapshot(free), now
        if waited >= patience or not math.isfinite(now):
            restore(best)
            optimizer.state.clear()
            waited, cuts = 0, cuts + 1
            if cuts == _CUTS:
                break
    restore(best)
    return least < start


def _step(loss: Tensor, free: list[Tensor], optimizer: torch.optim.Optimizer, zeros: Zeros) -> None:
    if not loss.requires_grad:  # nothing that may move has a part in it
        return
    if not bool(loss.isfinite()):
        raise NumericalError("The loss is not finite; lr is too large.")
    gradients = torch.autograd.grad(loss, free, allow_unused=True)
    for parameter, gradient in zip(free, gradients, strict=True):
        parameter.grad = gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
    optimizer.step()
    zeros.enforce()


def _sizes(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, float]]:
    """Each with the root mean square of its non-zeros; of nothing but zeros (a bias, say), with the smallest of all."""
    sizes = []
    for parameter in parameters:
        values = parameter.detach().to(torch.float64)
        count = int((values != 0).sum())
        sizes.append((parameter, float((values.square().sum() / max(count, 1)).sqrt())))
    least = min((size for _, size in sizes if size > 0), default=1.0)
    return [(parameter, size or least) for parameter, size in sizes]


@contextlib.contextmanager
def _training(model: nn.Module, free: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for what is free and nothing else; what the caller had is put back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    own = {id(parameter) for parameter in free.values()}
    # cuDNN has no backward pass for recurrent layers in evaluation mode; torch's own has.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in own)
        with torch.backends.cudnn.flags(enabled=not recurrent):
            yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
