// SPDX-License-Identifier: Apache-2.0
// Arithmetic on integers wraps around, as processors do it: by way of unsigned ones, for which C++ defines that.
#include <cmath>
#include <limits>
#include <type_traits>

#include "../runs.hpp"
#include "elementwise.hpp"
#include "scalars.hpp"

namespace featherweight {

namespace {

// Calls with a value of the C++ type.
template <class Function>
Loop by_type(Type type, Function function) {
    if (type == Type::i32) return function(std::int32_t{});
    if (type == Type::i64) return function(std::int64_t{});
    throw Unsupported(std::string("arithmetic on ") + name_of(type));
}

template <class T, class Function>
Loop loop_of(Function function) {
    return [function](const Runs& runs) { map<T, T>(runs, function); };
}

template <class T, class Function>
Loop loop_of_two(Function function) {
    return [function](const Runs& runs) { map_two<T, T, T>(runs, function); };
}

// Toward zero. Zeros were refused before; the most negative number over -1 wraps to itself.
template <class T> T quotient(T a, T b) { return b == -1 ? static_cast<T>(-static_cast<std::make_unsigned_t<T>>(a)) : static_cast<T>(a / b); }
template <class T> T remainder(T a, T b) { return b == -1 ? T{0} : static_cast<T>(a % b); }

// As a float that is out of range is turned into an integer by x86, and so by ONNX Runtime there: the most negative one.
template <class T> T truncated(double value) {
    constexpr double bound = -static_cast<double>(std::numeric_limits<T>::min());
    return value >= -bound && value < bound ? static_cast<T>(value) : std::numeric_limits<T>::min();
}

template <class T>
void check_zeros(const std::byte* data, const Fact& fact) {
    const Walk steps = walk({&fact});
    const T* from = reinterpret_cast<const T*>(data);
    each_run<1>(steps.dims, {&steps.strides[0]}, 0, count(steps.dims), [&](const auto& offsets, std::int64_t size) {
        for (std::int64_t i = 0; i < size; ++i)
            if (from[offsets[0] + i * steps.strides[0].back()] == 0) throw Error("an integer is divided by zero");
    });
}

}  // namespace

Loop integer_loop(Unary function, Type type) {
    return by_type(type, [&](auto zero) -> Loop {
        using T = decltype(zero);
        using U = std::make_unsigned_t<T>;
        switch (function) {
            case Unary::negative: return loop_of<T>([](T a) { return static_cast<T>(-static_cast<U>(a)); });
            case Unary::absolute: return loop_of<T>([](T a) { return static_cast<T>(a < 0 ? -static_cast<U>(a) : static_cast<U>(a)); });
            case Unary::sign: return loop_of<T>([](T a) { return static_cast<T>((a > 0) - (a < 0)); });
            default: throw Unsupported("this function of integers");
        }
    });
}

Loop integer_loop(Binary function, Type type) {
    return by_type(type, [&](auto zero) -> Loop {
        using T = decltype(zero);
        using U = std::make_unsigned_t<T>;
        switch (function) {
            case Binary::add: return loop_of_two<T>([](T a, T b) { return static_cast<T>(static_cast<U>(a) + static_cast<U>(b)); });
            case Binary::subtract: return loop_of_two<T>([](T a, T b) { return static_cast<T>(static_cast<U>(a) - static_cast<U>(b)); });
            case Binary::multiply: return loop_of_two<T>([](T a, T b) { return static_cast<T>(static_cast<U>(a) * static_cast<U>(b)); });
            case Binary::divide: return loop_of_two<T>(quotient<T>);
            case Binary::remainder: return loop_of_two<T>(remainder<T>);
            case Binary::floored_remainder:
                return loop_of_two<T>([](T a, T b) {
                    const T rest = remainder(a, b);
                    return static_cast<T>(rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest);
                });
            case Binary::minimum: return loop_of_two<T>([](T a, T b) { return a < b ? a : b; });
            case Binary::maximum: return loop_of_two<T>([](T a, T b) { return a > b ? a : b; });
            default: throw Unsupported("this function of integers");
        }
    });
}

Loop integer_power(Type base, Type exponent) {
    return by_type(base, [&](auto zero) -> Loop {
        using T = decltype(zero);
        const auto power = [](T a, auto b) { return truncated<T>(std::pow(static_cast<double>(a), static_cast<double>(b))); };
        if (exponent == Type::f32) return [power](const Runs& runs) { map_two<T, T, float>(runs, power); };
        return by_type(exponent, [&](auto other) -> Loop {
            using E = decltype(other);
            return [power](const Runs& runs) { map_two<T, T, E>(runs, power); };
        });
    });
}

void refuse_zeros(Planner& planner, const Fact& divisor) {
    const auto check = divisor.type == Type::i32 ? check_zeros<std::int32_t> : check_zeros<std::int64_t>;
    planner.step("check", {divisor}, [=](Frame& frame) { check(frame.bytes(divisor), divisor); });
}

}  // namespace featherweight
