// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <utility>

#include "plan.hpp"
#include "runs.hpp"

namespace featherweight {

namespace {

constexpr std::int64_t least = 1 << 14;  // elements that are worth a thread

// One run after the other. Those that lie densely in both are moved as bytes, the short ones without a call.
template <class T>
void copy_runs(const Walk& walk, std::int64_t begin, std::int64_t end, const T* from, T* to) {
    const std::int64_t step_to = walk.strides[0].back(), step_from = walk.strides[1].back();
    each_run<2>(walk.dims, {&walk.strides[0], &walk.strides[1]}, begin, end, [&](const auto& offsets, std::int64_t size) {
        T* target = to + offsets[0];
        const T* source = from + offsets[1];
        if (step_to == 1 && step_from == 1 && size >= 16)
            std::memcpy(target, source, static_cast<std::size_t>(size) * sizeof(T));
        else if (step_to == 1 && step_from == 0)
            std::fill_n(target, size, *source);
        else
            for (std::int64_t i = 0; i < size; ++i) target[i * step_to] = source[i * step_from];
    });
}

template <class T> struct Square {
    typedef T Row __attribute__((vector_size(16)));
    static constexpr int size = 16 / sizeof(T);
    Row rows[size];
};

template <class Row, std::size_t... i>
Row zipped_low(Row a, Row b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (i / 2 + i % 2 * sizeof...(i))...);
}
template <class Row, std::size_t... i>
Row zipped_high(Row a, Row b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (sizeof...(i) / 2 + i / 2 + i % 2 * sizeof...(i))...);
}

// A square of elements changes rows for columns. Zipping the upper half of the rows with the lower one turns the bits of an
// element's place by one; as many times as a row's number has bits, and rows are columns.
template <class T>
void transpose_square(const T* from, std::int64_t step_from, T* to, std::int64_t step_to) {
    constexpr int n = Square<T>::size;
    constexpr auto order = std::make_index_sequence<n>{};
    Square<T> square;
    for (int i = 0; i < n; ++i) std::memcpy(&square.rows[i], from + i * step_from, 16);
    for (int bit = 1; bit < n; bit *= 2) {
        Square<T> next;
        for (int i = 0; i < n / 2; ++i) {
            next.rows[2 * i] = zipped_low(square.rows[i], square.rows[i + n / 2], order);
            next.rows[2 * i + 1] = zipped_high(square.rows[i], square.rows[i + n / 2], order);
        }
        square = next;
    }
    for (int i = 0; i < n; ++i) std::memcpy(to + i * step_to, &square.rows[i], 16);
}

// to[a * step_to + b] = from[b * step_from + a], by squares of a cache line. They are read whole before they are written:
// lines whose distance is a power of two would drive each other out of the cache before they were done with.
template <class T>
void transpose_block(const T* from, std::int64_t step_from, T* to, std::int64_t step_to, std::int64_t as, std::int64_t bs) {
    constexpr std::int64_t n = Square<T>::size, line = 64 / sizeof(T);
    std::int64_t done = 0;
    if (as == line) {
        alignas(64) T lines[line * line];
        for (; done + line <= bs; done += line) {
            for (std::int64_t b = 0; b < line; ++b) std::memcpy(lines + b * line, from + (done + b) * step_from, 64);
            for (std::int64_t a = 0; a < line; a += n)
                for (std::int64_t b = 0; b < line; b += n) transpose_square(lines + b * line + a, line, to + a * step_to + done + b, step_to);
        }
    }
    const std::int64_t whole = as / n * n;
    for (; done + n <= bs; done += n)
        for (std::int64_t a = 0; a < whole; a += n) transpose_square(from + done * step_from + a, step_from, to + a * step_to + done, step_to);
    for (std::int64_t a = 0; a < as; ++a)
        for (std::int64_t b = a < whole ? done : 0; b < bs; ++b) to[a * step_to + b] = from[b * step_from + a];
}

// Where the target's innermost axis is one and the source's another. A block is a cache line wide in the source, and long in
// the target.
template <class T>
void copy_transposed(Pool& pool, const Walk& walk, std::size_t axis, const T* from, T* to) {
    constexpr std::int64_t line = 64 / sizeof(T), longest = 16 * line;
    const std::size_t inner = walk.dims.size() - 1;
    const std::int64_t as = walk.dims[axis], bs = walk.dims[inner];
    const std::int64_t step_to = walk.strides[0][axis], step_from = walk.strides[1][inner];
    Dims blocks = walk.dims;
    blocks[axis] = (as + line - 1) / line;
    blocks[inner] = (bs + longest - 1) / longest;
    const std::int64_t all = count(blocks);
    const int parts = static_cast<int>(std::clamp<std::int64_t>(count(walk.dims) / least, 1, std::min<std::int64_t>(all, pool.threads())));
    pool.run(parts, [&](int part) {
        for (std::int64_t block = all * part / parts; block < all * (part + 1) / parts; ++block) {
            std::int64_t rest = block, offset_to = 0, offset_from = 0, a = 0, b = 0;
            for (std::size_t i = inner + 1; i-- > 0;) {
                std::int64_t at = rest % blocks[i];
                rest /= blocks[i];
                if (i == axis) a = at *= line;
                if (i == inner) b = at *= longest;
                offset_to += at * walk.strides[0][i];
                offset_from += at * walk.strides[1][i];
            }
            transpose_block(from + offset_from, step_from, to + offset_to, step_to, std::min(line, as - a), std::min(longest, bs - b));
        }
    });
}

template <class T>
void copy_as(Pool& pool, const Walk& walk, const std::byte* source, std::byte* target) {
    const auto* from = reinterpret_cast<const T*>(source);
    auto* to = reinterpret_cast<T*>(target);
    const std::int64_t step_from = walk.strides[1].back();
    if (walk.strides[0].back() == 1 && step_from != 0 && step_from != 1)
        for (std::size_t axis = walk.dims.size() - 1; axis-- > 0;)
            if (walk.strides[1][axis] == 1) return copy_transposed(pool, walk, axis, from, to);
    const std::int64_t size = count(walk.dims);
    const int parts = static_cast<int>(std::clamp<std::int64_t>(size / least, 1, pool.threads()));
    pool.run(parts, [&](int part) { copy_runs(walk, size * part / parts, size * (part + 1) / parts, from, to); });
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
