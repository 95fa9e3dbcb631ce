// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace featherweight {

// out[image][m][p] = finish(bias[m] + sum over k of W[m][k] * B[image][k][p]): a convolution of one group, or a matrix product
// over tokens. Positions (pixels, tokens) fill registers; nothing is done for weights that are zero.

// Which input element a (k, position) reads, along one spatial axis: at position * stride + tap * dilation - pad.
struct Spatial {
    std::int64_t in = 1, out = 1, taps = 1, stride = 1, dilation = 1, pad = 0;
    bool operator==(const Spatial& other) const {
        return in == other.in && out == other.out && taps == other.taps && stride == other.stride && dilation == other.dilation && pad == other.pad;
    }
};

// Where B and the output lie. k counts channels, then taps of depth, height and width; positions are the output's pixels.
// A matrix product is a convolution of one tap over an image of one line.
struct Geometry {
    int rows = 0;                           // M
    int channels = 0;                       // of the input; the depth K is channels * taps
    Spatial space[3];                       // depth, height, width
    std::ptrdiff_t channel_step = 0;        // elements from channel to channel of the input; lines are dense
    std::ptrdiff_t row_step = 0;            // elements from row to row of the output
    std::vector<std::ptrdiff_t> in, out;    // where each image's first element lies

    std::int64_t taps() const { return space[0].taps * space[1].taps * space[2].taps; }
    std::int64_t depth() const { return channels * taps(); }
    std::int64_t positions() const { return space[0].out * space[1].out * space[2].out; }
    bool is_pointwise() const;              // every position reads the input at its own place
    bool is_vector() const;                 // there is one position, and its channels lie side by side
};

// Which k of a block some row reads, channel by channel: what has to be in its panel.
struct Columns {
    struct Run {
        int channel, first, count;  // into k and tap
    };
    std::vector<Run> runs;
    std::vector<std::uint16_t> k;    // within the block, rising
    std::vector<std::uint16_t> tap;  // k's tap
};

// A matrix by blocks of k, its zeros left out: block b has the entries of columns [b * block, (b + 1) * block).
struct SparseMatrix {
    int rows = 0, depth = 0, block = 0;
    struct Block {
        std::vector<std::int32_t> start;  // rows + 1
        std::vector<std::uint16_t> k;
        std::vector<float> values;
        Columns columns;
    };
    std::vector<Block> blocks;
    std::vector<std::int64_t> before;     // non-zeros in rows before m: rows + 1
};

SparseMatrix sparse_matrix(const float* weights, int rows, int depth, int taps, int block);
double density(const float* weights, std::int64_t size);  // share of non-zeros

// A dense matrix by groups of rows: [group][k][row in group].
struct DenseMatrix {
    int rows = 0, depth = 0, group = 0;
    std::vector<float> values;
    std::vector<Columns> columns;  // by block of k
};

DenseMatrix dense_matrix(const float* weights, int rows, int depth, int taps, int block, int group);

// How a product is carried out: found by measuring, see `choose`.
struct Choice {
    bool sparse = true;
    int width = 4;        // registers of positions in a tile
    int block = 256;      // k in a panel
    bool packed = true;   // panels are copied together, or read where they lie (pointwise only)
    bool vector = false;  // B is a vector: there are no panels, and dense rows fill registers instead of positions
};

struct Matrix {  // one of the two
    std::shared_ptr<const SparseMatrix> sparse;
    std::shared_ptr<const DenseMatrix> dense;
};

Matrix packed_matrix(const float* weights, const Geometry& geometry, const Choice& choice, const Kernels& kernels);

// How one tile's part of the input is brought together. Taps of a channel overlap: its lines are first copied into a window,
// padded, columns sorted by their remainder to the stride, so that every tap is a contiguous stretch of every line.
struct Window {
    std::vector<Stretch> stretches;      // empty where lines are taken from the input as they lie
    std::vector<Line> lines;
    std::vector<std::ptrdiff_t> shifts;  // by tap
    std::size_t size = 0;                // floats
};

// The tiles of a product, and which task takes which.
struct Tiling {
    struct Piece {  // of one image
        int image;
        std::int64_t first;
        int size;
    };
    struct Tile {
        int width;  // registers
        std::vector<Piece> pieces;
        std::vector<Segment> segments;  // the pieces, as they lie in the output
        int window = 0;                 // which of `windows`
        std::ptrdiff_t base = 0;        // added to where that one's input lies
    };
    std::vector<Tile> tiles;
    std::vector<Window> windows;   // tiles inside an image have the same but for a shift
    std::size_t window = 0;        // floats of the widest tile's window on one channel
    std::vector<int> cuts;         // rows are cut here, so that parts have as many non-zeros each: parts + 1
    std::size_t scratch = 0;       // floats that one thread needs
    int tasks() const { return static_cast<int>(tiles.size() * (cuts.size() - 1)); }
};

// `always`: a window is made even where lines could be taken as they lie.
Window window_of(const Geometry& geometry, const std::vector<Tiling::Piece>& pieces, bool always = false);

Tiling tiling(const Geometry& geometry, const Matrix& matrix, const Choice& choice, int lanes, int threads);

// Carries out task `task` of a product. `finisher` has everything but segments; its `out` and `residual` are of image offset 0.
// `values`: a dense matrix's, where they are not in it but packed for this call.
void multiply(const Geometry& geometry, const Matrix& matrix, const Choice& choice, const Tiling& tiling, int task, const float* in,
              const Finisher& finisher, float* scratch, const Kernels& kernels, const float* values = nullptr);

// The whole product on a pool's threads. `scratch`: tiling.scratch floats a thread.
void multiply_all(const Geometry& geometry, const Matrix& matrix, const Choice& choice, const Tiling& tiling, const float* in,
                  const Finisher& finisher, float* scratch, const Kernels& kernels, Pool& pool);

// What could be best for this product, the likeliest first.
std::vector<Choice> candidates(const Geometry& geometry, double density, int lanes);

}  // namespace featherweight
