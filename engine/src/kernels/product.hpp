// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "../activation.hpp"

namespace featherweight {

// A product is out[m][p] = finish(sum over k of W[m][k] * B[k][p]). Positions p (pixels, tokens) fill vector registers; a
// weight is broadcast. A tile is `width` registers of positions; its panel is B's rows for a block of k.

// Where positions of a tile lie in the output: a tile of small images may span several of them.
struct Segment {
    std::ptrdiff_t out;  // of its first position, from the row's
    int at;              // in the tile
    int size;
};

// What is done with a row's sums when they are whole.
struct Finisher {
    const float* bias;      // by row; null: none
    Activation activation;
    float low, high;        // as in Finish; for none and relu also: the bounds of a clamp
    const float* residual;  // laid out as the output; null: none
    bool residual_first;
    float* out;
    std::ptrdiff_t stride;  // from row to row
    const Segment* segments;
    int count;
};

// A block of k of a sparse matrix: for row m its entries are [start[m], start[m + 1]).
struct SparseBlock {
    const std::int32_t* start;
    const std::uint16_t* k;  // within the block
    const float* values;
};

constexpr int most_width = 8;  // registers in a tile

// Part of a line of an image as it lies in the input: `left` zeros, `size` elements `stride` apart, `right` zeros.
struct Stretch {
    std::ptrdiff_t from;  // from the channel's first element
    std::ptrdiff_t stride;
    int left, size, right;
};

// Positions of a tile that lie side by side in its source.
struct Line {
    std::ptrdiff_t from;
    int at;  // in the tile
    int size;
};

// Positions of a plane that a depthwise convolution sums where they lie: `size` of them, at most a register's lanes, side by
// side in the output from `to` on. Tap t reads plane[from + shifts[t] + i * stride]; where bit i * stride of masks[masks + t]
// is not set, that lies outside and is zero. Where `masks` is negative all lies inside, and `count` whole registers follow
// each other.
struct Strip {
    std::ptrdiff_t from, to;
    int masks, size, count;
};

// Positions side by side in every line of a plane, which a depthwise convolution of 3 x 3 taps goes down: `size` of them from
// `to` on. Tap j of a line reads line[from + j + i * stride]; where bit i * stride of masks[j] is not set, that is outside.
struct Column {
    std::ptrdiff_t from;
    int to, size;
    std::uint32_t masks[3];
};
// Lines of such a plane, all of one size; output lines [first, last) are wanted.
struct PlaneLines {
    int in, width, out_width, pad, first, last;
};

struct ProductKernels {
    // Rows [begin, end) times a panel of `width` registers; row k of the panel is at panel + k * step. `sums` (width * lanes
    // floats a row, from `begin` on) carries partial sums from block to block; the first starts at the bias, the last finishes.
    void (*sparse)(int width, const SparseBlock& block, int begin, int end, const float* panel, std::ptrdiff_t step, float* sums,
                   bool first, bool last, const Finisher& finisher);
    // The same with dense weights, packed by groups of dense_rows(most) rows, [group][k][row in group], for tiles of at most
    // `most` registers, 4 being the most that there is.
    void (*dense)(int most, int width, const float* packed, int depth, std::ptrdiff_t group_step, int begin, int end, const float* panel,
                  std::ptrdiff_t step, float* sums, bool first, bool last, const Finisher& finisher);
    int (*dense_rows)(int most);
    // A matrix with strides to groups of rows, as `dense` has them: rows beyond the last are zeros.
    void (*pack_rows)(const float* matrix, std::ptrdiff_t row, std::ptrdiff_t k, int rows, int depth, int group, float* to);
    // Writes stretches one behind the other. May write, and read, up to a register past their end.
    void (*pack)(const Stretch* stretches, int count, const float* channel, float* to);
    // Writes rows of a panel: row k[i] has the lines of source + shifts[index[i]]. May read a register past a line's end; rows
    // come in rising order, so that what one writes past its end the next puts right.
    void (*spread)(const float* source, const std::ptrdiff_t* shifts, const std::uint16_t* index, const std::uint16_t* k, int count,
                   const Line* lines, int line_count, float* panel, std::ptrdiff_t step);
    // The same for one position, whose column of B is dense: `x`. `sums` is a float a row.
    void (*sparse_vector)(const SparseBlock& block, int begin, int end, const float* x, float* sums, bool first, bool last,
                          const Finisher& finisher);
    // And with dense weights, by groups of `width` registers of rows, [group][k][row in group]; whole groups, all of k.
    void (*dense_vector)(int width, const float* packed, int depth, int begin, int end, const float* x, const Finisher& finisher);
    // Lines of a depthwise convolution, padded already: sums[i] = bias + sum of w[t] * in[offsets[t] + i] for i in [0, size),
    // finished by segments of it. `sums` has room for a register behind `size`.
    void (*depthwise)(const float* in, const std::int32_t* offsets, const float* weights, int taps, int size, float bias, float* sums,
                      const Finisher& finisher);
    // A plane of a depthwise convolution without a padded copy of it, its stride 1 or 2 along a line. Null where an instruction
    // set does not load by a mask.
    void (*depthwise_strips)(const float* plane, int stride, const Strip* strips, int count, const std::uint32_t* masks,
                             const std::ptrdiff_t* shifts, const float* weights, int taps, float bias, const Finisher& finisher);
    // The same of 3 x 3 taps, column by column: a line's elements are loaded once for all lines of the output that they are in.
    void (*depthwise_columns)(const float* plane, int stride, const Column* columns, int count, const PlaneLines& lines, const float* weights,
                              float bias, const Finisher& finisher);
    // `rounds` times 12 registers of multiply-adds and nothing else: what the processor can do at most.
    void (*spin)(std::int64_t rounds, float* out);
    // The sum of `size` floats, a multiple of 4 registers: what memory can do at most.
    float (*read)(const float* from, std::int64_t size);
};

}  // namespace featherweight
