// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace featherweight {

// The model's bytes or the user's inputs are wrong. The text names the node or value and what to do.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A sound model asks for what this engine does not do. Whoever splits the graph hands `node` to another runtime.
struct Unsupported : Error {
    Unsupported(const std::string& text, int node_index = -1, std::vector<std::string> made = {})
        : Error(text), node(node_index), makes(std::move(made)) {}
    int node;  // index in Graph::nodes, or -1 until the planner has filled it in
    std::vector<std::string> makes;  // the values that the node makes, by which it is found in the file; likewise
};

}  // namespace featherweight
