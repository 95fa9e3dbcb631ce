// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "plan.hpp"

namespace featherweight {

std::vector<Op> elementwise_ops();  // ops/elementwise.cpp: arithmetic, comparisons, activations, Cast, Where
std::vector<Op> movement_ops();     // ops/movement.cpp: Transpose, Reshape, Slice, Concat, Gather, Pad, ...
std::vector<Op> shape_ops();        // ops/shape.cpp: Shape, Size, Range, ConstantOfShape, Constant
std::vector<Op> row_ops();          // ops/rows.cpp: reductions, Softmax, norms
std::vector<Op> pool_ops();         // ops/pool.cpp: pooling, Resize
std::vector<Op> product_ops();      // ops/product.cpp: Conv, Gemm, MatMul

}  // namespace featherweight
