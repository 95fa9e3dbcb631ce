# SPDX-License-Identifier: Apache-2.0
"""The sparse engine: any ONNX model, and any module, run on the CPU without computing zeros. See docs/engine.md.

Whoever only runs files need not pay for torch, which is most of the seconds and megabytes of a start: `compile` alone
imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from featherweight.runtime import Engine, Port, Profile, Row, load

if TYPE_CHECKING:
    from featherweight.compiled import Compiled, compile

__all__ = ["Compiled", "Engine", "Port", "Profile", "Row", "compile", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Compiled", "compile"):
        return getattr(importlib.import_module("featherweight.compiled"), name)
    raise AttributeError(f"module 'featherweight.engine' has no attribute {name!r}")
