// SPDX-License-Identifier: Apache-2.0

static constexpr ElementwiseKernels elementwise_kernels{};
