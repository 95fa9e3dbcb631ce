// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "../plan.hpp"

namespace featherweight {

// `size` elements of an axis from `start` on, every `step`-th.
Fact sliced(const Fact& fact, int axis, std::int64_t start, std::int64_t size, std::int64_t step = 1);

// Gives output 0: `fact` in other dims, a view where there is one.
void give_reshaped(Planner& planner, const Fact& fact, const Dims& dims);

// Calls with an unsigned number of as many bytes as an element has: moving it needs to know no more.
template <class Function>
void by_size(Type type, Function function) {
    switch (size_of(type)) {
        case 1: return function(std::uint8_t{});
        case 2: return function(std::uint16_t{});
        case 4: return function(std::uint32_t{});
        default: return function(std::uint64_t{});
    }
}

// From one view to another of the same dims.
struct Move {
    Fact from, to;
};
// One step that makes `out` by moves, one after the other; those to `out` itself may read what earlier ones wrote.
void add_moves(Planner& planner, std::string what, const Fact& out, std::vector<Move> moves);

}  // namespace featherweight
