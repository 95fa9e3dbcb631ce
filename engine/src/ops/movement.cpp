// SPDX-License-Identifier: Apache-2.0
// Ops that only say where elements are found. Most are another view; none looks at what an element is.
#include <algorithm>
#include <limits>
#include <numeric>

#include "../loops.hpp"
#include "../ops.hpp"
#include "views.hpp"

namespace featherweight {

namespace {

void transpose(Planner& planner) {
    const Fact from = planner.in(0);
    std::vector<int> axes(from.rank());
    std::iota(axes.rbegin(), axes.rend(), 0);
    if (planner.node().has("perm")) {
        const std::vector<std::int64_t> given = planner.node().integers("perm");
        std::vector<bool> seen(axes.size(), false);
        if (given.size() != axes.size()) throw Error("its attribute 'perm' does not fit an input of " + std::to_string(from.rank()) + " axes");
        for (std::size_t i = 0; i < axes.size(); ++i) {
            axes[i] = axis_of(given[i], from.rank());
            if (seen[axes[i]]) throw Error("its attribute 'perm' names an axis twice");
            seen[axes[i]] = true;
        }
    }
    planner.alias(0, transposed(from, axes));
}

void reshape(Planner& planner) {
    const Fact from = planner.in(0);
    Dims dims = planner.opset() < 5 ? planner.node().integers("shape") : planner.integers(1);
    const bool zero_is_zero = planner.node().integer("allowzero", 0) != 0;
    int open = -1;
    std::int64_t known = 1;
    for (std::size_t i = 0; i < dims.size(); ++i) {
        if (dims[i] == -1) {
            if (open >= 0) throw Error("its shape has two sizes of -1");
            open = static_cast<int>(i);
            continue;
        }
        if (dims[i] == 0 && !zero_is_zero) {
            if (i >= from.dims.size()) throw Error("its shape keeps an axis that its input lacks");
            dims[i] = from.dims[i];
        }
        known = count({known, dims[i]});
    }
    if (open >= 0) {
        if (known == 0 || from.size() % known != 0) throw Error("an input of shape " + describe(from.dims) + " does not fit its shape");
        dims[open] = from.size() / known;
    }
    give_reshaped(planner, from, dims);
}

void flatten(Planner& planner) {
    const Fact from = planner.in(0);
    const std::int64_t given = planner.node().integer("axis", 1);
    const int axis = given == from.rank() ? from.rank() : axis_of(given, from.rank());
    give_reshaped(planner, from, {count({from.dims.begin(), from.dims.begin() + axis}), count({from.dims.begin() + axis, from.dims.end()})});
}

// Which axes an op names, in an input since `opset` and in an attribute before.
std::vector<bool> named_axes(Planner& planner, int rank) {
    std::vector<bool> named(static_cast<std::size_t>(rank), false);
    const bool input = planner.opset() >= 13;
    for (std::int64_t axis : input && planner.has(1) ? planner.integers(1) : input ? Dims{} : planner.node().integers("axes")) {
        const int at = axis_of(axis, rank);
        if (named[at]) throw Error("it names an axis twice");
        named[at] = true;
    }
    return named;
}

void squeeze(Planner& planner) {
    const Fact from = planner.in(0);
    Fact made = from;
    made.dims.clear();
    made.strides.clear();
    const std::vector<bool> named = named_axes(planner, from.rank());
    const bool any = std::find(named.begin(), named.end(), true) != named.end();
    for (int axis = 0; axis < from.rank(); ++axis) {
        if (any && named[axis] && from.dims[axis] != 1) throw Error("axis " + std::to_string(axis) + " is not of size 1");
        if (any ? named[axis] : from.dims[axis] == 1) continue;
        made.dims.push_back(from.dims[axis]);
        made.strides.push_back(from.strides[axis]);
    }
    planner.alias(0, made);
}

void unsqueeze(Planner& planner) {
    const Fact from = planner.in(0);
    const std::size_t more = (planner.opset() >= 13 ? planner.integers(1) : planner.node().integers("axes")).size();
    if (more > 64) throw Error("it adds more than 64 axes");
    const int rank = from.rank() + static_cast<int>(more);
    const std::vector<bool> named = named_axes(planner, rank);
    Fact made = from;
    made.dims.assign(rank, 1);
    made.strides.assign(rank, 1);
    for (int axis = 0, old = 0; axis < rank; ++axis) {
        if (named[axis]) continue;
        made.dims[axis] = from.dims[old];
        made.strides[axis] = from.strides[old++];
    }
    planner.alias(0, made);
}

void expand(Planner& planner) {
    const Fact from = planner.in(0);
    planner.alias(0, broadcast_to(from, broadcast_dims(from.dims, planner.integers(1))));
}

void concat(Planner& planner) {
    std::vector<Fact> inputs;
    for (int i = 0; i < planner.inputs(); ++i) inputs.push_back(planner.in(i));
    if (inputs.empty()) throw Error("it has no inputs");
    const Fact first = inputs[0];
    const int axis = axis_of(planner.node().integer("axis", 1), first.rank());
    Dims dims = first.dims;
    dims[axis] = 0;
    for (const Fact& input : inputs) {
        Dims there = input.dims;
        if (input.rank() == first.rank()) there[axis] = first.dims[axis];
        if (there != first.dims) throw Error("shapes " + describe(first.dims) + " and " + describe(input.dims) + " do not join");
        if (input.type != first.type) throw Error(std::string("it joins ") + name_of(first.type) + " and " + name_of(input.type));
        dims[axis] += input.dims[axis];
    }
    if (inputs.size() == 1) return planner.alias(0, first);
    const Fact out = planner.make(0, first.type, dims, storage_order(leader(inputs)));
    std::vector<Move> moves;
    std::int64_t at = 0;
    for (const Fact& input : inputs) {
        moves.push_back({input, sliced(out, axis, at, input.dims[axis])});
        at += input.dims[axis];
    }
    add_moves(planner, "Concat", out, std::move(moves));
}

void split(Planner& planner) {
    const Fact from = planner.in(0);
    const int axis = axis_of(planner.node().integer("axis", 0), from.rank());
    const std::int64_t whole = from.dims[axis], parts = planner.wanted();
    std::vector<std::int64_t> sizes = planner.has(1) ? planner.integers(1) : planner.node().integers("split");
    if (sizes.empty()) {
        const std::int64_t size = (whole + parts - 1) / parts;
        if (planner.opset() < 18 && size * parts != whole) throw Error("an axis of " + std::to_string(whole) + " does not split evenly");
        if (planner.node().integer("num_outputs", parts) != parts) throw Error("its attribute 'num_outputs' is not the number of its outputs");
        for (std::int64_t i = 0; i < parts; ++i) sizes.push_back(std::clamp<std::int64_t>(whole - i * size, 0, size));
    }
    if (static_cast<std::int64_t>(sizes.size()) != parts) throw Error("it has " + std::to_string(parts) + " outputs and " + std::to_string(sizes.size()) + " sizes");
    std::int64_t at = 0;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        if (sizes[i] < 0 || sizes[i] > whole - at) throw Error("its sizes do not add up to " + std::to_string(whole));
        planner.alias(static_cast<int>(i), sliced(from, axis, at, sizes[i]));
        at += sizes[i];
    }
    if (at != whole) throw Error("its sizes do not add up to " + std::to_string(whole));
}

void slice(Planner& planner) {
    Fact made = planner.in(0);
    const bool attributes = planner.opset() < 10;
    const Node& node = planner.node();
    const std::vector<std::int64_t> starts = attributes ? node.integers("starts") : planner.integers(1);
    const std::vector<std::int64_t> ends = attributes ? node.integers("ends") : planner.integers(2);
    std::vector<std::int64_t> axes = attributes ? node.integers("axes") : planner.has(3) ? planner.integers(3) : Dims{};
    std::vector<std::int64_t> steps = !attributes && planner.has(4) ? planner.integers(4) : Dims{};
    if (axes.empty()) {
        axes.resize(starts.size());
        std::iota(axes.begin(), axes.end(), 0);
    }
    if (steps.empty()) steps.assign(starts.size(), 1);
    if (ends.size() != starts.size() || axes.size() != starts.size() || steps.size() != starts.size())
        throw Error("it has " + std::to_string(starts.size()) + " starts and another number of ends, axes or steps");
    std::vector<bool> seen(made.dims.size(), false);
    for (std::size_t i = 0; i < starts.size(); ++i) {
        const int axis = axis_of(axes[i], made.rank());
        if (seen[axis]) throw Error("it names an axis twice");
        seen[axis] = true;
        const std::int64_t size = made.dims[axis];
        const std::int64_t step = std::clamp(steps[i], -size - 1, size + 1);  // beyond, a step is as good as this one
        if (steps[i] == 0) throw Error("its step is zero");
        const auto place = [&](std::int64_t at) {
            if (at < 0) at += size;
            return step > 0 ? std::clamp<std::int64_t>(at, 0, size) : std::clamp<std::int64_t>(at, -1, size - 1);
        };
        const std::int64_t start = place(starts[i]), end = place(ends[i]);
        const std::int64_t kept = step > 0 ? (end - start + step - 1) / step : (end - start + step + 1) / step;
        made = sliced(made, axis, start, std::max<std::int64_t>(kept, 0), step);
    }
    planner.alias(0, made);
}

// Each size is split in two, the number of copies (at a stride of 0) and the size itself, and both become one again.
void tile(Planner& planner) {
    if (planner.opset() < 6) throw Unsupported("the form of opset 5 and earlier");
    const Fact from = planner.in(0);
    const std::vector<std::int64_t> repeats = planner.integers(1);
    if (repeats.size() != from.dims.size()) throw Error("it has " + std::to_string(repeats.size()) + " repeats for " + describe(from.dims));
    Fact made = from;
    made.dims.clear();
    made.strides.clear();
    Dims dims;
    for (std::size_t i = 0; i < repeats.size(); ++i) {
        made.dims.insert(made.dims.end(), {repeats[i], from.dims[i]});
        made.strides.insert(made.strides.end(), {0, from.strides[i]});
        dims.push_back(count({repeats[i], from.dims[i]}));
    }
    give_reshaped(planner, made, dims);
}

// Before and behind, by axis.
std::vector<std::int64_t> pads_of(Planner& planner, int rank) {
    const Node& node = planner.node();
    const std::vector<std::int64_t> given = planner.opset() < 11 ? node.integers(planner.opset() < 2 ? "paddings" : "pads") : planner.integers(1);
    std::vector<std::int64_t> axes(static_cast<std::size_t>(rank));
    std::iota(axes.begin(), axes.end(), 0);
    if (planner.opset() >= 18 && planner.has(3)) axes = planner.integers(3);
    if (given.size() != 2 * axes.size()) throw Error("it has " + std::to_string(given.size()) + " pads for " + std::to_string(axes.size()) + " axes");
    std::vector<std::int64_t> pads(2 * static_cast<std::size_t>(rank), 0);
    for (std::size_t i = 0; i < axes.size(); ++i) {
        const int axis = axis_of(axes[i], rank);
        pads[axis] = given[i];
        pads[axis + rank] = given[i + axes.size()];
    }
    return pads;
}

void pad(Planner& planner) {
    Fact from = planner.in(0);
    const int rank = from.rank();
    const std::vector<std::int64_t> pads = pads_of(planner, rank);
    const std::string mode = planner.node().text("mode", "constant");
    if (mode != "constant" && mode != "reflect" && mode != "edge" && mode != "wrap") throw Unsupported("its mode '" + mode + "'");
    Dims before(rank), dims(rank);
    for (int axis = 0; axis < rank; ++axis) {
        const std::int64_t front = pads[axis], back = pads[axis + rank], size = from.dims[axis];
        constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
        if (std::max(front, back) > most || std::min(front, back) < -most) throw Error("a pad of more than 2^31");
        // What is cut away is cut from the input.
        const std::int64_t cut = std::min<std::int64_t>(front, 0) + std::min<std::int64_t>(back, 0);
        if (size + cut < 0) throw Error("it cuts more than there is of an input of shape " + describe(from.dims));
        from = sliced(from, axis, front < 0 ? -front : 0, size + cut);
        before[axis] = std::max<std::int64_t>(front, 0);
        const std::int64_t behind = std::max<std::int64_t>(back, 0), there = from.dims[axis], pad = std::max(before[axis], behind);
        if (pad > 0 && ((mode == "edge" && there < 1) || (mode == "wrap" && pad > there) || (mode == "reflect" && pad >= there)))
            throw Unsupported("mode '" + mode + "' with a pad of " + std::to_string(pad) + " to an axis of " + std::to_string(there));
        dims[axis] = before[axis] + there + behind;
    }
    Fact value;
    if (mode == "constant") {
        if (planner.opset() >= 11 && planner.has(2)) {
            if (planner.in(2).size() != 1 || planner.in(2).type != from.type) throw Error("its value must be one element of its input's type");
            value = *reshaped(planner.in(2), {});
        } else {
            const Tensor number(from.type, {});
            if (from.type == Type::f32) *number.as<float>() = planner.opset() < 11 ? planner.node().real("value", 0) : 0;
            value = planner.hold(number);
        }
    }
    const Fact out = planner.make(0, from.type, dims, storage_order(from));
    // The middle first; then axis by axis what lies before and behind, the axes done already at their full size.
    Fact middle = out;
    for (int axis = 0; axis < rank; ++axis) middle = sliced(middle, axis, before[axis], from.dims[axis]);
    std::vector<Move> moves{{from, middle}};
    for (int axis = rank - 1; axis >= 0; --axis) {
        const std::int64_t front = before[axis], size = from.dims[axis], back = dims[axis] - front - size;
        Fact done = out;
        for (int other = 0; other < axis; ++other) done = sliced(done, other, before[other], from.dims[other]);
        const auto fill = [&](std::int64_t at, std::int64_t pads, std::int64_t edge, std::int64_t mirror, std::int64_t wrapped) {
            if (pads == 0) return;
            const Fact to = sliced(done, axis, at, pads);
            if (mode == "constant") moves.push_back({broadcast_to(value, to.dims), to});
            if (mode == "edge") moves.push_back({broadcast_to(sliced(done, axis, edge, 1), to.dims), to});
            if (mode == "reflect") moves.push_back({sliced(done, axis, mirror, pads, -1), to});
            if (mode == "wrap") moves.push_back({sliced(done, axis, wrapped, pads), to});
        };
        fill(0, front, front, 2 * front, size);
        fill(front + size, back, front + size - 1, front + size - 2, front);
    }
    add_moves(planner, "Pad", out, std::move(moves));
}

// [N, C, H, W] as [N, blocks, blocks, C', H, W] or [N, C', blocks, blocks, H, W], and the blocks go behind H and W.
void depth_to_space(Planner& planner) {
    const Fact from = planner.in(0);
    const std::int64_t b = planner.node().integer("blocksize", 0);
    const std::string mode = planner.node().text("mode", "DCR");
    if (mode != "DCR" && mode != "CRD") throw Error("its mode is '" + mode + "'");
    if (from.rank() != 4 || b < 1 || b > 1 << 15 || from.dims[1] % (b * b) != 0) throw Error("blocks of " + std::to_string(b) + " do not fit " + describe(from.dims));
    const std::int64_t n = from.dims[0], c = from.dims[1] / (b * b), h = from.dims[2], w = from.dims[3];
    const bool depth_first = mode == "DCR";
    const std::optional<Fact> parts = reshaped(from, depth_first ? Dims{n, b, b, c, h, w} : Dims{n, c, b, b, h, w});
    give_reshaped(planner, transposed(*parts, depth_first ? std::vector<int>{0, 3, 4, 1, 5, 2} : std::vector<int>{0, 1, 4, 2, 5, 3}),
                  {n, c, h * b, w * b});
}

void space_to_depth(Planner& planner) {
    const Fact from = planner.in(0);
    const std::int64_t b = planner.node().integer("blocksize", 0);
    if (from.rank() != 4 || b < 1 || b > 1 << 15 || from.dims[2] % b != 0 || from.dims[3] % b != 0)
        throw Error("blocks of " + std::to_string(b) + " do not fit " + describe(from.dims));
    const std::int64_t n = from.dims[0], c = from.dims[1], h = from.dims[2] / b, w = from.dims[3] / b;
    const std::string mode = planner.node().text("mode", "DCR");  // an attribute since opset 28
    if (mode != "DCR" && mode != "CRD") throw Error("its mode is '" + mode + "'");
    const std::optional<Fact> parts = reshaped(from, {n, c, h, b, w, b});
    give_reshaped(planner, transposed(*parts, mode == "DCR" ? std::vector<int>{0, 3, 5, 1, 2, 4} : std::vector<int>{0, 1, 3, 5, 2, 4}),
                  {n, c * b * b, h, w});
}

}  // namespace

std::vector<Op> movement_ops() {
    return {{"Concat", concat},
            {"DepthToSpace", depth_to_space},
            {"Expand", expand},
            {"Flatten", flatten},
            {"Pad", pad},
            {"Reshape", reshape},
            {"Slice", slice},
            {"SpaceToDepth", space_to_depth},
            {"Split", split},
            {"Squeeze", squeeze},
            {"Tile", tile},
            {"Transpose", transpose},
            {"Unsqueeze", unsqueeze}};
}

}  // namespace featherweight
