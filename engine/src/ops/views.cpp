// SPDX-License-Identifier: Apache-2.0
#include "views.hpp"

namespace featherweight {

Fact sliced(const Fact& fact, int axis, std::int64_t start, std::int64_t size, std::int64_t step) {
    Fact made = fact;
    made.dims[axis] = size;
    if (made.size() == 0) return made;  // it has no first element to point at
    made.offset += start * fact.strides[axis];
    made.strides[axis] *= step;
    return made;
}

void give_reshaped(Planner& planner, const Fact& fact, const Dims& dims) {
    const std::optional<Fact> view = reshaped(fact, dims);
    planner.alias(0, view ? *view : *reshaped(planner.dense(fact), dims));
}

void add_moves(Planner& planner, std::string what, const Fact& out, std::vector<Move> moves) {
    std::vector<Fact> touches{out};
    double bytes = 0;
    for (const Move& move : moves) {
        touches.push_back(move.from);
        bytes += 2.0 * static_cast<double>(move.to.size()) * static_cast<double>(size_of(move.to.type));
    }
    const auto work = [moves = std::move(moves)](Frame& frame) {
        for (const Move& move : moves) copy(frame.pool, move.from, frame.bytes(move.from), move.to, frame.bytes(move.to));
    };
    planner.step(std::move(what), std::move(touches), work, 0, bytes);
}

}  // namespace featherweight
