// SPDX-License-Identifier: Apache-2.0
#include "../ops.hpp"

namespace featherweight {

std::vector<Op> index_ops() { return {}; }

}  // namespace featherweight
