# SPDX-License-Identifier: Apache-2.0
"""What an installed wheel must do, with NumPy and onnx alone: two products with an activation between them."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import featherweight_engine as core

rng = np.random.default_rng(0)
x, w, u = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 64), (64, 48), (48, 7)))
w *= rng.random(w.shape) < 0.1
graph = helper.make_graph(
    [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "u"], ["y"]),
    ],
    "wheel",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 64])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 7])],
    [numpy_helper.from_array(w, "w"), numpy_helper.from_array(u, "u")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
for name in core.instruction_sets():
    [y] = core.Engine(model, threads=2, instruction_set=name).run([x])
    np.testing.assert_allclose(y, np.maximum(x @ w, 0) @ u, rtol=1e-4, atol=1e-4)
