# SPDX-License-Identifier: Apache-2.0
"""Oracles: files put together by hand, of which it is known what a runtime can and cannot compute in integers."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from featherweight.deploy import Form, form_in, int8_instructions, is_quantized, session
from featherweight.errors import ArtefactError, OptionError


def conv(path: Path, end: bool, zero_point: int = 0) -> Path:
    """Q, DQ, Conv by int8, Relu; and at the end Q and DQ, or nothing."""
    random = np.random.default_rng(0)
    tables = {"s": np.float32(0.02), "z": np.uint8(128), "t": np.float32(0.05), "y": np.uint8(zero_point)}
    tables |= {"q": random.integers(-127, 128, (16, 8, 3, 3), dtype=np.int8), "w_s": np.full(16, 0.01, np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_f"]),
        helper.make_node("DequantizeLinear", ["q", "w_s"], ["w"], axis=0),
        helper.make_node("Conv", ["x_f", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r" if end else "out"]),
    ]
    if end:
        nodes += [helper.make_node("QuantizeLinear", ["r", "t", "y"], ["r_q"])]
        nodes += [helper.make_node("DequantizeLinear", ["r_q", "t", "y"], ["out"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 12, 12])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 16, 10, 10])
    graph = helper.make_graph(
        nodes, "conv", [x], [out], [numpy_helper.from_array(np.asarray(v), k) for k, v in tables.items()]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


def test_a_conv_between_grids_is_found_as_integers_in_both_runtimes(tmp_path) -> None:
    path = conv(tmp_path / "conv.onnx", end=True)
    assert is_quantized(path)
    found = form_in(path, "onnxruntime")
    assert (found.integer, found.floating, found.unfused) == ({"QLinearConv": 1}, (), ())
    assert found.words.startswith("1 layers in integers (1 QLinearConv), 0 in floating point")
    assert form_in(path, "openvino").integer == {"Convolution": 1}


@pytest.mark.parametrize(("end", "zero_point"), [(False, 0), (True, 128)])
def test_what_onnx_runtime_leaves_in_floating_point_is_named(end, zero_point, tmp_path) -> None:
    """A conv without a grid on its output, and one whose Relu the output's grid does not make superfluous."""
    found = form_in(conv(tmp_path / "conv.onnx", end, zero_point), "onnxruntime")
    assert found.integer == {} and len(found.floating) == 1 and "Conv" in found.floating[0]
    assert len(found.unfused) == 1
    assert f"1 in floating point ({found.floating[0]}); 1 pairs of Q and DQ left unfused" in found.words


def test_a_processor_without_products_of_bytes_is_told(monkeypatch) -> None:
    assert "no dot products of bytes" in Form("onnxruntime", {}, (), (), ()).words
    assert "no dot products" not in Form("onnxruntime", {}, (), (), ("avx512_vnni",)).words
    monkeypatch.setattr("featherweight.deploy.forms.machine_facts", lambda: {"flags": ["avx2", "fma"]})
    assert int8_instructions() == ()


def test_sessions_that_are_exact_keep_float_inputs_beside_integer_weights(tmp_path) -> None:
    """By default both runtimes round the inputs of a weight-only layer, which no node of the file says."""
    random = np.random.default_rng(0)
    q, s = random.integers(-7, 8, (256, 64), dtype=np.int8), np.full(64, 0.01, np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["out"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 256])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4, 64])
    graph = helper.make_graph(
        nodes, "product", [x], [out], [numpy_helper.from_array(q, "q"), numpy_helper.from_array(s, "s")]
    )
    path = tmp_path / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    image = torch.from_numpy(random.normal(size=(4, 256)).astype(np.float32))
    want = image.double().numpy() @ (q * 0.01)
    off = {}
    for runtime in ("onnxruntime", "openvino"):
        for exact in (True, False):
            got = session(path, runtime, exact=exact)(image).numpy()
            off[runtime, exact] = np.abs(got - want).max() / np.abs(want).max()
    assert off["onnxruntime", True] < 1e-6 and off["openvino", True] < 1e-6
    assert off["onnxruntime", False] > 1e-4


def test_wrong_calls_are_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match="Nearest: onnxruntime"):
        form_in(tmp_path / "x.onnx", "onnxrt")
    (tmp_path / "damaged.onnx").write_text("not ONNX")
    with pytest.raises(ArtefactError, match=r"damaged.onnx: onnxruntime refuses it"):
        form_in(tmp_path / "damaged.onnx", "onnxruntime")
