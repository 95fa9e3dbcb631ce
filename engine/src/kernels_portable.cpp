// SPDX-License-Identifier: Apache-2.0
#define KERNELS_NAMESPACE portable
#define KERNELS_LANES 4
#define KERNELS_REGISTERS 16
#include "kernels/unit.inl"
