// SPDX-License-Identifier: Apache-2.0
#define KERNELS_NAMESPACE avx512
#define KERNELS_LANES 16
#define KERNELS_REGISTERS 32
#include "kernels/unit.inl"
