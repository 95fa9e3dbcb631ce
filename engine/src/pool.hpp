// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>

namespace featherweight {

// Threads that stay, one engine's own. A region runs `work(part)` for every part in [0, parts), parts being few (about the
// number of threads, or as many as balance well). A second caller while a region runs does its parts itself, so that
// `Engine::run` may be called from any number of threads. An exception in a part is thrown again in the caller.
// A part never calls `run` of its own pool: that throws Error.
class Pool {
public:
    explicit Pool(int threads);  // including the caller's own; at least 1
    ~Pool();
    int threads() const;
    void run(int parts, const std::function<void(int part)>& work);

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace featherweight
