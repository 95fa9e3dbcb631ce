# SPDX-License-Identifier: Apache-2.0
"""A model's forward as a graph of ATen ops: by torch.export, or, where that fails, by recording one eager forward.

Both are taken before autograd and before decomposition, so that conv, linear, norms, LSTM and attention are single ops
and the rules are one set. A recording follows the branches that the given inputs take; it says so where they depend on
data.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.fx.traceback
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from featherweight.errors import GraphError, OptionError
from featherweight.task import describe

__all__ = ["Captured", "capture", "owner_of", "source_of"]

_STANDARD = str(Path(logging.__file__).parents[1])
_NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
    """A graph, which of its nodes are tensors of the model (by name) and which are constants, and how it was had."""

    module: torch.fx.GraphModule
    tensors: Mapping[torch.fx.Node, str]
    constants: Mapping[torch.fx.Node, Tensor]
    state: Mapping[str, Tensor]
    front: Literal["export", "recorded"]
    notes: tuple[str, ...]
    outputs: Any = None  # how an exported program's answers are put together again


def capture(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Captured:
    """The graph of `model(*inputs)`, or `model(**inputs)`, in eval mode. Changes nothing.

    Raises `GraphError` where the model does not run on these inputs at all, `OptionError` for inputs that are no tuple.
    """
    if not isinstance(inputs, Mapping | tuple | list):
        raise OptionError(f"inputs is {describe(inputs)}; give a tuple, for one tensor: (x,), or a dict by keyword.")
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    model = _plain(model)
    with _quiet(), _evaluating(model):
        try:
            return _exported(model, args, kwargs)
        except Exception as error:  # export fails in a hundred ways; whatever it was, recording is tried and it is told
            why = _first_line(error)
        try:
            recorded = _recorded(model, args, kwargs)
        except Exception as error:
            raise GraphError(
                f"the model could not be traced on these inputs. torch.export: {why} Recording a forward: {_first_line(error)} "
                "Try model(*inputs) by itself: what does not run cannot be traced."
            ) from error
    return dataclasses.replace(recorded, notes=(f"torch.export failed: {why}", *recorded.notes))


def _plain(model: nn.Module) -> nn.Module:
    """The model, or a copy whose parametrized tensors are plain ones under the same names, as edits name them."""
    if not any(parametrize.is_parametrized(m) or _old_weight_norms(m) for m in model.modules()):
        return model
    for module in model.modules():
        for name in _old_weight_norms(module):  # made anew before each forward; as it stands it could not be copied
            setattr(module, name, getattr(module, name).detach())
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # A copy shares the class that torch made for the original, and removal takes the property off that class.
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            module.parametrizations.eval()  # type: ignore[union-attr]  # a power iteration stays where it is
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in _old_weight_norms(module):
            nn.utils.remove_weight_norm(module, hook)
    return model


def _old_weight_norms(module: nn.Module) -> list[str]:
    return [
        str(vars(hook)["name"]) for hook in module._forward_pre_hooks.values() if type(hook).__name__ == "WeightNorm"
    ]


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    program = torch.export.export(model, args, kwargs, strict=False)
    module = program.graph_module
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    names, constants = {}, {}
    known = {name: canonical for name, _, canonical in _names(model)}
    for node in module.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.target is None:
            continue
        if spec.target in known:
            names[node] = known[spec.target]
        elif spec.target in program.constants:
            constants[node] = program.constants[spec.target]
    return Captured(module, names, constants, _state(model), "export", (), program.call_spec.out_spec)


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [item for item in flat if isinstance(item, Tensor)]

    def forward(*given: Tensor) -> list[Any]:
        left = iter(given)
        again = pytree.tree_unflatten([next(left) if isinstance(i, Tensor) else i for i in flat], spec)
        return [out for out in pytree.tree_leaves(model(*again[0], **again[1])) if isinstance(out, Tensor)]

    with _told_owner(model), torch.enable_grad():  # without gradients, torch's attention takes a fused path
        module = make_fx(
            forward,
            tracing_mode="real",
            pre_dispatch=True,
            _error_on_data_dependent_ops=False,
            record_stack_traces=True,
        )(*tensors)
    by_id = {id(tensor): canonical for _, tensor, canonical in _names(model)}
    names, constants, notes = {}, {}, []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, node.target)
            if id(value) in by_id:
                names[node] = by_id[id(value)]
            elif isinstance(value, Tensor):
                constants[node] = value
        if node.op == "call_function" and "item" in str(node.target):
            notes.append(
                f"the forward reads a value out of a tensor at {source_of(node)}; only the path of these inputs was seen"
            )
    return Captured(module, names, constants, _state(model), "recorded", tuple(dict.fromkeys(notes)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, tied ones by their first name."""
    return {name: tensor for name, tensor, canonical in _names(model) if name == canonical}


def _names(model: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Each name of each tensor, the tensor, and its first name: tied tensors go by that."""
    first: dict[int, str] = {}
    for held in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in held:
            yield name, tensor, first.setdefault(id(tensor), name)


@contextlib.contextmanager
def _told_owner(model: nn.Module) -> Iterator[None]:
    """Tells each recorded node in whose forward it was made."""
    stack: list[tuple[str, str]] = []
    handles = []

    def tell() -> None:
        torch.fx.traceback.current_meta["nn_module_stack"] = {path: (path, kind) for path, kind in stack}

    def enter(path: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            stack.append((path, type(module).__name__))
            tell()

        return hook

    def leave(*_: Any) -> None:
        stack.pop()
        tell()

    for path, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(enter(path)),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        with torch.fx.traceback.preserve_node_meta():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """export logs and prints whole graphs and tracebacks of what it could not do, which is told in one line instead."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def owner_of(node: torch.fx.Node) -> str:
    """The name of the module in whose forward the node was made."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())))[0] if stack else ""
    return re.sub(r"@\d+$", "", path)  # a module's second call is numbered


def source_of(node: torch.fx.Node) -> str:
    """`file.py:12 in forward: code`, of the last line that is not torch's own."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    frames = [
        (match[1], match[2], match[3], lines[i + 1].strip() if i + 1 < len(lines) else "")
        for i, line in enumerate(lines)
        if (match := re.match(r'\s*File "(.+)", line (\d+), in (\S+)', line))
    ]
    if not frames:
        return ""
    mine = [frame for frame in frames if "/torch/" not in frame[0] and "capture.py" not in frame[0]] or frames
    file, number, function, code = mine[-1]
    return f"{file.rsplit('/', 1)[-1]}:{number} in {function}: {code}"


def _first_line(error: Exception) -> str:
    """The error's first line, and the line of the model's code that it came up in."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    told = f"{type(error).__name__}: {text[:300]}".rstrip(". ")
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THEIRS)
        and (not frame.filename.startswith(_STANDARD) or "site-packages" in frame.filename)
        and Path(frame.filename).exists()
    ]
    if not theirs:
        return f"{told}."
    last = theirs[-1]
    return f"{told} (at {Path(last.filename).name}:{last.lineno} in {last.name}: {last.line})."
