# SPDX-License-Identifier: Apache-2.0
"""What a user brings is taken in every usual form, or refused with a word on what to give instead."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import DataError, OptionError
from featherweight.task import Stage, Task, batches, default_forward, describe

X = torch.arange(6.0).reshape(2, 3)
Y = torch.tensor([0, 1])


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return a if b is None else a + b


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, X),
        ((X, Y), X),
        ([X, Y], X),
        ((X, X, Y), 2 * X),
        ((X,), X),
        ({"a": X, "b": X}, 2 * X),
        ({"a": X}, X),
    ],
    ids=["tensor", "pair", "list", "two inputs and a target", "one", "dict", "dict of one"],
)
def test_batches_of_the_usual_forms_reach_the_model(batch: Any, expected: Tensor) -> None:
    assert torch.equal(default_forward(Two(), batch), expected)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"c": X}, "dict(c=Tensor[2, 3] float32)"),
        ((X, X, X, Y), "tuple(Tensor[2, 3] float32, Tensor[2, 3] float32, Tensor[2, 3] float32, Tensor[2] int64)"),
        ("abc", "The data yields str"),
        ((), "The data yields tuple()"),
        (None, "The data yields NoneType"),
    ],
    ids=["a name that the model lacks", "too many", "text", "nothing", "none"],
)
def test_other_batches_are_pictured_and_forward_is_offered(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        default_forward(Two(), batch)
    assert "Task(forward=" in str(caught.value)


def test_nested_data_is_pictured() -> None:
    picture = describe({"image": X.half(), "boxes": [Y, (1, None)]})
    assert picture == "dict(image=Tensor[2, 3] float16, boxes=list(Tensor[2] int64, tuple(int, NoneType)))"


class Loader:
    """Iterates anew each time, by the old protocol."""

    def __getitem__(self, index: int) -> Tensor:
        if index > 1:
            raise IndexError
        return X


@pytest.mark.parametrize(
    "data",
    [
        [X],
        (X,),
        Loader(),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y)),
        torch.utils.data.TensorDataset(X, Y),
    ],
    ids=["list", "tuple", "getitem", "DataLoader", "Dataset"],
)
def test_what_can_be_iterated_again_is_taken(data: Any) -> None:
    task = Task(Two(), (X,), train=data, calibration=data)
    for _ in range(2):
        assert next(iter(batches(task.train, "train"))) is not None


def once() -> Iterator[Tensor]:
    yield X


@pytest.mark.parametrize("name", ["train", "calibration"])
@pytest.mark.parametrize(
    "data", [once(), iter([X]), zip([X], [Y], strict=True), map(len, [X])], ids=["generator", "iter", "zip", "map"]
)
def test_one_shot_iterators_are_refused_with_the_reason(data: Any, name: str) -> None:
    with pytest.raises(DataError, match=rf"Task.{name} is a one-shot iterator.*second epoch would be empty"):
        Task(Two(), (X,), **{name: data})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": lambda x: x}, OptionError, "Task.model is function, not a torch.nn.Module"),
        ({"example_inputs": X}, OptionError, "example_inputs=(x,)"),
        ({"example_inputs": [X]}, OptionError, "Task.example_inputs is list(Tensor[2, 3] float32)"),
        ({"train": 3}, DataError, "Task.train is int, which cannot be iterated"),
    ],
    ids=["model", "bare tensor", "list", "number"],
)
def test_other_types_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Task(**{"model": Two(), "example_inputs": (X,), **fields})


def test_missing_and_empty_data_are_named() -> None:
    with pytest.raises(DataError, match=r"give Task\(train=\.\.\.\)"):
        batches(None, "train")
    with pytest.raises(DataError, match="calibration is empty"):
        batches([], "calibration")


def test_a_task_and_a_stage_cannot_be_changed() -> None:
    task = Task(Two(), (X,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.metric = "accuracy"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Stage().seed = 1  # type: ignore[misc]
