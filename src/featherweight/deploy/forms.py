# SPDX-License-Identifier: Apache-2.0
"""What a runtime makes of a quantized file: which layers it computes in integers, which stayed floating point, and why.

A QDQ file only offers integers. A runtime that finds no kernel for a pattern computes it in floating point,
dequantizing weights at each call, slower than the plain float file, and says nothing. So its own optimised graph is
read: ONNX Runtime writes it to a file, OpenVINO hands it out with the precision of each layer.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featherweight.deploy.nodes import constant, ir
from featherweight.deploy.sessions import openvino_core
from featherweight.errors import ArtefactError, OptionError, nearest, require
from featherweight.measure import machine_facts

__all__ = ["INTEGER_RUNTIMES", "Form", "form_in", "int8_instructions", "is_quantized"]

# Those that compute with integers. The engine does not yet: it hands quantized layers to ONNX Runtime.
INTEGER_RUNTIMES = ("onnxruntime", "openvino")

_LAYERS = {
    "Conv",
    "ConvTranspose",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "GRU",
    "Gemm",
    "LSTM",
    "MatMul",
    "NhwcFusedConv",
    "RNN",
}
_INTEGER_LAYERS = {
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearConvTranspose",
    "QLinearMatMul",
}
_OPENVINO_LAYERS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq"}
# Dot products of bytes; without them int8 multiplies no faster than float32.
_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclasses.dataclass(frozen=True)
class Form:
    """Of one file in one runtime: how many layers are computed in integers and as what, and the rest by name.

    MatMulNBits, and what is said to be "of integer weights", keeps weights as integers and multiplies as it sees fit.

    `floating` are layers (convolutions, matrix products, recurrences) in floating point; those whose inputs are both
    computed, as in attention, are not among them. `unfused` are QuantizeLinear and DequantizeLinear nodes that are left
    beside the ones at the network's ends: each is a pass over a tensor. `instructions` are the processor's for int8.
    """

    runtime: str
    integer: dict[str, int]
    floating: tuple[str, ...]
    unfused: tuple[str, ...]
    instructions: tuple[str, ...]

    @property
    def words(self) -> str:
        """In one or more sentences."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.integer.items()))
        text = f"{sum(self.integer.values())} layers in integers" + (f" ({kinds})" if kinds else "")
        text += f", {len(self.floating)} in floating point" + _listed(self.floating)
        if self.unfused:
            text += f"; {len(self.unfused)} pairs of Q and DQ left unfused" + _listed(self.unfused)
        if not self.instructions:
            text += ". This processor has no dot products of bytes (VNNI, AMX, dotprod): int8 saves memory, hardly time"
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def _listed(names: Sequence[str], most: int = 6) -> str:
    if not names:
        return ""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f" ({', '.join(names[:most])}{more})"


def int8_instructions() -> tuple[str, ...]:
    """What this processor has for products of bytes; nothing on older ones.

    >>> set(int8_instructions()) <= {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
    True
    """
    flags = machine_facts()["flags"]
    return tuple(flag for flag in _INSTRUCTIONS if flag in flags)


def is_quantized(path: str | Path) -> bool:
    """Whether an ONNX file holds integers to compute with: any DequantizeLinear, or a matrix product of integers."""
    kinds = {"DequantizeLinear", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"}
    return any(node.op_type in kinds for node in ir().load(str(path)).graph.all_nodes())


def form_in(path: str | Path, runtime: str) -> Form:
    """Opens a file in a runtime and reads what became of it.

    Raises `OptionError` for an unknown runtime, `MissingExtra` for one that is not installed, `ArtefactError` for a
    file that it refuses.
    """
    readers = dict(zip(INTEGER_RUNTIMES, (_onnxruntime, _openvino), strict=True))
    if runtime not in readers:
        raise OptionError(
            f"runtime {runtime!r} is none of {', '.join(readers)}. Nearest: {', '.join(nearest(runtime, readers))}."
        )
    try:
        integer, floating, unfused = readers[runtime](Path(path))
    except ImportError:
        raise
    except Exception as error:
        raise ArtefactError(f"{path}: {runtime} refuses it: {str(error).strip().splitlines()[0]}") from error
    return Form(runtime, dict(integer), tuple(floating), tuple(unfused), int8_instructions())


def _onnxruntime(path: Path) -> tuple[Counter[str], list[str], list[str]]:
    ort = require("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = ir().load(options.optimized_model_filepath).graph
        integer: Counter[str] = Counter()
        floating, unfused = [], []
        for node in graph.all_nodes():
            if node.op_type in _INTEGER_LAYERS:
                integer[node.op_type] += 1
            elif node.op_type in _LAYERS and _has_weight(node):
                floating.append(f"{node.op_type} {node.outputs[0].name}")
            elif node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is None and not _at_an_end(node):
                unfused.append(node.outputs[0].name)
    return integer, floating, unfused


def _has_weight(node: Any) -> bool:
    """Not so a product of two activations. ONNX Runtime's own layouts put nodes between a weight and its layer."""
    for value in node.inputs[:2]:
        while value is not None and value.producer() is not None and len(value.producer().inputs):
            if value.producer().op_type not in ("DequantizeLinear", "Transpose", "Reshape", "ReorderInput"):
                break
            value = value.producer().inputs[0]
        if value is not None and (value.is_initializer() or constant(value) is not None):
            return True
    return False


def _at_an_end(node: Any) -> bool:
    return any(value.is_graph_output() for value in node.outputs)


def _openvino(path: Path) -> tuple[Counter[str], list[str], list[str]]:
    core = openvino_core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    runtime_model = core.compile_model(core.read_model(str(path)), "CPU", settings).get_runtime_model()
    integer: Counter[str] = Counter()
    floating, unfused = [], []
    for op in runtime_model.get_ordered_ops():
        info = {
            key: str(op.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision", "primitiveType")
        }
        kind = info["layerType"]
        if kind in _OPENVINO_LAYERS:
            if info["runtimePrecision"] in ("i8", "u8", "i4", "u4"):
                integer[kind if info["primitiveType"].endswith("I8") else f"{kind} of integer weights"] += 1
            elif any(source.get_node().get_type_name() == "Const" for source in op.input_values()) or kind != "MatMul":
                floating.append(f"{kind} {op.get_friendly_name()}")
        elif kind == "FakeQuantize" and not any(
            i.get_node().get_friendly_name() in _inputs(runtime_model) for i in op.input_values()
        ):
            unfused.append(op.get_friendly_name())
    return integer, floating, unfused


def _inputs(model: Any) -> set[str]:
    return {parameter.get_friendly_name() for parameter in model.get_parameters()}
