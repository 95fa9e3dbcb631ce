# SPDX-License-Identifier: Apache-2.0
"""Where tensors come from: modules that are tapped by name, logits in a model's outputs, labels in a batch.

Each is one rule, written down, and an error where it does not decide: a loss on the wrong tensor trains without a
complaint.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import DataError, OptionError, nearest
from featherweight.task import describe

__all__ = ["Layers", "Taps", "labels_of", "logits_of", "pairs", "tensor_of"]

Layers = str | Sequence[str] | Mapping[str, str]


def pairs(me: str, layers: Layers, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Which module of the student is compared with which of the teacher: qualified names, in the student's order.

    A name or glob stands for the same name on both sides; a mapping gives the teacher's name for the student's.

    Raises `OptionError` for a name that student or teacher do not have, with the nearest that they have.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> pairs("me", "[02]", model, model), pairs("me", {"0": "2"}, model, model)
    ([('0', '0'), ('2', '2')], [('0', '2')])
    """
    has, knows = _names(student), _names(teacher)
    if isinstance(layers, Mapping):
        for name in layers:
            _refuse_unknown(me, "student", name, has)
        for name in layers.values():
            _refuse_unknown(me, "teacher", name, knows)
        return list(layers.items())
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not fnmatch.filter(has, pattern):
            _refuse_unknown(me, "student", pattern, has)
    found = [name for name in has if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for name in found:
        _refuse_unknown(me, "teacher", name, knows)
    return [(name, name) for name in found]


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _refuse_unknown(me: str, whose: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = (
            ", ".join(map(repr, nearest(name.strip("*"), known))) or ", ".join(map(repr, known[:3])) or "none at all"
        )
        mapping = " Where its name is another one, give layers={student's: teacher's}." if whose == "teacher" else ""
        raise OptionError(f"{me}: the {whose} has no module {name!r}. Nearest: {close}.{mapping}")


class Taps:
    """Keeps what modules of a model answer in its last forward, until `take` or the next forward.

    Forwards without gradients are not looked at, so that an evaluation in between changes nothing, but for a model that
    is `watched` all the time. Answers are kept as copies: what comes next may change them in place (ReLU). What a
    backward pass computes again (gradient checkpointing) is not looked at either.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], watched: bool = False) -> None:
        self.watched = watched
        self._open = False
        self._found: dict[str, list[Any]] = {}
        self._handles: list[Any] = []
        names = set(names)
        if names:
            self._handles.append(model.register_forward_pre_hook(self._begin(model), prepend=True))
            self._handles.append(model.register_forward_hook(self._end(model), always_call=True))
        for name in sorted(names):
            self._handles.append(model.get_submodule(name).register_forward_hook(self._look(name)))

    # Functions, not bound methods: a deepcopy of the model in mid-training, for an average of its weights say, copies
    # hooks, and is not to copy what they found; nor is the copy to be taken for the model.
    def _begin(self, model: nn.Module) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any) -> None:
            if module is model and (self.watched or torch.is_grad_enabled()):
                self._open = True
                self._found.clear()

        return begin

    def _end(self, model: nn.Module) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if module is model:
                self._open = False

        return end

    def _look(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if self._open:
                self._found.setdefault(name, []).append(_copied(output))

        return look

    def take(self) -> dict[str, list[Any]]:
        """What each module answered, a list of one entry a call; then nothing is kept."""
        found, self._found = self._found, {}
        return found

    def release(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return {key: _copied(value) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return tuple(_copied(item) for item in output)
    return output


def tensor_of(output: Any, item: int | str | None, where: str) -> Tensor:
    """The tensor that a module answered: itself, or item `item` (None: the first) of a tuple, list, dict or dataclass.

    Raises `OptionError` where that is no tensor of floating-point numbers.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get(item) if isinstance(item, str) else _at(list(output.values()), item)
    elif isinstance(output, tuple | list):
        found = _at(output, item)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        which = "" if found is output else f", whose item {0 if item is None else item!r} is {describe(found)}"
        raise OptionError(
            f"{where} answers {describe(output)}{which}; a tensor of floating-point numbers is needed. Name another "
            "module, or another item=."
        )
    return found


def _at(values: Sequence[Any], item: int | str | None) -> Any:
    index = 0 if item is None else item
    return values[index] if isinstance(index, int) and -len(values) <= index < len(values) else None


def logits_of(outputs: Any, whose: str = "model") -> Tensor:
    """The logits in a model's outputs: a tensor itself; else `logits`, else `out`, as a key or an attribute.

    A tuple or list is taken only where it holds one item. These are what plain networks, Hugging Face models and
    torchvision's segmentation models give. Raises `OptionError` for anything else.

    >>> logits_of({"loss": torch.tensor(0.3), "logits": torch.ones(1, 2)})
    tensor([[1., 1.]])
    """
    found = outputs
    if isinstance(outputs, tuple | list) and len(outputs) == 1:
        found = outputs[0]
    elif not isinstance(outputs, Tensor):
        both = ("logits", "out")
        if isinstance(outputs, Mapping):
            found = next((outputs[key] for key in both if key in outputs), None)
        else:
            found = next((getattr(outputs, key) for key in both if hasattr(outputs, key)), None)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise OptionError(
            f"distill: the {whose} answers {describe(outputs)}, in which the logits are not to be found: a tensor, or "
            "`logits` or `out` in a dict or dataclass. Give Distill(..., outputs=lambda outputs: ...), or the layers= of "
            "the module that makes them."
        )
    return found


def labels_of(batch: Any) -> Tensor:
    """The labels in a batch: of a dict `labels`, `label` or `target`; of a tuple or list of two and more the last item.

    Raises `DataError` where there are none, or where they are no whole numbers.
    """
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in ("labels", "label", "target") if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[-1]
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex():
        raise DataError(
            f"distill: labels are needed and not found in {describe(batch)}: a tensor of whole numbers as the last item "
            "of a tuple, or as `labels`, `label` or `target` of a dict. Give labels=lambda batch: ... to the loss."
        )
    return found
