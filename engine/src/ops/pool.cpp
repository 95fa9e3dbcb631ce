// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../ops.hpp"

namespace featherweight {

namespace {

Fact float_input(Planner& planner) {
    const Fact& fact = planner.in(0);
    if (fact.type != Type::f32) throw Unsupported(std::string("it computes in float, not ") + name_of(fact.type));
    return fact;
}

// ---- pooling

struct WindowAxis {
    std::int64_t size, outputs, taps, stride, dilation, begin, end;  // begin and end: padding

    // The taps of an output that fall on elements.
    std::vector<std::int64_t> reached(std::int64_t output) const {
        std::vector<std::int64_t> made;
        for (std::int64_t k = 0; k < taps; ++k) {
            const std::int64_t at = output * stride - begin + k * dilation;
            if (at >= 0 && at < size) made.push_back(at);
        }
        return made;
    }
    // Those that fall on elements or padding: with ceil_mode a window may reach beyond both.
    std::int64_t padded(std::int64_t output) const {
        std::int64_t made = 0;
        for (std::int64_t k = 0; k < taps; ++k) made += output * stride + k * dilation < size + begin + end;
        return made;
    }
};

std::vector<WindowAxis> window(const Node& node, const Fact& x) {
    const std::size_t rank = x.dims.size() - 2;
    const auto taps = node.integers("kernel_shape");
    const auto strides = node.integers("strides", std::vector<std::int64_t>(rank, 1));
    const auto dilations = node.integers("dilations", std::vector<std::int64_t>(rank, 1));
    const auto pads = node.integers("pads", std::vector<std::int64_t>(2 * rank, 0));
    const std::string automatic = node.text("auto_pad", "NOTSET");
    const bool up = node.integer("ceil_mode", 0) != 0;
    if (taps.size() != rank || strides.size() != rank || dilations.size() != rank || pads.size() != 2 * rank)
        throw Error("its window does not have " + std::to_string(rank) + " axes, as its input has");
    std::vector<WindowAxis> axes;
    for (std::size_t i = 0; i < rank; ++i) {
        WindowAxis axis{x.dims[i + 2], 0, taps[i], strides[i], dilations[i], pads[i], pads[i + rank]};
        constexpr std::int64_t most = 1 << 24;  // beyond which sums of these would not fit
        for (std::int64_t value : {axis.taps, axis.stride, axis.dilation})
            if (value < 1 || value > most) throw Error("its kernel_shape, strides and dilations must be positive and below 2^24");
        if (axis.begin < 0 || axis.end < 0 || axis.begin > most || axis.end > most) throw Unsupported("its pads are negative or huge");
        if (axis.taps * axis.dilation > most || axis.size > most) throw Unsupported("its window or its input is huge");
        const std::int64_t reach = (axis.taps - 1) * axis.dilation + 1;
        if (automatic == "SAME_UPPER" || automatic == "SAME_LOWER") {
            axis.outputs = (axis.size + axis.stride - 1) / axis.stride;
            const std::int64_t missing = std::max<std::int64_t>((axis.outputs - 1) * axis.stride + reach - axis.size, 0);
            axis.begin = automatic == "SAME_UPPER" ? missing / 2 : missing - missing / 2;
            axis.end = missing - axis.begin;
        } else {
            if (automatic == "VALID")
                axis.begin = axis.end = 0;
            else if (automatic != "NOTSET")
                throw Error("auto_pad '" + automatic + "' does not exist");
            // With ceil_mode a window may be longer than the padded input, by less than its stride.
            const std::int64_t room = axis.size + axis.begin + axis.end - reach + (up ? axis.stride - 1 : 0);
            if (room < 0) throw Error("its window of " + std::to_string(reach) + " is longer than the padded input");
            axis.outputs = room / axis.stride + 1;
            // A window that would start in the padding at the end is left out.
            if (up && (axis.outputs - 1) * axis.stride >= axis.size + axis.begin) --axis.outputs;
        }
        axes.push_back(axis);
    }
    return axes;
}

// For each line of outputs of a plane: the lines of input that its windows reach, and how many of them an average counts.
struct Reached {
    std::vector<std::int64_t> lines, start;  // of line i: [start[i], start[i + 1])
    std::vector<float> divisor;              // by line of outputs
    std::vector<float> counts;               // by output along a line
};

Reached reached_lines(const std::vector<WindowAxis>& axes, bool with_padding) {
    const auto counted = [&](const WindowAxis& axis, std::int64_t output) {
        return with_padding ? axis.padded(output) : static_cast<std::int64_t>(axis.reached(output).size());
    };
    const WindowAxis& last = axes.back();
    Reached made;
    made.start.push_back(0);
    std::int64_t lines = 1;
    for (std::size_t i = 0; i + 1 < axes.size(); ++i) lines *= axes[i].outputs;
    for (std::int64_t line = 0; line < lines; ++line) {
        std::vector<std::int64_t> offsets = {0};
        std::int64_t rest = line, divisor = 1, pitch = last.size;
        for (std::size_t i = axes.size() - 1; i-- > 0;) {
            const std::int64_t output = rest % axes[i].outputs;
            rest /= axes[i].outputs;
            std::vector<std::int64_t> more;
            for (std::int64_t at : axes[i].reached(output))
                for (std::int64_t offset : offsets) more.push_back(offset + at * pitch);
            offsets = more;
            pitch *= axes[i].size;
            divisor *= counted(axes[i], output);
        }
        std::sort(offsets.begin(), offsets.end());
        made.lines.insert(made.lines.end(), offsets.begin(), offsets.end());
        made.start.push_back(static_cast<std::int64_t>(made.lines.size()));
        made.divisor.push_back(static_cast<float>(divisor));
    }
    for (std::int64_t output = 0; output < last.outputs; ++output)
        made.counts.push_back(static_cast<float>(std::max<std::int64_t>(counted(last, output), 1)));
    return made;
}

int parts_of(std::int64_t lines, std::int64_t elements, std::int64_t least, int threads) {
    const std::int64_t most = std::min<std::int64_t>(threads, std::max<std::int64_t>(lines, 1));
    return static_cast<int>(std::clamp<std::int64_t>(elements / least, 1, most));
}

void pool(Planner& planner, bool average, bool with_padding) {
    if (planner.wants(1)) throw Unsupported("its second output, Indices");
    if (float_input(planner).rank() < 3) throw Unsupported("its input has no axes but batch and channels");
    const std::vector<WindowAxis> axes = window(planner.node(), planner.in(0));
    const WindowAxis last = axes.back();
    const Fact x = planner.dense(planner.in(0));
    Dims dims = {x.dims[0], x.dims[1]};
    for (const WindowAxis& axis : axes) dims.push_back(axis.outputs);
    const Fact y = planner.make(0, Type::f32, dims);
    const auto reached = std::make_shared<const Reached>(reached_lines(axes, with_padding));
    const auto number = [](std::int64_t value) { return static_cast<int>(value); };
    PoolLine shape{number(last.size), number(last.outputs), number(last.taps), number(last.stride), number(last.dilation),
                   number(last.begin), 0, nullptr};
    shape.phase = pool_phase(shape.outputs, shape.taps, shape.stride, shape.dilation);
    if (average) shape.counts = reached->counts.data();
    const int room = pool_floats(shape.phase, shape.stride);
    const std::int64_t lines = number(reached->divisor.size()), planes = dims[0] * dims[1], plane = planes == 0 ? 0 : x.size() / planes;
    const int parts = parts_of(planes * lines, y.size(), 1 << 13, planner.threads());
    const Fact scratch = planner.scratch(Type::f32, {parts, room});
    const float empty = average ? 0.0f : -std::numeric_limits<float>::infinity();
    double taps = 0;
    for (const WindowAxis& axis : axes) taps += static_cast<double>(axis.taps);
    planner.step(
        average ? "mean" : "largest", {x, y, scratch},
        [=](Frame& frame) {
            const float* from = frame.at<float>(x);
            float* to = frame.at<float>(y);
            frame.pool.run(parts, [&](int part) {
                float* own = frame.at<float>(scratch) + static_cast<std::int64_t>(part) * room;
                std::fill_n(own, room, empty);
                // Lines of all planes, so that pixels are shared out as they are by convolutions; planes where lines are few.
                const bool by_line = lines >= 8 * parts;
                const std::int64_t first = by_line ? lines * part / parts : 0, stop = by_line ? lines * (part + 1) / parts : lines;
                const std::int64_t top = by_line ? 0 : planes * part / parts, bottom = by_line ? planes : planes * (part + 1) / parts;
                for (std::int64_t i = 0; i < (bottom - top) * (stop - first); ++i) {
                    const std::int64_t each = top + i / (stop - first), line = first + i % (stop - first), start = reached->start[line];
                    const int there = static_cast<int>(reached->start[line + 1] - start);
                    float* out = to + (each * lines + line) * last.outputs;
                    const float* in = from + each * plane;
                    if (there == 0)
                        std::fill_n(out, last.outputs, empty);
                    else
                        frame.kernels.rows.pool(in, reached->lines.data() + start, there, reached->divisor[line], shape, own, out);
                }
            });
        },
        taps * static_cast<double>(y.size()), 4.0 * static_cast<double>(x.size() + y.size()));
}

void max_pool(Planner& planner) {
    if (planner.node().integer("storage_order", 0) != 0) throw Unsupported("its storage_order is by column");
    pool(planner, false, false);
}

void average_pool(Planner& planner) { pool(planner, true, planner.node().integer("count_include_pad", 0) != 0); }

// ---- resizing

// One axis from `from` to `to` elements: each is a weighted sum of `taps` of the old ones.
struct Sampled {
    int axis = 0, taps = 1;
    std::int64_t from = 0, to = 0;
    bool doubles = false;  // each element twice
    std::vector<std::int32_t> index;
    std::vector<float> weights;  // empty: copies of one element each
};

struct Sampling {
    std::string mode, coordinates, nearest;
    float cubic;
    bool inside;  // cubic weights of elements beyond the ends are left out, not given to the last element
};

// In float and in this order of operations, as ONNX Runtime has it: nearest neighbours at half an element depend on it.
float coordinate(const Sampling& how, std::int64_t at, float scale, std::int64_t from, std::int64_t to) {
    const float x = static_cast<float>(at), old = static_cast<float>(from), made = static_cast<float>(to);
    if (how.coordinates == "asymmetric") return x / scale;
    if (how.coordinates == "align_corners") return to == 1 ? 0.0f : x * (old - 1.0f) / (made - 1.0f);
    if (how.coordinates == "pytorch_half_pixel") return to > 1 ? (x + 0.5f) / scale - 0.5f : 0.0f;
    if (how.coordinates == "half_pixel") return (x + 0.5f) / scale - 0.5f;
    if (how.coordinates == "half_pixel_symmetric") {
        const float adjustment = made / (scale * old);
        return static_cast<float>(old / 2.0f * (1.0f - adjustment) + (x + 0.5) / scale - 0.5);
    }
    throw Unsupported("its coordinate_transformation_mode '" + how.coordinates + "'");
}

std::int64_t neighbour(const Sampling& how, float x) {
    const auto floor = [](float value) { return static_cast<std::int64_t>(std::floor(value)); };
    // What lies between two elements but for rounding is between them.
    const bool half = std::abs(x - std::floor(x) - 0.5f) <= 1e-6f * std::max(1.0f, std::abs(x));
    if (how.nearest == "floor") return floor(x);
    if (how.nearest == "ceil") return static_cast<std::int64_t>(std::ceil(x));
    if (how.nearest == "round_prefer_floor") return half ? floor(x) : static_cast<std::int64_t>(std::round(x));
    if (how.nearest == "round_prefer_ceil") return half ? floor(x) + 1 : static_cast<std::int64_t>(std::round(x));
    throw Unsupported("its nearest_mode '" + how.nearest + "'");
}

std::vector<float> cubic_weights(float t, float a) {
    const float u = 1.0f - t;
    const auto near = [a](float d) { return ((a + 2.0f) * d - (a + 3.0f)) * d * d + 1.0f; };
    const auto far = [a](float d) { return ((a * d - 5.0f * a) * d + 8.0f * a) * d - 4.0f * a; };
    return {far(t + 1.0f), near(t), near(u), far(u + 1.0f)};
}

Sampled sampled(const Sampling& how, int axis, std::int64_t from, std::int64_t to, float scale) {
    Sampled made{axis, how.mode == "nearest" ? 1 : how.mode == "linear" ? 2 : 4, from, to, false, {}, {}};
    const auto within = [&](std::int64_t at) { return static_cast<std::int32_t>(std::clamp<std::int64_t>(at, 0, from - 1)); };
    for (std::int64_t i = 0; i < to; ++i) {
        float x = coordinate(how, i, scale, from, to);
        if (made.taps == 1) {
            made.index.push_back(within(neighbour(how, x)));
            continue;
        }
        if (made.taps == 2) x = std::clamp(x, 0.0f, static_cast<float>(from - 1));
        const std::int64_t first = static_cast<std::int64_t>(std::floor(x));
        const float t = x - static_cast<float>(first);
        if (made.taps == 2) {
            made.index.insert(made.index.end(), {within(first), within(first + 1)});
            made.weights.insert(made.weights.end(), {1.0f - t, t});
            continue;
        }
        std::vector<float> weights = cubic_weights(t, how.cubic);
        for (std::int64_t k = 0; k < 4; ++k) {
            const std::int64_t at = first - 1 + k;
            if (how.inside && (at < 0 || at >= from)) weights[k] = 0;
            made.index.push_back(within(at));
        }
        const float sum = how.inside ? std::accumulate(weights.begin(), weights.end(), 0.0f) : 1.0f;
        for (float weight : weights) made.weights.push_back(weight / sum);
    }
    made.doubles = made.taps == 1 && to == 2 * from;
    for (std::int64_t i = 0; i < to && made.doubles; ++i) made.doubles = made.index[i] == i / 2;
    return made;
}

// Axes are resized one after the other, the innermost first, while there is least of it: each is [outer, from, inner].
void resample(Planner& planner, const std::vector<Sampled>& axes, const Dims& dims) {
    const std::vector<int> order = storage_order(planner.in(0));
    Fact x = planner.dense(planner.in(0), order);
    if (axes.empty()) return planner.alias(0, x);
    Dims stored;  // sizes by place in storage
    for (int axis : order) stored.push_back(x.dims[axis]);
    std::vector<Sampled> steps;
    for (std::size_t place = order.size(); place-- > 0;)
        for (const Sampled& each : axes)
            if (each.axis == order[place]) {
                steps.push_back(each);
                steps.back().axis = static_cast<int>(place);
            }
    for (std::size_t s = 0; s < steps.size(); ++s) {
        const auto table = std::make_shared<const Sampled>(std::move(steps[s]));
        const bool last = s + 1 == steps.size();
        stored[table->axis] = table->to;
        const Fact y = last ? planner.make(0, Type::f32, dims, order) : planner.scratch(Type::f32, stored);
        std::int64_t outer = 1, inner = 1;
        for (int i = 0; i < table->axis; ++i) outer *= stored[i];
        for (std::size_t i = table->axis + 1; i < stored.size(); ++i) inner *= stored[i];
        const std::int64_t lines = inner == 1 ? outer : outer * table->to, size = inner == 1 ? table->to : inner;
        planner.step(
            table->taps == 1 ? "nearest" : table->taps == 2 ? "linear" : "cubic", {x, y},
            [=](Frame& frame) {
                const RowKernels& kernels = frame.kernels.rows;
                const float* from = frame.at<float>(x);
                float* to = frame.at<float>(y);
                const int parts = parts_of(lines, lines * size, 1 << 14, frame.pool.threads());
                const float* weights = table->weights.empty() ? nullptr : table->weights.data();
                frame.pool.run(parts, [&](int part) {
                    for (std::int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i) {
                        if (inner == 1) {
                            if (table->doubles)
                                kernels.doubled(from + i * table->from, table->from, to + i * size);
                            else
                                kernels.gather(from + i * table->from, table->index.data(), weights, table->taps, size, to + i * size);
                            continue;
                        }
                        const float* plane = from + i / table->to * table->from * inner;
                        const std::int64_t at = i % table->to * table->taps;
                        if (weights == nullptr)
                            std::copy_n(plane + table->index[at] * inner, inner, to + i * size);
                        else
                            kernels.blend(plane, table->index.data() + at, weights + at, table->taps, inner, inner, to + i * size);
                    }
                });
            },
            2.0 * table->taps * static_cast<double>(lines * size), 4.0 * static_cast<double>(lines * size));
        x = y;
    }
}

std::vector<float> reals(Planner& planner, int input) {
    if (!planner.has(input) || planner.in(input).size() == 0) return {};
    const Tensor tensor = planner.constant(input);
    return {tensor.as<float>(), tensor.as<float>() + tensor.size()};
}

void resize_to(Planner& planner, const Sampling& how, const std::vector<int>& axes, const std::vector<float>& scales,
               const std::vector<std::int64_t>& sizes) {
    const Fact x = float_input(planner);
    Dims dims = x.dims;
    if ((scales.empty() ? sizes.size() : scales.size()) != axes.size()) throw Error("its sizes or scales are not as many as its axes");
    const std::string policy = planner.node().text("keep_aspect_ratio_policy", "stretch");
    float common = 0;
    if (scales.empty() && policy != "stretch")
        for (std::size_t i = 0; i < axes.size(); ++i) {
            const float scale = static_cast<float>(sizes[i]) / static_cast<float>(x.dims[axes[i]]);
            common = i == 0 ? scale : policy == "not_larger" ? std::min(common, scale) : std::max(common, scale);
        }
    std::vector<float> stretched(axes.size());
    for (std::size_t i = 0; i < axes.size(); ++i) {
        const std::int64_t from = x.dims[axes[i]];
        float& scale = stretched[i] = scales.empty() ? common : scales[i];
        if (!scales.empty()) {
            if (!(scale > 0) || !(scale * static_cast<float>(from) < 1e9f)) throw Error("its scales must be positive and not huge");
            dims[axes[i]] = static_cast<std::int64_t>(scale * static_cast<float>(from));
            // ONNX stretches to the unrounded size then, runtimes to the rounded one.
            if (how.coordinates == "align_corners" && static_cast<float>(dims[axes[i]]) != scale * static_cast<float>(from))
                throw Unsupported("align_corners with scales that give no whole size");
        } else if (common > 0) {
            dims[axes[i]] = static_cast<std::int64_t>(std::floor(common * static_cast<float>(from) + 0.5f));
        } else {
            dims[axes[i]] = sizes[i];
            scale = static_cast<float>(sizes[i]) / static_cast<float>(from);
        }
        const std::int64_t to = dims[axes[i]];
        if (to < 0 || to > 1 << 30) throw Error("its sizes must not be negative or huge");
        if (from != to && from == 0) throw Error("an axis without elements cannot be resized");
    }
    if (bytes_of(Type::f32, dims) == 0) {  // refused here where it is too large, before tables of its size are made
        planner.make(0, Type::f32, dims);
        return;
    }
    std::vector<Sampled> changed;
    for (std::size_t i = 0; i < axes.size(); ++i) {
        const std::int64_t from = x.dims[axes[i]], to = dims[axes[i]];
        if (from != to || stretched[i] != 1.0f) changed.push_back(sampled(how, axes[i], from, to, stretched[i]));
    }
    resample(planner, changed, dims);
}

void check_mode(const Sampling& how) {
    if (how.mode != "nearest" && how.mode != "linear" && how.mode != "cubic") throw Unsupported("its mode '" + how.mode + "'");
}

std::vector<int> all_axes(const Fact& x) {
    std::vector<int> axes(x.dims.size());
    std::iota(axes.begin(), axes.end(), 0);
    return axes;
}

void resize(Planner& planner) {
    const Node& node = planner.node();
    const bool old = planner.opset() < 11;
    const Sampling how{node.text("mode", "nearest"), node.text("coordinate_transformation_mode", old ? "asymmetric" : "half_pixel"),
                       node.text("nearest_mode", old ? "floor" : "round_prefer_floor"), node.real("cubic_coeff_a", -0.75f),
                       node.integer("exclude_outside", 0) != 0};
    check_mode(how);
    if (node.integer("antialias", 0) != 0) throw Unsupported("antialias");
    const Fact& x = planner.in(0);
    std::vector<int> axes = all_axes(x);
    if (node.has("axes")) {
        axes.clear();
        for (std::int64_t axis : node.integers("axes")) {
            axes.push_back(axis_of(axis, x.rank()));
            if (std::count(axes.begin(), axes.end(), axes.back()) > 1) throw Error("it names an axis twice");
        }
    }
    const std::vector<float> scales = reals(planner, old ? 1 : 2);
    std::vector<std::int64_t> sizes;
    if (scales.empty() && planner.has(3)) sizes = planner.integers(3);
    resize_to(planner, how, axes, scales, sizes);
}

void upsample(Planner& planner) {
    const Sampling how{planner.node().text("mode", "nearest"), "asymmetric", "floor", -0.75f, false};
    check_mode(how);
    const Attribute* scales = nullptr;
    if (planner.node().has("scales")) scales = &planner.node().attributes.at("scales");
    resize_to(planner, how, all_axes(planner.in(0)), scales != nullptr ? scales->reals : reals(planner, 1), {});
}

}  // namespace

std::vector<Op> pool_ops() {
    return {{"MaxPool", max_pool}, {"AveragePool", average_pool}, {"Resize", resize}, {"Upsample", upsample}};
}

}  // namespace featherweight
