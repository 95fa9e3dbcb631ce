// SPDX-License-Identifier: Apache-2.0
#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

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

}  // namespace

struct Pool::State {
    std::vector<std::thread> workers;
    std::mutex caller;  // held by whoever has the workers

    // A region: its number, its work, the next part to take, the workers still in it.
    std::atomic<std::uint64_t> region{0};
    const std::function<void(int)>* work = nullptr;
    int parts = 0;
    std::atomic<int> next{0};
    std::atomic<int> inside{0};
    std::exception_ptr failure;
    std::mutex failing;

    std::atomic<bool> stop{false};
    std::atomic<int> asleep{0};
    std::mutex sleeping;
    std::condition_variable wake;

    void take() {
        for (int part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
            try {
                (*work)(part);
            } catch (...) {
                std::lock_guard<std::mutex> lock(failing);
                if (!failure) failure = std::current_exception();
            }
        }
    }

    void serve() {
        std::uint64_t seen = 0;
        while (true) {
            std::uint64_t now = region.load(std::memory_order_acquire);
            for (int i = 0; now == seen && i < spins && !stop.load(std::memory_order_relaxed); ++i) {
                relax();
                now = region.load(std::memory_order_acquire);
            }
            if (now == seen) {
                std::unique_lock<std::mutex> lock(sleeping);
                asleep.fetch_add(1);
                wake.wait(lock, [&] { return stop.load() || region.load() != seen; });
                asleep.fetch_sub(1);
                now = region.load(std::memory_order_acquire);
            }
            if (stop.load()) return;
            seen = now;
            take();
            inside.fetch_sub(1, std::memory_order_release);
        }
    }
};

Pool::Pool(int threads) : state_(std::make_unique<State>()) {
    for (int i = 1; i < threads; ++i) state_->workers.emplace_back([state = state_.get()] { state->serve(); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(state_->sleeping);
        state_->stop.store(true);
    }
    state_->wake.notify_all();
    for (std::thread& worker : state_->workers) worker.join();
}

int Pool::threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void Pool::run(int parts, const std::function<void(int)>& work) {
    State& state = *state_;
    std::unique_lock<std::mutex> lock(state.caller, std::try_to_lock);
    if (parts <= 1 || state.workers.empty() || !lock.owns_lock()) {
        for (int part = 0; part < parts; ++part) work(part);
        return;
    }
    state.work = &work;
    state.parts = parts;
    state.failure = nullptr;
    state.next.store(0, std::memory_order_relaxed);
    state.inside.store(static_cast<int>(state.workers.size()), std::memory_order_relaxed);
    state.region.fetch_add(1);  // in one order with `asleep`: either the worker sees the region or we see that it sleeps
    if (state.asleep.load() > 0) {
        { std::lock_guard<std::mutex> wait(state.sleeping); }
        state.wake.notify_all();
    }
    state.take();
    // Every worker passes through each region, so that none is still reading this one when the next begins.
    for (int i = 0; state.inside.load(std::memory_order_acquire) > 0; ++i) {
        if (i < spins)
            relax();
        else
            std::this_thread::yield();  // more threads than cores: let the last one have ours
    }
    if (state.failure) std::rethrow_exception(state.failure);
}

}  // namespace featherweight
