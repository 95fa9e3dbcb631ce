// SPDX-License-Identifier: Apache-2.0
#include "../product.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "../ops.hpp"

namespace featherweight {

namespace {

constexpr float infinite = std::numeric_limits<float>::infinity();

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// A finisher without pointers, as the node says.
Finisher finisher_of(const Finish& finish) {
    Finisher made{nullptr, finish.activation, finish.low, finish.high, nullptr, finish.residual_first, nullptr, 0, nullptr, 0};
    if (finish.activation == Activation::none) made.low = -infinite, made.high = infinite;
    if (finish.activation == Activation::relu) made.low = 0, made.high = infinite;
    return made;
}

void require_floats(const Planner& planner) {
    for (int i = 0; i < planner.inputs(); ++i)
        if (planner.has(i) && planner.in(i).type != Type::f32)
            throw Unsupported(std::string("products are of floats, not of ") + name_of(planner.in(i).type));
}

// The residual as the output lies, or nothing.
std::optional<Fact> residual_of(Planner& planner, const Dims& dims, const std::vector<int>& order) {
    const int value = planner.node().finish.residual;
    if (value < 0) return std::nullopt;
    const Fact fact = planner.fact(value);
    if (fact.type != Type::f32) throw Unsupported("its residual is not of floats");
    return planner.dense(broadcast_to(fact, dims), order);
}

// What a step of a product needs at run time.
struct Places {
    Fact in, out, scratch;
    std::optional<Fact> bias, residual;

    std::vector<Fact> touched() const {
        std::vector<Fact> all{in, out, scratch};
        if (bias) all.push_back(*bias);
        if (residual) all.push_back(*residual);
        return all;
    }
    Finisher bound(const Frame& frame, Finisher finisher) const {
        if (bias) finisher.bias = frame.at<float>(*bias);
        if (residual) finisher.residual = frame.at<float>(*residual);
        finisher.out = frame.at<float>(out);
        return finisher;
    }
};

std::string text_of(const Geometry& g) {
    std::string text = std::to_string(g.rows) + "x" + std::to_string(g.channels) + "x" + std::to_string(g.in.size());
    for (const Spatial& axis : g.space)
        for (std::int64_t number : {axis.in, axis.out, axis.taps, axis.stride, axis.dilation, axis.pad}) text += "," + std::to_string(number);
    return text + ";" + std::to_string(g.channel_step);
}

std::string text_of(const Choice& choice) {
    if (choice.vector) return choice.sparse ? "sparse vector" : "dense vector";
    return (choice.sparse ? "sparse" : "dense") + std::string(" ") + std::to_string(choice.width) + "x" + std::to_string(choice.block) +
           (choice.packed ? "" : " in place");
}

// The index of what takes least time. All are run in turn, a few rounds, so that whatever else the machine does meanwhile
// strikes all of them; those that will not win any more are left out. Earlier ones win where the difference is noise.
template <class Run>
std::size_t fastest(std::size_t count, const Run& run) {
    constexpr int most_rounds = 5;
    constexpr double patience = 0.04, hopeless = 1.4, noise = 0.98;  // seconds; of the least time
    std::vector<double> shortest(count, infinite);
    double least = infinite, spent = 0;
    for (int round = 0; round < most_rounds && (round < 2 || spent < patience); ++round)
        for (std::size_t i = 0; i < count; ++i) {
            if (shortest[i] < infinite && shortest[i] > hopeless * least) continue;
            const double begin = now();
            run(i);
            const double took = now() - begin;
            spent += took;
            shortest[i] = std::min(shortest[i], took);
            least = std::min(least, took);
        }
    std::size_t best = 0;
    for (std::size_t i = 1; i < count; ++i)
        if (shortest[i] < noise * shortest[best]) best = i;
    return best;
}

// The candidate that is fastest on this machine, measured on the layer itself with numbers of no meaning. Layers that are
// alike share one measurement.
Choice choose(Planner& planner, const Geometry& g, const float* weights) {
    const double share = density(weights, static_cast<std::int64_t>(g.rows) * g.depth());
    const Kernels& kernels = planner.kernels();
    const std::vector<Choice> all = candidates(g, share, kernels.lanes);
    if (all.size() == 1) return all.front();
    const std::string key = std::string(kernels.name) + "/" + std::to_string(planner.threads()) + "/" + text_of(g) + "/" +
                            std::to_string(std::lround(share * 40));
    const std::string decision = planner.store().decision(key);
    for (const Choice& choice : all)
        if (text_of(choice) == decision) return choice;

    std::ptrdiff_t in_end = 0, out_end = 0;
    for (std::ptrdiff_t offset : g.in) in_end = std::max(in_end, offset);
    for (std::ptrdiff_t offset : g.out) out_end = std::max(out_end, offset);
    in_end += g.channels * g.channel_step + g.space[0].in * g.space[1].in * g.space[2].in;
    out_end += g.rows * g.row_step + static_cast<std::ptrdiff_t>(g.positions());
    Memory in(static_cast<std::size_t>(in_end) * 4), out(static_cast<std::size_t>(out_end) * 4);
    auto* source = reinterpret_cast<float*>(in.data());
    for (std::ptrdiff_t i = 0; i < in_end; ++i) source[i] = static_cast<float>(i % 7) - 3.0f;
    Finisher finisher = finisher_of({});
    finisher.out = reinterpret_cast<float*>(out.data());
    finisher.stride = g.row_step;
    std::vector<Matrix> matrices;
    std::vector<Tiling> tilings;
    std::size_t scratch = 0;
    for (const Choice& choice : all) {
        matrices.push_back(packed_matrix(weights, g, choice, kernels));
        tilings.push_back(tiling(g, matrices.back(), choice, kernels.lanes, planner.threads()));
        scratch = std::max(scratch, tilings.back().scratch);
    }
    Memory room(scratch * static_cast<std::size_t>(planner.threads()) * 4);
    const Choice best = all[fastest(all.size(), [&](std::size_t i) {
        multiply_all(g, matrices[i], all[i], tilings[i], source, finisher, reinterpret_cast<float*>(room.data()), kernels, planner.pool());
    })];
    planner.store().decide(key, text_of(best));
    return best;
}

// A product with constant weights [rows][depth], as one step. `groups` of it lie side by side: inputs, rows and outputs.
void add_product(Planner& planner, const Geometry& g, int groups, std::ptrdiff_t group_in, std::ptrdiff_t group_out, const Tensor& weights,
                 Places places) {
    const float* values = weights.as<float>();
    const std::int64_t each = static_cast<std::int64_t>(g.rows) * g.depth();
    const double share = density(values, each * groups);
    const Choice choice = choose(planner, g, values);
    std::vector<Matrix> matrices;
    const std::string tag = std::to_string(choice.sparse) + "/" + std::to_string(choice.vector) + "/" + std::to_string(choice.block) + "/" +
                            std::to_string(choice.width * !choice.sparse);
    for (int group = 0; group < groups; ++group)
        matrices.push_back(*planner.prepared<Matrix>(tag + "/" + std::to_string(group),
                                                     [&] { return packed_matrix(values + group * each, g, choice, planner.kernels()); }));
    std::vector<Tiling> tilings;  // rows are cut by each group's own zeros
    for (const Matrix& matrix : matrices) tilings.push_back(tiling(g, matrix, choice, planner.kernels().lanes, planner.threads()));
    std::size_t scratch = 0;
    std::vector<int> before{0};  // tasks of the groups before
    for (const Tiling& tiles : tilings) {
        scratch = std::max(scratch, tiles.scratch);
        before.push_back(before.back() + tiles.tasks());
    }
    places.scratch = planner.scratch(Type::f32, {planner.threads(), static_cast<std::int64_t>(scratch)});
    Finisher finisher = finisher_of(planner.node().finish);
    finisher.stride = g.row_step;

    const double positions = static_cast<double>(g.positions()) * static_cast<double>(g.in.size());
    const double flops = 2 * share * static_cast<double>(each) * groups * positions;
    const double bytes = 4 * (positions * g.rows * groups * (places.residual ? 2 : 1) +
                              static_cast<double>(g.channels) * groups * static_cast<double>(g.in.size() * g.space[0].in * g.space[1].in * g.space[2].in)) +
                         (choice.sparse ? 6 * share : 4) * static_cast<double>(each) * groups;
    planner.step(
        planner.node().op + " " + text_of(choice) + ", " + std::to_string(std::lround((1 - share) * 100)) + " % zeros", places.touched(),
        [=](Frame& frame) {
            const Finisher bound = places.bound(frame, finisher);
            const float* in = frame.at<float>(places.in);
            float* room = frame.at<float>(places.scratch);
            std::atomic<int> next{0};
            const int tasks = before.back();
            frame.pool.run(std::min(frame.pool.threads(), tasks), [&](int part) {
                for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
                    const int group = static_cast<int>(std::upper_bound(before.begin(), before.end(), task) - before.begin()) - 1;
                    Finisher to = bound;
                    if (to.bias != nullptr) to.bias += group * g.rows;
                    if (to.residual != nullptr) to.residual += group * group_out;
                    to.out += group * group_out;
                    multiply(g, matrices[group], choice, tilings[group], task - before[group], in + group * group_in, to,
                             room + part * scratch, frame.kernels);
                }
            });
        },
        flops, bytes);
}

// Pads and output sizes of a convolution's axes, by attribute.
// Rows, columns, tiles and tasks are counted by int.
void require_countable(const Tensor& weights, const Fact& out) {
    if (std::max(weights.size(), out.size()) > std::numeric_limits<int>::max()) throw Unsupported("it has more than 2^31 weights or results");
}

std::vector<Spatial> spatial_axes(const Node& node, const Dims& in, const Dims& kernel) {
    const std::size_t rank = in.size();
    const auto strides = node.integers("strides", Dims(rank, 1)), dilations = node.integers("dilations", Dims(rank, 1));
    auto pads = node.integers("pads", Dims(2 * rank, 0));
    const std::string automatic = node.text("auto_pad", "NOTSET");
    if (strides.size() != rank || dilations.size() != rank || pads.size() != 2 * rank)
        throw Error("strides, dilations and pads must be of " + std::to_string(rank) + " axes");
    std::vector<Spatial> axes;
    for (std::size_t i = 0; i < rank; ++i) {
        if (strides[i] < 1 || dilations[i] < 1 || kernel[i] < 1) throw Error("strides, dilations and kernel sizes must be positive");
        constexpr std::int64_t most = 1 << 24;  // beyond which products of these would not fit
        for (std::int64_t each : {strides[i], dilations[i], kernel[i], in[i], pads[i], pads[rank + i]})
            if (each > most || each < -most) throw Unsupported("its strides, dilations, pads, kernel or input is huge");
        const std::int64_t reach = (kernel[i] - 1) * dilations[i] + 1;
        if (automatic == "SAME_UPPER" || automatic == "SAME_LOWER") {
            const std::int64_t out = (in[i] + strides[i] - 1) / strides[i];
            const std::int64_t all = std::max<std::int64_t>((out - 1) * strides[i] + reach - in[i], 0);
            pads[i] = automatic == "SAME_UPPER" ? all / 2 : all - all / 2;
            pads[rank + i] = all - pads[i];
        } else if (automatic == "VALID") {
            pads[i] = pads[rank + i] = 0;
        } else if (automatic != "NOTSET") {
            throw Error("auto_pad is '" + automatic + "'");
        }
        const std::int64_t padded = in[i] + pads[i] + pads[rank + i];
        if (padded < reach) throw Error("the kernel is larger than its padded input");
        axes.push_back({in[i], (padded - reach) / strides[i] + 1, kernel[i], strides[i], dilations[i], pads[i]});
    }
    return axes;
}

// A depthwise convolution: planes on their own, a few lines at a time so that they stay in the nearest cache.
void add_depthwise(Planner& planner, const Geometry& g, int channels, int multiplier, std::ptrdiff_t image_out, const Tensor& weights, Places places) {
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
    auto chunks = std::make_shared<std::vector<Chunk>>();
    std::size_t window_room = 0, sums_room = 0;
    Geometry plane = g;
    plane.in = {0};
    plane.out = {0};
    const int lanes = planner.kernels().lanes;
    for (std::int64_t first = 0; first < height; first += rows) {
        Chunk chunk;
        const std::int64_t count = std::min(rows, height - first);
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
    const int planes = channels * multiplier, images = static_cast<int>(g.in.size());
    const std::vector<std::ptrdiff_t> in_offsets = g.in;
    const std::ptrdiff_t channel_step = g.channel_step, positions = static_cast<std::ptrdiff_t>(g.positions());
    const double work = static_cast<double>(positions) * planes * images;
    planner.step(
        planner.node().op + " depthwise", places.touched(),
        [=](Frame& frame) {
            const Finisher bound = places.bound(frame, finisher);
            const float* in = frame.at<float>(places.in);
            const float* values = weights.as<float>();
            float* room = frame.at<float>(places.scratch);
            const int all = planes * images;
            const int parts = std::min(frame.pool.threads(), all);
            frame.pool.run(parts, [&](int part) {
                float* window = room + part * static_cast<std::ptrdiff_t>(scratch);
                for (int at = static_cast<int>(static_cast<std::int64_t>(all) * part / parts); at < static_cast<std::int64_t>(all) * (part + 1) / parts; ++at) {
                    const int image = at / planes, plane_at = at % planes;
                    const float* from = in + in_offsets[image] + plane_at / multiplier * channel_step;
                    const std::ptrdiff_t to = image * image_out + plane_at * positions;
                    for (const Chunk& chunk : *chunks) {
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

void conv(Planner& planner) {
    require_floats(planner);
    const Node& node = planner.node();
    const Fact& given = planner.in(0);
    const Tensor weights = planner.constant(1);
    const std::int64_t groups = node.integer("group", 1);
    const int rank = given.rank() - 2;
    if (rank < 1 || rank > 3) throw Unsupported("convolutions are of 1 to 3 axes, not of " + std::to_string(rank));
    if (weights.dims.size() != given.dims.size()) throw Error("its weights have another number of axes than its input");
    const std::int64_t images = given.dims[0], channels = given.dims[1], rows = weights.dims[0];
    if (groups < 1 || channels != weights.dims[1] * groups || rows % groups != 0)
        throw Error("weights of " + describe(weights.dims) + " in " + std::to_string(groups) + " groups do not fit an input of " + describe(given.dims));
    const Dims kernel(weights.dims.begin() + 2, weights.dims.end());
    if (node.has("kernel_shape") && node.integers("kernel_shape") != kernel) throw Error("kernel_shape differs from its weights' shape");
    const std::vector<Spatial> axes = spatial_axes(node, Dims(given.dims.begin() + 2, given.dims.end()), kernel);

    Places places;
    places.in = given;
    std::int64_t line = 1;
    bool dense = true;  // within a channel
    for (int i = given.rank() - 1; i >= 2; --i) {
        dense = dense && (given.dims[i] == 1 || given.strides[i] == line);
        line *= given.dims[i];
    }
    if (!dense) places.in = planner.dense(given);
    Dims dims{images, rows};
    for (const Spatial& axis : axes) dims.push_back(axis.out);
    if (planner.has(2)) places.bias = planner.dense(planner.in(2));
    if (places.bias && places.bias->size() != rows) throw Error("its bias is of " + describe(places.bias->dims) + ", and it has " + std::to_string(rows) + " rows");
    places.residual = residual_of(planner, dims, {});
    places.out = planner.make(0, Type::f32, dims);
    if (places.out.size() == 0) return;
    require_countable(weights, places.out);
    if (count(kernel) > 1 << 16) throw Unsupported("its kernel has more than 2^16 taps");

    Geometry g;
    g.rows = static_cast<int>(rows / groups);
    g.channels = static_cast<int>(channels / groups);
    // Axes of one element go first, so that lines run along one that has more: 1-d convolutions are often written as 2-d ones.
    std::vector<Spatial> lines;
    for (const Spatial& axis : axes)
        if (!(axis.in == 1 && axis.out == 1 && axis.taps == 1 && axis.pad == 0)) lines.push_back(axis);
    std::copy(lines.begin(), lines.end(), std::end(g.space) - static_cast<std::ptrdiff_t>(lines.size()));
    g.channel_step = places.in.strides[1];
    g.row_step = static_cast<std::ptrdiff_t>(g.positions());
    for (std::int64_t image = 0; image < images; ++image) {
        g.in.push_back(image * places.in.strides[0]);
        g.out.push_back(image * rows * g.row_step);
    }
    if (g.channels == 1 && groups > 1 && rank <= 2)
        return add_depthwise(planner, g, static_cast<int>(channels), g.rows, rows * g.row_step, weights, places);
    // A line of positions need not know how long it is: whole images of one tap are one line.
    if (g.is_pointwise()) g.space[2].in = g.space[2].out = g.positions(), g.space[0] = g.space[1] = Spatial{};
    add_product(planner, g, static_cast<int>(groups), g.channels * g.channel_step, g.rows * g.row_step, weights, places);
}

// Weights [rows][depth] times x along `axis`, which the output has `rows` long. Whatever other axes x has are positions;
// those that are innermost in memory stay so, behind the rows.
void linear(Planner& planner, const Tensor& weights, const Fact& x, int axis, const std::optional<Fact>& bias, const std::optional<Fact>& added) {
    const std::int64_t rows = weights.dims[0], depth = weights.dims[1];
    const int rank = x.rank();
    Dims dims = x.dims;
    dims[axis] = rows;

    const auto others_of = [&](const Fact& fact) {  // outermost first
        std::vector<int> others;
        for (int each : storage_order(fact))
            if (each != axis && fact.dims[each] != 1) others.push_back(each);
        return others;
    };
    std::vector<int> others = others_of(x);
    Places places;
    places.in = x;
    // How many of the innermost axes make one line of positions.
    const auto run_of = [&](const Fact& fact, const std::vector<int>& axes) {
        std::size_t run = 0;
        std::int64_t stride = 1;
        while (run < axes.size() && fact.strides[axes[axes.size() - 1 - run]] == stride) {
            stride *= fact.dims[axes[axes.size() - 1 - run]];
            ++run;
        }
        return run;
    };
    std::size_t run = run_of(x, others);
    std::int64_t line = 1;
    for (std::size_t i = 0; i < run; ++i) line *= x.dims[others[others.size() - 1 - i]];
    const std::int64_t all = x.size() / std::max<std::int64_t>(depth, 1);
    if (depth > 0 && all > 0 && (run == 0 || (line < 16 && line < all)) && !others.empty()) {
        // Positions are brought side by side: behind k, all of them where lines would be short.
        std::vector<int> order;
        for (int i = 0; i < rank; ++i)
            if (i != axis && x.dims[i] == 1) order.push_back(i);
        const bool whole = line < 16 && x.dims[others.back()] < 16;
        if (!whole) order.insert(order.end(), others.begin(), others.end() - 1);
        order.push_back(axis);
        if (whole) order.insert(order.end(), others.begin(), others.end());
        else order.push_back(others.back());
        places.in = planner.dense(x, order);
        others = others_of(places.in);
        run = run_of(places.in, others);
        line = 1;
        for (std::size_t i = 0; i < run; ++i) line *= x.dims[others[others.size() - 1 - i]];
    } else if (others.empty()) {
        places.in = planner.dense(x);
    }
    std::vector<int> order;  // of the output: what is outside, rows, positions
    for (int i = 0; i < rank; ++i)
        if (i != axis && x.dims[i] == 1) order.push_back(i);
    order.insert(order.end(), others.begin(), others.end() - static_cast<std::ptrdiff_t>(run));
    order.push_back(axis);
    order.insert(order.end(), others.end() - static_cast<std::ptrdiff_t>(run), others.end());

    places.bias = bias;
    std::optional<Fact> extra = residual_of(planner, dims, order);
    if (added) {
        if (extra) throw Unsupported("it adds two tensors to its product");
        extra = planner.dense(broadcast_to(*added, dims), order);
    }
    places.residual = extra;
    places.out = planner.make(0, Type::f32, dims, order);
    if (places.out.size() == 0) return;
    require_countable(weights, places.out);

    Geometry g;
    g.rows = static_cast<int>(rows);
    g.channels = static_cast<int>(depth);
    g.space[2].in = g.space[2].out = line;
    g.channel_step = places.in.strides[axis];
    g.row_step = places.out.strides[axis];
    g.in = {0};
    g.out = {0};
    for (std::size_t i = 0; i + run < others.size(); ++i) {
        std::vector<std::ptrdiff_t> in, out;
        for (std::size_t j = 0; j < g.in.size(); ++j)
            for (std::int64_t at = 0; at < x.dims[others[i]]; ++at) {
                in.push_back(g.in[j] + at * places.in.strides[others[i]]);
                out.push_back(g.out[j] + at * places.out.strides[others[i]]);
            }
        g.in = std::move(in);
        g.out = std::move(out);
    }
    add_product(planner, g, 1, 0, 0, weights, places);
}

// Both operands change: the rows of one are packed when it runs. `v` has the positions, innermost in memory, `a` the rows.
struct Batched {
    Fact a, v, out;
    int a_rows, a_k, v_k, v_positions, out_rows, out_positions;  // axes
};

void add_batched(Planner& planner, const Batched& b, double scale_flops) {
    const std::int64_t rows = b.a.dims[b.a_rows], depth = b.a.dims[b.a_k], positions = b.v.dims[b.v_positions];
    struct Image {
        std::ptrdiff_t a, v, out;
    };
    auto images = std::make_shared<std::vector<Image>>(std::vector<Image>{{0, 0, 0}});
    for (int axis = 0; axis < b.out.rank() - 2; ++axis) {
        std::vector<Image> next;
        for (const Image& image : *images)
            for (std::int64_t i = 0; i < b.out.dims[axis]; ++i)
                next.push_back({image.a + i * b.a.strides[axis], image.v + i * b.v.strides[axis], image.out + i * b.out.strides[axis]});
        *images = std::move(next);
    }
    Geometry g;
    g.rows = static_cast<int>(rows);
    g.channels = static_cast<int>(depth);
    g.space[2].in = g.space[2].out = positions;
    g.channel_step = b.v.strides[b.v_k];
    g.row_step = b.out.strides[b.out_rows];
    g.in = {0};
    g.out = {0};
    const int lanes = planner.kernels().lanes;
    const std::int64_t vectors = (positions + lanes - 1) / lanes;
    const Choice choice{false, static_cast<int>(std::clamp<std::int64_t>(vectors, 1, vectors % 3 == 0 ? 3 : 4)), 256, positions % lanes != 0};
    const int group = planner.kernels().product.dense_rows(choice.width);
    // Columns are the same for every image; the values are packed in the thread's own room.
    Matrix pattern;
    auto dense = std::make_shared<DenseMatrix>();
    *dense = dense_matrix(std::vector<float>(static_cast<std::size_t>(rows * depth)).data(), g.rows, g.channels, 1, choice.block, group);
    const std::int64_t packed = static_cast<std::int64_t>(dense->values.size());
    dense->values.clear();
    pattern.dense = dense;
    const Tiling tiles = tiling(g, pattern, choice, lanes, 1);
    const int threads = planner.threads();
    // Few images: their tiles are shared out, and each thread packs the rows for itself.
    const int parts = static_cast<int>(images->size()) >= threads ? 1 : std::min<int>(static_cast<int>(tiles.tiles.size()), threads);
    const std::int64_t room = packed + 16 + static_cast<std::int64_t>(tiles.scratch);
    Places places{b.v, b.out, planner.scratch(Type::f32, {threads, room}), b.a, residual_of(planner, b.out.dims, storage_order(b.out))};
    Finisher finisher = finisher_of(planner.node().finish);
    finisher.stride = g.row_step;
    const double flops = scale_flops * static_cast<double>(rows * depth * positions) * static_cast<double>(images->size());
    const double bytes = 4.0 * static_cast<double>(images->size()) * static_cast<double>(rows * depth + depth * positions + rows * positions);
    planner.step(
        planner.node().op + " of two that change", places.touched(),
        [=](Frame& frame) {
            Places own = places;
            own.bias.reset();
            const Finisher bound = own.bound(frame, finisher);
            const float *a = frame.at<float>(b.a), *v = frame.at<float>(b.v);
            float* scratch = frame.at<float>(places.scratch);
            std::atomic<int> next{0};
            const int tasks = static_cast<int>(images->size()) * parts;
            const std::int64_t row = b.a.strides[b.a_rows], step = b.a.strides[b.a_k];
            frame.pool.run(std::min(frame.pool.threads(), tasks), [&](int part) {
                float* values = scratch + part * room;
                float* rest = values + packed + 16 - packed % 16;
                for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
                    const Image& image = (*images)[task / parts];
                    frame.kernels.product.pack_rows(a + image.a, row, step, g.rows, g.channels, group, values);
                    Finisher to = bound;
                    to.out += image.out;
                    if (to.residual != nullptr) to.residual += image.out;
                    const int count = static_cast<int>(tiles.tiles.size()), share = task % parts;
                    for (int tile = count * share / parts; tile < count * (share + 1) / parts; ++tile)
                        multiply(g, pattern, choice, tiles, tile, v + image.v, to, rest, frame.kernels, values);
                }
            });
        },
        flops, bytes);
}

Fact with_axes(const Fact& fact, const Dims& batch) {  // leading axes broadcast to `batch`
    Dims dims = batch;
    dims.insert(dims.end(), fact.dims.end() - 2, fact.dims.end());
    return broadcast_to(fact, dims);
}

Tensor transposed_matrix(const Tensor& matrix) {
    const std::int64_t rows = matrix.dims[0], columns = matrix.dims[1];
    Tensor made(Type::f32, {columns, rows});
    const float* from = matrix.as<float>();
    float* to = made.as<float>();
    constexpr std::int64_t side = 32;
    for (std::int64_t r = 0; r < rows; r += side)
        for (std::int64_t c = 0; c < columns; c += side)
            for (std::int64_t i = r; i < std::min(r + side, rows); ++i)
                for (std::int64_t j = c; j < std::min(c + side, columns); ++j) to[j * rows + i] = from[i * columns + j];
    return made;
}

// MatMul's optional third input is a bias over the last axis, put there by `fused`.
void matmul(Planner& planner) {
    require_floats(planner);
    Fact a = planner.in(0), b = planner.in(1);
    if (a.rank() == 0 || b.rank() == 0) throw Error("a product needs axes");
    if (a.rank() == 1 || b.rank() == 1) throw Unsupported("one of its inputs has one axis");
    const std::int64_t depth = a.dims.back();
    if (depth != b.dims[b.rank() - 2]) throw Error("shapes " + describe(a.dims) + " and " + describe(b.dims) + " cannot be multiplied");
    std::optional<Fact> bias;
    if (planner.has(2)) bias = planner.dense(planner.in(2));
    if (b.constant && b.rank() == 2 && !a.constant) {
        const auto weights = planner.prepared<Tensor>("transposed", [&] { return transposed_matrix(planner.constant(1)); });
        return linear(planner, *weights, a, a.rank() - 1, bias, std::nullopt);
    }
    if (a.constant && a.rank() == 2 && !b.constant && !bias) return linear(planner, planner.constant(0), b, b.rank() - 2, std::nullopt, std::nullopt);
    const Dims batch = broadcast_dims(Dims(a.dims.begin(), a.dims.end() - 2), Dims(b.dims.begin(), b.dims.end() - 2));
    a = with_axes(a, batch);
    b = with_axes(b, batch);
    const int rank = static_cast<int>(batch.size()) + 2, m = rank - 2, n = rank - 1;
    Dims dims = batch;
    dims.push_back(a.dims[m]);
    dims.push_back(b.dims[n]);
    if (bias) throw Unsupported("a bias on a product of two that change");
    std::vector<int> order(rank);
    std::iota(order.begin(), order.end(), 0);
    // Positions are the tokens of the left operand where they are innermost; then they stay so.
    const bool left = a.strides[m] == 1 && a.dims[m] > 1 && !(a.dims[n] == 1);
    if (left) std::swap(order[m], order[n]);
    if (!left && b.strides[n] != 1 && b.dims[n] != 1) b = planner.dense(b);
    const Fact out = planner.make(0, Type::f32, dims, order);
    if (out.size() == 0) return;
    if (left)
        add_batched(planner, {b, a, out, n, m, n, m, n, m}, 2);
    else
        add_batched(planner, {a, b, out, m, n, m, n, m, n}, 2);
}

void gemm(Planner& planner) {
    require_floats(planner);
    const Node& node = planner.node();
    const float alpha = node.real("alpha", 1), beta = node.real("beta", 1);
    Fact a = planner.in(0);
    const Fact& b = planner.in(1);
    if (a.rank() != 2 || b.rank() != 2) throw Error("Gemm is of matrices");
    if (node.integer("transA", 0) != 0) a = transposed(a, {1, 0});
    const bool turned = node.integer("transB", 0) != 0;
    const std::int64_t rows = b.dims[turned ? 0 : 1];
    if (a.dims[1] != b.dims[turned ? 1 : 0]) throw Error("shapes " + describe(a.dims) + " and " + describe(b.dims) + " cannot be multiplied");
    const auto weights = planner.prepared<Tensor>("weights", [&] {
        const Tensor given = planner.constant(1);
        Tensor made = turned ? given : transposed_matrix(given);
        if (alpha != 1) {
            Tensor scaled(Type::f32, made.dims);
            for (std::int64_t i = 0; i < made.size(); ++i) scaled.as<float>()[i] = alpha * made.as<float>()[i];
            made = scaled;
        }
        return made;
    });
    std::optional<Fact> bias, added;
    if (planner.has(2) && beta != 0) {
        Fact c = planner.in(2);
        if (beta != 1) throw Unsupported("beta is " + std::to_string(beta));
        const bool by_row = c.rank() == 0 || c.dims.back() == rows || c.dims.back() == 1;
        if (by_row && (c.rank() < 2 || c.dims[0] == 1)) {
            Fact line = c;
            if (c.rank() == 2) line = *reshaped(planner.dense(c), {c.dims[1]});
            bias = planner.dense(broadcast_to(line, {rows}));
        } else {
            if (node.finish.activation != Activation::none && !node.finish.residual_first) throw Unsupported("its matrix C is added after an activation");
            added = c;
        }
    }
    linear(planner, *weights, a, 1, bias, added);
}

}  // namespace

std::vector<Op> product_ops() { return {{"Conv", conv}, {"MatMul", matmul}, {"Gemm", gemm}}; }

}  // namespace featherweight
