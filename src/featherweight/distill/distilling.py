# SPDX-License-Identifier: Apache-2.0
"""Distillation at work: student, teacher, taps on both, and the sum of losses between them.

The teacher is run anew on each batch, in evaluation mode and without gradients; its answers are not kept, since data
that are augmented are never the same twice. It costs the teacher's forward a step, and the memory of what is tapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from featherweight.distill.options import Loss
from featherweight.distill.reading import Taps, logits_of, pairs, tensor_of
from featherweight.errors import DataError, FeatherweightError, OptionError
from featherweight.layers import unwrap
from featherweight.task import default_forward, describe

__all__ = ["Distill", "Distilling"]

Forward = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Distill:
    """What is imitated, of whom: losses (one or several, each times its weight), the teacher, and how logits are found.

    Saves nothing by itself: it makes a pruned or smaller network better. Without `teacher`, `Train` takes the task's
    own model, which no stage changes. `outputs` finds the logits in what both models answer; without it they are a
    tensor, or `logits` or `out` of a dict or dataclass.

    Raises `OptionError` for what is no loss.

    >>> from featherweight.distill import KL
    >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> optimizer, batch = torch.optim.SGD(student.parameters(), lr=0.1), (torch.randn(8, 4), torch.zeros(8).long())
    >>> distilling = Distill(KL()).attach(student, teacher, batch, optimizer)
    >>> outputs = student(batch[0])
    >>> loss = nn.functional.cross_entropy(outputs, batch[1]) + distilling.loss(outputs, batch)
    >>> loss.backward()
    >>> distilling.release()
    """

    losses: Loss | Sequence[Loss]
    teacher: nn.Module | None = None
    outputs: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        given: Any = self.losses
        losses = tuple(given) if isinstance(given, list | tuple) else (given,)
        for loss in losses:
            if not isinstance(loss, Loss) or isinstance(loss, type):
                raise OptionError(f"distill: {loss!r} is no loss to distill by, such as KL(temperature=4).")
        if not losses:
            raise OptionError("distill: there is no loss; give at least one, such as KL(temperature=4).")
        object.__setattr__(self, "losses", losses)
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise OptionError(f"distill: teacher is {self.teacher!r}, not a torch.nn.Module.")
        if self.outputs is not None and not callable(self.outputs):
            raise OptionError(f"distill: outputs is a function that finds the logits; got {self.outputs!r}.")

    def attach(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        batch: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        forward: Forward = default_forward,
    ) -> Distilling:
        """Taps your student and the teacher; `loss(outputs, batch)` of what is returned is what to add to your loss.

        Both models are run once on `batch`, without gradients and in evaluation mode, to see that they can be compared.
        `forward(model, batch)` is how you call either of them. Learned projections, where widths differ, are added to
        `optimizer` as a group of their own; without one, give `parameters()` of what is returned to yours. The teacher
        is put into evaluation mode, and on the student's device, until `release()`.

        Raises `OptionError`, with both models as they were, for layers that are not there, tensors that cannot be
        compared, and a teacher that would change with the student.
        """
        chosen = self.teacher if teacher is None else teacher
        if chosen is None:
            raise OptionError(
                "distill: there is no teacher; give attach(student, teacher, batch) or Distill(teacher=...)."
            )
        return Distilling(self, unwrap(student), unwrap(chosen), batch, optimizer, forward)


@dataclasses.dataclass(frozen=True)
class _Compared:
    """One loss, and the pairs of modules that it compares; None is the logits of both."""

    name: str
    loss: Loss
    pairs: tuple[tuple[str, str] | None, ...]

    def where(self, pair: tuple[str, str] | None) -> str:
        if pair is None:
            return f"{self.name}, logits"
        student, teacher = pair
        return f"{self.name}, layer {student!r}" + (f" (teacher: {teacher!r})" if teacher != student else "")


Calls = list[tuple[Tensor, Tensor]]  # the student's and the teacher's tensor, of each call of a module in a forward


class Distilling:
    """A student attached to its teacher; made by `Distill.attach`.

    `values` are the last losses by name ("KL", "CWD"; the second of a kind is "KL 2"), each without its weight.
    """

    def __init__(
        self,
        options: Distill,
        student: nn.Module,
        teacher: nn.Module,
        batch: Any,
        optimizer: torch.optim.Optimizer | None,
        forward: Forward,
    ) -> None:
        _refuse_shared(student, teacher)
        self.options, self.student, self.teacher, self.forward = options, student, teacher, forward
        self.values: Mapping[str, Tensor] = {}
        self._compared = list(_compared(options, student, teacher))
        tapped = [pair for compared in self._compared for pair in compared.pairs if pair is not None]
        self._modes = {module: module.training for module in teacher.modules()}
        self._home = _device(teacher)
        self._taps = Taps(student, (pair[0] for pair in tapped))
        self._teacher_taps = Taps(teacher, (pair[1] for pair in tapped), watched=True)
        try:
            self._move_teacher(_device(student))
            self.terms = nn.ModuleList(self._start(batch)).to(_device(student))
            learned = list(self.parameters())
            if optimizer is not None and learned:
                optimizer.add_param_group({"params": learned})
        except BaseException:
            self.release()
            raise

    def _start(self, batch: Any) -> list[nn.Module]:
        """Both models once on a batch, and a term for each pair of tensors that this shows."""
        modes = {module: module.training for module in self.student.modules()}
        self._taps.watched = True
        try:
            self.student.eval()
            with torch.no_grad(), _no_fast_path():
                outputs = self._run("student", self.student, batch)
            found = self._tensors(outputs, batch)
        finally:
            self._taps.watched = False
            for module, mode in modes.items():
                module.training = mode
        return [
            nn.ModuleList(c.loss.start(c.where(pair), *calls[0]) for pair, calls in zip(c.pairs, pairs, strict=True))
            for c, pairs in zip(self._compared, found, strict=True)
        ]

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Σ weight x loss, a scalar with gradients, of the student's last forward, which gave `outputs` for `batch`.

        Runs the teacher on the batch. Raises `OptionError` where a tapped module was not called in that forward or
        tensors no longer agree, `DataError` where the teacher cannot be run.
        """
        found = self._tensors(outputs, batch)
        values: dict[str, Tensor] = {}
        with torch.autocast(_device(self.student).type, enabled=False):
            for c, terms, pairs in zip(self._compared, self.terms, found, strict=True):
                each = [
                    term(student, teacher, batch)
                    for term, calls in zip(cast(nn.ModuleList, terms), pairs, strict=True)
                    for student, teacher in calls
                ]
                values[c.name] = torch.stack(each).mean()
            weighted = [c.loss.weight * values[c.name] for c in self._compared]
        self.values = {name: value.detach() for name, value in values.items()}
        return torch.stack(weighted).sum()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is learned along, projections, for an optimizer. It is never part of the student."""
        return self.terms.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Projections and queues: tensors by name."""
        return dict(self.terms.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, for the same losses on the same models."""
        self.terms.load_state_dict(state)

    def to(self, device: torch.device | str) -> None:
        """Moves the teacher, projections and queues; projections stay the same parameters to an optimizer."""
        self._move_teacher(torch.device(device))
        self.terms.to(device)

    def release(self) -> None:
        """Takes the taps off both models, and puts the teacher back into its modes and on its device."""
        self._taps.release()
        self._teacher_taps.release()
        self._move_teacher(self._home)
        for module, mode in self._modes.items():
            module.training = mode

    def _move_teacher(self, device: torch.device) -> None:
        if _device(self.teacher) != device:
            self.teacher.to(device)

    def _tensors(self, outputs: Any, batch: Any) -> list[list[Calls]]:
        """For each loss and each of its pairs what is to be compared; runs the teacher."""
        if self.teacher.training:
            self.teacher.eval()
        with torch.no_grad(), _no_fast_path():
            answers = self._run("teacher", self.teacher, batch)
        taken, taught = self._taps.take(), self._teacher_taps.take()

        def calls(c: _Compared, pair: tuple[str, str] | None) -> Calls:
            if pair is None:
                return [(self._logits(outputs, "student"), self._logits(answers, "teacher"))]
            return _calls(c.where(pair), taken.get(pair[0], []), taught.get(pair[1], []), c.loss.item)

        return [[calls(c, pair) for pair in c.pairs] for c in self._compared]

    def _logits(self, outputs: Any, whose: str) -> Tensor:
        if self.options.outputs is None:
            return logits_of(outputs, whose)
        logits: Any = self.options.outputs(outputs)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise OptionError(f"distill: outputs= gave {describe(logits)} for the {whose}; give a tensor of logits.")
        return logits

    def _run(self, whose: str, model: nn.Module, batch: Any) -> Any:
        try:
            return self.forward(model, batch)
        except (torch.OutOfMemoryError, FeatherweightError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DataError(
                f"distill: the {whose} could not be run on {describe(batch)}: {error}. Student and teacher are called in "
                "the same way, by Task.forward or attach(forward=...)."
            ) from error


def _calls(where: str, students: list[Any], teachers: list[Any], item: int | str | None) -> Calls:
    if not students or len(students) != len(teachers):
        raise OptionError(
            f"{where}: called {len(students)} times in the student's last forward with gradients and {len(teachers)} times "
            "in the teacher's; both must be called, equally often. Modules whose weights are read without a call of "
            "theirs, and those inside reentrant gradient checkpointing, cannot be tapped."
        )
    return [
        (tensor_of(student, item, f"{where}: the student"), tensor_of(teacher, item, f"{where}: the teacher"))
        for student, teacher in zip(students, teachers, strict=True)
    ]


def _compared(options: Distill, student: nn.Module, teacher: nn.Module) -> Iterator[_Compared]:
    """Each loss under a name of its own, with its pairs of modules."""
    names: Counter[str] = Counter()
    for loss in cast(Sequence[Loss], options.losses):
        kind = type(loss).__name__
        names[kind] += 1
        name = kind if names[kind] == 1 else f"{kind} {names[kind]}"
        yield _Compared(
            name, loss, (None,) if loss.layers is None else tuple(pairs(name, loss.layers, student, teacher))
        )


def _refuse_shared(student: nn.Module, teacher: nn.Module) -> None:
    """A teacher that learns with its student teaches it nothing."""
    trained = {id(parameter): name for name, parameter in student.named_parameters() if parameter.requires_grad}
    shared = next((name for name, parameter in teacher.named_parameters() if id(parameter) in trained), None)
    if student is teacher or shared is not None:
        what = "is the student itself" if student is teacher else f"shares {shared} with the student, which is trained"
        raise OptionError(
            f"distill: the teacher {what}. Give a copy: copy.deepcopy(model) before training, or as Distill(teacher=...)."
        )


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """PyTorch's transformer encoders pass nested tensors, without the padding, from layer to layer in evaluation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
