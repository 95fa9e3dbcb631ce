// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace featherweight {

// leaky_relu has its slope in `low`, hard_sigmoid its alpha in `low` and its beta in `high`, clip its bounds in both.
enum class Activation : std::uint8_t { none, relu, clip, sigmoid, silu, hard_sigmoid, hard_swish, gelu, gelu_tanh, tanh, leaky_relu };

}  // namespace featherweight
