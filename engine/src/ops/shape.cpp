// SPDX-License-Identifier: Apache-2.0
// Ops whose result follows from shapes and constants alone.
#include <algorithm>
#include <cmath>

#include "../ops.hpp"

namespace featherweight {

namespace {

Tensor tensor_of(const std::vector<std::int64_t>& values) {
    Tensor made(Type::i64, {static_cast<std::int64_t>(values.size())});
    std::copy(values.begin(), values.end(), made.as<std::int64_t>());
    return made;
}

Tensor scalar_of(std::int64_t value) {
    Tensor made(Type::i64, {});
    *made.as<std::int64_t>() = value;
    return made;
}

void shape(Planner& planner) {
    const Dims& dims = planner.in(0).dims;
    const std::int64_t rank = static_cast<std::int64_t>(dims.size());
    const auto place = [&](std::int64_t at) { return std::clamp<std::int64_t>(at < 0 ? at + rank : at, 0, rank); };
    const std::int64_t start = place(planner.node().integer("start", 0)), end = place(planner.node().integer("end", rank));
    planner.give(0, tensor_of(start < end ? Dims{dims.begin() + start, dims.begin() + end} : Dims{}));
}

void size(Planner& planner) { planner.give(0, scalar_of(planner.in(0).size())); }

template <class T>
Tensor range_of(Planner& planner, T start, std::int64_t size, T delta) {
    planner.afford(bytes_of(type_of<T>(), {size}));
    Tensor made(type_of<T>(), {size});
    for (std::int64_t i = 0; i < size; ++i) made.as<T>()[i] = static_cast<T>(start + static_cast<T>(i) * delta);
    return made;
}

void range(Planner& planner) {
    const Tensor start = planner.constant(0), limit = planner.constant(1), delta = planner.constant(2);
    for (const Tensor* each : {&start, &limit, &delta})
        if (each->size() != 1 || each->type != start.type) throw Error("its inputs must be three scalars of one type");
    if (start.type == Type::f32) {
        const double first = *start.as<float>(), step = *delta.as<float>();
        if (step == 0) throw Error("its step is zero");
        const double steps = std::ceil((*limit.as<float>() - first) / step);
        if (!(steps < 0x1p40)) throw Error("it is too long");
        return planner.give(0, range_of<float>(planner, *start.as<float>(), steps > 0 ? static_cast<std::int64_t>(steps) : 0, *delta.as<float>()));
    }
    if (start.type != Type::i32 && start.type != Type::i64) throw Unsupported(std::string("a range of ") + name_of(start.type));
    const std::int64_t first = planner.integers(0)[0], last = planner.integers(1)[0], step = planner.integers(2)[0];
    if (step == 0) throw Error("its step is zero");
    // The distance fits an unsigned number where it may not fit a signed one.
    const auto u = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
    const std::uint64_t distance = step > 0 ? (last > first ? u(last) - u(first) : 0) : (first > last ? u(first) - u(last) : 0);
    const std::uint64_t stride = step > 0 ? u(step) : -u(step);
    const std::uint64_t steps = distance / stride + (distance % stride != 0);
    if (steps > std::uint64_t{1} << 40) throw Error("it is too long");
    const std::int64_t many = static_cast<std::int64_t>(steps);
    if (start.type == Type::i64) return planner.give(0, range_of<std::int64_t>(planner, first, many, step));
    planner.give(0, range_of<std::int32_t>(planner, static_cast<std::int32_t>(first), many, static_cast<std::int32_t>(step)));
}

void constant_of_shape(Planner& planner) {
    Tensor value(Type::f32, {});
    const auto given = planner.node().attributes.find("value");
    if (given != planner.node().attributes.end()) {
        value = given->second.tensor;
        if (given->second.kind != Attribute::Kind::tensor || value.size() != 1) throw Error("its attribute 'value' must be a tensor of one element");
        value.dims = {};
    }
    const Dims dims = planner.integers(0);
    count(dims);
    planner.alias(0, broadcast_to(planner.hold(value), dims));
}

}  // namespace

std::vector<Op> shape_ops() {
    return {{"ConstantOfShape", constant_of_shape}, {"Range", range}, {"Shape", shape}, {"Size", size}};
}

}  // namespace featherweight
