# SPDX-License-Identifier: Apache-2.0
"""An ONNX file in two runtimes at once: the sparse core runs what it has ops for, ONNX Runtime the rest."""

from featherweight.runtime.engine import Engine, load
from featherweight.runtime.foreign import first_line, open_onnxruntime
from featherweight.runtime.ports import Port, physical_cores
from featherweight.runtime.profile import Profile, Row

__all__ = ["Engine", "Port", "Profile", "Row", "first_line", "load", "open_onnxruntime", "physical_cores"]
