# SPDX-License-Identifier: Apache-2.0
"""The types of src/python.cpp."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, overload

from numpy.typing import NDArray

class Error(ValueError): ...

class Unsupported(Error):
    makes: tuple[str, ...]

class _Spent(TypedDict):
    node: str
    op: str
    what: str
    seconds: float
    flops: float
    bytes: float

class Engine:
    @overload
    def __init__(
        self,
        model: bytes,
        threads: int = 1,
        instruction_set: str = "",
        folder: str = "",
        known: Sequence[str] = (),
        decisions: Mapping[str, str] = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        model: str | os.PathLike[str],
        threads: int = 1,
        instruction_set: str = "",
        known: Sequence[str] = (),
        decisions: Mapping[str, str] = ...,
    ) -> None: ...
    @property
    def inputs(self) -> list[tuple[str, str | None, list[int | str | None] | None]]: ...
    @property
    def outputs(self) -> list[tuple[str, str | None, list[int | str | None] | None]]: ...
    @property
    def nodes(self) -> list[tuple[str, str, str, tuple[str, ...]]]: ...
    @property
    def finishes(self) -> list[str]: ...
    @property
    def instruction_set(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def decided(self) -> int: ...
    @property
    def decisions(self) -> dict[str, str]: ...
    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]: ...
    def arena_bytes(self, inputs: Sequence[NDArray[Any]]) -> int: ...
    def profile(self, inputs: Sequence[NDArray[Any]]) -> list[_Spent]: ...

def instruction_sets() -> list[str]: ...
def op_names() -> list[str]: ...
def peak(threads: int = 1, instruction_set: str = "") -> list[float]: ...
