// SPDX-License-Identifier: Apache-2.0
#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "fuse.hpp"

namespace featherweight {

namespace {

constexpr std::size_t kept_plans = 8;
constexpr std::size_t kept_arenas = 4;

std::size_t bytes_of(const Input& input) { return featherweight::bytes_of(input.type, input.dims); }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Engine::Engine(Graph graph, const Options& options)
    : graph_(fused(std::move(graph))), kernels_(kernels(options.instruction_set.c_str())), pool_(options.threads), prepared_(options.decisions) {
    for (int input : graph_.inputs)
        known_.push_back(std::find(options.known.begin(), options.known.end(), graph_.values[input].name) != options.known.end());
    if (options.threads < 1) throw Error("threads must be at least 1, not " + std::to_string(options.threads));
}

void Engine::check(const std::vector<Input>& inputs) const {
    if (inputs.size() != graph_.inputs.size())
        throw Error("the model has " + std::to_string(graph_.inputs.size()) + " inputs, and " + std::to_string(inputs.size()) + " were given");
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const Value& value = graph_.values[graph_.inputs[i]];
        const std::string name = "input '" + value.name + "'";
        if (value.type && *value.type != inputs[i].type)
            throw Error(name + " is of type " + name_of(*value.type) + "; " + name_of(inputs[i].type) + " was given");
        count(inputs[i].dims);
        if (!value.dims) continue;
        bool fits = value.dims->size() == inputs[i].dims.size();
        std::string wanted;
        for (std::size_t a = 0; a < value.dims->size(); ++a) {
            const Dim& dim = (*value.dims)[a];
            fits = fits && (dim.size < 0 || dim.size == inputs[i].dims[a]);
            wanted += (a == 0 ? "" : "x") + (dim.size >= 0 ? std::to_string(dim.size) : dim.symbol.empty() ? std::string("?") : dim.symbol);
        }
        if (!fits) throw Error(name + " is of shape " + wanted + "; " + describe(inputs[i].dims) + " was given");
    }
}

std::shared_ptr<Engine::Ready> Engine::ready(const std::vector<Input>& inputs) {
    check(inputs);
    std::vector<Dims> dims;
    for (const Input& input : inputs) dims.push_back(input.dims);
    const auto same = [&](const Ready& other) {
        if (other.dims != dims) return false;
        for (std::size_t i = 0; i < inputs.size(); ++i)
            if (other.known[i] && other.known[i]->size() > 0 && std::memcmp(other.known[i]->bytes(), inputs[i].data, bytes_of(inputs[i])) != 0) return false;
        return true;
    };
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = plans_.begin(); it != plans_.end(); ++it)
        if (same(**it)) {
            plans_.splice(plans_.begin(), plans_, it);
            return plans_.front();
        }
    std::vector<Fact> facts;
    for (const Input& input : inputs) facts.push_back({input.type, input.dims, row_major(input.dims), 0, -1, false});
    auto made = std::make_shared<Ready>();
    made->dims = dims;
    made->known.resize(inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        if (!known_[i]) continue;
        made->known[i] = Tensor(inputs[i].type, inputs[i].dims);
        if (const std::size_t bytes = bytes_of(inputs[i])) std::memcpy(made->known[i]->bytes(), inputs[i].data, bytes);
    }
    made->plan = make_plan(graph_, facts, made->known, kernels_, pool_, prepared_);
    plans_.push_front(made);
    if (plans_.size() > kept_plans) plans_.pop_back();
    return made;
}

void Engine::prepare(const std::vector<Input>& shapes) { ready(shapes); }

std::size_t Engine::arena_bytes(const std::vector<Input>& shapes) { return ready(shapes)->plan.arena_bytes; }

std::vector<Tensor> Engine::run(const std::vector<Input>& inputs, std::vector<Spent>* spent) {
    const std::shared_ptr<Ready> ready = this->ready(inputs);
    const Plan& plan = ready->plan;
    Memory arena;
    {
        std::lock_guard<std::mutex> lock(ready->mutex);
        if (!ready->arenas.empty()) {
            arena = std::move(ready->arenas.back());
            ready->arenas.pop_back();
        }
    }
    if (arena.data() == nullptr) arena = Memory(plan.arena_bytes);

    std::vector<std::byte*> bases(plan.buffers.size());
    for (std::size_t i = 0; i < bases.size(); ++i) {
        const Buffer& buffer = plan.buffers[i];
        bases[i] = buffer.constant ? buffer.constant->bytes() : arena.data() + buffer.offset;
    }
    Frame frame(bases, pool_, kernels_);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const Fact& fact = plan.inputs[i];
        if (fact.constant) continue;
        copy(pool_, fact, static_cast<const std::byte*>(inputs[i].data), fact, frame.bytes(fact));
    }
    for (const Step& step : plan.steps) {
        const double begin = spent ? now() : 0;
        try {
            step.work(frame);
        } catch (const Error& error) {
            throw Error(graph_.nodes[step.node].describe() + ": " + error.what());
        }
        if (spent) {
            const Node& node = graph_.nodes[step.node];
            spent->push_back({node.name, node.op, step.what, now() - begin, step.flops, step.bytes});
        }
    }
    std::vector<Tensor> outputs;
    for (const Fact& fact : plan.outputs) {
        Tensor made(fact.type, fact.dims);
        const Fact to{fact.type, fact.dims, row_major(fact.dims), 0, -1, false};
        copy(pool_, fact, frame.bytes(fact), to, made.bytes());
        outputs.push_back(std::move(made));
    }
    std::lock_guard<std::mutex> lock(ready->mutex);
    if (ready->arenas.size() < kept_arenas) ready->arenas.push_back(std::move(arena));
    return outputs;
}

}  // namespace featherweight
