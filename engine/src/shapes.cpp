// SPDX-License-Identifier: Apache-2.0
#include "shapes.hpp"

#include <algorithm>
#include <set>

namespace featherweight {

namespace {

constexpr std::int64_t most = std::int64_t{1} << 30;  // sizes beyond it are left unsaid

struct Names {
    std::map<std::string, std::int64_t> numbers;
    std::int64_t of(const std::string& text) { return numbers.emplace(text, -1 - static_cast<std::int64_t>(numbers.size())).first->second; }
};

struct Rules {
    const Graph& graph;
    std::vector<Known>& known;
    Names& names;

    const std::optional<Dims>& dims(const Node& node, std::size_t input) const {
        static const std::optional<Dims> nothing;
        return input < node.inputs.size() && node.inputs[input] >= 0 ? known[node.inputs[input]].dims : nothing;
    }
    const Tensor* constant(const Node& node, std::size_t input) const {
        if (input >= node.inputs.size() || node.inputs[input] < 0) return nullptr;
        const auto& held = graph.values[node.inputs[input]].constant;
        return held ? &*held : nullptr;
    }
    std::optional<std::vector<std::int64_t>> integers(const Node& node, std::size_t input) const {
        const Tensor* held = constant(node, input);
        if (held == nullptr || held->type != Type::i64) return std::nullopt;
        return std::vector<std::int64_t>(held->as<std::int64_t>(), held->as<std::int64_t>() + held->size());
    }

    std::optional<Dims> broadcast(const Node& node) const {
        Dims made;
        for (std::size_t input = 0; input < node.inputs.size(); ++input) {
            if (!dims(node, input)) return std::nullopt;
            Dims more = *dims(node, input);
            if (more.size() < made.size()) more.insert(more.begin(), made.size() - more.size(), 1);
            made.insert(made.begin(), more.size() - made.size(), 1);
            for (std::size_t i = 0; i < made.size(); ++i) {
                if (made[i] == 1)
                    made[i] = more[i];
                else if (more[i] != 1 && more[i] != made[i])
                    return std::nullopt;
            }
        }
        return made;
    }

    // Spatial axes through a window: one whose size it keeps keeps its name.
    std::optional<Dims> windowed(const Node& node, std::vector<std::int64_t> taps) {
        if (!dims(node, 0) || taps.empty()) return std::nullopt;
        Dims made = *dims(node, 0);
        if (made.size() != taps.size() + 2) return std::nullopt;
        const std::size_t rank = taps.size();
        const auto strides = node.integers("strides", std::vector<std::int64_t>(rank, 1));
        const auto dilations = node.integers("dilations", std::vector<std::int64_t>(rank, 1));
        const auto pads = node.integers("pads", std::vector<std::int64_t>(2 * rank, 0));
        if (strides.size() != rank || dilations.size() != rank || pads.size() != 2 * rank) return std::nullopt;
        for (const auto& list : {taps, strides, dilations, pads, made})
            for (std::int64_t each : list)
                if (each > most || each < -most) return std::nullopt;
        const std::string mode = node.text("auto_pad", "NOTSET") + std::to_string(node.integer("ceil_mode", 0));
        for (std::size_t i = 0; i < rank; ++i) {
            const std::int64_t shrinks = (taps[i] - 1) * dilations[i] - pads[i] - pads[i + rank];
            if (mode == "NOTSET0" && strides[i] == 1 && shrinks == 0) continue;
            if (mode == "NOTSET0" && made[i + 2] >= 0 && made[i + 2] > shrinks && strides[i] > 0)
                made[i + 2] = (made[i + 2] - shrinks - 1) / strides[i] + 1;
            else
                made[i + 2] = names.of("window " + mode + " " + std::to_string(made[i + 2]) + " " + std::to_string(shrinks) + " " +
                                       std::to_string(strides[i]) + " " + std::to_string(taps[i]) + " " + std::to_string(dilations[i]));
        }
        return made;
    }

    std::optional<Dims> conv(const Node& node) {
        const Tensor* weights = constant(node, 1);
        if (weights == nullptr || weights->dims.size() < 3) return std::nullopt;
        std::optional<Dims> made = windowed(node, {weights->dims.begin() + 2, weights->dims.end()});
        if (made) (*made)[1] = weights->dims[0];
        return made;
    }

    std::optional<Dims> matmul(const Node& node) const {
        const auto &a = dims(node, 0), &b = dims(node, 1);
        if (!a || !b || a->size() < 2 || b->size() < 2) return std::nullopt;
        if (b->size() > 2 && (b->size() != a->size() || !std::equal(a->begin(), a->end() - 2, b->begin()))) return std::nullopt;
        Dims made = *a;
        made.back() = b->back();
        return made;
    }

    std::optional<Dims> gemm(const Node& node) const {
        const auto &a = dims(node, 0), &b = dims(node, 1);
        if (!a || !b || a->size() != 2 || b->size() != 2) return std::nullopt;
        return Dims{(*a)[node.integer("transA", 0) != 0 ? 1 : 0], (*b)[node.integer("transB", 0) != 0 ? 0 : 1]};
    }

    std::optional<Dims> transpose(const Node& node) const {
        if (!dims(node, 0)) return std::nullopt;
        const Dims& from = *dims(node, 0);
        Dims made(from.rbegin(), from.rend());
        const auto order = node.integers("perm");
        if (!order.empty() && order.size() != from.size()) return std::nullopt;
        for (std::size_t i = 0; i < order.size(); ++i) {
            if (order[i] < 0 || order[i] >= static_cast<std::int64_t>(from.size())) return std::nullopt;
            made[i] = from[order[i]];
        }
        return made;
    }

    std::optional<Dims> reshape(const Node& node) {
        const auto wanted = integers(node, 1);
        if (!wanted || node.integer("allowzero", 0) != 0) return std::nullopt;
        const auto& from = dims(node, 0);
        Dims made;
        std::int64_t all = 1, product = 1;
        bool counted = from.has_value();
        if (from)
            for (std::int64_t size : *from) counted = counted && size >= 0 && size < most && (all *= size) < most;
        for (std::size_t i = 0; i < wanted->size(); ++i) {
            std::int64_t size = (*wanted)[i];
            if (size == 0) {
                if (!from || i >= from->size()) return std::nullopt;
                size = (*from)[i];
                counted = counted && size > 0;
            }
            made.push_back(size);
            if ((*wanted)[i] != -1) counted = counted && size > 0 && size < most && (product *= size) < most;
        }
        for (std::size_t i = 0; i < made.size(); ++i)
            if ((*wanted)[i] == -1) made[i] = counted ? all / product : names.of("rest of " + std::to_string(node.outputs[0]));
        return made;
    }

    // Rows of a table, by indices along its first axis.
    std::optional<Dims> gather(const Node& node) const {
        const auto &table = dims(node, 0), &index = dims(node, 1);
        if (!table || !index || table->empty() || node.integer("axis", 0) != 0) return std::nullopt;
        Dims made = *index;
        made.insert(made.end(), table->begin() + 1, table->end());
        return made;
    }

    std::optional<Dims> concat(const Node& node) const {
        if (!dims(node, 0)) return std::nullopt;
        Dims made = *dims(node, 0);
        std::int64_t axis = node.integer("axis", 0);
        if (axis < 0) axis += static_cast<std::int64_t>(made.size());
        if (axis < 0 || axis >= static_cast<std::int64_t>(made.size())) return std::nullopt;
        for (std::size_t input = 1; input < node.inputs.size(); ++input) {
            const auto& more = dims(node, input);
            if (!more || more->size() != made.size()) return std::nullopt;
            if (std::min((*more)[axis], made[axis]) < 0 || std::max((*more)[axis], made[axis]) > most) return std::nullopt;
            made[axis] += (*more)[axis];
        }
        return made;
    }

    // Axes that are reduced and kept are of one element.
    std::optional<Dims> reduced(const Node& node) const {
        if (!dims(node, 0) || node.integer("keepdims", 1) == 0) return std::nullopt;
        Dims made = *dims(node, 0);
        const auto axes = node.inputs.size() > 1 ? integers(node, 1) : std::optional(node.integers("axes"));
        if (!axes || axes->empty()) return std::nullopt;
        for (std::int64_t axis : *axes) {
            const std::int64_t rank = static_cast<std::int64_t>(made.size());
            if (axis < -rank || axis >= rank) return std::nullopt;
            made[axis < 0 ? axis + rank : axis] = 1;
        }
        return made;
    }

    std::optional<Dims> pooled_whole(const Node& node) const {
        if (!dims(node, 0) || dims(node, 0)->size() < 2) return std::nullopt;
        Dims made = *dims(node, 0);
        std::fill(made.begin() + 2, made.end(), 1);
        return made;
    }

    std::optional<Dims> result(const Node& node) {
        static const std::set<std::string> same = {
            "Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "Erf", "Sqrt", "Exp", "Log", "Neg", "Abs", "Reciprocal", "Softplus", "Softmax",
            "LogSoftmax", "LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
            "Gelu", "HardSwish", "HardSigmoid", "Swish", "Mish", "Elu", "Selu", "Identity", "Dropout", "LpNormalization", "Cast", "CumSum"};
        static const std::set<std::string> joining = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum"};
        if (same.count(node.op) != 0) return dims(node, 0);
        if (joining.count(node.op) != 0) return broadcast(node);
        if (node.op == "Conv") return conv(node);
        if (node.op == "MaxPool" || node.op == "AveragePool") return windowed(node, node.integers("kernel_shape"));
        if (node.op == "GlobalAveragePool" || node.op == "GlobalMaxPool") return pooled_whole(node);
        if (node.op.compare(0, 6, "Reduce") == 0) return reduced(node);
        if (node.op == "MatMul") return matmul(node);
        if (node.op == "Gemm") return gemm(node);
        if (node.op == "Transpose") return transpose(node);
        if (node.op == "Reshape") return reshape(node);
        if (node.op == "Gather") return gather(node);
        if (node.op == "Concat") return concat(node);
        return std::nullopt;
    }

    std::optional<Type> type(const Node& node) const {
        // Ops whose first output is not of their first input's type.
        static const std::set<std::string> others = {
            "Cast", "CastLike", "Shape", "Size", "Where", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Not", "And", "Or",
            "IsNaN", "IsInf", "ArgMax", "ArgMin", "NonZero", "ConstantOfShape", "OneHot", "EyeLike", "QuantizeLinear", "DequantizeLinear"};
        if (others.count(node.op) != 0 || node.inputs.empty() || node.inputs[0] < 0) return std::nullopt;
        return known[node.inputs[0]].type;
    }
};

}  // namespace

std::vector<Known> known_shapes(const Graph& graph) {
    std::vector<Known> known(graph.values.size());
    Names names;
    for (std::size_t i = 0; i < graph.values.size(); ++i) {
        const Value& value = graph.values[i];
        known[i].type = value.constant ? std::optional<Type>(value.constant->type) : value.type;
        if (value.constant) {
            known[i].dims = value.constant->dims;
        } else if (value.dims) {
            Dims dims;
            for (std::size_t a = 0; a < value.dims->size(); ++a) {
                const Dim& dim = (*value.dims)[a];
                const std::string own = "axis " + std::to_string(a) + " of " + std::to_string(i);
                dims.push_back(dim.size >= 0 ? dim.size : names.of(dim.symbol.empty() ? own : "symbol " + dim.symbol));
            }
            known[i].dims = dims;
        }
    }
    Rules rules{graph, known, names};
    for (const Node& node : graph.nodes) {
        if (!node.domain.empty() || node.outputs.empty() || node.outputs[0] < 0) continue;
        Known& made = known[node.outputs[0]];
        if (!made.dims) made.dims = rules.result(node);
        if (!made.type) made.type = rules.type(node);
    }
    return known;
}

}  // namespace featherweight
