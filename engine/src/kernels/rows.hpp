// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace featherweight {

struct RowKernels {};

}  // namespace featherweight
