// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "graph.hpp"
#include "kernels.hpp"
#include "plan.hpp"
#include "pool.hpp"

namespace featherweight {

struct Options {
    int threads = 1;
    std::string instruction_set;  // "" chooses the best
    // Inputs whose elements a plan is made for, as if they were constants: a shape that another part of a model computes.
    // They should be few and small, and follow from the other inputs' shapes, since each value of them is a plan.
    std::vector<std::string> known;
    // What an engine of this model found by measuring earlier, on this processor; what is not in it is measured.
    Decisions decisions;
};

struct Input {
    Type type = Type::f32;
    Dims dims;
    const void* data = nullptr;  // row-major, dense
};

// One step's share of a run.
struct Spent {
    std::string node, op, what;
    double seconds = 0, flops = 0, bytes = 0;
};

// A loaded model. `run` may be called from any number of threads at once. Plans are made for the shapes that come, the
// first time each comes, and the last few are kept.
class Engine {
public:
    Engine(Graph graph, const Options& options);

    const Graph& graph() const { return graph_; }
    const char* instruction_set() const { return kernels_.name; }
    int threads() const { return pool_.threads(); }

    // One input per graph input, in the graph's order; the outputs likewise, row-major. `spent` is filled where given.
    // Throws Error for inputs that do not fit the graph, and Unsupported (with its node) for what cannot be planned.
    std::vector<Tensor> run(const std::vector<Input>& inputs, std::vector<Spent>* spent = nullptr);
    // Makes the plan that `run` would, and keeps it.
    void prepare(const std::vector<Input>& shapes);
    // Bytes of the arena that a plan for these shapes needs.
    std::size_t arena_bytes(const std::vector<Input>& shapes);
    // What was measured, or given in the options: how many, and all of it.
    std::size_t decided() const { return prepared_.decided(); }
    Decisions decisions() const { return prepared_.decisions(); }

private:
    struct Ready {
        std::vector<Dims> dims;
        std::vector<std::optional<Tensor>> known;
        Plan plan;
        std::mutex mutex;
        std::vector<Memory> arenas;  // that no run is using
        std::shared_ptr<Ready> one;  // of a single image, where a batch is run faster image by image
    };

    std::shared_ptr<Ready> ready(const std::vector<Input>& inputs);
    std::shared_ptr<Ready> one_by_one(const std::vector<Input>& inputs, Ready& whole);
    void run(Ready& ready, const std::vector<const std::byte*>& inputs, const std::vector<std::byte*>& outputs, std::vector<Spent>* spent);
    void check(const std::vector<Input>& inputs) const;

    Graph graph_;
    std::vector<bool> known_;  // by input
    const Kernels& kernels_;
    Pool pool_;
    Prepared prepared_;
    std::mutex mutex_;
    std::list<std::shared_ptr<Ready>> plans_;  // the last used first
};

}  // namespace featherweight
