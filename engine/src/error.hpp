// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

namespace featherweight {

// The model's bytes or the user's inputs are wrong. The text names the node or value and what to do.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A sound model asks for what this engine does not do. Whoever splits the graph hands `node` to another runtime.
struct Unsupported : Error {
    Unsupported(const std::string& text, int node_index = -1) : Error(text), node(node_index) {}
    int node;  // index in Graph::nodes, or -1 until the planner has filled it in
};

}  // namespace featherweight
