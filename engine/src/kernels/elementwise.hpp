// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "../activation.hpp"

namespace featherweight {

// What an elementwise loop does at once: `count` runs of `size` elements each, the output's lying one behind the other.
// The output may be an operand itself.
struct Runs {
    struct Operand {
        const void* at;
        std::ptrdiff_t step;  // from run to run, in elements
        bool moves;           // within a run: one element after the other, or the same one
    };
    std::ptrdiff_t count, size;
    void* out;
    Operand in[3];
    float low, high;  // parameters of the function; add, subtract, multiply and multiply_add clamp their result between them
};

// remainder is of the dividend's sign, as in C, floored_remainder of the divisor's, as in Python. leak is PRelu's.
// The parameters of elu, selu and swish are in `low` and `high`: alpha, and selu's gamma.
enum class Unary : std::uint8_t {
    negative, absolute, square, cube, square_root, reciprocal, exponential, logarithm, error_function, floor, ceiling, round, sign,
    sine, cosine, elu, selu, softplus, softsign, mish, swish, thresholded_relu, scaled
};
enum class Binary : std::uint8_t { add, subtract, multiply, divide, minimum, maximum, power, remainder, floored_remainder, leak };

// All on f32.
struct ElementwiseKernels {
    void (*unary)(Unary function, const Runs& runs);
    void (*activation)(Activation function, const Runs& runs);
    void (*binary)(Binary function, const Runs& runs);
    void (*multiply_add)(const Runs& runs);  // in[0] * in[1] + in[2]
};

}  // namespace featherweight
