// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace featherweight {

// Which processor each thread of a pool is on. A thread that wakes another is often joined by it on its own processor, where
// they take turns for tens to hundreds of milliseconds while another processor is idle: whole runs. A thread that finds one of
// a lower number on its processor moves to another, and may then go anywhere again. Threads are never bound to processors:
// processes that all bind theirs to the same ones wait for each other.
class Seats {
public:
    explicit Seats(int threads) : seats_(static_cast<std::size_t>(threads)) {}
    void sit(int thread);  // by that thread itself, whenever it begins to work

private:
    struct alignas(64) Seat {  // a cache line each
        std::atomic<int> processor{-1};
        std::int64_t moved = 0;  // microseconds; its thread's own
    };
    std::vector<Seat> seats_;
};

}  // namespace featherweight
