// SPDX-License-Identifier: Apache-2.0

static constexpr RowKernels row_kernels{};
