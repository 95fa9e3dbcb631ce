// SPDX-License-Identifier: Apache-2.0

// The sums of one row become its output. Where a tile is one whole segment and the activation is a clamp, nothing but
// registers is touched; else the sums go through memory, segment by segment.
static inline Vec finished(Vec sum, const Finisher& to, Vec residual) {
    if (to.residual != nullptr && to.residual_first) sum += residual;
    sum = activated(sum, to.activation, to.low, to.high);
    if (to.residual != nullptr && !to.residual_first) sum += residual;
    return sum;
}

__attribute__((noinline)) static void finish_segments(const float* sums, const Finisher& to, int row) {
    for (int s = 0; s < to.count; ++s) {
        const Segment& segment = to.segments[s];
        const std::ptrdiff_t base = row * to.stride + segment.out;
        int i = 0;
        for (; i + lanes <= segment.size; i += lanes) {
            const Vec residual = to.residual != nullptr ? load(to.residual + base + i) : Vec{};
            store(to.out + base + i, finished(load(sums + segment.at + i), to, residual));
        }
        if (const int rest = segment.size - i; rest > 0) {
            const Vec residual = to.residual != nullptr ? load_first(to.residual + base + i, rest) : Vec{};
            store_first(to.out + base + i, finished(load_first(sums + segment.at + i, rest), to, residual), rest);
        }
    }
}

static inline bool clamps(const Finisher& to) {
    return to.activation == Activation::none || to.activation == Activation::relu || to.activation == Activation::clip;
}

template <int width>
static inline void finish(const Vec (&sums)[width], const Finisher& to, int row) {
    if (to.count == 1 && to.segments[0].size == width * lanes && clamps(to)) {
        const std::ptrdiff_t base = row * to.stride + to.segments[0].out;
        float* out = to.out + base;
        const Vec low = splat(to.low), high = splat(to.high);
        if (to.residual == nullptr) {
#pragma GCC unroll 8
            for (int t = 0; t < width; ++t) store(out + t * lanes, clamp(sums[t], low, high));
        } else if (to.residual_first) {
            const float* residual = to.residual + base;
#pragma GCC unroll 8
            for (int t = 0; t < width; ++t) store(out + t * lanes, clamp(sums[t] + load(residual + t * lanes), low, high));
        } else {
            const float* residual = to.residual + base;
#pragma GCC unroll 8
            for (int t = 0; t < width; ++t) store(out + t * lanes, clamp(sums[t], low, high) + load(residual + t * lanes));
        }
        return;
    }
    float whole[width * lanes];
#pragma GCC unroll 8
    for (int t = 0; t < width; ++t) store(whole + t * lanes, sums[t]);
    finish_segments(whole, to, row);
}

template <int width>
static void sparse_rows(const SparseBlock& block, int begin, int end, const float* panel, std::ptrdiff_t step, float* sums, bool first,
                        bool last, const Finisher& finisher) {
    const std::int32_t* start = block.start;
    const std::uint16_t* k = block.k + start[begin];
    const float* value = block.values + start[begin];
    for (int row = begin; row < end; ++row) {
        float* kept = sums + static_cast<std::ptrdiff_t>(row - begin) * width * lanes;
        Vec sum[width];
        if (first) {
            const Vec bias = splat(finisher.bias != nullptr ? finisher.bias[row] : 0.0f);
#pragma GCC unroll 8
            for (int t = 0; t < width; ++t) sum[t] = bias;
        } else {
#pragma GCC unroll 8
            for (int t = 0; t < width; ++t) sum[t] = load(kept + t * lanes);
        }
        const float* stop = block.values + start[row + 1];
#pragma GCC unroll 4
        for (; value != stop; ++value, ++k) {
            const Vec weight = splat(*value);
            const float* from = panel + *k * step;
#pragma GCC unroll 8
            for (int t = 0; t < width; ++t) sum[t] += weight * load(from + t * lanes);
        }
        if (last) {
            finish<width>(sum, finisher, row);
        } else {
#pragma GCC unroll 8
            for (int t = 0; t < width; ++t) store(kept + t * lanes, sum[t]);
        }
    }
}

static void sparse(int width, const SparseBlock& block, int begin, int end, const float* panel, std::ptrdiff_t step, float* sums,
                   bool first, bool last, const Finisher& finisher) {
    switch (width) {
        case 1: return sparse_rows<1>(block, begin, end, panel, step, sums, first, last, finisher);
        case 2: return sparse_rows<2>(block, begin, end, panel, step, sums, first, last, finisher);
        case 3: return sparse_rows<3>(block, begin, end, panel, step, sums, first, last, finisher);
        case 4: return sparse_rows<4>(block, begin, end, panel, step, sums, first, last, finisher);
        case 5: return sparse_rows<5>(block, begin, end, panel, step, sums, first, last, finisher);
        case 6: return sparse_rows<6>(block, begin, end, panel, step, sums, first, last, finisher);
        case 7: return sparse_rows<7>(block, begin, end, panel, step, sums, first, last, finisher);
        default: return sparse_rows<8>(block, begin, end, panel, step, sums, first, last, finisher);
    }
}

// Rows in a register block: as many as leave registers for one row of the panel and a weight.
constexpr int registers = KERNELS_REGISTERS;
constexpr int rows_of(int width) {
    const int rows = (registers - width - 1) / width;
    return rows > 12 ? 12 : rows < 1 ? 1 : rows;
}

static int dense_rows(int most) { return rows_of(most); }

template <int rows, int width>
static void dense_tile(const float* packed, int depth, std::ptrdiff_t group_step, int begin, int end, const float* panel,
                       std::ptrdiff_t step, float* sums, bool first, bool last, const Finisher& finisher) {
    for (int group = begin / rows; group * rows < end; ++group) {
        const float* weights = packed + group * group_step;
        const int there = end - group * rows < rows ? end - group * rows : rows;
        float* kept = sums + static_cast<std::ptrdiff_t>(group * rows - begin) * width * lanes;
        Vec sum[rows][width];
        for (int r = 0; r < rows; ++r) {
            if (first) {
                const Vec bias = splat(finisher.bias != nullptr && r < there ? finisher.bias[group * rows + r] : 0.0f);
#pragma GCC unroll 8
                for (int t = 0; t < width; ++t) sum[r][t] = bias;
            } else {
#pragma GCC unroll 8
                for (int t = 0; t < width; ++t) sum[r][t] = r < there ? load(kept + (r * width + t) * lanes) : Vec{};
            }
        }
        const float* from = panel;
        for (int k = 0; k < depth; ++k, from += step, weights += rows) {
            Vec x[width];
#pragma GCC unroll 8
            for (int t = 0; t < width; ++t) x[t] = load(from + t * lanes);
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r) {
                const Vec weight = splat(weights[r]);
#pragma GCC unroll 8
                for (int t = 0; t < width; ++t) sum[r][t] += weight * x[t];
            }
        }
        for (int r = 0; r < there; ++r) {
            if (last) {
                finish<width>(sum[r], finisher, group * rows + r);
            } else {
#pragma GCC unroll 8
                for (int t = 0; t < width; ++t) store(kept + (r * width + t) * lanes, sum[r][t]);
            }
        }
    }
}

// A matrix is packed for tiles of `most` registers; the last tiles may be narrower.
template <int most>
static void dense_of(int width, const float* packed, int depth, std::ptrdiff_t group_step, int begin, int end, const float* panel,
                     std::ptrdiff_t step, float* sums, bool first, bool last, const Finisher& finisher) {
    constexpr int rows = rows_of(most);
    if (width == most)
        return dense_tile<rows, most>(packed, depth, group_step, begin, end, panel, step, sums, first, last, finisher);
    if constexpr (most > 1)
        switch (width) {
            case 1: return dense_tile<rows, 1>(packed, depth, group_step, begin, end, panel, step, sums, first, last, finisher);
            case 2: return dense_tile<rows, 2>(packed, depth, group_step, begin, end, panel, step, sums, first, last, finisher);
            default: return dense_tile<rows, 3>(packed, depth, group_step, begin, end, panel, step, sums, first, last, finisher);
        }
}

static void dense(int most, int width, const float* packed, int depth, std::ptrdiff_t group_step, int begin, int end, const float* panel,
                  std::ptrdiff_t step, float* sums, bool first, bool last, const Finisher& finisher) {
    const auto tile = most == 1 ? dense_of<1> : most == 2 ? dense_of<2> : most == 3 ? dense_of<3> : dense_of<4>;
    tile(width, packed, depth, group_step, begin, end, panel, step, sums, first, last, finisher);
}

static void pack_rows(const float* matrix, std::ptrdiff_t row, std::ptrdiff_t k, int rows, int depth, int group, float* to) {
    for (int first = 0; first < rows; first += group, to += static_cast<std::ptrdiff_t>(depth) * group) {
        const int there = rows - first < group ? rows - first : group;
        const float* from = matrix + first * row;
        for (int i = 0; i < depth; ++i)
            for (int r = 0; r < group; ++r) to[i * group + r] = r < there ? from[r * row + i * k] : 0.0f;
    }
}

#if KERNELS_LANES == 16
#define KERNELS_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#elif KERNELS_LANES == 8
#define KERNELS_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#else
#define KERNELS_EVEN 0, 2, 4, 6
#endif

// Whole registers are written from left to right, so that what one writes too much the next puts right.
static void pack(const Stretch* stretches, int count, const float* channel, float* to) {
    for (int s = 0; s < count; ++s) {
        const Stretch& piece = stretches[s];
        const float* from = channel + piece.from;
        for (int i = 0; i < piece.left; i += lanes) store(to + i, Vec{});
        to += piece.left;
        if (piece.stride == 1) {
            for (int i = 0; i < piece.size; i += lanes) store(to + i, load(from + i));
        } else if (piece.stride == 2) {
            int i = 0;
            for (; i + lanes <= piece.size - 1; i += lanes)  // the second load ends within the stretch
                store(to + i, __builtin_shufflevector(load(from + 2 * i), load(from + 2 * i + lanes), KERNELS_EVEN));
            for (; i < piece.size; ++i) to[i] = from[2 * i];
        } else {
            for (int i = 0; i < piece.size; ++i) to[i] = from[i * piece.stride];
        }
        to += piece.size;
        for (int i = 0; i < piece.right; i += lanes) store(to + i, Vec{});
        to += piece.right;
    }
}

static void spread(const float* source, const std::ptrdiff_t* shifts, const std::uint16_t* index, const std::uint16_t* k, int count,
                   const Line* lines, int line_count, float* panel, std::ptrdiff_t step) {
    for (int i = 0; i < count; ++i) {
        const float* from = source + shifts[index[i]];
        float* to = panel + k[i] * step;
        for (int l = 0; l < line_count; ++l) {
            const float* here = from + lines[l].from;
            float* there = to + lines[l].at;
            for (int x = 0; x < lines[l].size; x += lanes) store(there + x, load(here + x));
        }
    }
}

static void sparse_vector(const SparseBlock& block, int begin, int end, const float* x, float* sums, bool first, bool last,
                          const Finisher& finisher) {
    const std::uint16_t* k = block.k;
    const float* values = block.values;
    for (int row = begin; row < end; ++row) {
        float start = finisher.bias != nullptr ? finisher.bias[row] : 0.0f;
        if (!first) start = sums[row - begin];
        float sum[4] = {start, 0, 0, 0};  // so that an addition need not wait for the one before it
        std::int32_t i = block.start[row];
        const std::int32_t stop = block.start[row + 1];
        for (; i + 4 <= stop; i += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[j] += values[i + j] * x[k[i + j]];
        for (; i < stop; ++i) sum[0] += values[i] * x[k[i]];
        const float whole = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        if (last)
            finish_segments(&whole, finisher, row);
        else
            sums[row - begin] = whole;
    }
}

template <int width>
static void dense_vector_rows(const float* packed, int depth, int begin, int end, const float* x, const Finisher& finisher) {
    constexpr int rows = width * lanes;
    for (int from = begin; from < end; from += rows) {
        const float* weights = packed + static_cast<std::ptrdiff_t>(from) * depth;
        Vec sum[2][width] = {};  // by even and odd k
        int k = 0;
        for (; k + 2 <= depth; k += 2, weights += 2 * rows)
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                const Vec value = splat(x[k + odd]);
#pragma GCC unroll 4
                for (int t = 0; t < width; ++t) sum[odd][t] += value * load(weights + (odd * width + t) * lanes);
            }
        if (k < depth)
            for (int t = 0; t < width; ++t) sum[0][t] += splat(x[k]) * load(weights + t * lanes);
        float whole[rows];
        for (int t = 0; t < width; ++t) store(whole + t * lanes, sum[0][t] + sum[1][t]);
        for (int row = from; row < end && row < from + rows; ++row) {
            const float one = whole[row - from] + (finisher.bias != nullptr ? finisher.bias[row] : 0.0f);
            finish_segments(&one, finisher, row);
        }
    }
}

static void dense_vector(int width, const float* packed, int depth, int begin, int end, const float* x, const Finisher& finisher) {
    const auto rows = width == 1 ? dense_vector_rows<1> : width == 2 ? dense_vector_rows<2> : width == 3 ? dense_vector_rows<3> : dense_vector_rows<4>;
    rows(packed, depth, begin, end, x, finisher);
}

template <int width>
static inline void depthwise_piece(const float* in, const std::int32_t* offsets, const float* weights, int taps, float bias, float* sums) {
    Vec sum[width];
#pragma GCC unroll 8
    for (int t = 0; t < width; ++t) sum[t] = splat(bias);
    for (int i = 0; i < taps; ++i) {
        const Vec weight = splat(weights[i]);
        const float* from = in + offsets[i];
#pragma GCC unroll 8
        for (int t = 0; t < width; ++t) sum[t] += weight * load(from + t * lanes);
    }
#pragma GCC unroll 8
    for (int t = 0; t < width; ++t) store(sums + t * lanes, sum[t]);
}

static void depthwise(const float* in, const std::int32_t* offsets, const float* weights, int taps, int size, float bias, float* sums,
                      const Finisher& finisher) {
    int i = 0;
    for (; i + 8 * lanes <= size; i += 8 * lanes) depthwise_piece<8>(in + i, offsets, weights, taps, bias, sums + i);
    for (; i + 4 * lanes <= size; i += 4 * lanes) depthwise_piece<4>(in + i, offsets, weights, taps, bias, sums + i);
    for (; i < size; i += lanes) depthwise_piece<1>(in + i, offsets, weights, taps, bias, sums + i);
    finish_segments(sums, finisher, 0);
}

#if defined(KERNELS_LOAD_WHERE)
template <int stride>
static inline Vec strip_tap(const float* from) {
    if constexpr (stride == 1) return load(from);
    return __builtin_shufflevector(load(from), load(from + lanes), KERNELS_EVEN);
}
template <int stride>
static inline Vec strip_tap(const float* from, std::uint32_t mask) {
    if constexpr (stride == 1) return load_where(from, mask);
    return __builtin_shufflevector(load_where(from, mask), load_where(from + lanes, mask >> lanes), KERNELS_EVEN);
}

// Where sums of a depthwise convolution go. Clamps are done on the way; other activations would take the registers that
// weights and lines are kept in, and follow at the end, by `rest`.
struct Sink {
    explicit Sink(const Finisher& to)
        : out(to.out), residual(clamps(to) ? to.residual : nullptr), first(to.residual_first), low(splat(clamps(to) ? to.low : -__builtin_inff())),
          high(splat(clamps(to) ? to.high : __builtin_inff())) {}

    void put(Vec sum, std::ptrdiff_t at) const {
        if (residual == nullptr) return store(out + at, clamp(sum, low, high));
        const Vec added = load(residual + at);
        store(out + at, first ? clamp(sum + added, low, high) : clamp(sum, low, high) + added);
    }
    void put(Vec sum, std::ptrdiff_t at, int size) const {
        if (size == lanes) return put(sum, at);
        if (residual == nullptr) return store_first(out + at, clamp(sum, low, high), size);
        const Vec added = load_first(residual + at, size);
        store_first(out + at, first ? clamp(sum + added, low, high) : clamp(sum, low, high) + added, size);
    }
    static void rest(const Finisher& to, std::ptrdiff_t begin, std::ptrdiff_t end) {
        if (clamps(to)) return;
        const Segment all{begin, 0, static_cast<int>(end - begin)};
        Finisher own = to;
        own.segments = &all;
        own.count = 1;
        finish_segments(to.out + begin, own, 0);
    }

    float* const out;
    const float* const residual;
    const bool first;
    const Vec low, high;
};

// `known`: the number of taps where it is known to the compiler, so that weights stay in registers.
template <int stride, int known>
static void depthwise_by_strips(const float* plane, const Strip* strips, int count, const std::uint32_t* masks, const std::ptrdiff_t* shifts,
                                const float* weights, int taps, float bias, const Finisher& finisher) {
    if constexpr (known > 0) taps = known;
    const Sink sink(finisher);
    for (const Strip* strip = strips; strip != strips + count; ++strip) {
        const float* from = plane + strip->from;
        if (strip->masks < 0) {
            for (std::ptrdiff_t i = 0; i < strip->count; ++i, from += lanes * stride) {
                Vec sum = splat(bias);
#pragma GCC unroll 9
                for (int t = 0; t < taps; ++t) sum += splat(weights[t]) * strip_tap<stride>(from + shifts[t]);
                sink.put(sum, strip->to + i * lanes);
            }
        } else {
            Vec sum = splat(bias);
            const std::uint32_t* mask = masks + strip->masks;
#pragma GCC unroll 9
            for (int t = 0; t < taps; ++t) sum += splat(weights[t]) * strip_tap<stride>(from + shifts[t], mask[t]);
            sink.put(sum, strip->to, strip->size);
        }
    }
    if (const Strip* last = strips + count - 1; count > 0) Sink::rest(finisher, strips->to, last->to + (last->count - 1) * lanes + last->size);
}

static void depthwise_strips(const float* plane, int stride, const Strip* strips, int count, const std::uint32_t* masks,
                             const std::ptrdiff_t* shifts, const float* weights, int taps, float bias, const Finisher& finisher) {
    if (stride == 1)
        (taps == 9 ? depthwise_by_strips<1, 9> : depthwise_by_strips<1, 0>)(plane, strips, count, masks, shifts, weights, taps, bias, finisher);
    else
        (taps == 9 ? depthwise_by_strips<2, 9> : depthwise_by_strips<2, 0>)(plane, strips, count, masks, shifts, weights, taps, bias, finisher);
}

template <int stride>
static void depthwise_down(const float* plane, const Column column, const PlaneLines lines, const float* weights, float bias, const Sink& sink) {
    Vec weight[9], line[3][3];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) weight[i] = splat(weights[i]);
    const auto fill = [&](Vec(&to)[3], int y) {
        if (y < 0 || y >= lines.in) {
            to[0] = to[1] = to[2] = Vec{};
            return;
        }
        const float* from = plane + static_cast<std::ptrdiff_t>(y) * lines.width + column.from;
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) to[j] = strip_tap<stride>(from + j, column.masks[j]);
    };
#pragma GCC unroll 2
    for (int i = 0; i < 3 - stride; ++i) fill(line[i], lines.first * stride - lines.pad + i);
    for (int y = lines.first; y < lines.last; ++y) {
#pragma GCC unroll 2
        for (int i = 3 - stride; i < 3; ++i) fill(line[i], y * stride - lines.pad + i);
        Vec sum[3] = {splat(bias)};  // so that an addition need not wait for the one before it
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) sum[i % 3] += weight[i] * line[i / 3][i % 3];
        sink.put(sum[0] + sum[1] + sum[2], static_cast<std::ptrdiff_t>(y) * lines.out_width + column.to, column.size);
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
            line[0][j] = line[stride][j];
            if constexpr (stride == 1) line[1][j] = line[2][j];
        }
    }
}

static void depthwise_columns(const float* plane, int stride, const Column* columns, int count, const PlaneLines& lines, const float* weights,
                              float bias, const Finisher& finisher) {
    const Sink sink(finisher);
    for (int i = 0; i < count; ++i)
        (stride == 1 ? depthwise_down<1> : depthwise_down<2>)(plane, columns[i], lines, weights, bias, sink);
    const std::ptrdiff_t width = lines.out_width;
    Sink::rest(finisher, lines.first * width, lines.last * width);
}
#else
static constexpr decltype(ProductKernels::depthwise_strips) depthwise_strips = nullptr;
static constexpr decltype(ProductKernels::depthwise_columns) depthwise_columns = nullptr;
#endif

static void spin(std::int64_t rounds, float* out) {
    Vec sum[12];
    for (int i = 0; i < 12; ++i) sum[i] = splat(out[i]);
    const Vec factor = splat(out[0]), added = splat(out[1]);
    for (; rounds > 0; --rounds)
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) sum[i] = sum[i] * factor + added;
    for (int i = 0; i < 12; ++i) store(out + i * lanes, sum[i]);
}

static float read(const float* from, std::int64_t size) {
    Vec sum[4] = {};
    for (std::int64_t i = 0; i + 4 * lanes <= size; i += 4 * lanes)
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) sum[t] += load(from + i + t * lanes);
    const Vec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float whole = 0;
    for (int i = 0; i < lanes; ++i) whole += all[i];
    return whole;
}

static constexpr ProductKernels product_kernels{sparse, dense, dense_rows, pack_rows, pack, spread, sparse_vector, dense_vector, depthwise,
                                                depthwise_strips, depthwise_columns, spin, read};
