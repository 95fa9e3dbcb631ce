# SPDX-License-Identifier: Apache-2.0
"""Which layer's outputs are the inputs of exactly one other: what it takes to remove a neuron whole.

The exported graph is followed from each linear or conv call through operations that keep channels apart (element-wise
ones, dropout, BatchNorm, pooling, flatten) to the one linear or conv that reads it. Anything else on the way, a second
reader, a sum of two branches: no pair, and the reason says which operation it was. Nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from featherweight.errors import NothingToCompress, OptionError, nearest
from featherweight.layers import Weight
from featherweight.prune.units import rows

__all__ = ["given_chains", "traced_chains"]

_KINDS = ("linear", "conv", "transposed conv")
_CALLS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
_CALLS |= {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
# One tensor in, one out, entry by entry. mul, add and their like pass only with a number as the other operand.
_ELEMENTWISE = frozenset(
    (
        "relu",
        "relu6",
        "gelu",
        "silu",
        "mish",
        "sigmoid",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "tanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "softplus",
        "softsign",
        "log_sigmoid",
        "hardshrink",
        "softshrink",
        "tanhshrink",
        "threshold",
        "rrelu",
        "abs",
        "neg",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "square",
        "clamp",
        "clamp_min",
        "clamp_max",
        "mul",
        "add",
        "sub",
        "div",
        "pow",
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "to",
        "_to_copy",
    )
)
_PER_CHANNEL = frozenset(("batch_norm", "prelu"))
_POOLING = frozenset(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3))
_RESHAPES = frozenset(("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "unflatten"))


def given_chains(feeds: Mapping[str, str], found: Sequence[Weight]) -> dict[str, Weight]:
    """The user's pairs, `{"fc1": "fc2"}`, by the producer's name. Raises where one names no layer or does not fit."""
    pairs = {}
    for producer, consumer in feeds.items():
        first, second = _one_weight(producer, found), _one_weight(consumer, found)
        if (reason := _unpaired(first, second)) is not None:
            raise OptionError(f"feeds: {producer!r} cannot feed {consumer!r}: {reason}.")
        pairs[first.name] = second
    return pairs


def _one_weight(name: str, found: Sequence[Weight]) -> Weight:
    for weight in found:
        if name in (weight.layer, weight.name):
            return weight
    close = ", ".join(nearest(name, [weight.layer for weight in found])) or "none"
    raise NothingToCompress(f"feeds: {name!r} is not a layer with a weight. Nearest names: {close}.")


def _unpaired(producer: Weight, consumer: Weight) -> str | None:
    """Why the rows of one cannot be matched with the columns of the other, or None."""
    for weight in (producer, consumer):
        if weight.kind not in _KINDS:
            return f"{weight.name} is of kind {weight.kind}, and pairs are of linear and conv layers"
        if weight.aliases:
            return f"{weight.name} is tied to {weight.aliases[0]}, which would lose the neuron too"
    if consumer.groups > 1:
        return f"{consumer.name} is a conv with {consumer.groups} groups"
    if consumer.columns_per_tap % rows(producer) or (
        consumer.kind != "linear" and consumer.columns_per_tap != rows(producer)
    ):
        return f"{producer.name} has {rows(producer)} outputs, {consumer.name} {consumer.columns_per_tap} inputs"
    return None


def traced_chains(
    model: nn.Module, example_inputs: tuple[Any, ...], found: Sequence[Weight]
) -> tuple[dict[str, Weight], dict[str, str]]:
    """Pairs by the producer's name, and for every other weight why it has none.

    The model is traced in evaluation mode and left as it was.

    >>> from featherweight.layers import weights
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> pairs, reasons = traced_chains(model, (torch.zeros(1, 4),), weights(model)[0])
    >>> {name: consumer.name for name, consumer in pairs.items()}, reasons
    ({'0.weight': '2.weight'}, {'2.weight': "its outputs are the model's own"})
    """
    modes = {module: module.training for module in model.modules()}
    try:
        program = torch.export.export(model.eval(), example_inputs)
    except Exception as error:  # whatever the tracer, the user's code and torch between them raise: no pair is known
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {}, {w.name: f"torch.export could not trace the model ({first_line}); give feeds={{...}}" for w in found}
    finally:
        for module, mode in modes.items():
            module.training = mode
    calls = _calls(program, model, found)
    consumers = {node: weight for weight in found for node in calls[weight.name]}
    pairs: dict[str, Weight] = {}
    reasons: dict[str, str] = {}
    for weight in found:
        result = _follow(weight, calls, consumers)
        if isinstance(result, Weight):
            pairs[weight.name] = result
        else:
            reasons[weight.name] = result
    return pairs, reasons


def _calls(
    program: torch.export.ExportedProgram, model: nn.Module, found: Sequence[Weight]
) -> dict[str, list[fx.Node]]:
    """The nodes that read each weight: a tie may have a placeholder for each of its names."""
    names = {id(weight.parameter): weight.name for weight in found}
    calls: dict[str, list[fx.Node]] = {weight.name: [] for weight in found}
    parameters = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in parameters:
            name = names.get(id(model.get_parameter(parameters[node.name])))
            if name is not None:
                calls[name] += node.users
    return calls


def _follow(weight: Weight, calls: Mapping[str, list[fx.Node]], consumers: Mapping[fx.Node, Weight]) -> Weight | str:
    """The one weight that reads this one's outputs, or why there is none."""
    if weight.kind not in _KINDS:
        return f"weights of kind {weight.kind} have no neurons that one other layer reads"
    if len(calls[weight.name]) != 1:
        return f"it is read {len(calls[weight.name])} times in one forward, and pairs need exactly one"
    [node] = calls[weight.name]
    if _operation(node) not in _CALLS:
        return f"it is read by {_operation(node)}, not by a plain linear or conv"
    axis = len(_shape(node)) - 1 - _CALLS[_operation(node)]
    while True:
        if len(node.users) != 1:
            readers = ", ".join(user.name for user in node.users) or "none"
            return f"its outputs are read in {len(node.users)} places ({readers}), and pairs need exactly one"
        source, [node] = node, list(node.users)
        if node.op == "output":
            return "its outputs are the model's own"
        if node in consumers and source in node.args[:1]:
            consumer = consumers[node]
            if len(calls[consumer.name]) != 1:
                return f"it feeds {consumer.layer}, which is read {len(calls[consumer.name])} times in one forward"
            return _accept(weight, consumer, node, source, axis)
        moved = _moved(node, source, axis)
        if moved is None:
            return f"its outputs go through {_operation(node)}, which is not followed"
        axis = moved


def _accept(weight: Weight, consumer: Weight, node: fx.Node, source: fx.Node, axis: int) -> Weight | str:
    operation = _operation(node)
    if operation not in _CALLS or axis != len(_shape(source)) - 1 - _CALLS[operation]:
        return f"{consumer.name} does not read its outputs as input channels"
    reason = _unpaired(weight, consumer)
    return consumer if reason is None else f"it feeds {consumer.layer}, but {reason}"


def _moved(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Where the channels lie after one operation, or None where it may mix them."""
    operation, before, after = _operation(node), _shape(source), _shape(node)
    if source not in node.args[:1]:
        return None
    if operation in _PER_CHANNEL:
        return axis if axis == 1 else None
    if node.all_input_nodes != [source]:
        return None
    if operation in _ELEMENTWISE:
        return axis if before == after else None
    if operation in _POOLING:
        return axis if axis == len(before) - 1 - int(operation[-2]) else None
    if operation == "mean" and len(node.args) > 1:
        return _after_mean(node, before, after, axis)
    return _after_reshape(before, after, axis) if operation in _RESHAPES else None


def _after_mean(node: fx.Node, before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    dims = {int(dim) % len(before) for dim in node.args[1]}  # type: ignore[union-attr, arg-type]
    if axis in dims:
        return None
    return axis if len(after) == len(before) else axis - sum(dim < axis for dim in dims)


def _after_reshape(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """A reshape moves no data: channels stay apart if nothing outside their axis is mixed into it.

    They keep an axis of their own size, or become one with all that follows them: each channel is then a run of
    consecutive positions.
    """
    outer, channels, inner = math.prod(before[:axis]), before[axis], math.prod(before[axis + 1 :])
    for new, size in enumerate(after):
        if math.prod(after[:new]) == outer and size in (channels, channels * inner):
            return new
    return None


def _operation(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__).rstrip("_")
    return str(getattr(node.target, "__name__", node.target))


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()
