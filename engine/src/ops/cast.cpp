// SPDX-License-Identifier: Apache-2.0
// Cast: fractions are cut off, integers wrap around, a float that no integer can hold becomes the most negative one (as on
// x86, and so in ONNX Runtime), any number but zero is true, and what is too large for a float is infinite.
#include <limits>
#include <type_traits>

#include "../ops.hpp"
#include "elementwise.hpp"
#include "scalars.hpp"

namespace featherweight {

namespace {

struct Half {
    std::uint16_t bits;
};
struct Brain {
    std::uint16_t bits;
};

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Every case is worked out and one is chosen by its bits, so that loops over these become vector code.
std::uint32_t choose(bool first, std::uint32_t a, std::uint32_t b) {
    const std::uint32_t mask = 0u - static_cast<std::uint32_t>(first);
    return (a & mask) | (b & ~mask);
}

float to_float(Half value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7FFF;
    // The exponent is put right by a product, which also makes subnormal numbers normal.
    const std::uint32_t number = bit_cast<std::uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f);
    const std::uint32_t other = 0x7F800000 | (rest & 0x3FF) << 13;  // inf and NaN
    return bit_cast<float>(sign | choose(rest >= 0x7C00, other, number));
}

Half to_half(float value) {
    const std::uint32_t all = bit_cast<std::uint32_t>(value), sign = all >> 16 & 0x8000, rest = all & 0x7FFFFFFF;
    const std::uint32_t normal = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;  // halves to even; may carry to infinity
    const std::uint32_t small = bit_cast<std::uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3F000000;  // the sum rounds at the right bit
    const std::uint32_t large = choose(rest > 0x7F800000, 0x7E00, 0x7C00);  // NaN; 65536 and more
    return {static_cast<std::uint16_t>(sign | choose(rest >= 0x47800000, large, choose(rest < 0x38800000, small, normal)))};
}

float to_float(Brain value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

Brain to_brain(float value) {
    const std::uint32_t all = bit_cast<std::uint32_t>(value);
    if ((all & 0x7FFFFFFF) > 0x7F800000) return {static_cast<std::uint16_t>(all >> 16 | 0x40)};
    return {static_cast<std::uint16_t>((all + 0x7FFF + (all >> 16 & 1)) >> 16)};
}

template <class T> T widened(T value) { return value; }
float widened(Half value) { return to_float(value); }
float widened(Brain value) { return to_float(value); }

template <class To, class From>
To truncated(From value) {
    constexpr From bound = -static_cast<From>(std::numeric_limits<To>::min());
    return value >= -bound && value < bound ? static_cast<To>(value) : std::numeric_limits<To>::min();
}

template <class To, class From>
To cast(From from) {
    const auto value = widened(from);
    using Wide = std::remove_const_t<decltype(value)>;
    if constexpr (std::is_same_v<To, bool>) return value != 0;
    else if constexpr (std::is_same_v<To, Half>) return to_half(static_cast<float>(value));
    else if constexpr (std::is_same_v<To, Brain>) return to_brain(static_cast<float>(value));
    else if constexpr (!std::is_integral_v<To> || std::is_integral_v<Wide>) return static_cast<To>(value);
    else if constexpr (std::is_same_v<To, std::uint64_t>)  // its upper half has no counterpart among signed ones
        return value >= 0x1p63f && value < 0x1p64f ? static_cast<To>(value) : static_cast<To>(truncated<std::int64_t>(value));
    else if constexpr (std::is_same_v<To, std::int32_t>) return truncated<std::int32_t>(value);
    else return static_cast<To>(truncated<std::int64_t>(value));
}

template <class From, class To> void loop(const Runs& runs) { map<To, From>(runs, cast<To, From>); }

template <class From>
Loop loop_from(Type to) {
    switch (to) {
        case Type::f32: return loop<From, float>;
        case Type::f64: return loop<From, double>;
        case Type::f16: return loop<From, Half>;
        case Type::bf16: return loop<From, Brain>;
        case Type::i8: return loop<From, std::int8_t>;
        case Type::i16: return loop<From, std::int16_t>;
        case Type::i32: return loop<From, std::int32_t>;
        case Type::i64: return loop<From, std::int64_t>;
        case Type::u8: return loop<From, std::uint8_t>;
        case Type::u16: return loop<From, std::uint16_t>;
        case Type::u32: return loop<From, std::uint32_t>;
        case Type::u64: return loop<From, std::uint64_t>;
        case Type::boolean: return loop<From, bool>;
    }
    return {};
}

Loop loop_between(Type from, Type to) {
    switch (from) {
        case Type::f32: return loop_from<float>(to);
        case Type::f64: return loop_from<double>(to);
        case Type::f16: return loop_from<Half>(to);
        case Type::bf16: return loop_from<Brain>(to);
        case Type::i8: return loop_from<std::int8_t>(to);
        case Type::i16: return loop_from<std::int16_t>(to);
        case Type::i32: return loop_from<std::int32_t>(to);
        case Type::i64: return loop_from<std::int64_t>(to);
        case Type::u8: return loop_from<std::uint8_t>(to);
        case Type::u16: return loop_from<std::uint16_t>(to);
        case Type::u32: return loop_from<std::uint32_t>(to);
        case Type::u64: return loop_from<std::uint64_t>(to);
        case Type::boolean: return loop_from<bool>(to);
    }
    return {};
}

void cast_to(Planner& planner, Type type) {
    const Fact from = planner.in(0);
    if (from.type == type) return planner.alias(0, from);
    const Fact out = planner.make(0, type, from.dims, storage_order(from));
    add_loops(planner, planner.node().op, out, {from}, {{loop_between(from.type, type), {0}}});
}

}  // namespace

Fact converted(Planner& planner, const Fact& fact, Type type) {
    const Fact out = planner.scratch(type, fact.dims);
    add_loops(planner, "Cast", out, {fact}, {{loop_between(fact.type, type), {0}}});
    return out;
}

std::vector<Op> cast_ops() {
    return {{"Cast", [](Planner& planner) { cast_to(planner, from_onnx(planner.node().integer("to", 0))); }},
            {"CastLike", [](Planner& planner) { cast_to(planner, planner.in(1).type); }}};
}

}  // namespace featherweight
