# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime opened as all of featherweight opens it: on the CPU, with fixed threads, silent."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from featherweight.errors import require

__all__ = ["first_line", "open_onnxruntime"]


def open_onnxruntime(model: str | Path | bytes, threads: int | None, *, exact: bool = False) -> Any:
    """An InferenceSession. Whatever ONNX Runtime raises comes through; `first_line` says it in short.

    `exact` keeps it from rounding the inputs of layers with integer weights to 8 bits.
    """
    ort = require("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    # Threads that wait for the next call by spinning would eat the time of whatever is timed in between.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 4  # what fails is raised; the console is the caller's
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def first_line(error: Exception) -> str:
    """Without ONNX Runtime's codes in front (`[ONNXRuntimeError] : 1 : FAIL : `) and its C++ names behind."""
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip().partition("\n")[0])
    return textwrap.shorten(line, 200, placeholder=" ...")
