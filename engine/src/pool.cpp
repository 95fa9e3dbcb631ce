// SPDX-License-Identifier: Apache-2.0
#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "error.hpp"
#include "seats.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace featherweight {

namespace {

// A step takes tens of microseconds and the next follows at once, so that a thread looks for work for a while before it
// sleeps: waking one through the kernel costs as much as a step.
constexpr int spins = 20000;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The regions that this thread is in a part of, from the innermost on: they may be of several pools.
class Within {
public:
    explicit Within(const Pool* pool) : pool_(pool), outer_(innermost) { innermost = this; }
    ~Within() { innermost = outer_; }
    Within(const Within&) = delete;
    Within& operator=(const Within&) = delete;

    static bool a_part_of(const Pool* pool) {
        for (const Within* each = innermost; each != nullptr; each = each->outer_)
            if (each->pool_ == pool) return true;
        return false;
    }

private:
    static thread_local const Within* innermost;
    const Pool* pool_;
    const Within* outer_;
};

thread_local const Within* Within::innermost = nullptr;

}  // namespace

void Shares::share(int tasks) {
    const std::int64_t takers = static_cast<std::int64_t>(stretches_.size());
    for (std::int64_t i = 0; i < takers; ++i) {
        stretches_[i].next.store(static_cast<int>(tasks * i / takers), std::memory_order_relaxed);
        stretches_[i].end = static_cast<int>(tasks * (i + 1) / takers);
    }
}

int Shares::next(int taker) {
    const int takers = static_cast<int>(stretches_.size());
    for (int i = 0; i < takers; ++i) {
        Stretch& stretch = stretches_[(taker + i) % takers];
        if (stretch.next.load(std::memory_order_relaxed) >= stretch.end) continue;
        const int task = stretch.next.fetch_add(1, std::memory_order_relaxed);
        if (task < stretch.end) return task;
    }
    return -1;
}

struct Pool::State {
    explicit State(int threads) : shares(threads), seats(threads) {}

    std::vector<std::thread> workers;
    std::mutex caller;  // held by whoever has the workers

    // A region: its work, the parts left to take, and the gate: its number, whether it is open, the workers inside. A worker
    // that comes when it is closed was not needed, and is not waited for: on a busy machine it may come milliseconds late.
    const std::function<void(int)>* work = nullptr;
    Shares shares;
    Seats seats;
    static constexpr std::uint64_t open = 1 << 16, inside = open - 1;
    std::atomic<std::uint64_t> gate{0};
    static std::uint64_t number(std::uint64_t gate) { return gate / (2 * open); }
    std::exception_ptr failure;
    std::mutex failing;

    std::atomic<bool> stop{false};
    std::atomic<int> asleep{0};
    std::mutex sleeping;
    std::condition_variable wake;

    void take(const Pool* pool, int thread) {
        const Within within(pool);
        seats.sit(thread);
        for (int part; (part = shares.next(thread)) >= 0;) {
            try {
                (*work)(part);
            } catch (...) {
                std::lock_guard<std::mutex> lock(failing);
                if (!failure) failure = std::current_exception();
            }
        }
    }

    void serve(const Pool* pool, int thread) {
        std::uint64_t seen = 0;
        const auto fresh = [&](std::uint64_t now) { return (now & open) != 0 && number(now) != seen; };
        while (true) {
            std::uint64_t now = gate.load(std::memory_order_acquire);
            for (int i = 0; !fresh(now) && i < spins && !stop.load(std::memory_order_relaxed); ++i) {
                relax();
                now = gate.load(std::memory_order_acquire);
            }
            if (!fresh(now)) {
                std::unique_lock<std::mutex> lock(sleeping);
                asleep.fetch_add(1);
                wake.wait(lock, [&] { return stop.load() || fresh(gate.load()); });
                asleep.fetch_sub(1);
                now = gate.load(std::memory_order_acquire);
            }
            if (stop.load()) return;
            while (fresh(now)) {
                if (!gate.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) continue;
                seen = number(now);
                take(pool, thread);
                gate.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    void end() {
        {
            std::lock_guard<std::mutex> lock(sleeping);
            stop.store(true);
        }
        wake.notify_all();
        for (std::thread& worker : workers) worker.join();
    }
};

Pool::Pool(int threads) : state_(std::make_unique<State>(std::max(threads, 1))) {
    try {
        for (int i = 1; i < threads; ++i) state_->workers.emplace_back([this, i] { state_->serve(this, i); });
    } catch (const std::system_error&) {
        state_->end();  // those that have been started
        throw Error("the system does not start " + std::to_string(threads) + " threads");
    }
}

Pool::~Pool() { state_->end(); }

int Pool::threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void Pool::run(int parts, const std::function<void(int)>& work) {
    if (Within::a_part_of(this)) throw Error("a part of a parallel region asks for a region itself");
    State& state = *state_;
    std::unique_lock<std::mutex> lock(state.caller, std::try_to_lock);
    if (parts <= 1 || state.workers.empty() || !lock.owns_lock()) {
        const Within within(this);
        for (int part = 0; part < parts; ++part) work(part);
        return;
    }
    state.work = &work;
    state.shares.share(parts);
    // In one order with `asleep`: either the worker sees the region or we see that it sleeps.
    state.gate.store(2 * State::open * (State::number(state.gate.load(std::memory_order_relaxed)) + 1) + State::open);
    if (state.asleep.load() > 0) {
        { std::lock_guard<std::mutex> wait(state.sleeping); }
        state.wake.notify_all();
    }
    state.take(this, 0);
    state.gate.fetch_and(~State::open, std::memory_order_acquire);
    for (int i = 0; (state.gate.load(std::memory_order_acquire) & State::inside) != 0; ++i) {
        if (i < spins)
            relax();
        else
            std::this_thread::yield();  // more threads than cores: let the last one have ours
    }
    if (state.failure) std::rethrow_exception(std::exchange(state.failure, nullptr));  // the caller's alone from here on
}

}  // namespace featherweight
