// SPDX-License-Identifier: Apache-2.0
#include "product.hpp"

#include <algorithm>
#include <limits>
#include <map>

#include "error.hpp"

namespace featherweight {

bool Geometry::is_pointwise() const {
    for (const Spatial& axis : space)
        if (axis.taps != 1 || axis.stride != 1 || axis.pad != 0 || axis.in != axis.out) return false;
    return true;
}

bool Geometry::is_vector() const {
    return positions() == 1 && in.size() == 1 && is_pointwise() && (channel_step == 1 || channels <= 1);
}

double density(const float* weights, std::int64_t size) {
    std::int64_t zeros = 0;
    for (std::int64_t i = 0; i < size; ++i) zeros += weights[i] == 0;
    return size == 0 ? 0 : 1 - static_cast<double>(zeros) / static_cast<double>(size);
}

namespace {

Columns columns_of(const std::vector<char>& used, int begin, int taps) {
    Columns made;
    for (std::size_t k = 0; k < used.size(); ++k) {
        if (!used[k]) continue;
        const int channel = (begin + static_cast<int>(k)) / taps;
        if (made.runs.empty() || made.runs.back().channel != channel) made.runs.push_back({channel, static_cast<int>(made.k.size()), 0});
        made.runs.back().count += 1;
        made.k.push_back(static_cast<std::uint16_t>(k));
        made.tap.push_back(static_cast<std::uint16_t>((begin + static_cast<int>(k)) % taps));
    }
    return made;
}

}  // namespace

SparseMatrix sparse_matrix(const float* weights, int rows, int depth, int taps, int block) {
    SparseMatrix made{rows, depth, block, {}, std::vector<std::int64_t>(rows + 1, 0)};
    for (int begin = 0; begin < depth; begin += block) {
        const int size = std::min(block, depth - begin);
        SparseMatrix::Block one;
        std::vector<char> used(size, 0);
        one.start.reserve(rows + 1);
        one.start.push_back(0);
        for (int m = 0; m < rows; ++m) {
            const float* row = weights + static_cast<std::int64_t>(m) * depth + begin;
            for (int k = 0; k < size; ++k)
                if (row[k] != 0) {
                    one.k.push_back(static_cast<std::uint16_t>(k));
                    one.values.push_back(row[k]);
                    used[k] = 1;
                }
            made.before[m + 1] += static_cast<std::int64_t>(one.k.size()) - one.start.back();
            one.start.push_back(static_cast<std::int32_t>(one.k.size()));
        }
        one.columns = columns_of(used, begin, taps);
        made.blocks.push_back(std::move(one));
    }
    if (made.blocks.empty()) {  // nothing is summed: rows are their biases
        made.blocks.emplace_back();
        made.blocks.back().start.assign(rows + 1, 0);
    }
    for (int m = 0; m < rows; ++m) made.before[m + 1] += made.before[m];
    return made;
}

DenseMatrix dense_matrix(const float* weights, int rows, int depth, int taps, int block, int group) {
    const int groups = (rows + group - 1) / group;
    DenseMatrix made{rows, depth, group, std::vector<float>(static_cast<std::size_t>(groups) * depth * group, 0.0f), {}};
    for (int m = 0; m < rows; ++m) {
        float* to = made.values.data() + static_cast<std::size_t>(m / group) * depth * group + m % group;
        const float* from = weights + static_cast<std::int64_t>(m) * depth;
        for (int k = 0; k < depth; ++k) to[static_cast<std::ptrdiff_t>(k) * group] = from[k];
    }
    for (int begin = 0; begin < std::max(depth, 1); begin += block)
        made.columns.push_back(columns_of(std::vector<char>(std::min(block, depth - begin), 1), begin, taps));
    return made;
}

Matrix packed_matrix(const float* weights, const Geometry& g, const Choice& choice, const Kernels& kernels) {
    const int depth = static_cast<int>(g.depth()), taps = static_cast<int>(g.taps());
    Matrix made;
    if (choice.sparse) {
        made.sparse = std::make_shared<SparseMatrix>(sparse_matrix(weights, g.rows, depth, taps, choice.block));
    } else {
        // Rows of a product with a vector fill registers, as positions do of others.
        const int group = choice.vector ? choice.width * kernels.lanes : kernels.product.dense_rows(choice.width);
        made.dense = std::make_shared<DenseMatrix>(dense_matrix(weights, g.rows, depth, taps, choice.block, group));
    }
    return made;
}

Window window_of(const Geometry& g, const std::vector<Tiling::Piece>& pieces, bool always) {
    Window made;
    if (!always && g.is_pointwise()) {
        int at = 0;
        for (const Tiling::Piece& piece : pieces) {
            made.lines.push_back({g.in[piece.image] + static_cast<std::ptrdiff_t>(piece.first), at, piece.size});
            at += piece.size;
        }
        made.shifts.push_back(0);
        return made;
    }
    const Spatial &dz = g.space[0], &dy = g.space[1], &dx = g.space[2];
    struct Part {  // of one output line
        std::int64_t image, z, y, x;
        int at, size;
    };
    std::vector<Part> parts;
    int at = 0;
    for (const Tiling::Piece& piece : pieces)
        for (std::int64_t p = piece.first, end = piece.first + piece.size; p < end;) {
            const std::int64_t x = p % dx.out, size = std::min(end - p, dx.out - x), y = p / dx.out;
            parts.push_back({piece.image, y / dy.out, y % dy.out, x, at, static_cast<int>(size)});
            at += static_cast<int>(size);
            p += size;
        }
    const std::int64_t first_x = parts.size() == 1 ? parts[0].x : 0;
    const std::int64_t wide = parts.size() == 1 ? parts[0].size : dx.out;
    const std::int64_t reach = (dx.taps - 1) * dx.dilation;
    const std::int64_t pitch = wide + reach / dx.stride;           // columns of one remainder
    const std::int64_t remainders = std::min(dx.stride, reach + 1);
    const std::int64_t row = pitch * remainders;
    constexpr std::int64_t most_lines = 1 << 22;

    const auto input_row = [&](std::int64_t image, std::int64_t z, std::int64_t y) {
        for (std::int64_t r = 0; r < remainders; ++r) {
            const std::int64_t x = first_x * dx.stride - dx.pad + r;  // of the first column
            Stretch stretch{0, dx.stride, static_cast<int>(pitch), 0, 0};
            if (z >= 0 && z < dz.in && y >= 0 && y < dy.in) {
                const std::int64_t left = x >= 0 ? 0 : std::min((-x + dx.stride - 1) / dx.stride, pitch);
                const std::int64_t inside = dx.in - x <= 0 ? 0 : std::min((dx.in - x + dx.stride - 1) / dx.stride, pitch);
                const std::int64_t size = std::max<std::int64_t>(inside - left, 0);
                stretch.from = g.in[image] + static_cast<std::ptrdiff_t>((z * dy.in + y) * dx.in + x + left * dx.stride);
                stretch.left = static_cast<int>(left);
                stretch.size = static_cast<int>(size);
                stretch.right = static_cast<int>(pitch - left - size);
            }
            made.stretches.push_back(stretch);
        }
    };
    // Lines that follow each other share rows of the window: `rows` of them for each tap of depth.
    std::int64_t rows = 0;
    std::int64_t next_row = 0;  // of the input, behind the last one in the window
    const std::int64_t tall = (dy.taps - 1) * dy.dilation + 1;
    std::vector<std::pair<std::int64_t, std::int64_t>> heads;  // of the window's rows: image * depth + z, y
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const Part& part = parts[i];
        const std::int64_t first_row = part.y * dy.stride - dy.pad;
        const bool follows = i > 0 && parts[i - 1].image == part.image && parts[i - 1].z == part.z && first_row <= next_row;
        const std::int64_t from = follows ? next_row : first_row;
        if (tall + static_cast<std::int64_t>(heads.size()) > most_lines) throw Unsupported("its window is huge");
        for (std::int64_t y = from; y < first_row + tall; ++y) heads.emplace_back(part.image * dz.out + part.z, y);
        rows = static_cast<std::int64_t>(heads.size());
        next_row = first_row + tall;
        made.lines.push_back({static_cast<std::ptrdiff_t>((rows - tall) * row + part.x - first_x), part.at, part.size});
    }
    if (rows * dz.taps > most_lines / remainders || rows * dz.taps > std::numeric_limits<std::int32_t>::max() / row)
        throw Unsupported("its window is huge");
    for (std::int64_t kz = 0; kz < dz.taps; ++kz)
        for (const auto& [slice, y] : heads) input_row(slice / dz.out, slice % dz.out * dz.stride - dz.pad + kz * dz.dilation, y);
    for (std::int64_t kz = 0; kz < dz.taps; ++kz)
        for (std::int64_t ky = 0; ky < dy.taps; ++ky)
            for (std::int64_t kx = 0; kx < dx.taps; ++kx) {
                const std::int64_t x = kx * dx.dilation;
                made.shifts.push_back(static_cast<std::ptrdiff_t>((kz * rows + ky * dy.dilation) * row + x % dx.stride * pitch + x / dx.stride));
            }
    made.size = static_cast<std::size_t>(rows * row * dz.taps);
    return made;
}

namespace {

// Makes a window's places in the input relative to the first, and gives that one.
std::ptrdiff_t taken_from(Window& window) {
    std::ptrdiff_t base = 0;
    if (window.stretches.empty()) {
        base = window.lines[0].from;
        for (Line& line : window.lines) line.from -= base;
        return base;
    }
    const auto read = std::find_if(window.stretches.begin(), window.stretches.end(), [](const Stretch& s) { return s.size > 0; });
    if (read == window.stretches.end()) return 0;
    base = read->from;
    for (Stretch& stretch : window.stretches) stretch.from = stretch.size > 0 ? stretch.from - base : 0;
    return base;
}

std::vector<std::int64_t> numbers_of(const Window& window) {  // all that tells one from another
    std::vector<std::int64_t> made;
    for (const Stretch& s : window.stretches) made.insert(made.end(), {s.from, s.left, s.size, s.right});
    for (const Line& line : window.lines) made.insert(made.end(), {line.from, line.at, line.size});
    made.insert(made.end(), window.shifts.begin(), window.shifts.end());
    return made;
}

}  // namespace

Tiling tiling(const Geometry& geometry, const Matrix& matrix, const Choice& choice, int lanes, int threads) {
    Tiling made;
    const std::int64_t positions = geometry.positions();
    const std::int64_t most = static_cast<std::int64_t>(choice.width) * lanes;
    const int images = static_cast<int>(geometry.in.size());
    const auto add = [&](std::vector<Tiling::Piece> pieces) {
        int size = 0;
        std::vector<Segment> segments;
        for (const Tiling::Piece& piece : pieces) {
            segments.push_back({geometry.out[piece.image] + static_cast<std::ptrdiff_t>(piece.first), size, piece.size});
            size += piece.size;
        }
        made.tiles.push_back({(size + lanes - 1) / lanes, std::move(pieces), std::move(segments)});
    };
    // Registers are shared out evenly: 13 of them by 4 are 4, 3, 3, 3.
    const auto split = [&](std::int64_t size, const auto& each) {
        const std::int64_t vectors = (size + lanes - 1) / lanes, tiles = (vectors + choice.width - 1) / choice.width;
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::int64_t begin = vectors * t / tiles * lanes, end = std::min(vectors * (t + 1) / tiles * lanes, size);
            each(begin, end);
        }
    };
    if (images == 1 || (positions % lanes == 0 && positions >= most) || positions >= 8 * most) {
        for (int image = 0; image < images; ++image)
            split(positions, [&](std::int64_t begin, std::int64_t end) { add({{image, begin, static_cast<int>(end - begin)}}); });
    } else {  // small images: tiles span them, so that registers are full
        split(positions * images, [&](std::int64_t begin, std::int64_t end) {
            std::vector<Tiling::Piece> pieces;
            while (begin < end) {
                const std::int64_t image = begin / positions, first = begin % positions;
                const std::int64_t size = std::min(end - begin, positions - first);
                pieces.push_back({static_cast<int>(image), first, static_cast<int>(size)});
                begin += size;
            }
            add(std::move(pieces));
        });
    }
    const int tiles = static_cast<int>(made.tiles.size());
    int parts = tiles >= 6 * threads || tiles % threads == 0 ? 1 : threads;
    if (const std::int64_t work = matrix.sparse ? matrix.sparse->before.back() : geometry.rows * geometry.depth(); choice.vector && work < 16384)
        parts = 1;
    const int grain = matrix.sparse ? 1 : matrix.dense->group;
    parts = std::max(1, std::min(parts, geometry.rows / grain));
    made.cuts.push_back(0);
    for (int part = 1; part < parts; ++part) {
        int cut;
        if (matrix.sparse) {
            const std::vector<std::int64_t>& before = matrix.sparse->before;
            // A row costs something even without non-zeros: it is stored.
            const auto cost = [&](int m) { return before[m] + 4 * static_cast<std::int64_t>(m); };
            int low = 0, high = geometry.rows;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (cost(middle) * parts < cost(geometry.rows) * part)
                    low = middle + 1;
                else
                    high = middle;
            }
            cut = low;
        } else {
            cut = static_cast<int>(static_cast<std::int64_t>(geometry.rows) * part / parts) / grain * grain;
        }
        if (cut > made.cuts.back() && cut < geometry.rows) made.cuts.push_back(cut);
    }
    made.cuts.push_back(geometry.rows);
    int rows = 0;
    for (std::size_t i = 1; i < made.cuts.size(); ++i) rows = std::max(rows, made.cuts[i] - made.cuts[i - 1]);
    if (choice.vector) {
        made.scratch = static_cast<std::size_t>(rows);
        return made;
    }
    std::map<std::vector<std::int64_t>, int> known;
    for (Tiling::Tile& tile : made.tiles) {
        Window window = window_of(geometry, tile.pieces);
        made.window = std::max(made.window, window.size);
        tile.base = taken_from(window);
        const auto [found, is_new] = known.emplace(numbers_of(window), static_cast<int>(made.windows.size()));
        if (is_new) made.windows.push_back(std::move(window));
        tile.window = found->second;
    }
    // Behind each part a register is left, since whole ones are written.
    const auto whole = [&](std::size_t floats) { return (floats / lanes + 2) * lanes; };
    made.window = whole(made.window);
    const bool sums = geometry.depth() > choice.block;
    made.scratch = made.window + whole(static_cast<std::size_t>(std::min<std::int64_t>(choice.block, geometry.depth()) * most)) +
                   whole(sums ? static_cast<std::size_t>((rows + grain) * most) : 0);
    return made;
}

void multiply(const Geometry& geometry, const Matrix& matrix, const Choice& choice, const Tiling& tiling, int task, const float* in,
              const Finisher& finisher, float* scratch, const Kernels& kernels, const float* values) {
    const int parts = static_cast<int>(tiling.cuts.size()) - 1;
    const Tiling::Tile& tile = tiling.tiles[task / parts];
    const int begin = tiling.cuts[task % parts], end = tiling.cuts[task % parts + 1];
    const int lanes = kernels.lanes;
    const std::ptrdiff_t width = static_cast<std::ptrdiff_t>(tile.width) * lanes;
    const int depth = static_cast<int>(geometry.depth()), block = choice.block;

    Finisher to = finisher;
    to.segments = tile.segments.data();
    to.count = static_cast<int>(tile.segments.size());

    if (choice.vector) {
        if (!matrix.sparse) return kernels.product.dense_vector(choice.width, matrix.dense->values.data(), depth, begin, end, in + geometry.in[0], to);
        for (int first = 0; first < std::max(depth, 1); first += block) {
            const SparseMatrix::Block& part = matrix.sparse->blocks[first / block];
            kernels.product.sparse_vector({part.start.data(), part.k.data(), part.values.data()}, begin, end, in + geometry.in[0] + first, scratch,
                                          first == 0, first + block >= depth, to);
        }
        return;
    }

    // A tile that is not full of positions is copied even where it could be read in place: what lies behind is not ours.
    const bool packed = choice.packed || tile.segments.size() != 1 || tile.segments[0].size != width;
    float* window = scratch;
    float* panel = window + tiling.window;
    float* sums = panel + (static_cast<std::ptrdiff_t>(std::min(block, depth)) * choice.width + 2) * lanes;
    const Window& source = tiling.windows[tile.window];
    for (int first = 0; first < std::max(depth, 1); first += block) {
        const int size = std::min(block, depth - first);
        const float* rows = panel;
        std::ptrdiff_t step = width;
        const Columns& columns = matrix.sparse ? matrix.sparse->blocks[first / block].columns : matrix.dense->columns[first / block];
        if (!packed) {
            rows = in + geometry.in[tile.pieces[0].image] + first * geometry.channel_step + tile.pieces[0].first;
            step = geometry.channel_step;
        } else {
            for (const Columns::Run& run : columns.runs) {
                const float* from = in + tile.base + run.channel * geometry.channel_step;
                if (!source.stretches.empty()) {
                    kernels.product.pack(source.stretches.data(), static_cast<int>(source.stretches.size()), from, window);
                    from = window;
                }
                kernels.product.spread(from, source.shifts.data(), columns.tap.data() + run.first, columns.k.data() + run.first, run.count,
                                       source.lines.data(), static_cast<int>(source.lines.size()), panel, width);
            }
        }
        const bool last = first + block >= depth;
        if (matrix.sparse) {
            const SparseMatrix::Block& part = matrix.sparse->blocks[first / block];
            kernels.product.sparse(tile.width, {part.start.data(), part.k.data(), part.values.data()}, begin, end, rows, step, sums,
                                   first == 0, last, to);
        } else {
            const int group = matrix.dense->group;
            if (values == nullptr) values = matrix.dense->values.data();
            kernels.product.dense(choice.width, tile.width, values + static_cast<std::ptrdiff_t>(first) * group, size,
                                  static_cast<std::ptrdiff_t>(depth) * group, begin, end, rows, step, sums, first == 0, last, to);
        }
    }
}

void multiply_all(const Geometry& geometry, const Matrix& matrix, const Choice& choice, const Tiling& tiling, const float* in,
                  const Finisher& finisher, float* scratch, const Kernels& kernels, Pool& pool) {
    const int takers = std::min(pool.threads(), tiling.tasks());
    Shares shares(tiling.tasks(), takers);
    pool.run(takers, [&](int part) {
        for (int task; (task = shares.next(part)) >= 0;)
            multiply(geometry, matrix, choice, tiling, task, in, finisher, scratch + part * tiling.scratch, kernels);
    });
}

std::vector<Choice> candidates(const Geometry& geometry, double density, int lanes) {
    std::vector<Choice> made;
    if (geometry.is_vector()) {
        const int depth = static_cast<int>(std::max<std::int64_t>(geometry.depth(), 1));
        if (density < 0.6) made.push_back({true, 1, std::min(depth, 1 << 16), false, true});
        if (density > 0.05) made.push_back({false, std::min(4, (geometry.rows + lanes - 1) / lanes), depth, false, true});
        return made;
    }
    const bool pointwise = geometry.is_pointwise();
    const std::int64_t vectors = (geometry.positions() * static_cast<std::int64_t>(geometry.in.size()) + lanes - 1) / lanes;
    const auto add = [&](bool sparse, int width, int block) {
        const int fits = static_cast<int>(std::min<std::int64_t>(width, std::max<std::int64_t>(vectors, 1)));
        const int taps = static_cast<int>(geometry.taps());
        if (taps > 1 && taps <= block) block = block / taps * taps;  // no channel's window is filled twice
        block = std::min<int>(block, static_cast<int>(std::max<std::int64_t>(geometry.depth(), 1)));
        for (const Choice& other : made)
            if (other.sparse == sparse && other.width == fits && other.block == block) return;
        made.push_back({sparse, fits, block, true});
        if (pointwise) made.push_back({sparse, fits, block, false});
    };
    if (density < 0.6) {
        add(true, 4, 256);
        add(true, 4, 128);
        add(true, 6, 128);
        add(true, 2, 512);
        if (!pointwise)  // whole lines are copied with fewer loads
            for (int width = 3; width <= most_width; ++width)
                if (width * lanes % geometry.space[2].out == 0) add(true, width, 128);
    }
    if (density > 0.15) {
        add(false, 3, 192);
        add(false, 4, 128);
        add(false, 2, 256);
    }
    return made;
}

}  // namespace featherweight
