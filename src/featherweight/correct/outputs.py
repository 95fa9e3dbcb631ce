# SPDX-License-Identifier: Apache-2.0
"""How far one model's answers are from another's: the one judge of every correction.

An answer is a tensor or anything nested of tensors; of it, the floating-point tensors count. Positions that the batch's
`attention_mask` marks as padding do not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.correct.surroundings import evaluation
from featherweight.errors import DataError, NumericalError, OptionError
from featherweight.layers import numbered
from featherweight.task import describe

__all__ = [
    "Forward",
    "attention_mask",
    "check_batches",
    "energy",
    "float_tensors",
    "output_error",
    "squared_error",
    "valid",
]

Forward = Callable[[Any, Any], Any]
_MODEL, _REFERENCE = "the compressed model", "the dense reference"


def output_error(model: nn.Module, reference: nn.Module, batches: Iterable[Any], forward: Forward) -> float:
    """||y - y_ref||² / ||y_ref||² over all batches, both models in evaluation mode; the mean of several outputs.

    Every floating-point tensor of the answer (tensor, tuple, dict, dataclass, nested at will) has a relative error of
    its own, summed over batches in float64, so that each counts alike whatever its scale; their mean is returned. An
    output that is zero throughout has error 0 if it is answered with zeros, else infinity. Changes neither model.

    Raises `NumericalError` that names the model whose answer is not finite, `DataError` for no batch or no
    floating-point output, `OptionError` where the two models answer in different shapes.

    >>> dense, compressed = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = dense.weight.fill_(2.0), compressed.weight.fill_(1.0)
    >>> output_error(compressed, dense, [torch.ones(4, 2)], lambda model, batch: model(batch))
    0.25
    """
    errors: dict[str, float] = {}
    energies: dict[str, float] = {}
    with evaluation(model, reference), torch.no_grad():
        for i, batch in numbered(check_batches(batches, "held-out")):
            mask = attention_mask(batch)
            targets = dict(float_tensors(forward(reference, batch)))
            answers = dict(float_tensors(forward(model, batch)))
            if not targets:
                raise DataError(
                    "The model's answer holds no floating-point tensor to compare. Give a forward that returns one, "
                    "the logits say: forward=lambda model, batch: model(batch).logits."
                )
            for path, target in targets.items():
                error, size = _compare(answers.get(path), target, mask, f"output{path} of batch {i}")
                errors[path] = errors.get(path, 0.0) + error
                energies[path] = energies.get(path, 0.0) + size
    return math.fsum(_ratio(errors[path], energies[path]) for path in errors) / len(errors)


def _ratio(error: float, energy: float) -> float:
    if energy > 0:
        return error / energy
    return 0.0 if error == 0 else math.inf


def _compare(answer: Tensor | None, target: Tensor, mask: Tensor | None, where: str) -> tuple[float, float]:
    """||y - y_ref||² and ||y_ref||² at counted positions. Equal infinities (masked logits) agree and weigh nothing."""
    if answer is None or answer.shape != target.shape:
        found = "nothing" if answer is None else describe(answer)
        raise OptionError(
            f"{where}: {_REFERENCE} answers with {describe(target)} and {_MODEL} with {found}. Give the model that was "
            "compressed, in the same structure, as reference."
        )
    error = float(squared_error(answer.to(torch.float64), target, mask))
    size = energy(target, mask)
    if not math.isfinite(error) or not math.isfinite(size):
        whose = _MODEL if math.isfinite(size) and not bool(target.isinf().any()) else _REFERENCE
        raise NumericalError(f"{where}: the answer of {whose} holds NaN or infinity, so that it cannot be compared.")
    return error, size


def float_tensors(answer: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of nested outputs, each with its path (`['logits']`, `[0]`, empty for a tensor alone).

    Looks into mappings, tuples, lists and dataclasses (a transformers `ModelOutput` is a mapping); other objects,
    caches say, hold nothing to compare. Complex tensors are read as pairs of real numbers.

    >>> [path for path, _ in float_tensors({"logits": torch.ones(2), "states": (torch.ones(2), torch.arange(2))})]
    ["['logits']", "['states'][0]"]
    """
    if isinstance(answer, Tensor):
        if answer.is_complex():
            answer = torch.view_as_real(answer)
        if answer.is_floating_point():
            yield path, answer
    elif isinstance(answer, Mapping):
        for key, item in answer.items():
            yield from float_tensors(item, f"{path}[{key!r}]")
    elif isinstance(answer, tuple | list):
        for i, item in enumerate(answer):
            yield from float_tensors(item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(answer) and not isinstance(answer, type):
        for field in dataclasses.fields(answer):
            yield from float_tensors(getattr(answer, field.name), f"{path}.{field.name}")


def attention_mask(batch: Any) -> Tensor | None:
    """The batch's `attention_mask` (items, positions) as bool, True where a position counts; None where there is none.

    It is looked for in a mapping, in mappings within a tuple, and as an attribute; masks of other shapes are not per
    position and not used.
    """
    found: Any = None
    if isinstance(batch, Mapping):
        found = batch.get("attention_mask")
    elif isinstance(batch, tuple | list):
        return next((mask for mask in map(attention_mask, batch) if mask is not None), None)
    elif not isinstance(batch, Tensor):
        found = getattr(batch, "attention_mask", None)
    return found != 0 if isinstance(found, Tensor) and found.ndim == 2 else None


def valid(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """(positions that count, ...) where the first two axes are those of the mask, else the tensor as it is."""
    if mask is None or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor[mask.to(tensor.device)]


def squared_error(answer: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """||y - y_ref||² at the positions that count, in at least float32, with its gradient. Equal infinities agree."""
    wide = torch.promote_types(answer.dtype, torch.float32)
    y, y_ref = valid(answer, mask).to(wide), valid(target, mask).to(answer.device, wide)
    return torch.where(y == y_ref, 0.0, y - y_ref).square().sum()


def energy(target: Tensor, mask: Tensor | None) -> float:
    """||y_ref||² at the positions that count, in float64, infinities left out."""
    y_ref = valid(target, mask).to(torch.float64)
    return float(torch.where(y_ref.isinf(), 0.0, y_ref).square().sum())


def check_batches(batches: Iterable[Any], what: str = "calibration") -> Iterable[Any]:
    """The batches, once it is known that they can be read again and again and that there is one.

    Raises `DataError`.
    """
    if hasattr(batches, "__next__") or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise DataError(
            f"The {what} batches are {describe(batches)}, which can be read once at most; they are read several times. "
            "Give a list of batches or a DataLoader."
        )
    if next(iter(batches), None) is None:
        raise DataError(f"There is no {what} batch. Check the data set and drop_last.")
    return batches
