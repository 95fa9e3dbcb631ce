// SPDX-License-Identifier: Apache-2.0
#include "images.hpp"

#include <algorithm>
#include <optional>
#include <set>
#include <string>

namespace featherweight {

namespace {

using Names = std::set<std::string>;

// Element by element, broadcast.
const Names pointwise{"Abs", "Add", "And", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual",
                      "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg",
                      "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt",
                      "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where", "Xor"};
// The first axis of their first input is a batch by definition.
const Names batched{"AveragePool", "Conv", "DepthToSpace", "GlobalAveragePool", "GlobalMaxPool", "GroupNormalization", "InstanceNormalization",
                    "MaxPool", "SpaceToDepth"};
// What they do they do along axes that they name.
const Names along{"LayerNormalization", "LogSoftmax", "LpNormalization", "RMSNormalization", "Softmax"};
const Names reductions{"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
                       "ReduceSumSquare"};
// Elements stay in their order, and so in their image where the first axis stays as long.
const Names shapes{"Reshape", "Squeeze", "Unsqueeze"};

std::optional<std::vector<std::int64_t>> named_axes(const Planner& planner, int input, const std::vector<bool>& fixed) {
    const Node& node = planner.node();
    if (node.has("axes")) return node.integers("axes");
    if (!planner.has(input) || !fixed[static_cast<std::size_t>(node.inputs[static_cast<std::size_t>(input)])]) return std::nullopt;
    return planner.integers(input);
}

}  // namespace

bool Images::follow(const Planner& planner, const std::vector<bool>& fixed) {
    const Node& node = planner.node();
    const auto value = [&](int input) { return node.inputs[static_cast<std::size_t>(input)]; };
    const auto image = [&](int input) { return planner.has(input) && held(value(input)); };
    // The same for every image.
    const auto shared = [&](int given) { return planner.fact(given).constant && fixed[static_cast<std::size_t>(given)]; };
    bool any = node.finish.residual >= 0 && held(node.finish.residual);
    for (int i = 0; i < planner.inputs(); ++i) any = any || image(i);
    if (!any) return true;

    std::optional<int> rank;
    for (int output : node.outputs) {
        if (output < 0) continue;
        const Fact fact = planner.fact(output);
        if (fact.constant) return node.op == "Shape";  // known without any image's elements; not `fixed`
        if (fact.rank() == 0 || fact.dims[0] != batch_) return false;
        if (!rank) rank = fact.rank();
    }
    if (!rank) return false;
    const auto spread = [&](int given) {  // it goes to every image alike
        const Fact fact = planner.fact(given);
        return shared(given) && (fact.rank() < *rank || fact.dims[0] == 1);
    };
    const auto joins = [&](int given) { return (held(given) && planner.fact(given).rank() == *rank) || spread(given); };
    const auto others_shared = [&] {
        for (int i = 1; i < planner.inputs(); ++i)
            if (planner.has(i) && !shared(value(i))) return false;
        return true;
    };
    const auto axis = [&](std::int64_t given) { return given < 0 ? given + planner.in(0).rank() : given; };
    const auto rule = [&] {
        const std::string& op = node.op;
        if (!node.domain.empty()) return false;
        if (pointwise.count(op) != 0) {
            for (int i = 0; i < planner.inputs(); ++i)
                if (planner.has(i) && !joins(value(i))) return false;
            return true;
        }
        if (op == "MatMul") {
            const bool first = image(0), second = image(1);
            if (planner.has(2) && !(shared(value(2)) && planner.in(2).rank() == 1)) return false;
            if (first && shared(value(1)) && planner.in(0).rank() >= 2 && planner.in(1).rank() == 2) return true;
            if (*rank < 3 || planner.in(0).rank() < 2 || planner.in(1).rank() < 2) return false;
            return (first || second) && joins(value(0)) && joins(value(1));
        }
        if (op == "Gather" && !image(0)) return image(1) && shared(value(0)) && axis(node.integer("axis", 0)) == 0;
        if (op == "Concat") {
            for (int i = 0; i < planner.inputs(); ++i)
                if (!image(i)) return false;
            return axis(node.integer("axis", 0)) != 0;
        }
        if (!image(0)) return false;
        if (batched.count(op) != 0) return others_shared();
        if (op == "BatchNormalization") return others_shared() && node.integer("training_mode", 0) == 0;
        if (op == "Gemm") {
            if (node.integer("transA", 0) != 0 || !shared(value(1))) return false;
            return !planner.has(2) || spread(value(2));
        }
        if (along.count(op) != 0) {
            const bool coerced = planner.opset() < 13 && (op == "Softmax" || op == "LogSoftmax");
            return others_shared() && axis(node.integer("axis", coerced ? 1 : -1)) != 0;
        }
        if (op == "Split") return others_shared() && axis(node.integer("axis", 0)) != 0;
        if (op == "Flatten") return axis(node.integer("axis", 1)) == 1;
        if (op == "Gather") return others_shared() && axis(node.integer("axis", 0)) != 0;
        if (op == "Transpose") {
            const auto perm = node.integers("perm");
            return !perm.empty() && perm[0] == 0;
        }
        if (reductions.count(op) != 0 || op == "Slice") {
            if (!others_shared()) return false;
            const auto axes = named_axes(planner, op == "Slice" ? 3 : 1, fixed);
            return axes && !axes->empty() && std::none_of(axes->begin(), axes->end(), [&](std::int64_t each) { return axis(each) == 0; });
        }
        if (op == "Resize" || op == "Upsample")
            return node.text("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize" && !node.has("axes");
        return shapes.count(op) != 0;
    };
    if ((node.finish.residual >= 0 && !joins(node.finish.residual)) || !rule()) return false;
    for (int output : node.outputs)
        if (output >= 0) hold(output);
    return true;
}

}  // namespace featherweight
