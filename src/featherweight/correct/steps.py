# SPDX-License-Identifier: Apache-2.0
"""All corrections, one after the other, each kept only where held-out samples are then answered better."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
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
    lr: float = 1e-3,
    patience: int = 3,
    match: str = "both",
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[Correction, ...]:
    """Corrects your compressed model in place toward the dense `reference`, without labels; says what helped.

    - `batch_norm`: `reestimate_batch_norm`.
    - `moments`: `match_moments`, of BatchNorm's outputs too where `batch_norm` is not among the steps.
    - `bias`: `correct_bias`.
    - `outputs`: `fit_outputs` with `epochs`, `lr`, `patience` and `match`.

    Each step is fitted on `fit_batches` and kept where `output_error` on `held_out_batches` falls, else undone to the
    last bit. Held-out samples decide, so measure the final figure on others. Zeros and ties stand, parameters named
    `frozen` do not move, modes, gradients and random state are the caller's again; all that changed is in the state
    dict. Where anything is raised, Ctrl-C included, the model is as it was before the first step.

    `report` gets `{"kind": "progress", "correction", "step", "total"}` within a step and `{"kind": "correction", ...}`,
    the fields of `Correction`, after it (`after` is None where the answers were NaN).

    Raises `OptionError` for an unknown step or name, `DataError` for batches that cannot be read again, `NumericalError`
    for answers that are not finite.

    >>> import torch
    >>> reference, model = nn.Linear(1, 2), nn.Linear(1, 2)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(reference.weight), model.bias.copy_(reference.bias - 1)
    >>> data = [torch.randn(8, 1)]
    >>> for done in correct(model, reference, data, data, lambda model, batch: model(batch), ["batch_norm", "bias"]):
    ...     print(done.name, done.kept, done.note)
    batch_norm False nothing to correct
    bias True 1 tensors corrected
    """
    steps = _check(steps)
    check_fit(lr, epochs, patience, match)
    canonical(model, frozen)
    check_batches(fit_batches), check_batches(held_out_batches, "held-out")

    def error() -> float:
        with seeded(seed, model):
            return output_error(model, reference, held_out_batches, forward)

    def attempt(step: str) -> Moved:
        def progress(done: int, total: int) -> None:
            report({"kind": "progress", "correction": step, "step": done, "total": total})

        both = (model, reference, fit_batches)
        if step == "batch_norm":
            return reestimate_batch_norm(model, fit_batches, forward)
        if step == "moments":
            also = "batch_norm" not in steps
            return match_moments(*both, forward, frozen=frozen, batch_norm=also, progress=progress)
        if step == "bias":
            again = any(one.name == "batch_norm" and one.kept for one in done)
            return correct_bias(*both, forward, frozen=frozen, batch_norm=again, progress=progress)
        options: dict[str, Any] = {"lr": lr, "epochs": epochs, "patience": patience, "match": match, "seed": seed}
        return fit_outputs(*both, held_out_batches, forward, frozen=frozen, progress=progress, **options)

    def seeded_attempt(step: str) -> Moved:
        with seeded(seed, model):
            return attempt(step)

    done: list[Correction] = []
    touched = [_touched(model, step, frozen) for step in steps]
    # keep_if_better undoes the step that failed; here are those before it.
    with undone_on_error({id(t): t for tensors in touched[:-1] for t in tensors}.values()):
        least = error() if steps else 0.0
        for step, tensors in zip(steps, touched, strict=True):
            if least == 0.0:
                one = Correction(
                    step, least, least, False, "nothing to correct: the model answers as the reference does"
                )
            else:
                one = keep_if_better(step, functools.partial(seeded_attempt, step), tensors, error, least)
            done.append(one)
            least = one.error
            after = one.after if math.isfinite(one.after) else None
            report({"kind": "correction", **dataclasses.asdict(one), "after": after})
    return tuple(done)


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
    if step == "moments":
        return [parameter for norm in affine_norms(model)[0].values() for parameter in norm.parameters(recurse=False)]
    if step == "bias":
        biases = [parameter for parameter in unwrap(model).parameters() if parameter.ndim == 1]
        return [*biases, *running_statistics(tracked_norms(model)[0].values())]
    return list(movable(model, frozen)[0].values())
