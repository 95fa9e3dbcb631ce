// SPDX-License-Identifier: Apache-2.0
#include "peak.hpp"

#include <algorithm>
#include <chrono>
#include <limits>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"
#include "tensor.hpp"

namespace featherweight {

namespace {

template <class Work> double shortest(Pool& pool, const Work& work) {
    using clock = std::chrono::steady_clock;
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < 12; ++i) {
        const auto begin = clock::now();
        pool.run(pool.threads(), work);
        least = std::min(least, std::chrono::duration<double>(clock::now() - begin).count());
    }
    return least;
}

// Bytes a second when each thread reads `bytes` of its own, `times` over.
double reading(Pool& pool, const Kernels& kernels, std::size_t bytes, int times) {
    std::vector<Memory> own;
    for (int i = 0; i < pool.threads(); ++i) own.emplace_back(bytes);
    std::vector<float> sums(static_cast<std::size_t>(pool.threads()));
    const double seconds = shortest(pool, [&](int part) {
        for (int i = 0; i < times; ++i)
            sums[part] += kernels.product.read(reinterpret_cast<const float*>(own[part].data()), static_cast<std::int64_t>(bytes / 4));
    });
    return static_cast<double>(bytes) * times * pool.threads() / seconds;
}

}  // namespace

Peak measure_peak(int threads, const char* instruction_set) {
    const Kernels& best = kernels(instruction_set);
    Pool pool(threads);
    constexpr std::int64_t rounds = 1 << 20;
    const double seconds = shortest(pool, [&](int) {
        std::vector<float> out(static_cast<std::size_t>(12 * best.lanes), 0.5f);
        best.product.spin(rounds, out.data());
    });
    return {2.0 * rounds * 12 * best.lanes * pool.threads() / seconds, reading(pool, best, std::size_t{1} << 26, 1),
            reading(pool, best, std::size_t{1} << 18, 200)};
}

}  // namespace featherweight
