// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "activation.hpp"
#include "tensor.hpp"

namespace featherweight {

struct Attribute {
    enum class Kind : std::uint8_t { integer, real, text, integers, reals, texts, tensor, other };
    Kind kind = Kind::other;  // other: a graph, a sparse tensor, a type; no op here takes one
    std::int64_t integer = 0;
    float real = 0;
    std::string text;
    std::vector<std::int64_t> integers;
    std::vector<float> reals;
    std::vector<std::string> texts;
    Tensor tensor;
};

// What is done to a product's or an elementwise op's result before it is stored, by `fuse`.
struct Finish {
    Activation activation = Activation::none;
    float low = 0, high = 0;   // clip: its bounds; leaky_relu: low is the slope; hard_sigmoid: low is alpha, high is beta
    int residual = -1;         // a value that is added, of the result's own shape; -1: none
    bool residual_first = true;  // added before the activation (ResNet), or after it
};

struct Node {
    std::string op, domain, name;  // domain "" is ONNX's own
    std::vector<int> inputs;       // values; -1 where an optional input is left out
    std::vector<int> outputs;      // likewise
    std::map<std::string, Attribute> attributes;
    Finish finish;

    // An attribute, or the default where the node has none; throws Error where it is of another kind.
    std::int64_t integer(const char* key, std::int64_t otherwise) const;
    float real(const char* key, float otherwise) const;
    std::string text(const char* key, const char* otherwise) const;
    std::vector<std::int64_t> integers(const char* key, std::vector<std::int64_t> otherwise = {}) const;
    bool has(const char* key) const { return attributes.count(key) != 0; }
    std::string describe() const;  // "Conv 'layer1.0.conv1'", for messages
};

struct Dim {
    std::int64_t size = -1;  // -1: known only when the model is run
    std::string symbol;      // "batch", or "" where it has no name
};

struct Value {
    std::string name;
    std::optional<Type> type;              // where the file says so
    std::optional<std::vector<Dim>> dims;  // likewise
    std::optional<Tensor> constant;
};

// A model's graph, in topological order, each value with at most one producer. `read_onnx` has checked both.
struct Graph {
    std::vector<Value> values;
    std::vector<Node> nodes;
    std::vector<int> inputs;   // initializers are constants and never inputs
    std::vector<int> outputs;
    std::int64_t opset = 0;    // of ONNX's own domain
    std::string name;

    std::vector<std::string> made_by(const Node& node) const;  // the names of its outputs
};

// Reads a ModelProto. Tensors with external data are looked up in `folder` (a plain file name below it, never a path out
// of it); where `folder` is empty they are an Error. Throws Error for bytes that are no sound model, and Unsupported for
// what a sound one may hold and the engine cannot (subgraphs are kept as Attribute::Kind::other, local functions refused).
Graph read_onnx(const std::byte* data, std::size_t size, const std::string& folder);
// The same of a file, whose folder is that of its external data. Its bytes pass through memory in pieces, so that loading
// takes little more than the constants themselves.
Graph read_onnx_file(const std::string& path);

}  // namespace featherweight
