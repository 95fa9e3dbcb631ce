// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>

#include "tensor.hpp"

namespace featherweight {

// Elements [begin, end) of `dims`, counted with the last axis innermost, run by run along that axis: visit(offsets, size)
// with the offset of each run's first element by each of the `views` strides.
template <std::size_t views, class Visit>
void each_run(const Dims& dims, const std::array<const Dims*, views>& strides, std::int64_t begin, std::int64_t end, Visit visit) {
    if (begin >= end) return;
    const std::size_t outer = dims.size() - 1;
    const std::int64_t inner = dims[outer];
    Dims at(outer);
    std::array<std::int64_t, views> offsets{}, moved{};
    std::int64_t run = begin / inner;
    for (std::size_t axis = outer; axis-- > 0;) {
        at[axis] = run % dims[axis];
        run /= dims[axis];
        for (std::size_t v = 0; v < views; ++v) offsets[v] += at[axis] * (*strides[v])[axis];
    }
    std::int64_t first = begin % inner;
    while (true) {
        const std::int64_t size = std::min(inner - first, end - begin);
        for (std::size_t v = 0; v < views; ++v) moved[v] = offsets[v] + first * (*strides[v])[outer];
        visit(moved, size);
        begin += size;
        if (begin >= end) return;
        first = 0;
        for (std::size_t axis = outer; axis-- > 0;) {  // on to the next run, as an odometer
            const bool stays = ++at[axis] < dims[axis];
            const std::int64_t steps = stays ? 1 : 1 - dims[axis];
            for (std::size_t v = 0; v < views; ++v) offsets[v] += steps * (*strides[v])[axis];
            if (stays) break;
            at[axis] = 0;
        }
    }
}

}  // namespace featherweight
