// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "graph.hpp"

namespace featherweight {

// What can be said of a value before any shape of an input is known. A size is a number, or below zero a name: two equal
// names are equal sizes in every run.
struct Known {
    std::optional<Type> type;
    std::optional<Dims> dims;
};

// By value: from what the file says, and through the ops for which that is little work. Silence says nothing.
std::vector<Known> known_shapes(const Graph& graph);

}  // namespace featherweight
