// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "graph.hpp"
#include "shapes.hpp"

namespace featherweight {

// A graph while it is rewritten. A rewrite replaces the last node of what it matches, so that whatever the new node reads
// is there by then, and values keep their numbers; nodes that nothing reads any more go by themselves.
class Edit {
public:
    explicit Edit(Graph graph);

    const Graph& graph() const { return graph_; }
    bool has(int node) const { return !gone_[node]; }
    const Node& node(int number) const { return graph_.nodes[number]; }
    const Known& known(int value) const { return known_[value]; }

    // The node that makes a value, where it is this op of ONNX's own; else null.
    const Node* maker(int value, const char* op) const;
    const Node* maker(int value) const;
    int place(int value) const { return maker_[value]; }  // of its maker among the nodes
    // It is read once and no output of the graph: who takes its reader's place may take its maker's too.
    bool inside(int value) const { return reads_[value] == 1 && !output_[value]; }

    const Tensor* constant(int value) const;
    // A constant number, which leaves the shape of `beside` as it is when it is broadcast to it.
    std::optional<double> scalar(int value, int beside) const;
    int add(const std::string& name, Tensor constant);

    void replace(int number, Node with);
    Graph take();

private:
    void release(int value);

    Graph graph_;
    std::vector<Known> known_;
    std::vector<int> maker_;       // by value: a node, or -1
    std::vector<std::int64_t> reads_;
    std::vector<bool> output_;
    std::vector<bool> gone_;       // by node
};

// The inputs of a node and its residual.
std::vector<int> reads_of(const Node& node);

// What fuse.cpp does at each node, in order; each says whether it has replaced it.
bool recognise(Edit& edit, int number);   // patterns.cpp: GELU, SiLU, hard-swish, LayerNorm, ... in pieces
bool fold_weights(Edit& edit, int number);  // weights.cpp: what multiplies and shifts a product's channels

}  // namespace featherweight
