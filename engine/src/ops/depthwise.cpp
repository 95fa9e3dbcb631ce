// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>

#include "product_step.hpp"

namespace featherweight {

namespace {

// Strips of positions, and what of each tap lies inside.
struct Strips {
    std::vector<std::vector<Strip>> parts;  // of the plane, for as many threads
    std::vector<std::uint32_t> masks;
    std::vector<std::ptrdiff_t> shifts;  // by tap
};

Strips strips_of(const Geometry& g, int lanes, int parts) {
    const Spatial &y = g.space[1], &x = g.space[2];
    Strips made;
    for (std::int64_t i = 0; i < y.taps; ++i)
        for (std::int64_t j = 0; j < x.taps; ++j) made.shifts.push_back((i * y.dilation - y.pad) * x.in + j * x.dilation - x.pad);
    // Where lines of the output lie as those of the input do, a strip may go on over a line's end.
    const bool over_lines = x.stride == 1 && y.stride == 1 && x.in == x.out;
    std::map<std::vector<std::uint32_t>, int> known;
    std::vector<std::uint32_t> masks(made.shifts.size());
    const auto add = [&](std::vector<Strip>& to, std::int64_t first, int size) {
        std::fill(masks.begin(), masks.end(), 0u);
        bool inside = size == lanes;
        for (int done = 0; done < size;) {
            const std::int64_t row = (first + done) / x.out, column = (first + done) % x.out;
            const int here = static_cast<int>(std::min<std::int64_t>(size - done, x.out - column));
            for (std::int64_t i = 0; i < y.taps; ++i) {
                const std::int64_t line = row * y.stride + i * y.dilation - y.pad;
                const bool there = line >= 0 && line < y.in;
                for (std::int64_t j = 0; j < x.taps; ++j) {
                    std::uint32_t& mask = masks[static_cast<std::size_t>(i * x.taps + j)];
                    for (int k = 0; k < here; ++k) {
                        const std::int64_t at = (column + k) * x.stride + j * x.dilation - x.pad;
                        if (there && at >= 0 && at < x.in)
                            mask |= 1u << ((done + k) * x.stride);
                        else
                            inside = false;
                    }
                }
            }
            done += here;
        }
        const std::ptrdiff_t from = first / x.out * y.stride * x.in + first % x.out * x.stride;
        if (inside && !to.empty() && to.back().masks < 0 && to.back().to + to.back().count * lanes == first &&
            to.back().from + to.back().count * lanes * x.stride == from) {
            ++to.back().count;
            return;
        }
        int place = -1;
        if (!inside) {
            const auto [found, fresh] = known.try_emplace(masks, static_cast<int>(made.masks.size()));
            if (fresh) made.masks.insert(made.masks.end(), masks.begin(), masks.end());
            place = found->second;
        }
        to.push_back({from, static_cast<std::ptrdiff_t>(first), place, size, 1});
    };
    for (int part = 0; part < parts; ++part) {
        std::vector<Strip>& to = made.parts.emplace_back();
        const auto bound = [&](int at) { return over_lines ? (g.positions() * at / parts + lanes - 1) / lanes * lanes : y.out * at / parts * x.out; };
        const std::int64_t end = std::min(bound(part + 1), g.positions());
        for (std::int64_t first = bound(part); first < end;) {
            const std::int64_t size = std::min<std::int64_t>({lanes, end - first, over_lines ? lanes : x.out - first % x.out});
            add(to, first, static_cast<int>(size));
            first += size;
        }
    }
    return made;
}

// Large planes are shared out by positions, so that pixels stay with the thread that has them in its cache; small ones whole.
bool by_position(const Geometry& g, int threads) {
    constexpr std::int64_t large = 512;  // pixels
    return g.in.size() == 1 && g.space[1].out >= threads && g.positions() >= large;
}

// A step that calls `work(part, plane, weights, bias, finisher)` for every plane, in `parts` parts of each (see by_position) or 1.
template <class Work>
void add_planes(Planner& planner, const Geometry& g, int channels, int multiplier, std::ptrdiff_t image_out, const Tensor& weights,
                const Places& places, Work work) {
    const bool shared = by_position(g, planner.threads());
    const Finisher finisher = finisher_of(planner.node().finish);
    const int planes = channels * multiplier, taps = static_cast<int>(g.taps());
    const double images = static_cast<double>(g.in.size()), sums = static_cast<double>(g.positions()) * planes * images;
    planner.step(
        planner.node().op + " depthwise", places.touched(),
        [=, images_in = g.in, channel_step = g.channel_step, positions = static_cast<std::ptrdiff_t>(g.positions())](Frame& frame) {
            const Finisher bound = places.bound(frame, finisher);
            const std::int64_t all = static_cast<std::int64_t>(planes) * static_cast<std::int64_t>(images_in.size());
            const int parts = static_cast<int>(shared ? frame.pool.threads() : std::min<std::int64_t>(frame.pool.threads(), all));
            frame.pool.run(parts, [&](int part) {
                Finisher to = bound;
                for (std::int64_t at = shared ? 0 : all * part / parts, end = shared ? all : all * (part + 1) / parts; at < end; ++at) {
                    const std::int64_t image = at / planes, plane = at % planes;
                    const std::ptrdiff_t begin = image * image_out + plane * positions;
                    to.out = bound.out + begin;
                    if (bound.residual != nullptr) to.residual = bound.residual + begin;
                    work(frame.kernels.product, shared ? static_cast<std::size_t>(part) : 0,
                         frame.at<float>(places.in) + images_in[static_cast<std::size_t>(image)] + plane / multiplier * channel_step,
                         weights.as<float>() + plane * taps, bound.bias != nullptr ? bound.bias[plane] : 0.0f, to);
                }
            });
        },
        2 * sums * taps, 4 * (sums + images * channels * static_cast<double>(g.space[1].in * g.space[2].in)));
}

bool fits_columns(const Geometry& g) {
    const Spatial &y = g.space[1], &x = g.space[2];
    return y.taps == 3 && x.taps == 3 && y.dilation == 1 && x.dilation == 1 && y.stride == x.stride;
}

std::vector<Column> columns_of(const Spatial& x, int lanes) {
    std::vector<Column> made;
    for (std::int64_t first = 0; first < x.out; first += lanes) {
        Column column{static_cast<std::ptrdiff_t>(first * x.stride - x.pad), static_cast<int>(first), static_cast<int>(std::min<std::int64_t>(lanes, x.out - first)), {}};
        for (int j = 0; j < 3; ++j)
            for (int i = 0; i < column.size; ++i)
                if (const std::int64_t at = column.from + j + i * x.stride; at >= 0 && at < x.in) column.masks[j] |= 1u << (i * x.stride);
        made.push_back(column);
    }
    return made;
}

}  // namespace

// A depthwise convolution: planes on their own, where they lie or a few padded lines at a time that stay in the nearest cache.
void add_depthwise(Planner& planner, const Geometry& g, int channels, int multiplier, std::ptrdiff_t image_out, const Tensor& weights, Places places) {
    const int stride = static_cast<int>(g.space[2].stride), lanes = planner.kernels().lanes, parts = by_position(g, planner.threads()) ? planner.threads() : 1;
    // A hostile kernel may have as many taps as its plane has positions, and each strip its own mask for each.
    constexpr std::int64_t most_masks = 1 << 24;
    const auto add = [&](auto work) { add_planes(planner, g, channels, multiplier, image_out, weights, places, work); };
    if (planner.kernels().product.depthwise_strips != nullptr && stride <= 2 && fits_columns(g)) {
        const Spatial y = g.space[1];
        const PlaneLines all{static_cast<int>(y.in), static_cast<int>(g.space[2].in), static_cast<int>(g.space[2].out), static_cast<int>(y.pad), 0, 0};
        return add([=, columns = columns_of(g.space[2], lanes)](const ProductKernels& kernels, std::size_t part, const float* plane, const float* taps,
                                                                float bias, const Finisher& to) {
            PlaneLines own = all;
            own.first = static_cast<int>(y.out * static_cast<std::int64_t>(part) / parts);
            own.last = static_cast<int>(y.out * static_cast<std::int64_t>(part + 1) / parts);
            kernels.depthwise_columns(plane, stride, columns.data(), static_cast<int>(columns.size()), own, taps, bias, to);
        });
    }
    if (planner.kernels().product.depthwise_strips != nullptr && stride <= 2 && g.taps() * (g.positions() / lanes + g.space[1].out) <= most_masks) {
        const auto strips = std::make_shared<const Strips>(strips_of(g, lanes, parts));
        return add([=](const ProductKernels& kernels, std::size_t part, const float* plane, const float* taps, float bias, const Finisher& to) {
            const std::vector<Strip>& own = strips->parts[part];
            kernels.depthwise_strips(plane, stride, own.data(), static_cast<int>(own.size()), strips->masks.data(), strips->shifts.data(), taps,
                                     static_cast<int>(strips->shifts.size()), bias, to);
        });
    }
    const std::int64_t height = g.space[1].out, width = g.space[2].out;
    const int taps = static_cast<int>(g.taps());
    struct Chunk {
        Window window;
        std::vector<std::int32_t> offsets;
        std::vector<Segment> segments;  // lines of the output, as they lie among the sums
        std::int64_t first;
        int calls, size;                // lines are summed one by one, or all at once with what lies between them
        std::ptrdiff_t row;
    };
    constexpr std::int64_t nearest = 4096;  // floats
    const std::int64_t row_cost = (g.space[2].in + 2 * g.space[2].pad) * g.space[1].stride;
    const std::int64_t rows = std::clamp<std::int64_t>(nearest / std::max<std::int64_t>(row_cost, 1), 1, height);
    const int threads = planner.threads(), images = static_cast<int>(g.in.size());
    const bool by_line = by_position(g, threads);
    std::int64_t count_of_chunks = (height + rows - 1) / rows;
    if (by_line) count_of_chunks = (count_of_chunks + threads - 1) / threads * threads;
    auto chunks = std::make_shared<std::vector<Chunk>>();
    std::size_t window_room = 0, sums_room = 0;
    Geometry plane = g;
    plane.in = {0};
    plane.out = {0};
    for (std::int64_t i = 0; i < count_of_chunks; ++i) {
        Chunk chunk;
        const std::int64_t first = height * i / count_of_chunks, count = height * (i + 1) / count_of_chunks - first;
        if (count == 0) continue;
        chunk.first = first;
        chunk.window = window_of(plane, {{0, first * width, static_cast<int>(count * width)}}, true);
        chunk.offsets.assign(chunk.window.shifts.begin(), chunk.window.shifts.end());
        chunk.row = count > 1 ? chunk.window.lines[1].from - chunk.window.lines[0].from : width;
        const std::int64_t all = (count - 1) * chunk.row + width;
        const bool together = (all + lanes - 1) / lanes <= count * ((width + lanes - 1) / lanes);
        chunk.calls = together ? 1 : static_cast<int>(count);
        chunk.size = static_cast<int>(together ? all : width);
        for (std::int64_t y = 0; y < (together ? count : 1); ++y)
            chunk.segments.push_back({static_cast<std::ptrdiff_t>(y * width), static_cast<int>(y * chunk.row), static_cast<int>(width)});
        // A register may be read behind the window's end, and written behind the sums'.
        window_room = std::max(window_room, (chunk.window.size / lanes + 2) * lanes);
        sums_room = std::max(sums_room, static_cast<std::size_t>(chunk.size / lanes + 2) * lanes);
        chunks->push_back(std::move(chunk));
    }
    const std::size_t scratch = window_room + sums_room;
    places.scratch = planner.scratch(Type::f32, {planner.threads(), static_cast<std::int64_t>(scratch)});
    const Finisher finisher = finisher_of(planner.node().finish);
    const int planes = channels * multiplier;
    const std::vector<std::ptrdiff_t> in_offsets = g.in;
    const std::ptrdiff_t channel_step = g.channel_step, positions = static_cast<std::ptrdiff_t>(g.positions());
    const double work = static_cast<double>(positions) * planes * images;
    planner.step(
        planner.node().op + " depthwise", places.touched(),
        [=](Frame& frame) {
            const Finisher bound = places.bound(frame, finisher);
            const float* in = frame.at<float>(places.in);
            const float* values = weights.as<float>();
            float* room = frame.at<float>(*places.scratch);
            const std::int64_t all = static_cast<std::int64_t>(planes) * images, pieces = static_cast<std::int64_t>(chunks->size());
            const int parts = static_cast<int>(std::min<std::int64_t>(frame.pool.threads(), by_line ? pieces : all));
            frame.pool.run(parts, [&](int part) {
                float* window = room + part * static_cast<std::ptrdiff_t>(scratch);
                const std::int64_t first = by_line ? 0 : all * part / parts, last = by_line ? all : all * (part + 1) / parts;
                const auto begin_chunk = chunks->begin() + (by_line ? pieces * part / parts : 0);
                const auto end_chunk = chunks->begin() + (by_line ? pieces * (part + 1) / parts : pieces);
                for (int at = static_cast<int>(first); at < last; ++at) {
                    const int image = at / planes, plane_at = at % planes;
                    const float* from = in + in_offsets[image] + plane_at / multiplier * channel_step;
                    const std::ptrdiff_t to = image * image_out + plane_at * positions;
                    for (auto each = begin_chunk; each != end_chunk; ++each) {
                        const Chunk& chunk = *each;
                        frame.kernels.product.pack(chunk.window.stretches.data(), static_cast<int>(chunk.window.stretches.size()), from, window);
                        Finisher lines = bound;
                        lines.segments = chunk.segments.data();
                        lines.count = static_cast<int>(chunk.segments.size());
                        for (int y = 0; y < chunk.calls; ++y) {
                            const std::ptrdiff_t begin = to + (chunk.first + y) * width;
                            lines.out = bound.out + begin;
                            if (bound.residual != nullptr) lines.residual = bound.residual + begin;
                            frame.kernels.product.depthwise(window + y * chunk.row, chunk.offsets.data(),
                                                            values + static_cast<std::ptrdiff_t>(plane_at) * taps, taps, chunk.size,
                                                            bound.bias != nullptr ? bound.bias[plane_at] : 0.0f, window + window_room, lines);
                        }
                    }
                }
            });
        },
        2 * work * taps, 4 * (work + static_cast<double>(images) * channels * static_cast<double>(g.space[1].in * g.space[2].in)));
}

}  // namespace featherweight
