// SPDX-License-Identifier: Apache-2.0
#include "seats.hpp"

#if defined(__linux__)

#include <sched.h>

#include <algorithm>
#include <chrono>

namespace featherweight {

void Seats::sit(int thread) {
    // Where all processors are taken, by whomever, moving helps nobody.
    constexpr std::int64_t rest = 5000;  // microseconds

    Seat& seat = seats_[static_cast<std::size_t>(thread)];
    const int here = sched_getcpu();
    if (seat.processor.load(std::memory_order_relaxed) != here) seat.processor.store(here, std::memory_order_relaxed);
    const auto lower = seats_.begin() + thread;
    if (std::none_of(seats_.begin(), lower, [&](const Seat& each) { return each.processor.load(std::memory_order_relaxed) == here; })) return;
    const std::int64_t now =
        std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
    if (now - seat.moved < rest) return;
    seat.moved = now;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;  // more processors than a set has: the system is left to it
    cpu_set_t free = allowed;
    std::for_each(seats_.begin(), lower, [&](const Seat& each) {
        if (const int taken = each.processor.load(std::memory_order_relaxed); taken >= 0 && taken < CPU_SETSIZE) CPU_CLR(taken, &free);
    });
    if (CPU_COUNT(&free) == 0) return;
    sched_setaffinity(0, sizeof free, &free);
    sched_setaffinity(0, sizeof allowed, &allowed);
    seat.processor.store(sched_getcpu(), std::memory_order_relaxed);
}

}  // namespace featherweight

#else

namespace featherweight {

void Seats::sit(int) {}

}  // namespace featherweight

#endif
