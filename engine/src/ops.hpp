// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "plan.hpp"

namespace featherweight {

std::vector<Op> elementwise_ops();  // ops/elementwise.cpp: arithmetic, activations
std::vector<Op> logic_ops();        // ops/logic.cpp: comparisons, logic, Where
std::vector<Op> cast_ops();         // ops/cast.cpp
std::vector<Op> movement_ops();     // ops/movement.cpp: Transpose, Reshape, Slice, Concat, Pad, ...
std::vector<Op> index_ops();        // ops/index.cpp: Gather and what else is told by a tensor of indices
std::vector<Op> scan_ops();         // ops/scan.cpp: CumSum
std::vector<Op> shape_ops();        // ops/shape.cpp: Shape, Size, Range, ConstantOfShape
std::vector<Op> row_ops();          // ops/rows.cpp: reductions, Softmax, norms
std::vector<Op> pool_ops();         // ops/pool.cpp: pooling, Resize
std::vector<Op> conv_ops();         // ops/conv.cpp
std::vector<Op> matmul_ops();       // ops/matmul.cpp: Gemm, MatMul

// Whether an op carries out its Node::finish.
bool accepts_finish(const std::string& op);

}  // namespace featherweight
