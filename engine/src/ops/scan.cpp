// SPDX-License-Identifier: Apache-2.0
// Sums that run along an axis. They number the words of a text that are no padding.
#include <type_traits>

#include "../ops.hpp"
#include "../runs.hpp"

namespace featherweight {

namespace {

// A running sum of integers wraps around, as all arithmetic on them here.
template <class T> T sum(T a, T b) {
    if constexpr (std::is_integral_v<T>)
        return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
    else
        return a + b;
}

struct Scan {
    Walk lines;                    // of the result, then the input, the axis left out
    std::int64_t size;             // of the axis
    std::int64_t step_to, step_from;
    bool exclusive;                // an element's sum is of those before it
};

// Lines lie side by side: sums of all of them go on from element to element.
template <class T>
void add_up(const Scan& scan, const T* from, T* to) {
    const Walk& lines = scan.lines;
    const std::int64_t by_to = lines.strides[0].back(), by_from = lines.strides[1].back();
    each_run<2>(lines.dims, {&lines.strides[0], &lines.strides[1]}, 0, count(lines.dims), [&](const auto& offsets, std::int64_t many) {
        T* target = to + offsets[0];
        const T* source = from + offsets[1];
        for (std::int64_t i = 0; i < many; ++i) target[i * by_to] = scan.exclusive ? T{0} : source[i * by_from];
        for (std::int64_t at = 1; at < scan.size; ++at) {
            const T* before = target;
            target += scan.step_to;
            const T* added = scan.exclusive ? source : source + scan.step_from;
            source += scan.step_from;
            for (std::int64_t i = 0; i < many; ++i) target[i * by_to] = sum(before[i * by_to], added[i * by_from]);
        }
    });
}

Fact without(const Fact& fact, int axis) {
    Fact made = fact;
    made.dims.erase(made.dims.begin() + axis);
    made.strides.erase(made.strides.begin() + axis);
    return made;
}

void cumulative_sum(Planner& planner) {
    const Fact from = planner.in(0);
    const std::vector<std::int64_t> given = planner.integers(1);
    if (given.size() != 1) throw Error("its axis must be one number");
    const int axis = axis_of(given[0], from.rank());
    const bool known = from.type == Type::f32 || from.type == Type::f64 || from.type == Type::i32 || from.type == Type::i64;
    if (!known) throw Unsupported(std::string("sums of ") + name_of(from.type));
    const Fact out = planner.make(0, from.type, from.dims, storage_order(from));
    const bool reverse = planner.node().integer("reverse", 0) != 0, exclusive = planner.node().integer("exclusive", 0) != 0;
    Fact source = without(from, axis), target = without(out, axis);
    const std::int64_t size = from.dims[axis], step_from = from.strides[axis], step_to = out.strides[axis];
    if (reverse && out.size() > 0) {  // from the axis's end on, backwards
        source.offset += (size - 1) * step_from;
        target.offset += (size - 1) * step_to;
    }
    const Scan scan{walk({&target, &source}), size, reverse ? -step_to : step_to, reverse ? -step_from : step_from, exclusive};
    const auto work = [=](Frame& frame) {
        if (out.size() == 0) return;
        if (out.type == Type::f32) add_up(scan, frame.at<float>(source), frame.at<float>(target));
        if (out.type == Type::f64) add_up(scan, frame.at<double>(source), frame.at<double>(target));
        if (out.type == Type::i32) add_up(scan, frame.at<std::int32_t>(source), frame.at<std::int32_t>(target));
        if (out.type == Type::i64) add_up(scan, frame.at<std::int64_t>(source), frame.at<std::int64_t>(target));
    };
    planner.step("CumSum", {from, out}, work);
}

}  // namespace

std::vector<Op> scan_ops() { return {{"CumSum", cumulative_sum}}; }

}  // namespace featherweight
