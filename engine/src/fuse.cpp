// SPDX-License-Identifier: Apache-2.0
#include "fuse.hpp"

#include <cmath>
#include <limits>
#include <numeric>

#include "edit.hpp"
#include "ops.hpp"

namespace featherweight {

namespace {

// ---- before all else: constants are values, and what passes its input on is left out

std::optional<Tensor> constant_of(const Node& node) {
    if (!node.domain.empty() || node.op != "Constant" || node.outputs.size() != 1 || node.attributes.size() != 1) return std::nullopt;
    const auto& [key, attribute] = *node.attributes.begin();
    if (key == "value" && attribute.kind == Attribute::Kind::tensor) return attribute.tensor;
    if (key == "value_float" && attribute.kind == Attribute::Kind::real) {
        Tensor made(Type::f32, {});
        *made.as<float>() = attribute.real;
        return made;
    }
    return std::nullopt;
}

bool passes_on(const Graph& graph, const Node& node) {
    if (!node.domain.empty() || node.inputs.empty() || node.inputs[0] < 0 || node.outputs.empty()) return false;
    for (std::size_t i = 1; i < node.outputs.size(); ++i)
        if (node.outputs[i] >= 0) return false;
    if (node.op == "Identity") return true;
    if (node.op != "Dropout" || graph.opset < 7) return false;
    if (node.inputs.size() < 3 || node.inputs[2] < 0) return true;  // its third input says that it trains
    const auto& trains = graph.values[node.inputs[2]].constant;
    return trains && trains->type == Type::boolean && trains->size() == 1 && !*trains->as<bool>();
}

Graph simplified(Graph graph) {
    std::vector<int> stands_for(graph.values.size());
    std::iota(stands_for.begin(), stands_for.end(), 0);
    std::vector<bool> output(graph.values.size(), false);
    for (int value : graph.outputs) output[value] = true;
    std::vector<Node> nodes;
    for (Node& node : graph.nodes) {
        for (int& input : node.inputs)
            if (input >= 0) input = stands_for[input];
        const int made = node.outputs.empty() ? -1 : node.outputs[0];
        if (made >= 0 && !output[made]) {
            if (auto held = constant_of(node)) {
                graph.values[made].constant = std::move(held);
                continue;
            }
            if (passes_on(graph, node)) {
                stands_for[made] = node.inputs[0];
                continue;
            }
        }
        nodes.push_back(std::move(node));
    }
    graph.nodes = std::move(nodes);
    return graph;
}

// ---- after all else: what is done to a result before it is stored

// An activation that a node's finish can name.
std::optional<Finish> activation(const Edit& edit, const Node& node) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    if (!node.domain.empty() || node.inputs.empty() || node.outputs.size() != 1) return std::nullopt;
    const auto made = [](Activation activation, float low = 0, float high = 0) { return Finish{activation, low, high}; };
    if (node.op == "Relu") return made(Activation::relu);
    if (node.op == "Sigmoid") return made(Activation::sigmoid);
    if (node.op == "Tanh") return made(Activation::tanh);
    if (node.op == "HardSwish") return made(Activation::hard_swish);
    if (node.op == "LeakyRelu") return made(Activation::leaky_relu, node.real("alpha", 0.01f));
    if (node.op == "HardSigmoid") return made(Activation::hard_sigmoid, node.real("alpha", 0.2f), node.real("beta", 0.5f));
    if (node.op == "Gelu") return made(node.text("approximate", "none") == "tanh" ? Activation::gelu_tanh : Activation::gelu);
    if (node.op == "Swish" && node.real("alpha", 1) == 1) return made(Activation::silu);
    if (node.op != "Clip") return std::nullopt;
    if (edit.graph().opset < 11) return made(Activation::clip, node.real("min", -infinity), node.real("max", infinity));
    Finish clip = made(Activation::clip, -infinity, infinity);
    bool bounded = false;  // bounds are floats: else it may be of integers
    for (std::size_t i = 1; i < node.inputs.size(); ++i) {
        if (node.inputs[i] < 0) continue;
        const auto bound = edit.scalar(node.inputs[i], -1);
        if (!bound || std::isnan(*bound)) return std::nullopt;
        (i == 1 ? clip.low : clip.high) = static_cast<float>(*bound);
        bounded = true;
    }
    // Where low is above high ONNX gives high, and so does a clamp by low first.
    return bounded ? std::optional<Finish>(clip) : std::nullopt;
}

// A node whose result only this one reads, and which still takes something on.
const Node* host(const Edit& edit, int value) {
    const Node* node = edit.maker(value);
    if (node == nullptr || !node->domain.empty() || !accepts_finish(node->op) || !edit.inside(value)) return nullptr;
    for (std::size_t i = 1; i < node->outputs.size(); ++i)
        if (node->outputs[i] >= 0) return nullptr;
    return node->finish.residual >= 0 && !node->finish.residual_first ? nullptr : node;
}

bool is_product(const Node& node) { return node.op == "Conv" || node.op == "ConvTranspose" || node.op == "Gemm" || node.op == "MatMul"; }

bool take_activation(Edit& edit, int number) {
    const Node& node = edit.node(number);
    const auto finish = activation(edit, node);
    if (!finish) return false;
    const Node* before = host(edit, node.inputs[0]);
    if (before == nullptr || before->finish.activation != Activation::none) return false;
    Node made = *before;
    made.outputs = {node.outputs[0]};
    made.finish.activation = finish->activation;
    made.finish.low = finish->low;
    made.finish.high = finish->high;
    edit.replace(number, std::move(made));
    return true;
}

// Whether what is added is surely of the result's own shape (`exactly`), or at least makes it no larger.
bool fits(const Edit& edit, int result, int added, bool exactly) {
    const auto &own = edit.known(result).dims, &other = edit.known(added).dims;
    if (!own || !other || other->size() > own->size() || (exactly && *own != *other)) return false;
    for (std::size_t i = 0; i < other->size(); ++i) {
        const std::int64_t size = (*other)[other->size() - 1 - i];
        if (size != 1 && size != (*own)[own->size() - 1 - i]) return false;
    }
    return true;
}

bool take_residual(Edit& edit, int number) {
    const Node& add = edit.node(number);
    if (!add.domain.empty() || add.op != "Add" || add.inputs.size() != 2 || add.inputs[0] == add.inputs[1]) return false;
    if (add.finish.residual >= 0 || add.finish.activation != Activation::none) return false;
    // A product rather than an elementwise op, which would have to be written out before it; the later of two products.
    int chosen = -1;
    for (int i : {1, 0}) {
        const Node* node = host(edit, add.inputs[i]);
        if (node == nullptr || node->finish.residual >= 0) continue;
        const bool products = is_product(*node);
        if (!fits(edit, add.inputs[i], add.inputs[1 - i], products)) continue;
        if (!products && edit.known(add.inputs[i]).type != Type::f32) continue;
        // A matrix that Gemm adds takes the place that a residual would have.
        if (node->op == "Gemm" && node->inputs.size() > 2 && node->inputs[2] >= 0)
            if (const Tensor* bias = edit.constant(node->inputs[2]); bias == nullptr || bias->dims.size() > 1) continue;
        const Node* other = chosen < 0 ? nullptr : edit.maker(add.inputs[chosen]);
        const bool later = chosen < 0 || edit.place(add.inputs[i]) > edit.place(add.inputs[chosen]);
        if (other == nullptr || (products && (!is_product(*other) || later))) chosen = i;
    }
    if (chosen < 0) return false;
    Node made = *edit.maker(add.inputs[chosen]);
    made.outputs = {add.outputs[0]};
    made.finish.residual = add.inputs[1 - chosen];
    made.finish.residual_first = made.finish.activation == Activation::none;
    edit.replace(number, std::move(made));
    return true;
}

void sweep(Edit& edit, bool (*rewrite)(Edit&, int)) {
    for (std::size_t i = 0; i < edit.graph().nodes.size(); ++i)
        while (edit.has(static_cast<int>(i)) && rewrite(edit, static_cast<int>(i))) {
        }
}

}  // namespace

Graph fused(Graph graph) {
    Edit edit(simplified(std::move(graph)));
    sweep(edit, recognise);
    sweep(edit, fold_weights);
    sweep(edit, [](Edit& each, int number) { return take_activation(each, number) || take_residual(each, number); });
    return edit.take();
}

std::string describe(const Graph& graph, const Finish& finish) {
    static const char* const names[] = {"",     "relu", "clip",      "sigmoid", "silu",      "hard_sigmoid",
                                        "hard_swish", "gelu", "gelu_tanh", "tanh",    "leaky_relu"};
    const std::string act = names[static_cast<int>(finish.activation)];
    if (finish.residual < 0) return act;
    const std::string added = "+ " + graph.values[finish.residual].name;
    if (act.empty()) return added;
    return finish.residual_first ? added + ", " + act : act + ", " + added;
}

}  // namespace featherweight
