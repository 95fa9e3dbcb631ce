// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "error.hpp"

namespace featherweight {

// The element types of ONNX that the engine can hold. It computes in f32; integers and booleans carry shapes and indices.
enum class Type : std::uint8_t { f32, f64, f16, bf16, i8, i16, i32, i64, u8, u16, u32, u64, boolean };

std::size_t size_of(Type type);       // bytes of one element
const char* name_of(Type type);       // ONNX's own word for it: "float", "int64"
Type from_onnx(std::int64_t number);  // TensorProto.DataType; throws Unsupported for strings and what is not listed
std::int64_t to_onnx(Type type);

template <class T> constexpr Type type_of();
template <> constexpr Type type_of<float>() { return Type::f32; }
template <> constexpr Type type_of<double>() { return Type::f64; }
template <> constexpr Type type_of<std::int8_t>() { return Type::i8; }
template <> constexpr Type type_of<std::int16_t>() { return Type::i16; }
template <> constexpr Type type_of<std::int32_t>() { return Type::i32; }
template <> constexpr Type type_of<std::int64_t>() { return Type::i64; }
template <> constexpr Type type_of<std::uint8_t>() { return Type::u8; }
template <> constexpr Type type_of<bool>() { return Type::boolean; }

using Dims = std::vector<std::int64_t>;

constexpr std::size_t most_axes = 64;  // far more than any network has; a file that asks for a million is up to no good

std::int64_t count(const Dims& dims);     // product; throws Error where it overflows or a size is negative
std::string describe(const Dims& dims);   // "1x3x224x224", or "a scalar"
Dims row_major(const Dims& dims);         // strides in elements; throws as count does
std::size_t bytes_of(Type type, const Dims& dims);  // of such a tensor; throws Error where this machine has not as many

// 64 bytes aligned, with `slack` bytes behind the last element that may be read and written, so that vector code may
// work on whole registers.
class Memory {
public:
    static constexpr std::size_t alignment = 64;
    static constexpr std::size_t slack = 1024;

    Memory() = default;
    explicit Memory(std::size_t bytes);  // zeros; throws Error where there is not enough
    static std::size_t most();           // bytes that this machine has: no model needs more
    std::byte* data() const { return data_.get(); }
    std::size_t size() const { return size_; }

private:
    struct Free { void operator()(std::byte* data) const; };
    std::unique_ptr<std::byte, Free> data_;
    std::size_t size_ = 0;
};

// A constant: row-major, aligned, never changed once made.
struct Tensor {
    Type type = Type::f32;
    Dims dims;
    std::shared_ptr<Memory> memory;

    Tensor() = default;
    Tensor(Type type, Dims dims);  // zeros
    std::int64_t size() const { return count(dims); }
    std::byte* bytes() const { return memory->data(); }

    template <class T> T* as() const {
        if (type != type_of<T>()) throw Error(std::string("expected ") + name_of(type_of<T>()) + ", got " + name_of(type));
        return reinterpret_cast<T*>(memory->data());
    }
};

}  // namespace featherweight
