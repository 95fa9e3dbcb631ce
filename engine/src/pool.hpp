// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

namespace featherweight {

// Tasks shared out among takers: each takes a stretch of neighbours of its own first, and then what others have left. What a
// step wrote about some pixels is then mostly read by the next one in the same processor's cache, since the taker is the same.
class Shares {
public:
    explicit Shares(int takers) : stretches_(static_cast<std::size_t>(takers)) {}
    Shares(int tasks, int takers) : Shares(takers) { share(tasks); }
    void share(int tasks);  // while nobody takes
    int next(int taker);    // -1 when none is left

private:
    struct alignas(64) Stretch {  // a cache line each
        std::atomic<int> next{0};
        int end = 0;
    };
    std::vector<Stretch> stretches_;
};

// Threads that stay, one engine's own. A region runs `work(part)` for every part in [0, parts), parts being few (about the
// number of threads, or as many as balance well): those of a thread's own stretch first, see Shares. A second caller while a region runs does its parts itself, so that
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
