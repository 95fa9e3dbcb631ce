// SPDX-License-Identifier: Apache-2.0
// Loops over runs. The last register of a run is worked out first and stored last: it may overlap the one before it, so
// that no run of at least a register has a tail, and the output may be an operand.

template <bool moves> static inline Vec operand(const float* from, std::ptrdiff_t at) { return moves ? load(from + at) : splat(*from); }
template <bool moves> static inline Vec operand_first(const float* from, int n) { return moves ? load_first(from, n) : splat(*from); }
static inline const float* floats(const Runs::Operand& operand, std::ptrdiff_t run) {
    return static_cast<const float*>(operand.at) + run * operand.step;
}

template <bool a_moves, bool b_moves, bool c_moves, class Function>
static inline void each_run(const Runs& runs, Function function) {
    for (std::ptrdiff_t run = 0; run < runs.count; ++run) {
        const float* a = floats(runs.in[0], run);
        const float* b = floats(runs.in[1], run);
        const float* c = floats(runs.in[2], run);
        float* out = static_cast<float*>(runs.out) + run * runs.size;
        if (runs.size < lanes) {
            const int n = static_cast<int>(runs.size);
            store_first(out, function(operand_first<a_moves>(a, n), operand_first<b_moves>(b, n), operand_first<c_moves>(c, n)), n);
            continue;
        }
        const std::ptrdiff_t last = runs.size - lanes;
        const Vec end = function(operand<a_moves>(a, last), operand<b_moves>(b, last), operand<c_moves>(c, last));
        for (std::ptrdiff_t i = 0; i < last; i += lanes)
            store(out + i, function(operand<a_moves>(a, i), operand<b_moves>(b, i), operand<c_moves>(c, i)));
        store(out + last, end);
    }
}

// Operands that a function has not are given as its first: the compiler drops what nothing reads.
template <class Function> static inline void map(const Runs& given, Function function) {
    Runs runs = given;
    runs.in[1] = runs.in[2] = runs.in[0];
    const auto first = [&](Vec x, Vec, Vec) __attribute__((always_inline)) { return function(x); };
    if (runs.in[0].moves) return each_run<true, false, false>(runs, first);
    each_run<false, false, false>(runs, first);
}

template <class Function> static inline void map_two(const Runs& given, Function function) {
    Runs runs = given;
    runs.in[2] = runs.in[0];
    const auto both = [&](Vec x, Vec y, Vec) __attribute__((always_inline)) { return function(x, y); };
    if (runs.in[0].moves && runs.in[1].moves) return each_run<true, true, false>(runs, both);
    if (runs.in[0].moves) return each_run<true, false, false>(runs, both);
    if (runs.in[1].moves) return each_run<false, true, false>(runs, both);
    each_run<false, false, false>(runs, both);
}

// For what has no vector code here, a lane at a time.
template <class Function> static inline Vec by_lane(Vec x, Vec y, Function function) {
    Vec made{};
    for (int i = 0; i < lanes; ++i) made[i] = function(x[i], y[i]);
    return made;
}

static inline Vec magnitude(Vec x) { return bits(bits(x) & 0x7FFFFFFF); }
static inline Vec with_sign_of(Vec x, Vec sign) { return bits((bits(x) & 0x7FFFFFFF) | (bits(sign) & INT32_MIN)); }

// To the nearest integer, halves to even: what lies behind the point falls off where 2^23 is added. -0 stays -0.
static inline Vec rounded(Vec x) {
    const Vec size = magnitude(x);
    const Vec whole = (size + 8388608.0f) - 8388608.0f;
    return size < 8388608.0f ? with_sign_of(whole, x) : x;
}
static inline Vec rounded_down(Vec x) {
    const Vec whole = rounded(x);
    return with_sign_of(whole > x ? whole - 1.0f : whole, x);
}
static inline Vec rounded_up(Vec x) { return -rounded_down(-x); }

// log(x) by a polynomial of degree 9 about 1 (Cephes), after x = m * 2^e with m in [sqrt(1/2), sqrt(2)): within 2 ulp.
static inline Vec natural_log(Vec x) {
    const Vec size = magnitude(x);  // a negative number's bits would overflow below
    const Vec normal = size < 1.17549435e-38f ? size * 8388608.0f : size;
    const Vec shift = size < 1.17549435e-38f ? splat(-23.0f) : splat(0.0f);
    const Int exponent = (bits(normal) - 0x3F3504F3) >> 23;
    const Vec m = bits(bits(normal) - exponent * 8388608) - 1.0f;
    const Vec e = __builtin_convertvector(exponent, Vec) + shift;
    const Vec z = m * m;
    Vec p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    Vec made = p * m * z + e * -2.12194440e-4f - 0.5f * z;
    made = m + made + e * 0.693359375f;
    made = x < 3.4028235e38f ? made : x;  // inf and NaN
    made = x < 0.0f ? splat(__builtin_nanf("")) : made;
    return x == 0.0f ? splat(-__builtin_inff()) : made;
}
// log(1 + x) for x in [0, 1]: the error of 1 + x is made good by what log's own slope there is.
static inline Vec log_of_one_more(Vec x) {
    const Vec sum = 1.0f + x;
    const Vec kept = sum - 1.0f;
    return kept == 0.0f ? x : natural_log(sum) * x / kept;
}
static inline Vec softplus(Vec x) {
    return (x > 0.0f ? x : splat(0.0f)) + log_of_one_more(exponential(-magnitude(x))) + (x != x ? x : splat(0.0f));
}
// exp(x) - 1 for x <= 0: near zero, where the difference cancels, by its series.
static inline Vec exponential_less_one(Vec x) {
    Vec p = splat(1.0f / 720);
    p = p * x + 1.0f / 120;
    p = p * x + 1.0f / 24;
    p = p * x + 1.0f / 6;
    p = p * x + 0.5f;
    p = p * x * x + x;
    return x > -0.35f ? p : exponential(x) - 1.0f;
}
// x * tanh(softplus(x)), tanh(log(1 + e)) being (e^2 + 2e) / (e^2 + 2e + 2).
static inline Vec mish(Vec x) {
    const Vec e = exponential(x > 20.0f ? splat(20.0f) : x);
    const Vec n = e * (e + 2.0f);
    return x > 20.0f ? x : x * (n / (n + 2.0f));
}

static void elementwise_unary(Unary function, const Runs& runs) {
    const float low = runs.low, high = runs.high;
    switch (function) {
        case Unary::negative: return map(runs, [](Vec x) { return -x; });
        case Unary::absolute: return map(runs, [](Vec x) { return magnitude(x); });
        case Unary::square: return map(runs, [](Vec x) { return x * x; });
        case Unary::cube: return map(runs, [](Vec x) { return x * x * x; });
        case Unary::square_root:
            return map(runs, [](Vec x) {
                for (int i = 0; i < lanes; ++i) x[i] = __builtin_sqrtf(x[i]);
                return x;
            });
        case Unary::reciprocal: return map(runs, [](Vec x) { return 1.0f / x; });
        case Unary::exponential: return map(runs, [](Vec x) { return exponential(x); });
        case Unary::logarithm: return map(runs, [](Vec x) { return natural_log(x); });
        case Unary::error_function: return map(runs, [](Vec x) { return error_function(x); });
        case Unary::floor: return map(runs, [](Vec x) { return rounded_down(x); });
        case Unary::ceiling: return map(runs, [](Vec x) { return rounded_up(x); });
        case Unary::round: return map(runs, [](Vec x) { return rounded(x); });
        case Unary::sign: return map(runs, [](Vec x) { return x > 0.0f ? splat(1.0f) : x < 0.0f ? splat(-1.0f) : x; });
        case Unary::sine:
            return map(runs, [](Vec x) { return by_lane(x, x, [](float a, float) { return __builtin_sinf(a); }); });
        case Unary::cosine:
            return map(runs, [](Vec x) { return by_lane(x, x, [](float a, float) { return __builtin_cosf(a); }); });
        case Unary::elu: return map(runs, [=](Vec x) { return x < 0.0f ? low * exponential_less_one(x) : x; });
        case Unary::selu: return map(runs, [=](Vec x) { return high * (x < 0.0f ? low * exponential_less_one(x) : x); });
        case Unary::softplus: return map(runs, [](Vec x) { return softplus(x); });
        case Unary::softsign: return map(runs, [](Vec x) { return x / (1.0f + magnitude(x)); });
        case Unary::mish: return map(runs, [](Vec x) { return mish(x); });
        case Unary::swish: return map(runs, [=](Vec x) { return x * sigmoid(low * x); });
        case Unary::thresholded_relu: return map(runs, [=](Vec x) { return x > low ? x : splat(0.0f); });
        case Unary::scaled: return map(runs, [=](Vec x) { return x * low; });
    }
}

static void elementwise_activation(Activation function, const Runs& runs) {
    const float low = runs.low, high = runs.high;
    switch (function) {
        case Activation::none: return map(runs, [](Vec x) { return x; });
        case Activation::relu: return map(runs, [](Vec x) { return activated(x, Activation::relu, 0, 0); });
        case Activation::clip: return map(runs, [=](Vec x) { return activated(x, Activation::clip, low, high); });
        case Activation::sigmoid: return map(runs, [](Vec x) { return activated(x, Activation::sigmoid, 0, 0); });
        case Activation::silu: return map(runs, [](Vec x) { return activated(x, Activation::silu, 0, 0); });
        case Activation::hard_sigmoid: return map(runs, [=](Vec x) { return activated(x, Activation::hard_sigmoid, low, high); });
        case Activation::hard_swish: return map(runs, [](Vec x) { return activated(x, Activation::hard_swish, 0, 0); });
        case Activation::gelu: return map(runs, [](Vec x) { return activated(x, Activation::gelu, 0, 0); });
        case Activation::gelu_tanh: return map(runs, [](Vec x) { return activated(x, Activation::gelu_tanh, 0, 0); });
        case Activation::tanh: return map(runs, [](Vec x) { return activated(x, Activation::tanh, 0, 0); });
        case Activation::leaky_relu: return map(runs, [=](Vec x) { return activated(x, Activation::leaky_relu, low, 0); });
    }
}

static void elementwise_binary(Binary function, const Runs& runs) {
    const Vec low = splat(runs.low), high = splat(runs.high);
    switch (function) {
        case Binary::add: return map_two(runs, [=](Vec a, Vec b) { return clamp(a + b, low, high); });
        case Binary::subtract: return map_two(runs, [=](Vec a, Vec b) { return clamp(a - b, low, high); });
        case Binary::multiply: return map_two(runs, [=](Vec a, Vec b) { return clamp(a * b, low, high); });
        case Binary::divide: return map_two(runs, [](Vec a, Vec b) { return a / b; });
        case Binary::minimum: return map_two(runs, [](Vec a, Vec b) { return a != a ? a : a < b ? a : b; });
        case Binary::maximum: return map_two(runs, [](Vec a, Vec b) { return a != a ? a : a > b ? a : b; });
        case Binary::power:
            return map_two(runs, [](Vec a, Vec b) { return by_lane(a, b, [](float x, float y) { return __builtin_powf(x, y); }); });
        case Binary::remainder:
            return map_two(runs, [](Vec a, Vec b) { return by_lane(a, b, [](float x, float y) { return __builtin_fmodf(x, y); }); });
        case Binary::floored_remainder:
            return map_two(runs, [](Vec a, Vec b) {
                const Vec rest = by_lane(a, b, [](float x, float y) { return __builtin_fmodf(x, y); });
                const Vec moved = (bits(rest) ^ bits(b)) < 0 ? rest + b : rest;
                return rest == 0.0f ? with_sign_of(rest, b) : moved;
            });
        case Binary::leak: return map_two(runs, [](Vec a, Vec b) { return a < 0.0f ? a * b : a; });
    }
}

static void elementwise_multiply_add(const Runs& runs) {
    const Vec low = splat(runs.low), high = splat(runs.high);
    const auto function = [=](Vec a, Vec b, Vec c) { return clamp(a * b + c, low, high); };
    if (runs.in[0].moves && runs.in[1].moves) return each_run<true, true, true>(runs, function);
    if (runs.in[0].moves) return each_run<true, false, false>(runs, function);
    if (runs.in[1].moves) return each_run<false, true, true>(runs, function);
    each_run<false, false, false>(runs, function);
}

static constexpr ElementwiseKernels elementwise_kernels{elementwise_unary, elementwise_activation, elementwise_binary,
                                                        elementwise_multiply_add};
