// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "../loops.hpp"

namespace featherweight {

// Loops over runs of any type, in plain code: for integers, booleans and conversions.
template <class Out, class A, class Function>
void map(const Runs& runs, Function function) {
    Out* out = static_cast<Out*>(runs.out);
    for (std::ptrdiff_t run = 0; run < runs.count; ++run, out += runs.size) {
        const A* a = static_cast<const A*>(runs.in[0].at) + run * runs.in[0].step;
        if (runs.in[0].moves)
            for (std::ptrdiff_t i = 0; i < runs.size; ++i) out[i] = function(a[i]);
        else
            std::fill_n(out, runs.size, function(*a));
    }
}

template <class Out, class A, class B, class Function>
void map_two(const Runs& runs, Function function) {
    Out* out = static_cast<Out*>(runs.out);
    for (std::ptrdiff_t run = 0; run < runs.count; ++run, out += runs.size) {
        const A* a = static_cast<const A*>(runs.in[0].at) + run * runs.in[0].step;
        const B* b = static_cast<const B*>(runs.in[1].at) + run * runs.in[1].step;
        const std::ptrdiff_t step_a = runs.in[0].moves, step_b = runs.in[1].moves;
        const A only_a = *a;  // as copies: a store to `out` might change what a pointer points at, as far as the compiler knows
        const B only_b = *b;
        if (step_a == 1 && step_b == 1)
            for (std::ptrdiff_t i = 0; i < runs.size; ++i) out[i] = function(a[i], b[i]);
        else if (step_a == 1)
            for (std::ptrdiff_t i = 0; i < runs.size; ++i) out[i] = function(a[i], only_b);
        else
            for (std::ptrdiff_t i = 0; i < runs.size; ++i) out[i] = function(only_a, b[i * step_b]);
    }
}

}  // namespace featherweight
