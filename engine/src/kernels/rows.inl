// SPDX-License-Identifier: Apache-2.0

template <Fold kind>
static inline Vec term(Vec x, Vec shift) {
    if constexpr (kind == Fold::absolute) return x < 0.0f ? -x : x;
    if constexpr (kind == Fold::squares) return (x - shift) * (x - shift);
    if constexpr (kind == Fold::exponentials) return exponential(x - shift);
    return x;
}

template <Fold kind, class T>
static inline T joined(T a, T b) {
    if constexpr (kind == Fold::largest) return a > b ? a : b;
    if constexpr (kind == Fold::smallest) return a < b ? a : b;
    if constexpr (kind == Fold::product) return a * b;
    return a + b;
}

template <Fold kind>
constexpr float neutral() {
    return kind == Fold::largest ? -__builtin_inff() : kind == Fold::smallest ? __builtin_inff() : kind == Fold::product ? 1.0f : 0.0f;
}

template <Fold kind>
static inline float across(Vec value, int n) {
    float each[lanes];
    store(each, value);
    float whole = each[0];
    for (int i = 1; i < n; ++i) whole = joined<kind>(whole, each[i]);
    return whole;
}

// Sums of many terms lose digits when they go into one number: every so many a new one is begun.
constexpr std::ptrdiff_t terms_in_a_row = 64 * 4 * lanes;
constexpr std::ptrdiff_t terms_in_a_column = 128;

template <Fold kind>
static float fold_line(const float* in, std::ptrdiff_t n, float shift) {
    const Vec less = splat(shift), start = splat(neutral<kind>());
    Vec total = start;
    std::ptrdiff_t i = 0;
    while (n - i >= 4 * lanes) {
        const std::ptrdiff_t stop = n - i < terms_in_a_row ? n : i + terms_in_a_row;
        Vec sum[4] = {start, start, start, start};
        for (; i + 4 * lanes <= stop; i += 4 * lanes)
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) sum[t] = joined<kind>(sum[t], term<kind>(load(in + i + t * lanes), less));
        total = joined<kind>(total, joined<kind>(joined<kind>(sum[0], sum[1]), joined<kind>(sum[2], sum[3])));
    }
    for (; i + lanes <= n; i += lanes) total = joined<kind>(total, term<kind>(load(in + i), less));
    float whole = across<kind>(total, lanes);
    if (const int rest = static_cast<int>(n - i); rest > 0)
        whole = joined<kind>(whole, across<kind>(term<kind>(load_first(in + i, rest), less), rest));
    return whole;
}

static float fold(Fold kind, const float* in, std::ptrdiff_t n, float shift) {
    switch (kind) {
        case Fold::sum: return fold_line<Fold::sum>(in, n, shift);
        case Fold::absolute: return fold_line<Fold::absolute>(in, n, shift);
        case Fold::squares: return fold_line<Fold::squares>(in, n, shift);
        case Fold::largest: return fold_line<Fold::largest>(in, n, shift);
        case Fold::smallest: return fold_line<Fold::smallest>(in, n, shift);
        case Fold::product: return fold_line<Fold::product>(in, n, shift);
        default: return fold_line<Fold::exponentials>(in, n, shift);
    }
}

template <bool whole>
static inline Vec some(const float* from, int n) {
    if constexpr (whole) return load(from);
    return load_first(from, n);
}
template <bool whole>
static inline void some(float* to, Vec value, int n) {
    if constexpr (whole)
        store(to, value);
    else
        store_first(to, value, n);
}

// Columns by blocks of four registers, then of one. The last block overlaps the one before it: what is written twice is
// the same. Only where all columns fill no register is a part of one touched.
template <class Block>
static inline void by_columns(std::ptrdiff_t columns, const Block& block) {
    std::ptrdiff_t j = 0;
    for (; j + 4 * lanes <= columns; j += 4 * lanes) block.template at<4, true>(j, lanes);
    for (; j + lanes <= columns; j += lanes) block.template at<1, true>(j, lanes);
    if (j == columns) return;
    if (columns >= lanes)
        block.template at<1, true>(columns - lanes, lanes);
    else
        block.template at<1, false>(0, static_cast<int>(columns));
}

template <Fold kind, int width, bool whole>
static inline void column_fold(const float* in, std::ptrdiff_t step, std::ptrdiff_t n, const Vec (&shift)[width], int there,
                               Vec (&total)[width]) {
#pragma GCC unroll 4
    for (int t = 0; t < width; ++t) total[t] = splat(neutral<kind>());
    for (std::ptrdiff_t i = 0; i < n;) {
        const std::ptrdiff_t stop = n - i < terms_in_a_column ? n : i + terms_in_a_column;
        Vec sum[width];
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) sum[t] = splat(neutral<kind>());
        for (; i < stop; ++i)
#pragma GCC unroll 4
            for (int t = 0; t < width; ++t)
                sum[t] = joined<kind>(sum[t], term<kind>(some<whole>(in + i * step + t * lanes, there), shift[t]));
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) total[t] = joined<kind>(total[t], sum[t]);
    }
}

template <Fold kind>
struct FoldColumns {
    const float* in;
    std::ptrdiff_t step, n;
    const float* shift;
    float* out;

    template <int width, bool whole>
    void at(std::ptrdiff_t j, int there) const {
        Vec less[width], total[width];
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) less[t] = shift != nullptr ? some<whole>(shift + j + t * lanes, there) : Vec{};
        column_fold<kind, width, whole>(in + j, step, n, less, there, total);
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) some<whole>(out + j + t * lanes, total[t], there);
    }
};

template <Fold kind>
static void fold_columns_as(const float* in, std::ptrdiff_t step, std::ptrdiff_t n, std::ptrdiff_t columns, const float* shift,
                            float* out) {
    // Through room of its own, so that a block that is computed twice is joined once.
    constexpr std::ptrdiff_t most = 64 * lanes;
    float made[most];
    for (std::ptrdiff_t begin = 0; begin < columns; begin += most) {
        const std::ptrdiff_t there = columns - begin < most ? columns - begin : most;
        by_columns(there, FoldColumns<kind>{in + begin, step, n, shift != nullptr ? shift + begin : nullptr, made});
        for (std::ptrdiff_t j = 0; j < there; ++j) out[begin + j] = joined<kind>(out[begin + j], made[j]);
    }
}

static void fold_columns(Fold kind, const float* in, std::ptrdiff_t step, std::ptrdiff_t n, std::ptrdiff_t columns, const float* shift,
                         float* out) {
    switch (kind) {
        case Fold::sum: return fold_columns_as<Fold::sum>(in, step, n, columns, shift, out);
        case Fold::absolute: return fold_columns_as<Fold::absolute>(in, step, n, columns, shift, out);
        case Fold::squares: return fold_columns_as<Fold::squares>(in, step, n, columns, shift, out);
        case Fold::largest: return fold_columns_as<Fold::largest>(in, step, n, columns, shift, out);
        case Fold::smallest: return fold_columns_as<Fold::smallest>(in, step, n, columns, shift, out);
        case Fold::product: return fold_columns_as<Fold::product>(in, step, n, columns, shift, out);
        default: return fold_columns_as<Fold::exponentials>(in, step, n, columns, shift, out);
    }
}

static void affine(const float* in, std::ptrdiff_t n, float scale, float shift, float* out) {
    const Vec by = splat(scale), plus = splat(shift);
    std::ptrdiff_t i = 0;
    for (; i + lanes <= n; i += lanes) store(out + i, load(in + i) * by + plus);
    if (const int rest = static_cast<int>(n - i); rest > 0) store_first(out + i, load_first(in + i, rest) * by + plus, rest);
}

// exp(x - top) goes to `out`; its sum is returned.
static float exponentials(const float* in, std::ptrdiff_t n, float top, float* out) {
    const Vec less = splat(top);
    Vec sum[2] = {Vec{}, Vec{}};
    std::ptrdiff_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes)
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) {
            const Vec e = exponential(load(in + i + t * lanes) - less);
            store(out + i + t * lanes, e);
            sum[t] += e;
        }
    for (; i + lanes <= n; i += lanes) {
        const Vec e = exponential(load(in + i) - less);
        store(out + i, e);
        sum[0] += e;
    }
    float whole = across<Fold::sum>(sum[0] + sum[1], lanes);
    if (const int rest = static_cast<int>(n - i); rest > 0) {
        const Vec e = exponential(load_first(in + i, rest) - less);
        store_first(out + i, e, rest);
        whole += across<Fold::sum>(e, rest);
    }
    return whole;
}

static void softmax(const float* in, std::ptrdiff_t n, bool logarithm, float* out) {
    const float top = fold_line<Fold::largest>(in, n, 0);
    if (logarithm) {
        const float sum = fold_line<Fold::exponentials>(in, n, top);
        affine(in, n, 1.0f, -top, out);
        affine(out, n, 1.0f, -__builtin_logf(sum), out);
    } else {
        affine(out, n, 1.0f / exponentials(in, n, top, out), 0.0f, out);
    }
}

static inline Vec logarithms(Vec value) {
    for (int i = 0; i < lanes; ++i) value[i] = __builtin_logf(value[i]);
    return value;
}

struct SoftmaxColumns {
    const float* in;
    std::ptrdiff_t step, n;
    bool logarithm;
    float* out;
    std::ptrdiff_t out_step;

    template <int width, bool whole>
    void at(std::ptrdiff_t j, int there) const {
        Vec top[width], sum[width];
        const Vec zero[width] = {};
        column_fold<Fold::largest, width, whole>(in + j, step, n, zero, there, top);
        if (logarithm) {
            column_fold<Fold::exponentials, width, whole>(in + j, step, n, top, there, sum);
#pragma GCC unroll 4
            for (int t = 0; t < width; ++t) sum[t] = logarithms(sum[t]);
            for (std::ptrdiff_t i = 0; i < n; ++i)
#pragma GCC unroll 4
                for (int t = 0; t < width; ++t) {
                    const Vec x = some<whole>(in + i * step + j + t * lanes, there);
                    some<whole>(out + i * out_step + j + t * lanes, x - top[t] - sum[t], there);
                }
            return;
        }
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) sum[t] = Vec{};
        for (std::ptrdiff_t i = 0; i < n; ++i)
#pragma GCC unroll 4
            for (int t = 0; t < width; ++t) {
                const Vec e = exponential(some<whole>(in + i * step + j + t * lanes, there) - top[t]);
                some<whole>(out + i * out_step + j + t * lanes, e, there);
                sum[t] += e;
            }
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) sum[t] = 1.0f / sum[t];
        for (std::ptrdiff_t i = 0; i < n; ++i)
#pragma GCC unroll 4
            for (int t = 0; t < width; ++t) {
                float* to = out + i * out_step + j + t * lanes;
                some<whole>(to, some<whole>(to, there) * sum[t], there);
            }
    }
};

static void softmax_columns(const float* in, std::ptrdiff_t step, std::ptrdiff_t n, std::ptrdiff_t columns, bool logarithm, float* out,
                            std::ptrdiff_t out_step) {
    by_columns(columns, SoftmaxColumns{in, step, n, logarithm, out, out_step});
}

template <bool whole>
static inline void normalised(const float* in, const Normal& normal, std::ptrdiff_t i, Vec mean, Vec inverse, float* out, int there) {
    Vec value = (some<whole>(in + i, there) - mean) * inverse;
    if (normal.scale != nullptr) value *= some<whole>(normal.scale + i, there);
    if (normal.bias != nullptr) value += some<whole>(normal.bias + i, there);
    some<whole>(out + i, value, there);
}

static void normalise(const float* in, std::ptrdiff_t n, const Normal& normal, float* out, float* mean, float* inverse) {
    const float middle = normal.centred ? fold_line<Fold::sum>(in, n, 0) / static_cast<float>(n) : 0.0f;
    const float by = 1.0f / __builtin_sqrtf(fold_line<Fold::squares>(in, n, middle) / normal.divisor + normal.epsilon);
    if (mean != nullptr) *mean = middle;
    if (inverse != nullptr) *inverse = by;
    std::ptrdiff_t i = 0;
    for (; i + lanes <= n; i += lanes) normalised<true>(in, normal, i, splat(middle), splat(by), out, lanes);
    if (const int rest = static_cast<int>(n - i); rest > 0) normalised<false>(in, normal, i, splat(middle), splat(by), out, rest);
}

struct NormaliseColumns {
    const float* in;
    std::ptrdiff_t step, n;
    const Normal& normal;
    float* out;
    std::ptrdiff_t out_step;
    float *mean, *inverse;

    template <int width, bool whole>
    void at(std::ptrdiff_t j, int there) const {
        Vec middle[width], by[width];
        const Vec zero[width] = {};
        column_fold<Fold::sum, width, whole>(in + j, step, n, zero, there, middle);
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) middle[t] = normal.centred ? middle[t] / static_cast<float>(n) : Vec{};
        column_fold<Fold::squares, width, whole>(in + j, step, n, middle, there, by);
#pragma GCC unroll 4
        for (int t = 0; t < width; ++t) {
            by[t] = by[t] / normal.divisor + normal.epsilon;
            for (int i = 0; i < lanes; ++i) by[t][i] = __builtin_sqrtf(by[t][i]);
            by[t] = 1.0f / by[t];
            if (mean != nullptr) some<whole>(mean + j + t * lanes, middle[t], there);
            if (inverse != nullptr) some<whole>(inverse + j + t * lanes, by[t], there);
        }
        for (std::ptrdiff_t i = 0; i < n; ++i) {
            const Vec scale = splat(normal.scale != nullptr ? normal.scale[i] : 1.0f);
            const Vec bias = splat(normal.bias != nullptr ? normal.bias[i] : 0.0f);
#pragma GCC unroll 4
            for (int t = 0; t < width; ++t) {
                const Vec value = (some<whole>(in + i * step + j + t * lanes, there) - middle[t]) * by[t];
                some<whole>(out + i * out_step + j + t * lanes, value * scale + bias, there);
            }
        }
    }
};

static void normalise_columns(const float* in, std::ptrdiff_t step, std::ptrdiff_t n, std::ptrdiff_t columns, const Normal& normal,
                              float* out, std::ptrdiff_t out_step, float* mean, float* inverse) {
    by_columns(columns, NormaliseColumns{in, step, n, normal, out, out_step, mean, inverse});
}

// Elements 0, 2, 4, ... and 1, 3, 5, ... of two registers.
static inline void split(Vec a, Vec b, Vec& even, Vec& odd) {
#if KERNELS_LANES == 16
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif KERNELS_LANES == 8
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#elif KERNELS_LANES == 4
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

static inline void zip(Vec a, float* out) {
#if KERNELS_LANES == 16
    store(out, __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7));
    store(out + lanes, __builtin_shufflevector(a, a, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15));
#elif KERNELS_LANES == 8
    store(out, __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3));
    store(out + lanes, __builtin_shufflevector(a, a, 4, 4, 5, 5, 6, 6, 7, 7));
#elif KERNELS_LANES == 4
    store(out, __builtin_shufflevector(a, a, 0, 0, 1, 1));
    store(out + lanes, __builtin_shufflevector(a, a, 2, 2, 3, 3));
#endif
}

static void doubled(const float* in, std::ptrdiff_t n, float* out) {
    std::ptrdiff_t i = 0;
    for (; i + lanes <= n; i += lanes) zip(load(in + i), out + 2 * i);
    for (; i < n; ++i) out[2 * i] = out[2 * i + 1] = in[i];
}

template <Fold kind>
static inline Vec over_lines(const float* in, const std::int64_t* lines, int count) {
    Vec made = load(in + lines[0]);
    for (int i = 1; i < count; ++i) made = joined<kind>(made, load(in + lines[i]));
    return made;
}

template <Fold kind>
static inline float over_lines_at(const float* in, const std::int64_t* lines, int count) {
    float made = in[lines[0]];
    for (int i = 1; i < count; ++i) made = joined<kind>(made, in[lines[i]]);
    return made;
}

// The window is folded across lines first, into the scratch line, and then along it: taps + lines steps, not taps * lines.
template <Fold kind>
static void pool_line(const float* in, const std::int64_t* lines, int count, float divisor, const PoolLine& line, float* scratch,
                      float* out) {
    const int reach = (line.outputs - 1) * line.stride + (line.taps - 1) * line.dilation + 1 - line.pad;
    const int width = reach < line.width ? reach : line.width;  // what is right of it no window reaches
    const bool halves = line.stride == 2;
    const auto place = [&](int x) {
        const int at = line.pad + x;
        return halves ? scratch + (at & 1) * line.phase + (at >> 1) : scratch + at;
    };
    const int piece = halves ? 2 * lanes : lanes;
    int x = 0;
    while (x < width) {
        if (width < piece) {
            for (; x < width; ++x) *place(x) = over_lines_at<kind>(in + x, lines, count);
            break;
        }
        if (x + piece > width) x = width - piece;
        if (halves) {
            Vec even, odd;
            split(over_lines<kind>(in + x, lines, count), over_lines<kind>(in + x + lanes, lines, count), even, odd);
            store(place(x), even);
            store(place(x + 1), odd);
        } else {
            store(place(x), over_lines<kind>(in + x, lines, count));
        }
        x += piece;
    }
    if (line.stride > 2) {
        for (int o = 0; o < line.outputs; ++o) {
            float made = neutral<kind>();
            for (int k = 0; k < line.taps; ++k) made = joined<kind>(made, scratch[o * line.stride + k * line.dilation]);
            out[o] = line.counts != nullptr ? made / (line.counts[o] * divisor) : made;
        }
        return;
    }
    for (int o = 0; o < line.outputs; o += lanes) {
        const int rest = line.outputs - o;
        if (rest < lanes && line.outputs >= lanes) o = line.outputs - lanes;
        Vec made = splat(neutral<kind>());
        for (int k = 0, at = 0; k < line.taps; ++k, at += line.dilation)
            made = joined<kind>(made, load((halves ? scratch + (at & 1) * line.phase + (at >> 1) : scratch + at) + o));
        const bool whole = line.outputs >= lanes;
        if (line.counts != nullptr) {
            const Vec counts = whole ? load(line.counts + o) : load_first(line.counts, rest);
            made /= counts * divisor;
        }
        if (whole)
            store(out + o, made);
        else
            store_first(out, made, rest);
    }
}

static void pool(const float* in, const std::int64_t* lines, int count, float divisor, const PoolLine& line, float* scratch,
                      float* out) {
    if (line.counts != nullptr)
        pool_line<Fold::sum>(in, lines, count, divisor, line, scratch, out);
    else
        pool_line<Fold::largest>(in, lines, count, divisor, line, scratch, out);
}

static void gather(const float* in, const std::int32_t* index, const float* weights, int taps, std::ptrdiff_t n, float* out) {
    if (weights == nullptr) {
        for (std::ptrdiff_t i = 0; i < n; ++i) out[i] = in[index[i]];
        return;
    }
    for (std::ptrdiff_t i = 0; i < n; ++i, index += taps, weights += taps) {
        float sum = 0;
        for (int t = 0; t < taps; ++t) sum += weights[t] * in[index[t]];
        out[i] = sum;
    }
}

static void blend(const float* in, const std::int32_t* index, const float* weights, int taps, std::ptrdiff_t step, std::ptrdiff_t n,
                  float* out) {
    std::ptrdiff_t j = 0;
    for (; j + lanes <= n; j += lanes) {
        Vec sum = weights[0] * load(in + index[0] * step + j);
        for (int t = 1; t < taps; ++t) sum += weights[t] * load(in + index[t] * step + j);
        store(out + j, sum);
    }
    for (; j < n; ++j) {
        float sum = 0;
        for (int t = 0; t < taps; ++t) sum += weights[t] * in[index[t] * step + j];
        out[j] = sum;
    }
}

static constexpr RowKernels row_kernels{fold,      fold_columns,      softmax, softmax_columns, normalise,
                                        normalise_columns, affine, pool,    gather,          doubled, blend};
