// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iterator>

#include "product_step.hpp"

namespace featherweight {

namespace {

// Pads and output sizes of a convolution's axes, by attribute.
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
    require_countable(weights.dims, places.out);
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

}  // namespace

std::vector<Op> conv_ops() { return {{"Conv", conv}}; }

}  // namespace featherweight
