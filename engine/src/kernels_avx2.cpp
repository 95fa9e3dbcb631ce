// SPDX-License-Identifier: Apache-2.0
#define KERNELS_NAMESPACE avx2
#define KERNELS_LANES 8
#define KERNELS_REGISTERS 16
#include "kernels/unit.inl"
