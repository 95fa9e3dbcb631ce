// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "kernels/elementwise.hpp"
#include "kernels/product.hpp"
#include "kernels/rows.hpp"

namespace featherweight {

// The inner loops for one instruction set. Each kernels_<set>.cpp compiles the same .inl files with its own flags, in a
// namespace of its own (KERNELS_NAMESPACE), and nothing that is inline and shared: a function of the standard library
// that such a unit instantiates might be the copy that the linker keeps for a processor that lacks the instructions.
struct Kernels {
    const char* name;  // "avx512", "avx2", "portable"
    int lanes;         // floats in a register
    ProductKernels product;
    ElementwiseKernels elementwise;
    RowKernels rows;
};

const Kernels& kernels(const char* name);  // by name, or the best for this processor where name is null or ""; throws Error
std::vector<std::string> instruction_sets();  // those that this build has and this processor runs, best first

}  // namespace featherweight
