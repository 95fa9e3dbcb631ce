// SPDX-License-Identifier: Apache-2.0
// One instruction set's kernels: see kernels.hpp for why nothing here is shared between units.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../kernels.hpp"

namespace featherweight {

namespace KERNELS_NAMESPACE {

#include "vector.inl"

#include "elementwise.inl"
#include "product.inl"
#include "rows.inl"

}  // namespace KERNELS_NAMESPACE

#define KERNELS_TEXT(name) #name
#define KERNELS_NAME(name) KERNELS_TEXT(name)
#define KERNELS_JOIN(a, b) a##b
#define KERNELS_OBJECT(name) KERNELS_JOIN(kernels_, name)

extern const Kernels KERNELS_OBJECT(KERNELS_NAMESPACE);
const Kernels KERNELS_OBJECT(KERNELS_NAMESPACE){KERNELS_NAME(KERNELS_NAMESPACE), KERNELS_LANES, KERNELS_NAMESPACE::product_kernels,
                                                KERNELS_NAMESPACE::elementwise_kernels, KERNELS_NAMESPACE::row_kernels};

}  // namespace featherweight
