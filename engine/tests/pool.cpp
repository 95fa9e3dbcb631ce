// SPDX-License-Identifier: Apache-2.0
// The pool under stress. It says nothing where all is well; under ThreadSanitizer it is where races show.
#include "pool.hpp"

#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "error.hpp"
#include "seats.hpp"
#include "test.hpp"

using namespace featherweight;

namespace {

// The parts write plain integers, which the caller reads without more ado.
void run_and_check(Pool& pool, int parts, std::vector<int>& counts) {
    counts.assign(parts, 0);
    pool.run(parts, [&](int part) { counts[part] += part + 1; });
    for (int part = 0; part < parts; ++part) EXPECT(counts[part] == part + 1);
}

void every_part_runs_once() {
    std::vector<int> counts;
    for (const int threads : {1, 2, 3, 8}) {
        Pool pool(threads);
        EXPECT(pool.threads() == threads);
        for (int round = 0; round < 50; ++round)
            for (const int parts : {0, 1, 2, 3, 7, 64}) run_and_check(pool, parts, counts);
    }
}

void one_pool_serves_many_callers() {
    Pool pool(3);
    std::vector<std::thread> callers;
    for (int i = 0; i < 6; ++i)
        callers.emplace_back([&pool] {
            std::vector<int> counts;
            for (int round = 0; round < 300; ++round) run_and_check(pool, 1 + round % 9, counts);
        });
    for (std::thread& caller : callers) caller.join();
}

void pools_stand_side_by_side() {
    std::vector<std::thread> owners;
    for (int i = 0; i < 4; ++i)
        owners.emplace_back([i] {
            for (int round = 0; round < 10; ++round) {
                Pool pool(1 + i);
                std::vector<int> counts;
                for (int k = 0; k < 20; ++k) run_and_check(pool, 5, counts);
            }
        });
    for (std::thread& owner : owners) owner.join();
}

void an_exception_reaches_the_caller_and_the_pool_goes_on() {
    for (const int threads : {1, 3}) {
        Pool pool(threads);
        std::vector<int> counts;
        for (int round = 0; round < 100; ++round) {
            EXPECT_THROWS(std::domain_error, pool.run(8, [&](int part) {
                if (part == round % 8 || part == 3) throw std::domain_error("a part fails");
            }));
            run_and_check(pool, 8, counts);
        }
    }
}

void callers_get_their_own_exceptions() {
    Pool pool(3);
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&pool, i] {
            for (int round = 0; round < 200; ++round) {
                int caught = -1;
                try {
                    pool.run(4, [&](int part) {
                        if (i % 2 == 0 && part == round % 4) throw i;
                    });
                } catch (int value) {
                    caught = value;
                }
                EXPECT(caught == (i % 2 == 0 ? i : -1));
            }
        });
    for (std::thread& caller : callers) caller.join();
}

void a_part_may_not_ask_for_a_region_of_its_own_pool() {
    for (const int threads : {1, 2, 4}) {
        Pool pool(threads), other(2);
        EXPECT_THROWS(Error, pool.run(4, [&](int) { pool.run(2, [](int) {}); }));
        std::atomic<int> count{0};
        pool.run(4, [&](int) { other.run(3, [&](int) { ++count; }); });  // another's may be asked for
        EXPECT(count == 12);
        Pool single(1);
        EXPECT_THROWS(Error, pool.run(2, [&](int) { single.run(2, [&](int) { pool.run(2, [](int) {}); }); }));
        std::vector<int> counts;
        run_and_check(pool, 5, counts);
    }
}

void threads_that_sleep_wake_up() {
    Pool pool(3);
    std::vector<int> counts;
    for (int round = 0; round < 20; ++round) {
        std::this_thread::sleep_for(std::chrono::milliseconds(round % 4));
        run_and_check(pool, 6, counts);
    }
}

#if defined(__linux__)
void a_thread_leaves_the_processor_of_one_before_it() {
    cpu_set_t allowed;
    EXPECT(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
    if (CPU_COUNT(&allowed) < 2) return;
    int first = 0;
    while (!CPU_ISSET(first, &allowed)) ++first;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    Seats seats(2);
    const auto sit = [&](int thread) {  // beginning on that processor, free to leave it
        EXPECT(sched_setaffinity(0, sizeof one, &one) == 0 && sched_setaffinity(0, sizeof allowed, &allowed) == 0);
        const bool there = sched_getcpu() == first;
        seats.sit(thread);
        const int now = sched_getcpu();
        cpu_set_t may;
        EXPECT(sched_getaffinity(0, sizeof may, &may) == 0 && CPU_EQUAL(&may, &allowed));
        return std::pair(there, now);
    };
    for (int round = 0; round < 10; ++round) {
        const auto [lower_there, lower] = sit(0);
        std::pair<bool, int> higher;
        std::thread([&] { higher = sit(1); }).join();
        if (lower_there && higher.first && lower == first) {
            EXPECT(higher.second != first);
            return;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(10));  // the system moved one of them meanwhile
    }
}
#endif

#if !SANITIZED
void a_pool_that_cannot_start_leaves_nothing_behind() {
    rlimit before{};
    getrlimit(RLIMIT_AS, &before);
    rlimit little = before;
    little.rlim_cur = std::size_t{256} << 20;  // threads have stacks of megabytes
    setrlimit(RLIMIT_AS, &little);
    const std::size_t more = std::size_t{1} << 30;
    void* granted = mmap(nullptr, more, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (granted != MAP_FAILED) {  // an emulator that knows no limits
        munmap(granted, more);
        return;
    }
    EXPECT_THROWS(Error, Pool(4000));
    setrlimit(RLIMIT_AS, &before);
    std::vector<int> counts;
    Pool pool(3);
    run_and_check(pool, 5, counts);
}
#endif

}  // namespace

int main() {
    every_part_runs_once();
    one_pool_serves_many_callers();
    pools_stand_side_by_side();
    an_exception_reaches_the_caller_and_the_pool_goes_on();
    callers_get_their_own_exceptions();
    a_part_may_not_ask_for_a_region_of_its_own_pool();
    threads_that_sleep_wake_up();
#if defined(__linux__)
    a_thread_leaves_the_processor_of_one_before_it();
#endif
#if !SANITIZED
    a_pool_that_cannot_start_leaves_nothing_behind();
#endif
}
