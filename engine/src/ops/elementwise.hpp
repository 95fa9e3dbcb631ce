// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../loops.hpp"

namespace featherweight {

// The loops of arithmetic on i32 and i64 (ops/integers.cpp), wrapping around as in C; throw Unsupported for other types.
Loop integer_loop(Unary function, Type type);
Loop integer_loop(Binary function, Type type);
Loop integer_power(Type base, Type exponent);

// Adds a step that throws an Error where an element of `divisor`, an integer, is zero.
void refuse_zeros(Planner& planner, const Fact& divisor);

// `fact` in another type, by a step of its own (ops/cast.cpp).
Fact converted(Planner& planner, const Fact& fact, Type type);

}  // namespace featherweight
