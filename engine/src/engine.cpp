// SPDX-License-Identifier: Apache-2.0
#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>

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
    if (made->plan.by_image) made->one = one_by_one(inputs, *made);
    plans_.push_front(made);
    if (plans_.size() > kept_plans) plans_.pop_back();
    return made;
}

void Engine::prepare(const std::vector<Input>& shapes) { ready(shapes); }

std::size_t Engine::arena_bytes(const std::vector<Input>& shapes) {
    const std::shared_ptr<Ready> ready = this->ready(shapes);
    return (ready->one ? *ready->one : *ready).plan.arena_bytes;
}

// Ready for a single image where that is faster for each of the batch than all at once, as measured with numbers of no
// meaning; nothing where it is not, or where a single image cannot be planned for.
std::shared_ptr<Engine::Ready> Engine::one_by_one(const std::vector<Input>& inputs, Ready& whole) {
    const std::int64_t batch = inputs[0].dims[0];
    double flops = 0;
    for (const Step& step : whole.plan.steps) flops += step.flops;
    std::string key = std::string("images/") + kernels_.name + "/" + std::to_string(pool_.threads());
    for (const Input& input : inputs) key += "/" + describe(input.dims);
    key += "/" + std::to_string(whole.plan.steps.size()) + " steps, " + std::to_string(std::llround(flops / 1e6)) + " MFLOP";
    const std::string decision = prepared_.decision(key);
    if (decision == "together") return nullptr;

    auto one = std::make_shared<Ready>();
    std::vector<Fact> facts;
    for (const Input& input : inputs) {
        Dims dims = input.dims;
        dims[0] = 1;
        facts.push_back({input.type, dims, row_major(dims), 0, -1, false});
    }
    one->known.resize(inputs.size());
    try {
        one->plan = make_plan(graph_, facts, one->known, kernels_, pool_, prepared_);
    } catch (const Unsupported&) {
        return nullptr;
    } catch (const Error&) {  // a size of the batch stands in the file
        return nullptr;
    }
    for (std::size_t i = 0; i < whole.plan.outputs.size(); ++i) {
        Dims dims = one->plan.outputs[i].dims;
        if (dims.empty() || dims[0] != 1 || one->plan.outputs[i].type != whole.plan.outputs[i].type) return nullptr;
        dims[0] = batch;
        if (dims != whole.plan.outputs[i].dims) return nullptr;
    }
    if (decision == "one by one") return one;

    std::vector<Memory> memories;
    const auto room = [&](std::size_t bytes) { return memories.emplace_back(bytes).data(); };
    std::vector<const std::byte*> from;
    std::vector<std::byte*> to;
    for (const Input& input : inputs) {
        std::byte* data = room(bytes_of(input));
        if (input.type == Type::f32)
            for (std::int64_t i = 0; i < count(input.dims); ++i) reinterpret_cast<float*>(data)[i] = static_cast<float>(i % 7) - 3.0f;
        from.push_back(data);
    }
    for (const Fact& fact : whole.plan.outputs) to.push_back(room(featherweight::bytes_of(fact.type, fact.dims)));
    constexpr double patience = 1;  // seconds
    double together = std::numeric_limits<double>::infinity(), apart = together;
    try {
        const double start = now();
        for (int round = 0; round < 2 || (round < 4 && now() - start < patience); ++round) {  // the first touches the memory
            const double begin = now();
            run(whole, from, to, nullptr);
            const double middle = now();
            for (std::int64_t i = 0; i < batch; ++i) run(*one, from, to, nullptr);
            together = std::min(together, middle - begin);
            apart = std::min(apart, now() - middle);
        }
    } catch (const Error&) {  // numbers of no meaning may be none that the model takes
        return nullptr;
    }
    const bool better = apart < 0.97 * together;
    prepared_.decide(key, better ? "one by one" : "together");
    (better ? whole : *one).arenas.clear();
    return better ? one : nullptr;
}

std::vector<Tensor> Engine::run(const std::vector<Input>& inputs, std::vector<Spent>* spent) {
    const std::shared_ptr<Ready> ready = this->ready(inputs);
    std::vector<const std::byte*> from;
    for (const Input& input : inputs) from.push_back(static_cast<const std::byte*>(input.data));
    std::vector<Tensor> outputs;
    std::vector<std::byte*> to;
    for (const Fact& fact : ready->plan.outputs) {
        outputs.emplace_back(fact.type, fact.dims);
        to.push_back(outputs.back().bytes());
    }
    if (!ready->one) {
        run(*ready, from, to, spent);
        return outputs;
    }
    const std::int64_t batch = inputs[0].dims[0];
    for (std::int64_t image = 0; image < batch; ++image) {
        std::vector<Spent> own;
        run(*ready->one, from, to, spent ? &own : nullptr);
        for (std::size_t i = 0; i < from.size(); ++i) from[i] += bytes_of(inputs[i]) / static_cast<std::size_t>(batch);
        for (std::size_t i = 0; i < to.size(); ++i)
            to[i] += featherweight::bytes_of(ready->plan.outputs[i].type, ready->plan.outputs[i].dims) / static_cast<std::size_t>(batch);
        if (!spent) continue;
        if (image == 0) *spent = own;
        for (std::size_t i = 0; image > 0 && i < own.size(); ++i) {
            (*spent)[i].seconds += own[i].seconds;
            (*spent)[i].flops += own[i].flops;
            (*spent)[i].bytes += own[i].bytes;
        }
    }
    return outputs;
}

void Engine::run(Ready& ready, const std::vector<const std::byte*>& inputs, const std::vector<std::byte*>& outputs, std::vector<Spent>* spent) {
    const Plan& plan = ready.plan;
    Memory arena;
    {
        std::lock_guard<std::mutex> lock(ready.mutex);
        if (!ready.arenas.empty()) {
            arena = std::move(ready.arenas.back());
            ready.arenas.pop_back();
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
        if (!fact.constant) copy(pool_, fact, inputs[i], fact, frame.bytes(fact));
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
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        const Fact& fact = plan.outputs[i];
        const Fact to{fact.type, fact.dims, row_major(fact.dims), 0, -1, false};
        copy(pool_, fact, frame.bytes(fact), to, outputs[i]);
    }
    std::lock_guard<std::mutex> lock(ready.mutex);
    if (ready.arenas.size() < kept_arenas) ready.arenas.push_back(std::move(arena));
}

}  // namespace featherweight
