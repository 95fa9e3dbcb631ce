# SPDX-License-Identifier: Apache-2.0
"""What goes in and out of a model: names, types and shapes, and what is said of arrays that do not fit them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.errors import DataError, nearest, require

__all__ = ["Port", "checked", "physical_cores", "ports", "proto_ports"]

_NUMPY = {"float": "float32", "double": "float64"}


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output. `type` is NumPy's name, as in "float32"; a size that may change is a name or None in `shape`.

    Both are None where the file does not say.
    """

    name: str
    type: str | None
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        sizes = (
            "" if self.shape is None else f"[{', '.join('?' if size is None else str(size) for size in self.shape)}]"
        )
        return f"{self.name} {self.type or 'of any type'}{sizes}"

    def fits(self, array: np.ndarray) -> bool:
        """Whether an array has this shape."""
        if self.shape is None:
            return True
        return array.ndim == len(self.shape) and all(
            have == want for have, want in zip(array.shape, self.shape, strict=True) if isinstance(want, int)
        )


def ports(facts: Iterable[tuple[str, str | None, Sequence[int | str | None] | None]]) -> tuple[Port, ...]:
    """Of (name, ONNX's name of the type, shape)."""
    return tuple(
        Port(name, None if kind is None else _NUMPY.get(kind, kind), None if shape is None else tuple(shape))
        for name, kind, shape in facts
    )


def checked(me: str, takes: Sequence[Port], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs as arrays, row by row in memory; raises `DataError` where one is missing, unknown, or does not fit."""
    listed = ", ".join(map(str, takes)) or "nothing"
    names = [port.name for port in takes]
    for name in inputs:
        if name not in names:
            close = ", ".join(nearest(str(name), names)) or listed
            raise DataError(f"{me}: there is no input {name!r}; it takes {listed}. Nearest: {close}.")
    missing = [name for name in names if name not in inputs]
    if missing:
        raise DataError(f"{me}: {', '.join(missing)} is missing; it takes {listed}.")
    return {port.name: _fitting(me, port, inputs[port.name]) for port in takes}


def _fitting(me: str, port: Port, value: Any) -> Any:
    if isinstance(value, list) or value is None:  # of a sequence, or an optional that is left out: ONNX Runtime looks
        return value
    array = np.asarray(value, order="C")
    if port.type is not None and array.dtype.kind not in "OUS" and array.dtype.name != port.type:
        raise DataError(f"{me} takes {port}, and {array.dtype.name} was given. Give {port.name}.astype({port.type!r}).")
    if not port.fits(array):
        raise DataError(f"{me} takes {port}, and an array of shape {list(array.shape)} was given.")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def physical_cores() -> int:
    """Cores that this process may run on: two threads of one core are one.

    >>> 1 <= physical_cores() <= len(os.sched_getaffinity(0))
    True
    """
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def proto_ports(proto: Any, names: Iterable[str]) -> tuple[Port, ...]:
    """Of inputs and outputs of a ModelProto."""
    helper = require("onnx", extra="onnx").helper
    values = {value.name: value for value in (*proto.graph.input, *proto.graph.output)}
    found = []
    for name in names:
        kind = values[name].type
        tensor = kind.tensor_type if kind.WhichOneof("value") == "tensor_type" else None
        if tensor is None or not tensor.elem_type:
            found.append(Port(name, None, None))
            continue
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        sizes = tuple(_size(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
        found.append(Port(name, "string" if dtype.kind == "O" else dtype.name, sizes))
    return tuple(found)


def _size(dim: Any) -> int | str | None:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
