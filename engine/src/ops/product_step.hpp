// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "../ops.hpp"
#include "../product.hpp"

namespace featherweight {

// What convolutions and matrix products share: how a product becomes a step.

// What a step of a product needs at run time.
struct Places {
    Fact in, out;
    std::optional<Fact> scratch, bias, residual;

    std::vector<Fact> touched() const;
    Finisher bound(const Frame& frame, Finisher finisher) const;  // with pointers
};

// Constant weights [rows][depth] of a product, made for whoever looks at them: plans after the first find them packed already,
// and none keeps a turned copy of what the graph has.
struct Weights {
    Weights(const Tensor& held) : dims(held.dims), make([held] { return held; }) {}
    Weights(Dims dims, std::function<Tensor()> make) : dims(std::move(dims)), make(std::move(make)) {}

    Dims dims;
    std::function<Tensor()> make;
};

// A finisher without pointers, as the node says.
Finisher finisher_of(const Finish& finish);

void require_floats(const Planner& planner);

// Rows, columns, tiles and tasks are counted by int.
void require_countable(const Dims& weights, const Fact& out);

// The residual as the output lies, or nothing.
std::optional<Fact> residual_of(Planner& planner, const Dims& dims, const std::vector<int>& order);

// A product with constant weights [rows][depth], as one step. `groups` of it lie side by side: inputs, rows and outputs.
void add_product(Planner& planner, const Geometry& g, int groups, std::ptrdiff_t group_in, std::ptrdiff_t group_out, const Weights& weights,
                 Places places);

// A depthwise convolution, as one step: `multiplier` planes a channel (ops/depthwise.cpp).
void add_depthwise(Planner& planner, const Geometry& g, int channels, int multiplier, std::ptrdiff_t image_out, const Tensor& weights, Places places);

}  // namespace featherweight
