// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace featherweight {

// What a reduction adds up, and how: squares and exponentials are of x less a shift.
enum class Fold : std::uint8_t { sum, absolute, squares, largest, smallest, product, exponentials };

// y = (x - mean) * inverse * scale + bias, where inverse = 1 / sqrt(sum of (x - mean)^2 / divisor + epsilon).
struct Normal {
    bool centred;        // else the mean is taken as 0
    float divisor, epsilon;
    const float* scale;  // along the line; null: none
    const float* bias;   // likewise
};

// One axis of a pooling window over a line of `width` elements. Stride 1 and 2 fill registers.
struct PoolLine {
    int width, outputs;
    int taps, stride, dilation, pad;
    int phase;            // floats from phase to phase in the scratch line, see pool_phase
    const float* counts;  // by output: how many elements an average counts along this line; null: the largest is wanted
};

// Lines of n elements are folded or normalised: each contiguous, or `step` apart with many lines (columns) side by side.
// A [batch, tokens, channels] tensor whose tokens lie innermost is of the second kind.
struct RowKernels {
    float (*fold)(Fold kind, const float* in, std::ptrdiff_t n, float shift);
    // Joins to out[j] the fold of column j. `shift` by column; null: 0.
    void (*fold_columns)(Fold kind, const float* in, std::ptrdiff_t step, std::ptrdiff_t n, std::ptrdiff_t columns, const float* shift,
                         float* out);
    void (*softmax)(const float* in, std::ptrdiff_t n, bool logarithm, float* out);
    void (*softmax_columns)(const float* in, std::ptrdiff_t step, std::ptrdiff_t n, std::ptrdiff_t columns, bool logarithm, float* out,
                            std::ptrdiff_t out_step);
    // `mean` and `inverse` take what was found, by column; null: not wanted.
    void (*normalise)(const float* in, std::ptrdiff_t n, const Normal& normal, float* out, float* mean, float* inverse);
    void (*normalise_columns)(const float* in, std::ptrdiff_t step, std::ptrdiff_t n, std::ptrdiff_t columns, const Normal& normal,
                              float* out, std::ptrdiff_t out_step, float* mean, float* inverse);
    // out = in * scale + shift
    void (*affine)(const float* in, std::ptrdiff_t n, float scale, float shift, float* out);
    // One line of outputs from the `count` lines of the input that the window's other axes reach, at in + lines[i]; an average
    // counts `divisor` of them. `scratch` (pool_floats of them) is neutral to begin with, -inf or 0, and where padding lies it
    // stays so from call to call.
    void (*pool)(const float* in, const std::int64_t* lines, int count, float divisor, const PoolLine& line, float* scratch, float* out);
    // out[i] = sum over taps of weights[i][tap] * in[index[i][tap]]; null weights: one tap of weight 1.
    void (*gather)(const float* in, const std::int32_t* index, const float* weights, int taps, std::ptrdiff_t n, float* out);
    // Each of n elements twice.
    void (*doubled)(const float* in, std::ptrdiff_t n, float* out);
    // out[j] = sum over taps of weights[tap] * in[index[tap] * step + j].
    void (*blend)(const float* in, const std::int32_t* index, const float* weights, int taps, std::ptrdiff_t step, std::ptrdiff_t n,
                  float* out);
};

// A pool's scratch holds its line, padded, with every stride-th element together where the stride is 2: room for whole registers.
constexpr int pool_phase(int outputs, int taps, int stride, int dilation) {
    constexpr int most_lanes = 16;
    const int phases = stride == 2 ? 2 : 1;
    const int reach = (outputs - 1) * stride + (taps - 1) * dilation + 1;
    return (reach / phases + 1 + 2 * most_lanes) / most_lanes * most_lanes + most_lanes;
}
constexpr int pool_floats(int phase, int stride) { return stride == 2 ? 2 * phase : phase; }

}  // namespace featherweight
