// SPDX-License-Identifier: Apache-2.0
// Vectors of `lanes` floats by the compiler's own types, and the functions on them. Included in a unit's own namespace.

constexpr int lanes = KERNELS_LANES;
typedef float Vec __attribute__((vector_size(KERNELS_LANES * 4)));
typedef std::int32_t Int __attribute__((vector_size(KERNELS_LANES * 4)));

static inline Vec load(const float* from) {
    Vec made;
    __builtin_memcpy(&made, from, sizeof made);
    return made;
}
static inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }
static inline Vec splat(float value) { return value - Vec{}; }
// The first n of them, 0 < n < lanes; the rest are zeros, and nothing is touched there. A call of memcpy would cost more than
// most of what is done with them.
#if defined(__AVX512F__)
static inline Vec load_first(const float* from, int n) {
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
}
static inline void store_first(float* to, Vec value, int n) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), (__m512)value);
}
// Those whose bit is set, zeros else; nothing is touched where it is not.
#define KERNELS_LOAD_WHERE
static inline Vec load_where(const float* from, std::uint32_t mask) {
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
}
#elif defined(__AVX2__)
static inline Int first_lanes(int n) { return Int{0, 1, 2, 3, 4, 5, 6, 7} < n; }
static inline Vec load_first(const float* from, int n) { return (Vec)_mm256_maskload_ps(from, (__m256i)first_lanes(n)); }
static inline void store_first(float* to, Vec value, int n) { _mm256_maskstore_ps(to, (__m256i)first_lanes(n), (__m256)value); }
#else
static inline Vec load_first(const float* from, int n) {
    Vec made{};
    for (int i = 0; i < n; ++i) made[i] = from[i];
    return made;
}
static inline void store_first(float* to, Vec value, int n) {
    for (int i = 0; i < n; ++i) to[i] = value[i];
}
#endif
// As in C: NaN in the first operand gives the second; so clamps put the value first where NaN must survive.
static inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec bits(Int value) {
    Vec made;
    __builtin_memcpy(&made, &value, sizeof made);
    return made;
}
static inline Int bits(Vec value) {
    Int made;
    __builtin_memcpy(&made, &value, sizeof made);
    return made;
}
static inline Vec clamp(Vec value, Vec low, Vec high) {
    value = value < low ? low : value;  // NaN stays
    return value > high ? high : value;
}

// exp(x) = 2^n * e^r, |r| <= ln(2)/2: n, and e^r by a polynomial of degree 6 (Cephes).
static inline Vec reduced_exponential(Vec x, Int* n) {
    const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
    *n = bits(shifted) - 0x4B400000;
    const Vec whole = shifted - 12582912.0f;
    const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}
// Within 2 ulp. Below -87.3 it is 0; above 88.7, inf.
static inline Vec exponential(Vec x) {
    Int n;
    const Vec p = reduced_exponential(clamp(x, splat(-87.33654f), splat(88.72283f)), &n);
    // 2^n in two halves: n = 128 has no float of its own.
    const Int half = n >> 1;
    const Vec made = p * bits((half + 127) << 23) * bits((n - half + 127) << 23);
    const Vec low = x < -87.33654f ? splat(0.0f) : made;
    return x > 88.72283f ? splat(__builtin_inff()) : low;
}
static inline Vec sigmoid(Vec x) {
    Int n;
    const Vec p = reduced_exponential(clamp(-x, splat(-87.0f), splat(88.0f)), &n);  // so that 2^n is a float
    const Vec made = 1.0f / (1.0f + p * bits((n + 127) << 23));
    return x < -88.0f ? splat(0.0f) : made;
}
static inline Vec hyperbolic_tangent(Vec x) {
    // Where x is small, 1 - 2 / (e^2x + 1) cancels: an odd polynomial there (Cephes).
    const Vec z = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const Vec small = (p * z + 1.0f) * x;
    const Vec large = 1.0f - 2.0f / (exponential(x + x) + 1.0f);
    return z < 0.390625f ? small : large;
}
// erf by a rational function on [-3.83, 3.83], 1 beyond (as Eigen and XLA have it): within 4 ulp.
static inline Vec error_function(Vec value) {
    constexpr float bound = 3.832506856900711f;
    const Vec x = clamp(value, splat(-bound), splat(bound));
    const Vec z = x * x;
    Vec p = splat(0.00022905065861350646f);
    p = p * z + 0.0034082910107109506f;
    p = p * z + 0.050955695062380861f;
    p = p * z + 0.18520832239976145f;
    p = p * z + 1.128379143519084f;
    Vec q = splat(-1.1791602954361697e-7f);
    q = q * z + 0.000023547966471313185f;
    q = q * z + 0.0010179625278914885f;
    q = q * z + 0.014070470171167667f;
    q = q * z + 0.11098505178285362f;
    q = q * z + 0.49746925110067538f;
    q = q * z + 1.0f;
    const Vec made = value > bound ? splat(1.0f) : x * p / q;
    return value < -bound ? splat(-1.0f) : made;
}

static inline Vec activated(Vec x, Activation activation, float low, float high) {
    switch (activation) {
        case Activation::none: return x;
        case Activation::relu: return x < 0.0f ? splat(0.0f) : x;
        case Activation::clip: return clamp(x, splat(low), splat(high));
        case Activation::sigmoid: return sigmoid(x);
        case Activation::silu: return x * sigmoid(x);
        case Activation::hard_sigmoid: return clamp(x * low + high, splat(0.0f), splat(1.0f));
        case Activation::hard_swish: return x * clamp(x * (1.0f / 6.0f) + 0.5f, splat(0.0f), splat(1.0f));
        case Activation::gelu: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
        case Activation::gelu_tanh: return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
        case Activation::tanh: return hyperbolic_tangent(x);
        case Activation::leaky_relu: return x < 0.0f ? x * low : x;
    }
    return x;
}
