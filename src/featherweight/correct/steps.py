# SPDX-License-Identifier: Apache-2.0
"""All corrections, one after the other, each kept only where held-out samples are then answered better."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from featherweight.correct.batch_norm import reestimate_batch_norm, running_statistics, tracked_norms
from featherweight.correct.bias import correct_bias
from featherweight.correct.fit import check_fit, fit_outputs, movable
from featherweight.correct.keep import Correction, Moved, keep_if_better
from featherweight.correct.norms import affine_norms, match_moments
from featherweight.correct.outputs import Forward, check_batches, output_error
from featherweight.correct.surroundings import canonical, seeded, undone_on_error
from featherweight.errors import OptionError, nearest
from featherweight.layers import unwrap

__all__ = ["CORRECTIONS", "correct"]

CORRECTIONS = ("batch_norm", "moments", "bias", "outputs")


def correct(
    model: nn.Module,
    reference: nn.Module,
    fit_batches: Iterable[Any],
    held_out_batches: Iterable[Any],
    forward: Forward,
    steps: Sequence[str] = CORRECTIONS,
    *,
    frozen: Collection[str] = (),
    seed: int = 0,
    epochs: int = 20,
    lr: float = 1e-2,
    patience: int = 3,
    match: str = "both",
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[Correction, ...]:
    """Corrects your compressed model in place toward the dense `reference`, without labels; says what helped.

    - `batch_norm`: `reestimate_batch_norm`.
    - `moments`: `match_moments`.
    - `bias`: `correct_bias`, without and with the norms' corrections that were kept made again.
    - `outputs`: `fit_outputs` with `epochs`, `lr`, `patience` and `match`.

    Each step is fitted on `fit_batches` and kept where `output_error` on `held_out_batches` falls, else undone to the
    last bit. Held-out samples decide, so measure the final figure on others. Zeros and ties stand, parameters named
    `frozen` do not move, modes, gradients and random state are the caller's again; all that changed is in the state
    dict. Where anything is raised, Ctrl-C included, the model is as it was before the first step.

    `report` gets `{"kind": "progress", "correction", "step", "total"}` within a step and `{"kind": "correction", ...}`,
    the fields of `Correction`, after it (`after` is None where the answers were NaN).

    Raises `OptionError` for an unknown step or name, `DataError` for batches that cannot be read again,
    `NumericalError` for answers that are not finite.

    >>> import torch
    >>> reference, model = nn.Linear(1, 2), nn.Linear(1, 2)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(reference.weight), model.bias.copy_(reference.bias - 1)
    >>> data = [torch.randn(8, 1)]
    >>> for done in correct(model, reference, data, data, lambda model, batch: model(batch), ["batch_norm", "bias"]):
    ...     print(done.name, done.kept, done.note)
    batch_norm False nothing to correct
    bias True 1 tensor corrected
    """
    steps = _check(steps)
    check_fit(lr, epochs, patience, match)
    canonical(model, frozen)
    check_batches(fit_batches), check_batches(held_out_batches, "held-out")

    def error() -> float:
        with seeded(seed, model):
            return output_error(model, reference, held_out_batches, forward)

    def attempt(step: str, again: Sequence[str] = ()) -> Moved:
        def progress(done: int, total: int) -> None:
            report({"kind": "progress", "correction": step, "step": done, "total": total})

        data = (model, reference, fit_batches)
        options: dict[str, Any] = {"frozen": frozen, "progress": progress}
        with seeded(seed, model):
            if step == "batch_norm":
                return reestimate_batch_norm(model, fit_batches, forward)
            if step == "moments":
                return match_moments(*data, forward, **options)
            if step == "bias":
                return correct_bias(*data, forward, again=again, **options)
            options |= {"lr": lr, "epochs": epochs, "patience": patience, "match": match, "seed": seed}
            return fit_outputs(*data, held_out_batches, forward, **options)

    touched = {step: _touched(model, step, frozen) for step in steps}
    done: list[Correction] = []
    with undone_on_error({id(tensor): tensor for step in steps for tensor in touched[step]}.values()):
        least = error() if steps else 0.0
        for step in steps:
            one = _try(step, attempt, touched[step], error, least, done)
            done.append(one)
            least = one.error
            after = one.after if math.isfinite(one.after) else None
            report({"kind": "correction", **dataclasses.asdict(one), "after": after})
    return tuple(done)


def _try(
    step: str,
    attempt: Callable[..., Moved],
    tensors: list[Tensor],
    error: Callable[[], float],
    least: float,
    done: Sequence[Correction],
) -> Correction:
    if least == 0:
        return Correction(step, 0.0, 0.0, False, "nothing to correct: the model answers as the reference does")
    one = keep_if_better(step, partial(attempt, step), tensors, error, least)
    again = [other.name for other in done if other.kept and other.name in ("batch_norm", "moments")]
    if step == "bias" and again:
        # Norms read what biases move. To make their corrections again is better on some networks and worse on others.
        second = keep_if_better(step, partial(attempt, step, again), tensors, error, one.error)
        return dataclasses.replace(second, before=one.before) if second.kept else one
    return one


def _check(steps: Sequence[str]) -> tuple[str, ...]:
    if isinstance(steps, str):
        raise OptionError(
            f'steps is a list of {", ".join(CORRECTIONS)}; got {steps!r}. For one step: steps=["{steps}"].'
        )
    for step in steps:
        if step not in CORRECTIONS:
            close = ", ".join(nearest(str(step), CORRECTIONS)) or CORRECTIONS[0]
            raise OptionError(f"steps: {step!r} is none of {', '.join(CORRECTIONS)}. Nearest: {close}.")
    return tuple(steps)


def _touched(model: nn.Module, step: str, frozen: Collection[str]) -> list[Tensor]:
    """All that a step may change."""
    if step == "batch_norm":
        return running_statistics(tracked_norms(model)[0].values())
    affine: list[Tensor] = [
        parameter for norm in affine_norms(model)[0].values() for parameter in norm.parameters(recurse=False)
    ]
    if step == "moments":
        return affine
    if step == "bias":
        biases = [parameter for parameter in unwrap(model).parameters() if parameter.ndim == 1]
        return [*biases, *affine, *running_statistics(tracked_norms(model)[0].values())]
    return list(movable(model, frozen)[0].values())
