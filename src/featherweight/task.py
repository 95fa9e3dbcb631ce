# SPDX-License-Identifier: Apache-2.0
"""What the user brings (`Task`), and what a method is (`Method`, called with a `Stage`).

A task knows nothing of methods; a method sees the task, a working copy of the model and its stage, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from featherweight.errors import DataError, OptionError
from featherweight.plan import Plan

__all__ = ["Method", "Stage", "Task", "batches", "default_forward", "describe", "tensors_in"]


def describe(value: object) -> str:
    """A short picture of nested data, for messages: `tuple(Tensor[64, 1, 28, 28] float32, Tensor[64] int64)`."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return "dict(" + ", ".join(f"{key}={describe(item)}" for key, item in value.items()) + ")"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}(" + ", ".join(describe(item) for item in value) + ")"
    return type(value).__name__


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested data, mappings of every kind among them, in their order.

    >>> import torch
    >>> [int(tensor) for tensor in tensors_in(({"x": torch.tensor(1), "n": 3}, [torch.tensor(2)]))]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ():
        yield from tensors_in(item)


def default_forward(model: Callable[..., Any], batch: Any) -> Any:
    """Calls the model on a batch: a tensor as it is, a dict by keyword, a tuple without its last item (the target).

    A tuple or list of one item passes that item; of n > 1 items, the first n - 1. Anything else needs a `forward` of
    your own: `Task(..., forward=lambda model, batch: model(batch.image))`.

    >>> import torch
    >>> default_forward(torch.nn.ReLU(), (torch.tensor([-1.0, 2.0]), "label"))
    tensor([0., 2.])
    """
    try:
        if isinstance(batch, Tensor):
            return model(batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list) and batch:
            return model(*batch[:-1]) if len(batch) > 1 else model(batch[0])
    except TypeError as error:
        raise DataError(
            f"The model could not be called with what the data yields, {describe(batch)}: {error}. "
            "Give Task(forward=lambda model, batch: ...) that unpacks your batches."
        ) from error
    raise DataError(
        f"The data yields {describe(batch)}; forward takes a tensor, a tuple (inputs..., target) or a dict. "
        "Give Task(forward=lambda model, batch: ...) that unpacks your batches."
    )


@dataclasses.dataclass(frozen=True, kw_only=False)
class Task:
    """What a user brings: a model, inputs that it accepts, data, and a way to score it. Nothing here is ever changed.

    `model` is the reference: `compress` works on a copy. `example_inputs` is the tuple of positional arguments of one
    forward call. `train` and `calibration` are re-iterables (a DataLoader, a list) of batches: a tensor, a tuple whose
    last item is the target, or a dict. `loss(outputs, batch)` gives a scalar tensor; `evaluate(model)` takes any
    callable that answers as the model does and gives a float, named `metric`, on `samples` examples.

    Raises `OptionError` for a wrong type and `DataError` for a one-shot iterator.

    >>> import torch
    >>> task = Task(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
    >>> task.metric
    'metric'
    """

    model: nn.Module
    example_inputs: tuple[Any, ...]
    train: Iterable[Any] | None = None
    calibration: Iterable[Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    evaluate: Callable[[Callable[..., Any]], float] | None = None
    forward: Callable[[Any, Any], Any] = default_forward
    metric: str = "metric"
    higher_is_better: bool = True
    samples: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise OptionError(f"Task.model is {describe(self.model)}, not a torch.nn.Module.")
        if not isinstance(self.example_inputs, tuple):
            raise OptionError(
                f"Task.example_inputs is {describe(self.example_inputs)}; give a tuple of the forward call's "
                "positional arguments, for one tensor: example_inputs=(x,)."
            )
        for name in ("train", "calibration"):
            _refuse_one_shot(name, getattr(self, name))


def _refuse_one_shot(name: str, data: Iterable[Any] | None) -> None:
    if data is None:
        return
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise DataError(
            f"Task.{name} is {describe(data)}, which cannot be iterated. Give a DataLoader or a list of batches."
        )
    if hasattr(data, "__next__"):
        raise DataError(
            f"Task.{name} is a one-shot iterator ({type(data).__name__}): its second epoch would be empty, and a run "
            "could not be resumed. Give what makes it: a DataLoader, or a list of batches."
        )


def batches(data: Iterable[Any] | None, name: str) -> Iterable[Any]:
    """The data, after making sure that it is there and yields at least one batch.

    Raises `DataError` that names which of the task's loaders is missing or empty.
    """
    if data is None:
        raise DataError(
            f"This needs data, but the task has none: give Task({name}=...), a DataLoader or a list of batches."
        )
    if next(iter(data), None) is None:
        raise DataError(f"Task.{name} is empty: it yielded no batch. Check the data set and drop_last.")
    return data


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where a method may keep its checkpoints and to whom it tells how it gets on.

    `folder` is None when the run leaves nothing on disk. `report` takes one JSON-able dict an event; a method reports
    facts (`{"step": 10, "loss": 0.3}`) and never draws. The key `kind` says what an event is.

    >>> events = []
    >>> Stage(report=events.append).report({"kind": "step", "step": 1, "total": 10})
    >>> events
    [{'kind': 'step', 'step': 1, 'total': 10}]
    """

    name: str = "stage"
    folder: Path | None = None
    resume: bool = False
    seed: int = 0
    report: Callable[[dict[str, Any]], None] = lambda event: None


@runtime_checkable
class Method(Protocol):
    """One step of a recipe: a frozen dataclass of a few options that decides.

    Called with a working copy, it changes values in place, changes structure only through `featherweight.apply`, and
    returns the plan of what it did. A third party's class needs no base class: these two lines are the whole contract.
    """

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan: ...
