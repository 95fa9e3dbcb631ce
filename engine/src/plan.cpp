// SPDX-License-Identifier: Apache-2.0
#include "plan.hpp"

#include <algorithm>
#include <numeric>

#include "images.hpp"

namespace featherweight {

namespace {

// Of what is computed while planning. Shapes and masks are small, and weights that a graph takes apart are seldom more than
// a few hundred megabytes; a file of a few bytes can ask for any amount.
constexpr std::size_t most_evaluated = std::size_t{1} << 30;

// Bytes from a channel to the next of one image, stored in `order`: every cache line of a channel has its thread (see place).
std::size_t period_of(Type type, const Dims& dims, const std::vector<int>& order, int threads) {
    if (threads == 1 || dims.size() < 3 || dims[0] != 1) return 0;
    if (dims.size() == 3) return static_cast<std::size_t>(dims[order.empty() ? 2 : order.back()]) * size_of(type);
    return bytes_of(type, Dims(dims.begin() + 2, dims.end()));
}

}  // namespace

struct Planner::State {
    const Graph& graph;
    const Kernels& kernels;
    Pool& pool;
    Prepared& prepared;
    Plan plan;
    std::vector<std::optional<Fact>> facts;  // by value
    std::vector<bool> fixed;                 // by value: it follows from the file alone, whatever the inputs
    int node = -1;
    Prepared own{};  // of this plan alone
    std::size_t evaluated = 0;  // bytes of constants that were computed

    Fact& known(int value) {
        std::optional<Fact>& fact = facts[value];
        if (!fact && graph.values[value].constant) fact = held(*graph.values[value].constant);
        if (!fact) throw Error("value '" + graph.values[value].name + "' is used before it is made");
        return *fact;
    }

    Fact room(Type type, const Dims& dims) {
        Fact fact{type, dims, row_major(dims), 0, static_cast<int>(plan.buffers.size()), false};
        Buffer buffer;
        buffer.bytes = bytes_of(type, dims);
        plan.buffers.push_back(std::move(buffer));
        return fact;
    }

    Fact held(const Tensor& tensor) {
        Fact fact = room(tensor.type, tensor.dims);
        plan.buffers.back().constant = tensor;
        fact.constant = true;
        return fact;
    }

    // A constant's elements, row-major.
    Tensor elements(const Fact& fact) {
        const Tensor& held = *plan.buffers[fact.buffer].constant;
        if (fact.is_row_major() && fact.offset == 0 && held.type == fact.type && count(held.dims) == fact.size()) {
            Tensor same = held;
            same.dims = fact.dims;
            return same;
        }
        const std::size_t bytes = bytes_of(fact.type, fact.dims);
        if (bytes > static_cast<std::size_t>(held.size()) * size_of(held.type)) afford(bytes);  // broadcast: the file has fewer
        Tensor made(fact.type, fact.dims);
        const Fact to{fact.type, fact.dims, row_major(fact.dims), 0, -1, false};
        copy(pool, fact, held.bytes() + fact.offset * static_cast<std::int64_t>(size_of(fact.type)), to, made.bytes());
        return made;
    }

    void afford(std::size_t bytes) {
        const std::size_t most = std::min(most_evaluated, Memory::most());
        if (bytes > most - std::min(evaluated, most)) throw Unsupported("its constant result, with those before it, is too large to keep");
        evaluated += bytes;
    }

    // Carries out the steps from `begin` on, all of whose inputs are constants, and turns what they made into constants.
    void evaluate(std::size_t begin) {
        for (const Buffer& buffer : plan.buffers)
            if (!buffer.constant && buffer.first >= static_cast<int>(begin)) afford(buffer.bytes);
        std::vector<std::byte*> bases(plan.buffers.size(), nullptr);
        for (std::size_t i = 0; i < plan.buffers.size(); ++i) {
            Buffer& buffer = plan.buffers[i];
            if (!buffer.constant && buffer.first >= static_cast<int>(begin)) {
                Tensor tensor;
                tensor.type = Type::u8;
                tensor.dims = {static_cast<std::int64_t>(buffer.bytes)};
                tensor.memory = std::make_shared<Memory>(buffer.bytes);
                buffer.constant = tensor;
                buffer.first = buffer.last = -1;
            }
            if (buffer.constant) bases[i] = buffer.constant->bytes();
        }
        Frame frame(bases, pool, kernels);
        for (std::size_t i = begin; i < plan.steps.size(); ++i) plan.steps[i].work(frame);
        plan.steps.resize(begin);
    }
};

const Node& Planner::node() const { return state_.graph.nodes[state_.node]; }
int Planner::opset() const { return static_cast<int>(state_.graph.opset); }
int Planner::index() const { return state_.node; }
const Kernels& Planner::kernels() const { return state_.kernels; }
Pool& Planner::pool() const { return state_.pool; }
int Planner::threads() const { return state_.pool.threads(); }
Prepared& Planner::store() const {
    for (int input : node().inputs)
        if (input >= 0 && state_.known(input).constant && !state_.fixed[input]) return state_.own;
    return state_.prepared;
}
Fact Planner::fact(int value) const { return state_.known(value); }

int Planner::inputs() const {
    std::size_t size = node().inputs.size();
    while (size > 0 && node().inputs[size - 1] < 0) --size;
    return static_cast<int>(size);
}

bool Planner::has(int input) const { return input < inputs() && node().inputs[input] >= 0; }

const Fact& Planner::in(int input) const {
    if (!has(input)) throw Error(node().describe() + " lacks its input " + std::to_string(input));
    return state_.known(node().inputs[input]);
}

int Planner::wanted() const { return static_cast<int>(node().outputs.size()); }
bool Planner::wants(int output) const { return output < wanted() && node().outputs[output] >= 0; }

Tensor Planner::constant(int input) const {
    const Fact& fact = in(input);
    if (!fact.constant)
        throw Unsupported("its input " + std::to_string(input) + " ('" + state_.graph.values[node().inputs[input]].name +
                          "') must be a constant");
    return state_.elements(fact);
}

std::vector<std::int64_t> Planner::integers(int input) const {
    const Tensor tensor = constant(input);
    const std::size_t size = static_cast<std::size_t>(tensor.size());
    if (tensor.type == Type::i32) return {tensor.as<std::int32_t>(), tensor.as<std::int32_t>() + size};
    return {tensor.as<std::int64_t>(), tensor.as<std::int64_t>() + size};
}

Fact Planner::make(int output, Type type, const Dims& dims, const std::vector<int>& order) {
    Fact fact = state_.room(type, dims);
    if (!order.empty()) {
        std::int64_t stride = 1;
        for (std::size_t i = order.size(); i-- > 0;) {
            fact.strides[order[i]] = stride;
            stride *= dims[order[i]];
        }
    }
    state_.plan.buffers.back().period = period_of(type, dims, order, threads());
    alias(output, fact);
    return fact;
}

void Planner::alias(int output, const Fact& view) {
    if (view.dims.size() > most_axes) throw Unsupported("its result has more than " + std::to_string(most_axes) + " axes");
    if (wants(output)) state_.facts[node().outputs[output]] = view;
}

void Planner::give(int output, const Tensor& tensor) { alias(output, state_.held(tensor)); }

void Planner::afford(std::size_t bytes) { state_.afford(bytes); }

Fact Planner::hold(const Tensor& tensor) { return state_.held(tensor); }

Fact Planner::scratch(Type type, const Dims& dims) { return state_.room(type, dims); }

Fact Planner::dense(const Fact& fact, const std::vector<int>& order) {
    Fact made = fact;
    std::vector<int> axes = order;
    if (axes.empty()) {
        axes.resize(fact.dims.size());
        std::iota(axes.begin(), axes.end(), 0);
    }
    std::int64_t stride = 1;
    bool same = true;
    for (std::size_t i = axes.size(); i-- > 0;) {
        made.strides[axes[i]] = stride;
        same = same && (fact.dims[axes[i]] == 1 || fact.strides[axes[i]] == stride);
        stride *= fact.dims[axes[i]];
    }
    if (same) return fact;
    if (fact.constant) {
        const Tensor elements(fact.type, fact.dims);
        made.buffer = state_.held(elements).buffer;
        made.offset = 0;
        copy(state_.pool, fact, state_.plan.buffers[fact.buffer].constant->bytes() + fact.offset * static_cast<std::int64_t>(size_of(fact.type)),
             made, elements.bytes());
        return made;
    }
    made.buffer = state_.room(fact.type, fact.dims).buffer;
    made.offset = 0;
    made.constant = false;
    const double bytes = 2.0 * static_cast<double>(fact.size()) * static_cast<double>(size_of(fact.type));
    step("copy", {fact, made}, [fact, made](Frame& frame) { copy(frame.pool, fact, frame.bytes(fact), made, frame.bytes(made)); }, 0, bytes);
    return made;
}

void Planner::step(std::string what, std::vector<Fact> touches, Work work, double flops, double bytes) {
    const int now = static_cast<int>(state_.plan.steps.size());
    for (const Fact& fact : touches) {
        if (fact.buffer < 0) throw Error(node().describe() + " has a step that touches what lies nowhere");
        Buffer& buffer = state_.plan.buffers[fact.buffer];
        if (buffer.first < 0) buffer.first = now;
        buffer.last = now;
    }
    state_.plan.steps.push_back({state_.node, std::move(what), std::move(work), flops, bytes});
}

namespace {

// Offsets in a part of the arena that begins at `begin`, and where it ends: the largest first, each at the lowest place where
// nothing alive at the same time lies. All offsets are multiples of `unit`, from `begin` on.
std::size_t place(std::vector<Buffer>& buffers, std::vector<int> order, std::size_t begin, std::size_t unit) {
    const auto room = [&](const Buffer& buffer) { return (buffer.bytes + Memory::alignment + unit - 1) / unit * unit; };  // a register past the end
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return buffers[a].bytes > buffers[b].bytes; });
    std::vector<int> placed;  // by offset
    std::size_t end = begin;
    for (int each : order) {
        Buffer& buffer = buffers[each];
        std::size_t offset = begin;
        for (int other : placed) {
            const Buffer& there = buffers[other];
            if (there.last < buffer.first || buffer.last < there.first) continue;
            if (offset + room(buffer) <= there.offset) break;
            offset = std::max(offset, there.offset + room(there));
        }
        buffer.offset = offset;
        placed.insert(std::upper_bound(placed.begin(), placed.end(), offset,
                                       [&](std::size_t at, int other) { return at < buffers[other].offset; }),
                      each);
        end = std::max(end, offset + room(buffer));
    }
    return end;
}

// The whole arena's bytes. Pixels are shared out over threads by their position, the same way in every layer of one size; so
// buffers whose channels are equally far apart have a part of the arena of their own, in which every cache line is written by
// one thread only. Between caches a line takes as long as dozens of multiply-adds.
// That wastes room: buffers of a few channels have none of it, and where the parts together would be more than twice the
// arena that all buffers can share, they share it.
std::size_t place(std::vector<Buffer>& buffers) {
    const auto unit = [](std::size_t period) { return period == 0 ? Memory::alignment : std::lcm(period, Memory::alignment); };
    std::map<std::size_t, std::vector<int>> by_period;
    std::vector<int> all;
    for (std::size_t i = 0; i < buffers.size(); ++i) {
        const Buffer& buffer = buffers[i];
        if (buffer.constant || buffer.last < buffer.first || buffer.last < 0) continue;
        all.push_back(static_cast<int>(i));
        by_period[unit(buffer.period) <= buffer.bytes / 4 ? buffer.period : 0].push_back(static_cast<int>(i));
    }
    std::size_t end = 0;
    for (const auto& [period, members] : by_period) end = place(buffers, members, (end + unit(period) - 1) / unit(period) * unit(period), unit(period));
    if (by_period.size() < 2) return end;
    std::vector<Buffer> together = buffers;
    const std::size_t least = place(together, all, 0, Memory::alignment);
    if (end <= 2 * least) return end;
    buffers = std::move(together);
    return least;
}

// The length of the inputs' first axes, where that is more than one and the same for all.
std::optional<std::int64_t> batch_of(const std::vector<Fact>& inputs) {
    for (const Fact& fact : inputs)
        if (fact.constant || fact.rank() == 0 || fact.dims[0] < 2 || fact.dims[0] != inputs[0].dims[0]) return std::nullopt;
    return inputs.empty() ? std::nullopt : std::optional(inputs[0].dims[0]);
}

}  // namespace

Plan make_plan(const Graph& graph, const std::vector<Fact>& inputs, const std::vector<std::optional<Tensor>>& known, const Kernels& kernels,
               Pool& pool, Prepared& prepared) {
    const std::size_t values = graph.values.size();
    Planner::State state{graph, kernels, pool, prepared, {}, std::vector<std::optional<Fact>>(values), std::vector<bool>(values)};
    for (std::size_t i = 0; i < values; ++i) state.fixed[i] = graph.values[i].constant.has_value();
    for (std::size_t i = 0; i < graph.inputs.size(); ++i) {
        if (i < known.size() && known[i]) {
            const Fact fact = state.held(*known[i]);
            state.facts[graph.inputs[i]] = fact;
            state.plan.inputs.push_back(fact);
            continue;
        }
        const Fact fact = state.room(inputs[i].type, inputs[i].dims);
        Buffer& buffer = state.plan.buffers[fact.buffer];
        buffer.first = buffer.last = 0;
        buffer.period = period_of(fact.type, fact.dims, {}, pool.threads());
        state.facts[graph.inputs[i]] = fact;
        state.plan.inputs.push_back(fact);
    }
    std::optional<Images> images;
    if (const auto batch = batch_of(state.plan.inputs)) {
        images.emplace(values, *batch);
        for (int input : graph.inputs) images->hold(input);
    }
    for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
        const Node& node = graph.nodes[i];
        state.node = static_cast<int>(i);
        const std::size_t begin = state.plan.steps.size();
        Planner planner(state);
        try {
            const Rule* rule = find_rule(node.domain, node.op);
            if (rule == nullptr) throw Unsupported("there is no such op in the engine");
            const int added = node.finish.residual;
            bool constant = added < 0 || state.known(added).constant, fixed = added < 0 || state.fixed[added];
            for (int input : node.inputs) {
                constant = constant && (input < 0 || state.known(input).constant);
                fixed = fixed && (input < 0 || state.fixed[input]);
            }
            (*rule)(planner);
            for (int output : node.outputs) {
                if (output < 0) continue;
                if (!state.facts[output]) throw Unsupported("it does not give output '" + graph.values[output].name + "'");
                state.fixed[output] = fixed;
            }
            if (constant) {
                state.evaluate(begin);
                for (int output : node.outputs)
                    if (output >= 0) state.facts[output]->constant = true;
            }
            if (images && !images->follow(planner, state.fixed)) images.reset();
        } catch (const Unsupported& refusal) {
            throw Unsupported(node.describe() + ": " + refusal.what(), static_cast<int>(i), graph.made_by(node));
        } catch (const Error& error) {
            throw Error(node.describe() + ": " + error.what());
        }
    }
    const int end = static_cast<int>(state.plan.steps.size());
    for (int output : graph.outputs) {
        const Fact fact = state.known(output);
        Buffer& buffer = state.plan.buffers[fact.buffer];
        if (buffer.first < 0) buffer.first = 0;
        buffer.last = end;
        state.plan.outputs.push_back(fact);
    }
    state.plan.by_image = images && std::all_of(graph.outputs.begin(), graph.outputs.end(), [&](int output) { return images->held(output); });
    state.plan.arena_bytes = place(state.plan.buffers);
    return std::move(state.plan);
}

}  // namespace featherweight
