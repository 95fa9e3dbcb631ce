# SPDX-License-Identifier: Apache-2.0
"""The sparse engine's core: ONNX graphs of the ops that it knows, run on the CPU without computing zeros.

Most users want `featherweight.engine`, which runs any ONNX file and hands what this core lacks to ONNX Runtime.
"""

from ._core import Engine, Error, Unsupported, instruction_sets, op_names, peak

__all__ = ["Engine", "Error", "Unsupported", "instruction_sets", "op_names", "peak"]
