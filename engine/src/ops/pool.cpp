// SPDX-License-Identifier: Apache-2.0
#include "../ops.hpp"

namespace featherweight {

std::vector<Op> pool_ops() { return {}; }

}  // namespace featherweight
