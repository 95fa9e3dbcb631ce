// SPDX-License-Identifier: Apache-2.0
// What gives or reads booleans: comparisons, logic, Where.
#include <cmath>
#include <functional>

#include "../ops.hpp"
#include "scalars.hpp"

namespace featherweight {

namespace {

using Truth = std::uint8_t;  // a boolean as it lies in memory

// `lead`: the inputs of whose order the result's is taken.
void into(Planner& planner, Type type, const std::vector<Fact>& inputs, Loop loop, const std::vector<Fact>& lead) {
    Dims dims;
    for (const Fact& input : inputs) dims = broadcast_dims(dims, input.dims);
    const Fact out = planner.make(0, type, dims, leading_order(lead, dims));
    std::vector<Fact> views;
    std::vector<int> in;
    for (const Fact& input : inputs) {
        in.push_back(static_cast<int>(views.size()));
        views.push_back(alongside(planner, input, out));
    }
    add_loops(planner, planner.node().op, out, views, {{std::move(loop), in}});
}

void same_type(const Fact& a, const Fact& b) {
    if (a.type != b.type) throw Error(std::string("its inputs are of two types, ") + name_of(a.type) + " and " + name_of(b.type));
}

template <class T, class Function>
Loop comparison() {
    return [](const Runs& runs) { map_two<Truth, T, T>(runs, [](T a, T b) { return static_cast<Truth>(Function{}(a, b)); }); };
}

template <class Function>
void compare(Planner& planner) {
    const Fact a = planner.in(0), b = planner.in(1);
    same_type(a, b);
    Loop loop;
    switch (a.type) {
        case Type::f32: loop = comparison<float, Function>(); break;
        case Type::i32: loop = comparison<std::int32_t, Function>(); break;
        case Type::i64: loop = comparison<std::int64_t, Function>(); break;
        case Type::boolean: loop = comparison<Truth, Function>(); break;
        default: throw Unsupported(std::string("comparison of ") + name_of(a.type));
    }
    into(planner, Type::boolean, {a, b}, std::move(loop), {a, b});
}

template <class Function>
void logic(Planner& planner) {
    const Fact a = planner.in(0), b = planner.in(1);
    if (a.type != Type::boolean || b.type != Type::boolean) throw Error("its inputs must be booleans");
    into(planner, Type::boolean, {a, b}, comparison<Truth, Function>(), {a, b});
}

void logical_not(Planner& planner) {
    const Fact a = planner.in(0);
    if (a.type != Type::boolean) throw Error("its input must be a boolean");
    into(planner, Type::boolean, {a}, [](const Runs& runs) { map<Truth, Truth>(runs, [](Truth x) { return static_cast<Truth>(x == 0); }); }, {a});
}

void is_nan(Planner& planner) {
    const Fact a = planner.in(0);
    if (a.type != Type::f32) throw Unsupported(std::string("a test of ") + name_of(a.type));
    into(planner, Type::boolean, {a}, [](const Runs& runs) { map<Truth, float>(runs, [](float x) { return static_cast<Truth>(x != x); }); }, {a});
}

void is_inf(Planner& planner) {
    const Fact a = planner.in(0);
    if (a.type != Type::f32) throw Unsupported(std::string("a test of ") + name_of(a.type));
    const bool negative = planner.node().integer("detect_negative", 1) != 0, positive = planner.node().integer("detect_positive", 1) != 0;
    const auto test = [=](float x) { return static_cast<Truth>(std::isinf(x) && (x < 0 ? negative : positive)); };
    into(planner, Type::boolean, {a}, [=](const Runs& runs) { map<Truth, float>(runs, test); }, {a});
}

template <class T>
void select(const Runs& runs) {
    T* out = static_cast<T*>(runs.out);
    for (std::ptrdiff_t run = 0; run < runs.count; ++run, out += runs.size) {
        const Truth* which = static_cast<const Truth*>(runs.in[0].at) + run * runs.in[0].step;
        const T* a = static_cast<const T*>(runs.in[1].at) + run * runs.in[1].step;
        const T* b = static_cast<const T*>(runs.in[2].at) + run * runs.in[2].step;
        const std::ptrdiff_t step = runs.in[0].moves, step_a = runs.in[1].moves, step_b = runs.in[2].moves;
        const T only_a = *a, only_b = *b;  // masks stand beside a constant mostly
        // Both are read whatever is chosen, so that the choice is one of registers.
        if (step == 1 && step_a == 1 && step_b == 1)
            for (std::ptrdiff_t i = 0; i < runs.size; ++i) {
                const T x = a[i], y = b[i];
                out[i] = which[i] ? x : y;
            }
        else if (step == 1 && step_a == 1)
            for (std::ptrdiff_t i = 0; i < runs.size; ++i) {
                const T x = a[i];
                out[i] = which[i] ? x : only_b;
            }
        else if (step == 1 && step_b == 1)
            for (std::ptrdiff_t i = 0; i < runs.size; ++i) {
                const T y = b[i];
                out[i] = which[i] ? only_a : y;
            }
        else
            for (std::ptrdiff_t i = 0; i < runs.size; ++i) out[i] = which[i * step] ? a[i * step_a] : b[i * step_b];
    }
}

void where(Planner& planner) {
    const Fact which = planner.in(0), a = planner.in(1), b = planner.in(2);
    if (which.type != Type::boolean) throw Error("its condition must be a boolean");
    same_type(a, b);
    const std::size_t size = size_of(a.type);
    const Loop loop = size == 1   ? select<std::uint8_t>
                      : size == 2 ? select<std::uint16_t>
                      : size == 4 ? select<std::uint32_t>
                                  : select<std::uint64_t>;
    into(planner, a.type, {which, a, b}, loop, {a, b, which});
}

template <class T>
struct DiffersAsTruth {
    bool operator()(T a, T b) const { return (a != 0) != (b != 0); }
};

}  // namespace

std::vector<Op> logic_ops() {
    return {{"And", logic<std::logical_and<>>},
            {"Equal", compare<std::equal_to<>>},
            {"Greater", compare<std::greater<>>},
            {"GreaterOrEqual", compare<std::greater_equal<>>},
            {"IsInf", is_inf},
            {"IsNaN", is_nan},
            {"Less", compare<std::less<>>},
            {"LessOrEqual", compare<std::less_equal<>>},
            {"Not", logical_not},
            {"Or", logic<std::logical_or<>>},
            {"Where", where},
            {"Xor", logic<DiffersAsTruth<Truth>>}};
}

}  // namespace featherweight
