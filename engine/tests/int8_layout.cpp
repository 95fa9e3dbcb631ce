// SPDX-License-Identifier: Apache-2.0
// A trial of the int8 kernel that is to come: does it fit the house as it stands?
//
// Activations are u8, four channels of a position side by side: [channels / 4][position][4]. Four channels are then one
// 32-bit element, and everything that moves elements (geometry, windows, panels, tiles) serves them as it serves floats, with
// channels / 4 for channels. A weight is a tile of 1 x 4: four signed bytes, one VNNI dot product for 16 positions; tiles of
// four zeros are left out by the same SparseMatrix. Only the sums and the finish are new. Rows are finished by fours, so
// that the output is again [rows / 4][position][4], and what comes next reads it as it lies.
//
// Two chained convolutions, 3 x 3 and 1 x 1, are compared with plain loops to the last bit, and timed beside floats.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "product.hpp"
#include "tensor.hpp"
#include "test.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

using namespace featherweight;

namespace {

constexpr int lanes = 16, width = 4;

struct Layer {
    Geometry g;                      // channels and rows in fours
    std::vector<std::int8_t> plain;  // [rows][channels][taps]
    std::vector<float> scale, bias;  // from sums to the output's grid
    SparseMatrix tiles;
};

Geometry square(int rows, int channels, std::int64_t size, std::int64_t kernel) {
    Geometry g;
    g.rows = rows;
    g.channels = channels;
    g.space[1] = g.space[2] = {size, size, kernel, 1, 1, kernel / 2};
    if (kernel == 1) g.space[1] = {}, g.space[2] = {size * size, size * size, 1, 1, 1, 0};
    g.channel_step = g.row_step = size * size;
    g.in = g.out = {0};
    return g;
}

Layer layer(int rows, int channels, std::int64_t size, std::int64_t kernel, double zeros, std::mt19937& random) {
    Layer made;
    made.g = square(rows, channels / 4, size, kernel);
    const std::int64_t taps = kernel * kernel, depth = channels / 4 * taps;
    made.plain.assign(static_cast<std::size_t>(rows * channels * taps), 0);
    std::vector<float> packed(static_cast<std::size_t>(rows * depth), 0.0f);  // four bytes each
    std::uniform_real_distribution<double> uniform;
    for (int m = 0; m < rows; ++m)
        for (std::int64_t k = 0; k < depth; ++k) {
            if (uniform(random) < zeros) continue;
            std::int8_t four[4];
            for (int i = 0; i < 4; ++i) {
                four[i] = static_cast<std::int8_t>(random() % 255 - 127);
                made.plain[static_cast<std::size_t>((m * channels + k / taps * 4 + i) * taps + k % taps)] = four[i];
            }
            std::memcpy(&packed[static_cast<std::size_t>(m * depth + k)], four, 4);
        }
    made.tiles = sparse_matrix(packed.data(), rows, static_cast<int>(depth), static_cast<int>(taps), 256 / static_cast<int>(taps) * static_cast<int>(taps));
    for (int m = 0; m < rows; ++m) made.scale.push_back(1.0f / 4096 / static_cast<float>(1 + m % 3)), made.bias.push_back(static_cast<float>(m % 50));
    return made;
}

__attribute__((target("avx512f,avx512bw,avx512vnni"))) void multiply_int8(const Layer& l, const Tiling& tiling, int tile_at, const std::uint8_t* in,
                                                                          std::uint8_t* out, float* scratch, const Kernels& kernels) {
    const Tiling::Tile& tile = tiling.tiles[tile_at];
    const Window source = window_of(l.g, tile.pieces);
    float* panel = scratch + tiling.window;
    auto* sums = reinterpret_cast<std::int32_t*>(panel + (l.tiles.block * width + 2) * lanes);
    const std::ptrdiff_t step = tile.width * lanes;
    for (std::size_t b = 0; b < l.tiles.blocks.size(); ++b) {
        const SparseMatrix::Block& block = l.tiles.blocks[b];
        for (const Columns::Run& run : block.columns.runs) {
            const float* from = reinterpret_cast<const float*>(in) + run.channel * l.g.channel_step;
            if (!source.stretches.empty()) {
                kernels.product.pack(source.stretches.data(), static_cast<int>(source.stretches.size()), from, scratch);
                from = scratch;
            }
            kernels.product.spread(from, source.shifts.data(), block.columns.tap.data() + run.first, block.columns.k.data() + run.first, run.count,
                                   source.lines.data(), static_cast<int>(source.lines.size()), panel, step);
        }
        for (int m = 0; m < l.g.rows; ++m) {
            __m512i sum[width];
            std::int32_t* kept = sums + m * step;
            for (int t = 0; t < width; ++t) sum[t] = b == 0 || t >= tile.width ? _mm512_setzero_si512() : _mm512_loadu_si512(kept + t * lanes);
            for (std::int32_t i = block.start[m]; i < block.start[m + 1]; ++i) {
                std::int32_t four;
                std::memcpy(&four, &block.values[i], 4);
                const __m512i weight = _mm512_set1_epi32(four);
                const float* x = panel + block.k[i] * step;
#pragma GCC unroll 4
                for (int t = 0; t < width; ++t) sum[t] = _mm512_dpbusd_epi32(sum[t], _mm512_loadu_si512(x + t * lanes), weight);
            }
            for (int t = 0; t < tile.width; ++t) _mm512_storeu_si512(kept + t * lanes, sum[t]);
        }
    }
    // Four rows become one row of bytes by fours.
    for (int m = 0; m < l.g.rows; m += 4) {
        alignas(64) std::int32_t whole[width * lanes];
        for (int t = 0; t < tile.width; ++t) {
            __m512i bytes = _mm512_setzero_si512();
            for (int r = 0; r < 4; ++r) {
                const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + (m + r) * step + t * lanes)), _mm512_set1_ps(l.scale[m + r]),
                                                 _mm512_set1_ps(l.bias[m + r]));
                const __m512i rounded = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(x, _mm512_setzero_ps()), _mm512_set1_ps(255)));
                bytes = _mm512_or_si512(bytes, _mm512_sllv_epi32(rounded, _mm512_set1_epi32(8 * r)));
            }
            _mm512_store_si512(whole + t * lanes, bytes);
        }
        int at = 0;
        for (const Tiling::Piece& piece : tile.pieces) {
            std::memcpy(out + 4 * (m / 4 * l.g.row_step + piece.first), whole + at, static_cast<std::size_t>(piece.size) * 4);
            at += piece.size;
        }
    }
}

std::vector<std::uint8_t> by_loops(const Layer& l, const std::vector<std::uint8_t>& in, std::int64_t size, std::int64_t kernel) {
    const int channels = l.g.channels * 4;
    const std::int64_t positions = size * size;
    std::vector<std::uint8_t> out(static_cast<std::size_t>(l.g.rows * positions));
    for (int m = 0; m < l.g.rows; ++m)
        for (std::int64_t y = 0; y < size; ++y)
            for (std::int64_t x = 0; x < size; ++x) {
                std::int32_t sum = 0;
                for (int c = 0; c < channels; ++c)
                    for (std::int64_t ky = 0; ky < kernel; ++ky)
                        for (std::int64_t kx = 0; kx < kernel; ++kx) {
                            const std::int64_t iy = y + ky - kernel / 2, ix = x + kx - kernel / 2;
                            if (iy < 0 || ix < 0 || iy >= size || ix >= size) continue;
                            sum += l.plain[static_cast<std::size_t>((m * channels + c) * kernel * kernel + ky * kernel + kx)] *
                                   in[static_cast<std::size_t>((c / 4 * positions + iy * size + ix) * 4 + c % 4)];
                        }
                const float value = std::fma(static_cast<float>(sum), l.scale[m], l.bias[m]);
                out[static_cast<std::size_t>((m / 4 * positions + y * size + x) * 4 + m % 4)] =
                    static_cast<std::uint8_t>(std::nearbyint(std::min(std::max(value, 0.0f), 255.0f)));
            }
    return out;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Work> double shortest(const Work& work) {
    double best = std::numeric_limits<double>::infinity();
    for (int i = 0; i < (SANITIZED ? 1 : 30); ++i) {
        const double begin = now();
        work();
        best = std::min(best, now() - begin);
    }
    return best;
}

}  // namespace

int main() {
    if (!__builtin_cpu_supports("avx512vnni")) return std::puts("no VNNI here: skipped"), 0;
    const Kernels& best = kernels("avx512");
    std::mt19937 random(0);
    for (const double zeros : {0.0, 0.5, 0.75, 0.9}) {
        const int in_channels = 128, inner = 128, rows = 512;
        const std::int64_t size = 28;
        const Layer first = layer(inner, in_channels, size, 3, zeros, random), second = layer(rows, inner, size, 1, zeros, random);
        std::vector<std::uint8_t> in(static_cast<std::size_t>(in_channels * size * size));
        for (std::uint8_t& x : in) x = static_cast<std::uint8_t>(random());
        Memory source(in.size()), middle(static_cast<std::size_t>(inner * size * size)), out(static_cast<std::size_t>(rows * size * size));
        std::memcpy(source.data(), in.data(), in.size());

        const Choice choice{true, width, first.tiles.block, true};
        const auto run = [&](const Layer& l, const Memory& from, const Memory& to) {
            const Matrix matrix{std::make_shared<SparseMatrix>(l.tiles), nullptr};
            const Tiling tiles = tiling(l.g, matrix, choice, lanes, 1);
            Memory scratch((tiles.window + static_cast<std::size_t>((l.tiles.block * width + 2) * lanes + l.g.rows * width * lanes)) * 4);
            return shortest([&] {
                for (std::size_t t = 0; t < tiles.tiles.size(); ++t)
                    multiply_int8(l, tiles, static_cast<int>(t), reinterpret_cast<const std::uint8_t*>(from.data()),
                                  reinterpret_cast<std::uint8_t*>(to.data()), reinterpret_cast<float*>(scratch.data()), best);
            });
        };
        const double took = run(first, source, middle) + run(second, middle, out);
        const std::vector<std::uint8_t> expected = by_loops(second, by_loops(first, in, size, 3), size, 1);
        if (std::memcmp(expected.data(), out.data(), expected.size()) != 0) return std::puts("int8: differs from plain loops"), 1;

        // The same geometry in floats, as many zeros among single weights.
        double floats = 0;
        for (const Layer* l : {&first, &second}) {
            Geometry g = l->g;
            g.channels *= 4;
            std::vector<float> weights(static_cast<std::size_t>(g.rows * g.depth()));
            std::uniform_real_distribution<double> uniform;
            for (float& w : weights) w = uniform(random) < zeros ? 0.0f : 1.0f;
            double least = std::numeric_limits<double>::infinity();
            Memory x(static_cast<std::size_t>(g.channels * g.channel_step) * 4), y(static_cast<std::size_t>(g.rows * g.row_step) * 4);
            for (const Choice& each : candidates(g, density(weights.data(), static_cast<std::int64_t>(weights.size())), lanes)) {
                Matrix matrix;
                const int depth = static_cast<int>(g.depth()), taps = static_cast<int>(g.taps());
                if (each.sparse)
                    matrix.sparse = std::make_shared<SparseMatrix>(sparse_matrix(weights.data(), g.rows, depth, taps, each.block));
                else
                    matrix.dense = std::make_shared<DenseMatrix>(dense_matrix(weights.data(), g.rows, depth, taps, each.block, best.product.dense_rows(each.width)));
                const Tiling tiles = tiling(g, matrix, each, lanes, 1);
                Memory scratch(tiles.scratch * 4);
                Finisher to{nullptr, Activation::none, -1e30f, 1e30f, nullptr, true, reinterpret_cast<float*>(y.data()), g.row_step, nullptr, 0};
                least = std::min(least, shortest([&] {
                    for (int t = 0; t < tiles.tasks(); ++t)
                        multiply(g, matrix, each, tiles, t, reinterpret_cast<const float*>(x.data()), to, reinterpret_cast<float*>(scratch.data()), best);
                }));
            }
            floats += least;
        }
        std::printf("%2.0f %% zero tiles: int8 as plain loops to the last bit; %4.0f us, floats with as many zeros %4.0f us, %.1fx\n", 100 * zeros, took * 1e6,
                    floats * 1e6, floats / took);
    }
}

#else
int main() { return 0; }
#endif
