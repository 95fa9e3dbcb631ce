# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for recipes: plain, resumable to the last bit, and yours to replace.

What must happen while a network trains (gradual sparsity, later channel scores, fake quantization) are hooks:
`attach(model, optimizer)`, then `step()` after each optimizer step, then `finalize()`. What the network is to imitate
meanwhile is added to its loss (`distill`). Both serve a loop of your own, of any framework; this one adds data,
devices, mixed precision and `torchrun` through accelerate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from featherweight.distill import Distill, Distilling, Loss
from featherweight.errors import DataError, NumericalError, OptionError, nearest, require
from featherweight.layers import Zeros, existing_zeros
from featherweight.plan import Plan
from featherweight.state import load_state, random_state, save_state, set_random_state
from featherweight.task import Stage, Task, batches, describe

__all__ = ["Attached", "Hook", "Train"]

_CURVE_POINTS = 400  # what a plot can show; more would only make the report heavy


@runtime_checkable
class Attached(Protocol):
    """A hook at work on one model: told of each optimizer step, saved and restored with the training state."""

    def step(self) -> Mapping[str, Any]:
        """Does its part after an optimizer step and returns facts for the curves, such as `{"sparsity": 0.4}`."""

    def finalize(self) -> Plan:
        """Lets go of the model and says what was done to it."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, tensors and containers of them: all that resuming needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""


@runtime_checkable
class Hook(Protocol):
    """What `Train(hooks=[...])` takes: options that can be attached to a model and its optimizer."""

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, example_inputs: tuple[Any, ...] | None = None
    ) -> Attached: ...


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains the model for `steps` optimizer steps or `epochs` passes over `task.train`, with hooks at work.

    The loss is the task's plus, with `distill`, the sum of weight x loss of what is named there: one loss or several
    (`KL(temperature=4)`, `CWD()`), with the task's own model as teacher, or a `Distill` with another; a task without a
    loss is then trained by distillation alone. Records have the whole as `loss` and that part as `distill_loss`.

    Saves nothing by itself; its hooks may. Zeros that an earlier stage made stay zero. `optimizer` is adamw, adam or
    sgd, or a function of the parameters; `schedule` is cosine, linear, exponential (to 1 % of `lr`) or constant, after
    `warmup` steps of linear rise, or a function of the optimizer that gives a torch scheduler. `precision` is no, bf16
    or fp16. The metric is evaluated every `evaluate_every` steps where the task has one. State is checkpointed after
    every epoch and every `checkpoint_every` steps, so that a killed run goes on to the same weights.

    Raises `OptionError` for bad options, `DataError` for data that the model does not accept, `NumericalError` when
    the loss is not finite.

    >>> from torch.nn.functional import cross_entropy
    >>> data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
    >>> task = Task(nn.Linear(4, 2), (data[0][0],), train=data, loss=lambda out, batch: cross_entropy(out, batch[1]))
    >>> Train(steps=5, lr=0.01)(task.model, task, Stage())
    Plan(edits=(), formats={})
    """

    steps: int | None = None
    epochs: int | None = None
    hooks: Sequence[Hook] = ()
    distill: Loss | Sequence[Loss] | Distill | None = None
    optimizer: str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str | Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] = "cosine"
    warmup: int = 0
    clip: float | None = None
    precision: str = "no"
    evaluate_every: int | None = None
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "hooks", tuple(self.hooks))
        if self.distill is not None and not isinstance(self.distill, Distill):
            object.__setattr__(self, "distill", Distill(self.distill).losses)
        if (self.steps is None) == (self.epochs is None):
            raise OptionError(
                f"train: give steps or epochs, one of the two; got steps={self.steps}, epochs={self.epochs}."
            )
        for name in ("steps", "epochs", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise OptionError(f"train: {name} must be a whole number from 1; got {value!r}.")
        if not self.lr > 0 or self.warmup < 0:
            raise OptionError(
                f"train: lr must be above 0 and warmup at least 0; got lr={self.lr}, warmup={self.warmup}."
            )
        for name, known in (
            ("optimizer", _OPTIMIZERS),
            ("schedule", _SCHEDULES),
            ("precision", ("no", "bf16", "fp16")),
        ):
            value = getattr(self, name)
            if isinstance(value, str) and value not in known:
                raise OptionError(
                    f"train: {name} {value!r} is none of {', '.join(known)}. Nearest: {', '.join(nearest(value, known))}."
                )
        for hook in self.hooks:
            if not isinstance(hook, Hook):
                raise OptionError(
                    f"train: {hook!r} in hooks has no attach(model, optimizer); a hook is e.g. GradualPruning(...)."
                )

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        accelerate = require("accelerate", extra="train")
        data = batches(task.train, "train")
        if task.loss is None and self.distill is None:
            raise OptionError(
                "train: the task has no loss; give Task(loss=lambda outputs, batch: ...), or distill=KL() to train by a "
                "teacher alone."
            )
        total = self._total(data)
        torch.manual_seed(stage.seed)
        accelerator = accelerate.Accelerator(mixed_precision=self.precision)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        modes = {module: module.training for module in model.modules()}
        optimizer = self._optimizer([p for p in model.parameters() if p.requires_grad])
        zeros = Zeros(optimizer)
        attached: list[Attached] = []
        distilling: Distilling | None = None
        plan = Plan()
        try:
            for weight, pruned in existing_zeros(model):
                zeros.hold(weight.parameter, pruned)
            distilling = self._distilling(model, task, data, optimizer)
            attached += [hook.attach(model, optimizer, example_inputs=task.example_inputs) for hook in self.hooks]
            for hook in attached:  # which layers a hook acts on and why is a fact for the report, where it has any
                for chosen in getattr(hook, "selection", ()):
                    stage.report({"kind": "selection", "weight": dataclasses.asdict(chosen)})
            loop = _Loop(self, model, task, stage, total, optimizer, zeros, attached, distilling, accelerator)
            loop.run(data)
        finally:
            for hook in attached:
                plan += hook.finalize()
                for event in getattr(hook, "events", ()):  # what a report is to know, and only the end could say
                    stage.report(event)
            if distilling is not None:
                distilling.release()
            zeros.release()
            optimizer.zero_grad(set_to_none=True)
            _let_go(accelerate, accelerator, model, device, modes)
        return plan

    def _total(self, data: Iterable[Any]) -> int:
        if self.steps is not None:
            total = self.steps
        elif self.epochs is not None and isinstance(data, Sized):
            total = self.epochs * len(data)
        else:
            raise OptionError(
                f"train: epochs needs data that knows its length; {type(data).__name__} does not. Give steps."
            )
        for hook in self.hooks:
            end = getattr(hook, "end", None)
            if isinstance(end, int) and end >= total:
                raise OptionError(
                    f"train: {type(hook).__name__} ends at step {end}, but training stops after step {total - 1}, short of "
                    f"its target. Give end={total - 1} or less, or steps={end + 1} or more."
                )
        return total

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if not parameters:
            raise OptionError("train: no parameter of the model has requires_grad=True; there is nothing to train.")
        if not isinstance(self.optimizer, str):
            return self.optimizer(parameters)
        return _OPTIMIZERS[self.optimizer](parameters, self)

    def _distilling(
        self, model: nn.Module, task: Task, data: Iterable[Any], optimizer: torch.optim.Optimizer
    ) -> Distilling | None:
        if self.distill is None:
            return None
        options = self.distill if isinstance(self.distill, Distill) else Distill(self.distill)
        # A shuffled loader draws its order: with a teacher the student sees the same batches as without.
        before = random_state()
        first = next(iter(data))
        set_random_state(before)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        first = require("accelerate.utils", extra="train").send_to_device(first, device)
        return options.attach(model, options.teacher or task.model, first, optimizer, task.forward)

    def _scheduler(self, optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LRScheduler:
        if not isinstance(self.schedule, str):
            return self.schedule(optimizer)
        shape, warmup = _SCHEDULES[self.schedule], self.warmup

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return shape((step - warmup) / max(1, total - warmup))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], Train], torch.optim.Optimizer]] = {
    "adamw": lambda p, o: torch.optim.AdamW(p, lr=o.lr, weight_decay=o.weight_decay),
    "adam": lambda p, o: torch.optim.Adam(p, lr=o.lr, weight_decay=o.weight_decay),
    "sgd": lambda p, o: torch.optim.SGD(p, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay),
}
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * min(t, 1.0))),
    "linear": lambda t: max(0.0, 1 - t),
    "exponential": lambda t: 0.01 ** min(t, 1.0),
    "constant": lambda t: 1.0,
}


class _Loop:
    """One run of `Train`: what changes from step to step, and how it is saved and found again."""

    def __init__(
        self,
        options: Train,
        model: nn.Module,
        task: Task,
        stage: Stage,
        total: int,
        optimizer: torch.optim.Optimizer,
        zeros: Zeros,
        attached: list[Attached],
        distilling: Distilling | None,
        accelerator: Any,
    ) -> None:
        self.options, self.task, self.stage, self.total = options, task, stage, total
        self.model, self.optimizer, self.zeros, self.attached = model, optimizer, zeros, attached
        self.accelerator, self.distilling = accelerator, distilling
        self.prepared, self.stepper = accelerator.prepare(model, optimizer)
        if distilling is not None:
            distilling.to(accelerator.device)
        self.scheduler = options._scheduler(optimizer, total)
        self.file = None if stage.folder is None else stage.folder / "training.safetensors"
        self.step = self.skip = 0
        self.epoch_start: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []
        self.distilled: list[Tensor] = []  # the part of each of these losses that distillation makes

    def run(self, data: Iterable[Any]) -> None:
        if self.accelerator.num_processes > 1:
            data = self._share(data)
        resumed = self.stage.resume and self.file is not None and self.file.exists()
        if resumed:
            self._load()
        while self.step < self.total:
            if not resumed:
                self.epoch_start, self.skip = random_state(), 0
            for batch in self._epoch(data, resumed):
                self._one_step(batch)
                self.skip += 1
                if self.step >= self.total:
                    break
                if self.step % self.options.checkpoint_every == 0:
                    self._save()
            else:
                self.epoch_start, self.skip = random_state(), 0
                if self.step < self.total:
                    self._save()
            resumed = False

    def _epoch(self, data: Iterable[Any], resumed: bool) -> Iterator[Any]:
        """An epoch's batches; of a resumed one those that are left, with the generators where they were."""
        now = random_state()
        if resumed:
            set_random_state(self.epoch_start)
        iterator = iter(data)
        for _ in range(self.skip):
            next(iterator, None)
        if resumed and self.skip:
            set_random_state(now)
        empty = self.skip == 0
        for batch in iterator:
            empty = False
            yield batch
        if empty:
            raise DataError(
                f"Task.train yielded no batch in a later epoch, at step {self.step}. It must be re-iterable."
            )

    def _share(self, data: Iterable[Any]) -> Iterable[Any]:
        if isinstance(data, torch.utils.data.DataLoader):
            return self.accelerator.prepare(data)  # type: ignore[no-any-return]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return _Share(data, rank, world)

    def _one_step(self, batch: Any) -> None:
        send_to_device = require("accelerate.utils", extra="train").send_to_device
        self.model.train()
        batch = send_to_device(batch, self.accelerator.device)
        with self.accelerator.autocast():
            loss = self._loss(batch)
        self.losses.append(loss.detach())
        if (
            loss.device.type == "cpu"
        ):  # elsewhere it would wait for the device at every step; `_tell` looks often enough
            self._check(float(loss.detach()))
        self.stepper.zero_grad()
        self.accelerator.backward(loss)
        learned = [] if self.distilling is None else list(self.distilling.parameters())
        if self.accelerator.num_processes > 1:  # the model's gradients are shared by its wrapper; projections have none
            for parameter in learned:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        if self.options.clip is not None:
            self.accelerator.clip_grad_norm_([*self.model.parameters(), *learned], self.options.clip)
        self.stepper.step()
        lr = self.optimizer.param_groups[0]["lr"]
        if not self.stepper.step_was_skipped:
            self.scheduler.step()
        self.zeros.enforce()
        facts: dict[str, Any] = {}
        for hook in self.attached:
            facts |= hook.step()
        self.step += 1
        self._tell(lr, facts)

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise NumericalError(
                f"The training loss became {loss} by step {self.step} (learning rate {self.optimizer.param_groups[0]['lr']:.3g}). "
                "Lower lr, set clip=1.0, or look for bad values in the data; the last checkpoint and all earlier stages are kept."
            )

    def _loss(self, batch: Any) -> Tensor:
        outputs, loss = self._task_loss(batch)
        if self.distilling is None:
            return cast(Tensor, loss)
        distilled = self.distilling.loss(outputs, batch)
        self.distilled.append(distilled.detach())
        return distilled if loss is None else loss + distilled

    def _task_loss(self, batch: Any) -> tuple[Any, Tensor | None]:
        try:
            outputs = self.task.forward(self.prepared, batch)
            loss: Any = None if self.task.loss is None else self.task.loss(outputs, batch)
        except (torch.OutOfMemoryError, DataError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DataError(
                f"step {self.step}: the model and the loss could not be run on what Task.train yields, {describe(batch)} "
                f"(example_inputs are {describe(self.task.example_inputs)}): {error}"
            ) from error
        if self.task.loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
            raise OptionError(
                f"Task.loss gave {describe(loss)}; it must give a scalar tensor, such as a mean over the batch."
            )
        return outputs, loss

    def _tell(self, lr: float, facts: dict[str, Any]) -> None:
        """Reports each step, and with loss and metric as often as a curve needs them."""
        every = self.options.evaluate_every
        evaluates = every is not None and self.task.evaluate is not None and self.step % every == 0
        due = self.step % max(1, self.total // _CURVE_POINTS) == 0 or self.step == self.total
        self.stage.report({"kind": "step", "step": self.step, "total": self.total})
        if not (due or evaluates or facts.pop("updated", False)):
            return
        loss = float(torch.stack(self.losses).float().mean())
        self._check(loss)
        facts.pop("updated", None)
        record = {"kind": "record", "step": self.step, "loss": loss, "lr": lr, **facts}
        if self.distilled:
            record["distill_loss"] = float(torch.stack(self.distilled).float().mean())
        self.losses.clear()
        self.distilled.clear()
        if evaluates and self.task.evaluate is not None:
            record["metric"] = self._evaluate(self.task.evaluate)
        self.history.append(record)
        self.stage.report(record)

    def _evaluate(self, evaluate: Callable[[Callable[..., Any]], float]) -> float:
        # Looking must not change what is looked at: the generators go on as if nobody had evaluated.
        before = random_state()
        self.model.eval()
        with torch.no_grad():
            metric = float(evaluate(self.model))
        set_random_state(before)
        return metric

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "skip": self.skip,
            "total": self.total,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "hooks": [hook.state_dict() for hook in self.attached],
            "distill": None if self.distilling is None else self.distilling.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": random_state(),
            "epoch_start": self.epoch_start,
            "history": self.history,
            "losses": self.losses,
            "distilled": self.distilled,
        }

    def _save(self) -> None:
        if self.file is not None and self.accelerator.is_main_process:
            save_state(self.file, self._state())

    def _load(self) -> None:
        if self.file is None:
            return
        state = load_state(self.file)
        self.step, self.skip, self.epoch_start = state["step"], state["skip"], state["epoch_start"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for hook, saved in zip(self.attached, state["hooks"], strict=True):
            hook.load_state_dict(saved)
        if self.distilling is not None:
            self.distilling.load_state_dict(state["distill"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history, self.losses, self.distilled = state["history"], state["losses"], state["distilled"]
        for record in self.history:
            self.stage.report(record)
        self.stage.report({"kind": "resumed", "step": self.step, "total": self.total})
        set_random_state(state["random"])


class _Share:
    """Every world-th batch of a plain iterable, for one of several processes."""

    def __init__(self, data: Iterable[Any], rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.data), self.rank, None, self.world)


def _let_go(
    accelerate: Any, accelerator: Any, model: nn.Module, device: torch.device, modes: Mapping[nn.Module, bool]
) -> None:
    """Leaves the model as the caller knows it: its own forward, its device, its modes."""
    if "_original_forward" in model.__dict__:  # mixed precision puts a casting forward on the instance
        del model.__dict__["_original_forward"], model.__dict__["forward"]
    accelerator.free_memory()
    # Accelerate keeps the precision of the first loop for the whole process and refuses another; stages may differ.
    accelerate.state.AcceleratorState._reset_state()
    model.to(device)
    for module, mode in modes.items():
        module.training = mode
