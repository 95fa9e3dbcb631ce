// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "edit.hpp"

namespace featherweight {

namespace {

// A product with constant weights, and how they lie: weight i belongs to channel channel_of(i).
struct Product {
    const Node* node;
    const Tensor* weights;
    std::int64_t channels = 0;
    std::int64_t behind = 0;  // axes of the output behind that of channels
    std::int64_t rank = 0;    // of the output, or as little as is known

    std::int64_t channel_of(std::int64_t i) const {
        const Dims& dims = weights->dims;
        if (node->op == "Conv") return i / (weights->size() / dims[0]);
        if (node->op == "ConvTranspose") {
            const std::int64_t taps = weights->size() / (dims[0] * dims[1]), groups = node->integer("group", 1);
            return i / (taps * dims[1]) / (dims[0] / groups) * dims[1] + i / taps % dims[1];
        }
        return node->integer("transB", 0) != 0 ? i / dims[1] : i % dims[1];
    }
};

std::optional<Product> product(const Edit& edit, int value) {
    const Node* node = edit.maker(value);
    if (node == nullptr || !node->domain.empty() || !edit.inside(value) || node->inputs.size() < 2) return std::nullopt;
    if (node->finish.activation != Activation::none || node->finish.residual >= 0) return std::nullopt;
    const Tensor* weights = edit.constant(node->inputs[1]);
    if (weights == nullptr || weights->type != Type::f32 || weights->size() == 0) return std::nullopt;
    Product made{node, weights};
    const std::int64_t rank = static_cast<std::int64_t>(weights->dims.size());
    if (node->op == "Conv" || node->op == "ConvTranspose") {
        if (rank < 3) return std::nullopt;
        const std::int64_t groups = node->integer("group", 1);
        if (node->op == "ConvTranspose" && (groups < 1 || weights->dims[0] % groups != 0)) return std::nullopt;
        made.channels = node->op == "Conv" ? weights->dims[0] : weights->dims[1] * groups;
        made.behind = rank - 2;
        made.rank = rank;
    } else if ((node->op == "MatMul" || node->op == "Gemm") && rank == 2) {
        made.channels = weights->dims[node->integer("transB", 0) != 0 ? 0 : 1];
        const auto& dims = edit.known(value).dims;
        made.rank = node->op == "Gemm" ? 2 : dims ? static_cast<std::int64_t>(dims->size()) : 1;
    } else {
        return std::nullopt;
    }
    return made;
}

using Numbers = std::vector<double>;

// A constant that has one element a channel of the product, or one for all.
std::optional<Numbers> by_channel(const Product& product, const Tensor* tensor) {
    if (tensor == nullptr || tensor->type != Type::f32) return std::nullopt;
    const std::int64_t rank = static_cast<std::int64_t>(tensor->dims.size()), place = rank - 1 - product.behind;
    if (rank > product.rank) return std::nullopt;
    for (std::int64_t i = 0; i < rank; ++i)
        if (tensor->dims[i] != 1 && (i != place || tensor->dims[i] != product.channels)) return std::nullopt;
    const float* values = tensor->as<float>();
    if (tensor->size() == 1) return Numbers(static_cast<std::size_t>(product.channels), values[0]);
    return Numbers(values, values + tensor->size());
}

// The product's own bias, zeros where it has none; nothing where it has one of another kind.
std::optional<Numbers> bias_of(const Edit& edit, const Product& product) {
    const Node& node = *product.node;
    if (node.inputs.size() < 3 || node.inputs[2] < 0) return Numbers(static_cast<std::size_t>(product.channels), 0.0);
    const Tensor* bias = edit.constant(node.inputs[2]);
    if (bias == nullptr) return std::nullopt;
    if (node.op == "Gemm") {
        std::optional<Numbers> made = by_channel(product, bias);
        if (made)
            for (double& each : *made) each *= node.real("beta", 1);
        return made;
    }
    if (bias->type != Type::f32 || bias->dims != Dims{product.channels}) return std::nullopt;
    return Numbers(bias->as<float>(), bias->as<float>() + bias->size());
}

// The output of the product times `scale` plus `shift`, as one product: in double, rounded once. A zero stays a zero, so what
// would not (a division by zero, a variance of minus epsilon) is left to be computed as it stands.
bool rescale(Edit& edit, int number, const Product& product, const Numbers& bias, const Numbers& scale, const Numbers& shift) {
    Node made = *product.node;
    made.outputs = {edit.node(number).outputs[0]};
    made.inputs.resize(3, -1);
    if (std::any_of(scale.begin(), scale.end(), [](double each) { return each != 1; })) {
        Tensor weights(Type::f32, product.weights->dims);
        const float* from = product.weights->as<float>();
        float* to = weights.as<float>();
        for (std::int64_t i = 0; i < weights.size(); ++i) {
            to[i] = static_cast<float>(from[i] * scale[product.channel_of(i)]);
            if (!std::isfinite(to[i])) return false;
        }
        made.inputs[1] = edit.add(edit.graph().values[made.inputs[1]].name + ", scaled", std::move(weights));
    }
    Tensor moved(Type::f32, {product.channels});
    for (std::size_t c = 0; c < bias.size(); ++c) {
        moved.as<float>()[c] = static_cast<float>(bias[c] * scale[c] + shift[c]);
        if (!std::isfinite(moved.as<float>()[c])) return false;
    }
    made.inputs[2] = edit.add("bias of " + made.name, std::move(moved));
    made.attributes.erase("beta");
    edit.replace(number, std::move(made));
    return true;
}

// BatchNormalization as it is used: scale and shift by channel.
std::optional<std::pair<Numbers, Numbers>> batch_norm(const Edit& edit, const Node& node, const Product& product) {
    if (node.integer("training_mode", 0) != 0) return std::nullopt;
    if (product.node->op == "MatMul") return std::nullopt;  // which axis is its channels' depends on the rank
    const float* given[4];
    for (std::size_t i = 0; i < 4; ++i) {
        const Tensor* held = edit.constant(node.inputs[i + 1]);
        if (held == nullptr || held->type != Type::f32 || held->dims != Dims{product.channels}) return std::nullopt;
        given[i] = held->as<float>();
    }
    std::pair<Numbers, Numbers> made;
    for (std::int64_t c = 0; c < product.channels; ++c) {
        const double scale = given[0][c] / std::sqrt(static_cast<double>(given[3][c]) + node.real("epsilon", 1e-5f));
        made.first.push_back(scale);
        made.second.push_back(given[1][c] - scale * given[2][c]);
    }
    return made;
}

// Mul, Div, Add or Sub of a constant by channel.
std::optional<std::pair<Numbers, Numbers>> arithmetic(const Node& node, const Product& product, const Tensor* constant, bool first) {
    const auto found = by_channel(product, constant);
    if (!found || (!first && (node.op == "Div" || node.op == "Sub"))) return std::nullopt;
    const std::size_t size = found->size();
    std::pair<Numbers, Numbers> made{Numbers(size, 1.0), Numbers(size, 0.0)};
    for (std::size_t c = 0; c < size; ++c) {
        if (node.op == "Mul") made.first[c] = (*found)[c];
        if (node.op == "Div") made.first[c] = 1 / (*found)[c];
        if (node.op == "Add") made.second[c] = (*found)[c];
        if (node.op == "Sub") made.second[c] = -(*found)[c];
    }
    return made;
}

}  // namespace

bool fold_weights(Edit& edit, int number) {
    const Node& node = edit.node(number);
    const bool norm = node.op == "BatchNormalization";
    if (!node.domain.empty() || (!norm && node.op != "Mul" && node.op != "Div" && node.op != "Add" && node.op != "Sub")) return false;
    if (node.inputs.size() != (norm ? 5 : 2) || node.outputs.empty() || node.outputs[0] < 0) return false;
    for (std::size_t output = 1; output < node.outputs.size(); ++output)
        if (node.outputs[output] >= 0) return false;
    for (std::size_t i = 0; i < (norm ? 1 : 2); ++i) {
        const auto found = product(edit, node.inputs[i]);
        if (!found) continue;
        const auto bias = bias_of(edit, *found);
        const auto by = norm ? batch_norm(edit, node, *found) : arithmetic(node, *found, edit.constant(node.inputs[1 - i]), i == 0);
        if (bias && by && rescale(edit, number, *found, *bias, by->first, by->second)) return true;
    }
    return false;
}

}  // namespace featherweight
