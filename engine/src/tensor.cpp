// SPDX-License-Identifier: Apache-2.0
#include "tensor.hpp"

#include <unistd.h>

#include <array>
#include <limits>

namespace featherweight {

namespace {

struct Facts {
    Type type;
    std::int64_t onnx;
    std::size_t bytes;
    const char* name;
};

// In the order of Type, so that a type is its own index.
constexpr std::array<Facts, 13> types{{
    {Type::f32, 1, 4, "float"},
    {Type::f64, 11, 8, "double"},
    {Type::f16, 10, 2, "float16"},
    {Type::bf16, 16, 2, "bfloat16"},
    {Type::i8, 3, 1, "int8"},
    {Type::i16, 5, 2, "int16"},
    {Type::i32, 6, 4, "int32"},
    {Type::i64, 7, 8, "int64"},
    {Type::u8, 2, 1, "uint8"},
    {Type::u16, 4, 2, "uint16"},
    {Type::u32, 12, 4, "uint32"},
    {Type::u64, 13, 8, "uint64"},
    {Type::boolean, 9, 1, "bool"},
}};

// What ONNX has besides, for messages.
struct Other {
    std::int64_t onnx;
    const char* name;
};
constexpr std::array<Other, 15> others{{
    {8, "string"},
    {14, "complex64"},
    {15, "complex128"},
    {17, "float8e4m3fn"},
    {18, "float8e4m3fnuz"},
    {19, "float8e5m2"},
    {20, "float8e5m2fnuz"},
    {21, "uint4"},
    {22, "int4"},
    {23, "float4e2m1"},
    {24, "float8e8m0"},
    {25, "uint2"},
    {26, "int2"},
    {27, "float6e2m3"},
    {28, "float6e3m2"},
}};

const Facts& of(Type type) { return types[static_cast<std::size_t>(type)]; }

}  // namespace

std::size_t size_of(Type type) { return of(type).bytes; }
const char* name_of(Type type) { return of(type).name; }
std::int64_t to_onnx(Type type) { return of(type).onnx; }

Type from_onnx(std::int64_t number) {
    for (const Facts& each : types)
        if (each.onnx == number) return each.type;
    for (const Other& each : others)
        if (each.onnx == number) throw Unsupported(std::string("the engine holds no elements of type ") + each.name);
    throw Unsupported("the engine holds no elements of ONNX's type " + std::to_string(number));
}

std::int64_t count(const Dims& dims) {
    // No tensor in memory has more; and a product that stays below this cannot overflow once multiplied by 8 bytes.
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max() / 64;
    std::int64_t product = 1;  // of what is not zero, so that the strides of a tensor without elements do not overflow either
    bool empty = false;
    for (std::int64_t size : dims) {
        if (size < 0) throw Error("a tensor of shape " + describe(dims) + " has a negative size");
        if (size == 0) empty = true;
        if (size > 0 && product > most / size) throw Error("a tensor of shape " + describe(dims) + " is too large");
        if (size > 0) product *= size;
    }
    return empty ? 0 : product;
}

std::string describe(const Dims& dims) {
    if (dims.empty()) return "a scalar";
    std::string text;
    for (std::int64_t size : dims) text += (text.empty() ? "" : "x") + std::to_string(size);
    return text;
}

std::size_t bytes_of(Type type, const Dims& dims) {
    const std::size_t bytes = static_cast<std::size_t>(count(dims)) * size_of(type);
    if (bytes > Memory::most()) throw Error("a tensor of shape " + describe(dims) + " does not fit into this machine's memory");
    return bytes;
}

Dims row_major(const Dims& dims) {
    count(dims);
    Dims strides(dims.size());
    std::int64_t stride = 1;
    for (std::size_t i = dims.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= dims[i];
    }
    return strides;
}

std::size_t Memory::most() {
#if defined(FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION)
    return std::size_t{256} << 20;  // a fuzzer is not to spend its time on what is large
#else
    static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
#endif
}

Memory::Memory(std::size_t bytes) : size_(bytes) {
    // The system would promise more than it has, and end the process once it is asked to keep its word.
    if (bytes > most()) throw Error(std::to_string(bytes) + " bytes do not fit into this machine's memory");
    const std::size_t room = (bytes / alignment + 1) * alignment + slack;
    auto* data = static_cast<std::byte*>(::operator new(room, std::align_val_t(alignment), std::nothrow));
    if (data == nullptr) throw Error("there is no memory for " + std::to_string(bytes) + " bytes");
    std::memset(data, 0, room);
    data_.reset(data);
}

void Memory::Free::operator()(std::byte* data) const { ::operator delete(data, std::align_val_t(alignment)); }

Tensor::Tensor(Type type, Dims dims) : type(type), dims(std::move(dims)) {
    memory = std::make_shared<Memory>(bytes_of(type, this->dims));
}

}  // namespace featherweight
