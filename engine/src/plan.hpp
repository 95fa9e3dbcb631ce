// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <any>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "graph.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace featherweight {

// A plan is a graph made concrete for given input shapes: steps in order, and where each value's elements lie.
// Values are strided views of buffers, as in NumPy: Transpose, Slice, Split, Squeeze, Expand and most Reshapes move nothing.
// A matrix product over tokens leaves its result channel by channel (tokens innermost), and whatever comes next reads it so.

struct Buffer {
    std::size_t bytes = 0;
    std::optional<Tensor> constant;  // what it holds, where it is known while planning; its dims say nothing
    std::size_t offset = 0;          // in the arena, where it is not
    int first = -1, last = -1;       // steps between which it is alive
    std::size_t period = 0;          // bytes after which the same positions come again, for the next channel; 0: nothing of the kind
};

struct Fact {
    Type type = Type::f32;
    Dims dims;
    Dims strides;             // in elements; 0 along a broadcast axis; never negative except through a Slice with a negative step
    std::int64_t offset = 0;  // in elements, of the first one
    int buffer = -1;
    bool constant = false;    // its elements are known while planning

    std::int64_t size() const { return count(dims); }
    int rank() const { return static_cast<int>(dims.size()); }
    bool is_row_major() const;  // dense, last axis innermost
};

// What a step sees while it runs.
class Frame {
public:
    Frame(const std::vector<std::byte*>& bases, Pool& pool, const Kernels& kernels) : pool(pool), kernels(kernels), bases_(bases) {}
    template <class T> T* at(const Fact& fact) const { return reinterpret_cast<T*>(bases_[fact.buffer]) + fact.offset; }
    std::byte* bytes(const Fact& fact) const { return bases_[fact.buffer] + fact.offset * static_cast<std::int64_t>(size_of(fact.type)); }
    Pool& pool;
    const Kernels& kernels;

private:
    const std::vector<std::byte*>& bases_;
};

using Work = std::function<void(Frame&)>;

struct Step {
    int node = -1;       // index in Graph::nodes
    std::string what;    // what the profile calls it: "Conv sparse 4x", "copy"
    Work work;
    double flops = 0;    // multiply-adds count two; zeros that are skipped count none
    double bytes = 0;    // read and written, each once
};

struct Plan {
    std::vector<Buffer> buffers;
    std::vector<Step> steps;
    std::vector<Fact> inputs;   // where the graph's inputs are to be put: row-major
    std::vector<Fact> outputs;  // where its outputs are found: views of any strides
    std::size_t arena_bytes = 0;
    bool by_image = false;      // the batch's images do not meet, see images.hpp
};

// What was found by measuring, by what it was asked of: texts, so that they can be kept for the next time the model is loaded.
using Decisions = std::map<std::string, std::string>;

// What outlives a plan and is shared by all plans of one model: packed weights, by node and tag, and decisions. What depends
// on more than the file (weights that are sliced as an input's shape says) is a plan's own.
class Prepared {
public:
    explicit Prepared(Decisions decisions = {}) : decisions_(std::move(decisions)) {}

    template <class T, class Make> std::shared_ptr<const T> get(int node, const std::string& tag, Make make) {
        std::lock_guard<std::mutex> lock(mutex_);
        std::any& slot = kept_[std::to_string(node) + "/" + tag];
        if (!slot.has_value()) slot = std::shared_ptr<const T>(std::make_shared<T>(make()));
        return std::any_cast<std::shared_ptr<const T>>(slot);
    }

    Decisions decisions() const {
        std::lock_guard<std::mutex> lock(mutex_);
        return decisions_;
    }
    std::size_t decided() const {
        std::lock_guard<std::mutex> lock(mutex_);
        return decisions_.size();
    }
    std::string decision(const std::string& key) const {  // "" where there is none yet
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = decisions_.find(key);
        return found == decisions_.end() ? "" : found->second;
    }
    void decide(const std::string& key, const std::string& text) {
        std::lock_guard<std::mutex> lock(mutex_);
        decisions_[key] = text;
    }

private:
    mutable std::mutex mutex_;
    std::unordered_map<std::string, std::any> kept_;
    Decisions decisions_;
};

// Handed to an op's rule: its inputs as facts, and the means to make outputs and steps. A rule either makes every output
// of its node, or throws Unsupported and is as if it had not been called.
//
// A rule whose inputs are all constants is run as any other; its steps are then carried out at once, and its outputs are
// constants. So there is no second implementation of an op for shapes, and ops on shapes must accept i64.
class Planner {
public:
    const Node& node() const;
    int opset() const;
    int inputs() const;                 // how many, trailing ones that are left out not counted
    bool has(int input) const;          // is it there
    const Fact& in(int input) const;    // throws Error where it is left out
    int wanted() const;                 // how many outputs the node names
    bool wants(int output) const;

    // The elements of a constant input, row-major; throws Unsupported("... must be constant") where it is not one.
    Tensor constant(int input) const;
    std::vector<std::int64_t> integers(int input) const;  // the same of an i64 or i32 tensor

    // A new output: dense, its axes stored in `order` (outermost first; row-major where empty).
    Fact make(int output, Type type, const Dims& dims, const std::vector<int>& order = {});
    // An output that is another view of what exists.
    void alias(int output, const Fact& view);
    // An output that is known without its inputs' elements, as Shape's is.
    void give(int output, const Tensor& tensor);
    // Throws Unsupported where this many bytes more of constants are more than a plan may compute.
    void afford(std::size_t bytes);
    // A constant that is no output: what a rule works out while planning and its step reads.
    Fact hold(const Tensor& tensor);
    // Room that only this step uses: dense, row-major.
    Fact scratch(Type type, const Dims& dims);
    // The same elements, dense in `order`: `fact` itself where it is so already, or a copy that a step of its own makes;
    // that of a constant is made at once.
    Fact dense(const Fact& fact, const std::vector<int>& order = {});

    // Adds a step. `touches`: every fact that it reads or writes; buffers live as long as steps that touch them.
    void step(std::string what, std::vector<Fact> touches, Work work, double flops = 0, double bytes = 0);

    const Kernels& kernels() const;
    Pool& pool() const;
    int threads() const;
    template <class T, class Make> std::shared_ptr<const T> prepared(const std::string& tag, Make make) {
        return store().get<T>(index(), tag, std::move(make));
    }
    int index() const;  // of the node
    Prepared& store() const;
    Fact fact(int value) const;  // of a value by its number: Finish::residual

    struct State;
    explicit Planner(State& state) : state_(state) {}

private:
    State& state_;
};

// Throws Unsupported with its node, or Error. `inputs` has type and dims of each graph input, and `known` the elements of
// those that the plan is made for: they are constants in it.
Plan make_plan(const Graph& graph, const std::vector<Fact>& inputs, const std::vector<std::optional<Tensor>>& known, const Kernels& kernels,
               Pool& pool, Prepared& prepared);

// Copies elements from one view to another of equal type and dims, in parallel, by blocks where axes change places.
void copy(Pool& pool, const Fact& from, const std::byte* source, const Fact& to, std::byte* target);

using Rule = void (*)(Planner&);
struct Op {
    const char* name;
    Rule rule;
};
// ops/<room>.cpp each give a table; ops.cpp puts them together. Domain "" only.
const Rule* find_rule(const std::string& domain, const std::string& op);
std::vector<std::string> op_names();

// Strided helpers that rules share (strides.cpp).
Fact transposed(const Fact& fact, const std::vector<int>& axes);      // output axis i is input axis axes[i]
Fact broadcast_to(const Fact& fact, const Dims& dims);                // NumPy's rules; throws Error where it does not fit
std::optional<Fact> reshaped(const Fact& fact, const Dims& dims);     // a view, or nothing where elements would have to move
std::vector<int> storage_order(const Fact& fact);                     // axes by falling stride: outermost first
Dims broadcast_dims(const Dims& a, const Dims& b);                    // throws Error
int axis_of(std::int64_t axis, int rank);                             // negative counts from the end; throws Error

// Dims and strides of several views over the same elements, with size-1 axes dropped, axes that are adjacent in all of
// them merged, and the order that is innermost for the first. What elementwise loops walk on.
struct Walk {
    Dims dims;
    std::vector<Dims> strides;  // by view, then axis; the last axis is the innermost
};
Walk walk(const std::vector<const Fact*>& views);

}  // namespace featherweight
