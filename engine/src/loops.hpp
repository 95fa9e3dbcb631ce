// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "plan.hpp"

namespace featherweight {

using Loop = std::function<void(const Runs&)>;

// One pass over a piece of the output, while that piece is in the nearest cache. An op is one stage or a few: a sum of four
// inputs is three, and an activation that was fused into it a fourth.
struct Stage {
    Loop loop;
    std::vector<int> in;  // operands: which of the step's views, or `made`
    bool clamps = false;  // the loop clamps its result between the two
    float low = -std::numeric_limits<float>::infinity();
    float high = std::numeric_limits<float>::infinity();
};
constexpr int made = -1;  // what the stages before left in the output

// Elements that are worth a thread of their own, for what costs a cycle a register and for what costs tens.
constexpr std::int64_t light = 1 << 14, heavy = 1 << 12;

// Adds a step that makes `out` (which Planner::make has made, and so is dense) of `views`, broadcast to its dims. An operand
// is read where it lies if it lies as the output does, or stays the same or moves one by one along the output's innermost
// axis; else it is gathered, piece by piece.
void add_loops(Planner& planner, std::string what, const Fact& out, const std::vector<Fact>& views, std::vector<Stage> stages,
               std::int64_t least = light);

// The largest input, of those the first that is no constant; and the order of storage that it gives a result.
const Fact& leader(const std::vector<Fact>& inputs);
std::vector<int> leading_order(const std::vector<Fact>& inputs, const Dims& dims);

// `fact`, broadcast to the dims of `out` and copied first where the two are transposed to each other and it is worth it.
Fact alongside(Planner& planner, const Fact& fact, const Fact& out);

// What Node::finish asks for, once `stages` have made the output. The residual joins `views`.
void add_finish(Planner& planner, const Fact& out, std::vector<Fact>& views, std::vector<Stage>& stages);

}  // namespace featherweight
