// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "plan.hpp"

namespace featherweight {

namespace {

template <class T>
void copy_as(Pool& pool, const Walk& walk, const std::byte* source, std::byte* target) {
    const auto* from = reinterpret_cast<const T*>(source);
    auto* to = reinterpret_cast<T*>(target);
    const std::size_t rank = walk.dims.size();
    const std::int64_t inner = walk.dims.back();
    const std::int64_t rows = count(walk.dims) / std::max<std::int64_t>(inner, 1);
    const std::int64_t step_to = walk.strides[0].back(), step_from = walk.strides[1].back();
    const std::int64_t least = 1 << 14;  // elements that are worth a thread
    const int parts = static_cast<int>(std::clamp<std::int64_t>(rows * inner / least, 1, std::min<std::int64_t>(rows, pool.threads())));
    pool.run(parts, [&](int part) {
        for (std::int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
            std::int64_t rest = row, a = 0, b = 0;
            for (std::size_t i = rank - 1; i-- > 0;) {
                const std::int64_t at = rest % walk.dims[i];
                rest /= walk.dims[i];
                a += at * walk.strides[0][i];
                b += at * walk.strides[1][i];
            }
            if (step_to == 1 && step_from == 1)
                std::copy_n(from + b, inner, to + a);
            else
                for (std::int64_t i = 0; i < inner; ++i) to[a + i * step_to] = from[b + i * step_from];
        }
    });
}

}  // namespace

void copy(Pool& pool, const Fact& from, const std::byte* source, const Fact& to, std::byte* target) {
    if (to.size() == 0) return;
    const Walk steps = walk({&to, &from});
    switch (size_of(to.type)) {
        case 1: return copy_as<std::uint8_t>(pool, steps, source, target);
        case 2: return copy_as<std::uint16_t>(pool, steps, source, target);
        case 4: return copy_as<std::uint32_t>(pool, steps, source, target);
        default: return copy_as<std::uint64_t>(pool, steps, source, target);
    }
}

}  // namespace featherweight
