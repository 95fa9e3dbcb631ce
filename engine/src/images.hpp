// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "plan.hpp"

namespace featherweight {

// Follows a batch through a graph: which values hold image after image (or sequence, or row) along their first axis, each made
// of that image of the inputs alone. Then the images may as well be run one by one, which is faster where what a layer writes
// for all of them does not fit the caches. Only ops that are listed here are followed, and only where their axes are known;
// a batch that meets anything else stays together.
class Images {
public:
    Images(std::size_t values, std::int64_t batch) : batch_(batch), held_(values, false) {}
    void hold(int value) { held_[static_cast<std::size_t>(value)] = true; }
    bool held(int value) const { return held_[static_cast<std::size_t>(value)]; }
    // `planner` is at a node whose outputs have been made. `fixed`, by value: it follows from the file alone. False where
    // images meet each other, or may.
    bool follow(const Planner& planner, const std::vector<bool>& fixed);

private:
    std::int64_t batch_;
    std::vector<bool> held_;
};

}  // namespace featherweight
