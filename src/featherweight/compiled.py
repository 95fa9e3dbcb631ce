# SPDX-License-Identifier: Apache-2.0
"""A module in the sparse engine: exported, checked against it, and called as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from featherweight.deploy import EngineSession, export_onnx
from featherweight.errors import OptionError
from featherweight.measure import eval_copy, run_once
from featherweight.runtime import Engine, load
from featherweight.task import describe

__all__ = ["Compiled", "compile"]


class Compiled(EngineSession):
    """A module in the engine, called as the module is; `engine` is what runs it, and knows its profile."""

    def __init__(self, engine: Engine, like: Any, folder: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(engine, like)
        self._folder = folder  # the file is read again where another batch changes what runs where


def compile(
    model: nn.Module, example_inputs: tuple[Any, ...], threads: int | None = None, *, cache: str | Path | None = None
) -> Compiled:
    """A callable that stands in for the module, in eval mode: tensors in and out, by place or by name.

    Exports the model as `export_onnx` does, checked against it, and loads that as `load` does: later changes to the
    model do not reach it. The batch may change from call to call where the model lets it. Faster where weights are
    zeros; no gradients.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    >>> x = torch.randn(3, 16)
    >>> fast = compile(model, (x[:2],))
    >>> torch.testing.assert_close(fast(x), model(x).detach())
    """
    if not isinstance(example_inputs, tuple):
        raise OptionError(f"example_inputs is {describe(example_inputs)}; give a tuple, for one tensor: (x,).")
    folder = tempfile.TemporaryDirectory(prefix="featherweight-")
    written = export_onnx(model, example_inputs, Path(folder.name) / "model.onnx")
    return Compiled(load(written.path, threads, cache=cache), run_once(eval_copy(model), example_inputs), folder)
