// SPDX-License-Identifier: Apache-2.0
// Any bytes as a model: read, and where they are one, planned for small inputs and run where that is cheap. Every outcome
// is fine but a crash, a read or write out of bounds, undefined behaviour, or memory without end.
//
// `make fuzz` builds and runs it.
#include <new>

#include "engine.hpp"

using namespace featherweight;

namespace {

constexpr std::int64_t most_elements = 1 << 14;
constexpr std::size_t most_arena = std::size_t{16} << 20;

// Sizes that are left open are 2; nothing where an input is large.
std::vector<Tensor> small_inputs(const Graph& graph) {
    std::vector<Tensor> made;
    for (const int number : graph.inputs) {
        const Value& value = graph.values[number];
        Dims dims;
        for (const Dim& dim : value.dims.value_or(std::vector<Dim>{})) dims.push_back(dim.size < 0 ? 2 : dim.size);
        if (count(dims) > most_elements) throw Error("too large to try");
        made.emplace_back(value.type.value_or(Type::f32), dims);
    }
    return made;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        Engine engine(read_onnx(reinterpret_cast<const std::byte*>(data), size, ""), Options{1, "", {}, {}});
        std::vector<Input> inputs;
        const std::vector<Tensor> tensors = small_inputs(engine.graph());
        for (const Tensor& tensor : tensors) inputs.push_back({tensor.type, tensor.dims, tensor.bytes()});
        if (engine.arena_bytes(inputs) <= most_arena) engine.run(inputs);
    } catch (const Error&) {
    } catch (const std::bad_alloc&) {
    }
    return 0;
}
