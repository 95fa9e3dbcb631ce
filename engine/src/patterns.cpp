// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "edit.hpp"

namespace featherweight {

namespace {

bool near(double a, double b) { return std::abs(a - b) <= 1e-5 * std::abs(b); }

// The node that makes a value, where it is this op and has its inputs.
const Node* made_by(const Edit& edit, int value, const char* op, std::size_t inputs) {
    const Node* node = edit.maker(value, op);
    if (node == nullptr || node->inputs.size() < inputs) return nullptr;
    for (std::size_t i = 0; i < inputs; ++i)
        if (node->inputs[i] < 0) return nullptr;
    return node;
}

// A value as a number times other values: what is multiplied, divided by numbers and raised to a small power is one
// product, in whatever order an exporter wrote it.
struct Factors {
    double scale = 1;
    std::vector<int> values;

    bool are(double number, const std::vector<int>& others) const { return near(scale, number) && values == others; }
};

bool is_power(const Edit& edit, const Node& pow, double exponent) {
    const auto found = edit.scalar(pow.inputs[1], pow.inputs[0]);
    return found && *found == exponent;
}

void multiply_out(const Edit& edit, int value, Factors& into, int depth) {
    constexpr std::size_t most = 4;
    if (into.values.size() >= most) return;
    const bool open = depth > 0 && edit.maker(value) != nullptr && edit.maker(value)->finish.activation == Activation::none;
    if (const Node* mul = made_by(edit, value, "Mul", 2); open && mul != nullptr) {
        const int a = mul->inputs[0], b = mul->inputs[1];
        const auto left = edit.scalar(a, b), right = edit.scalar(b, a);
        const auto follow = [&](int each) {
            // What is read elsewhere too is a factor itself.
            if (edit.inside(each))
                multiply_out(edit, each, into, depth - 1);
            else
                into.values.push_back(each);
        };
        if (left) {
            into.scale *= *left;
            follow(b);
        } else if (right) {
            into.scale *= *right;
            follow(a);
        } else {
            follow(a);
            follow(b);
        }
        return;
    }
    if (const Node* div = made_by(edit, value, "Div", 2); open && div != nullptr) {
        if (const auto by = edit.scalar(div->inputs[1], div->inputs[0]); by && *by != 0) {
            into.scale /= *by;
            if (edit.inside(div->inputs[0]))
                multiply_out(edit, div->inputs[0], into, depth - 1);
            else
                into.values.push_back(div->inputs[0]);
            return;
        }
    }
    if (const Node* pow = made_by(edit, value, "Pow", 2); open && pow != nullptr) {
        for (int exponent : {2, 3})
            if (is_power(edit, *pow, exponent)) {
                into.values.insert(into.values.end(), static_cast<std::size_t>(exponent), pow->inputs[0]);
                return;
            }
    }
    into.values.push_back(value);
}

Factors factors(const Edit& edit, int value) {
    Factors made;
    multiply_out(edit, value, made, 5);
    return made;
}

// The other input of an addition of a number, or -1.
int plus(const Edit& edit, int value, double number) {
    const Node* add = made_by(edit, value, "Add", 2);
    if (add == nullptr) return -1;
    for (int i : {0, 1}) {
        const int other = add->inputs[1 - i];
        if (const auto found = edit.scalar(add->inputs[i], other); found && near(*found, number)) return other;
    }
    return -1;
}

int argument(const Edit& edit, int value, const char* op) {
    const Node* made = made_by(edit, value, op, 1);
    return made == nullptr ? -1 : made->inputs[0];
}

// clip(x + 3, 0, 6): its x, or -1.
int clipped_to_six(const Edit& edit, int value) {
    const Node* clip = made_by(edit, value, "Clip", 1);
    if (clip == nullptr) return -1;
    double low = clip->real("min", 1), high = clip->real("max", 0);
    const auto bound = [&](std::size_t i) { return i < clip->inputs.size() ? edit.scalar(clip->inputs[i], -1) : std::nullopt; };
    if (clip->inputs.size() > 1) low = bound(1).value_or(1), high = bound(2).value_or(0);
    return low == 0 && high == 6 ? plus(edit, clip->inputs[0], 3) : -1;
}

// sqrt(2 / pi) * (x + 0.044715 * x^3), in either of the ways that it is written.
bool is_tanh_argument(const Edit& edit, int value, int x) {
    const Factors outer = factors(edit, value);
    if (!near(outer.scale, 0.7978845608)) return false;
    if (outer.values.size() == 1) {
        const Node* add = made_by(edit, outer.values[0], "Add", 2);
        if (add == nullptr) return false;
        for (int i : {0, 1})
            if (add->inputs[i] == x && factors(edit, add->inputs[1 - i]).are(0.044715, {x, x, x})) return true;
        return false;
    }
    if (outer.values.size() != 2) return false;
    for (int i : {0, 1})
        if (outer.values[i] == x && factors(edit, plus(edit, outer.values[1 - i], 1)).are(0.044715, {x, x})) return true;
    return false;
}

Attribute real(double value) {
    Attribute made;
    made.kind = Attribute::Kind::real;
    made.real = static_cast<float>(value);
    return made;
}

Attribute text(const char* value) {
    Attribute made;
    made.kind = Attribute::Kind::text;
    made.text = value;
    return made;
}

Attribute integer(std::int64_t value) {
    Attribute made;
    made.kind = Attribute::Kind::integer;
    made.integer = value;
    return made;
}

Node instead(const Node& node, const char* op, std::vector<int> inputs, std::map<std::string, Attribute> attributes = {}) {
    Node made;
    made.op = op;
    made.name = node.name;
    made.inputs = std::move(inputs);
    made.outputs = node.outputs;
    made.attributes = std::move(attributes);
    return made;
}

// x times a function of x, which makes an activation that has a name.
std::optional<Node> gated(const Edit& edit, const Node& node, double scale, int x, int gate) {
    if (const int a = argument(edit, gate, "Sigmoid"); a >= 0 && near(scale, 1)) {
        const Factors inner = factors(edit, a);
        if (a == x) return instead(node, "Swish", {x});
        if (inner.values == std::vector<int>{x}) return instead(node, "Swish", {x}, {{"alpha", real(inner.scale)}});
    }
    if (const Node* hard = made_by(edit, gate, "HardSigmoid", 1); hard != nullptr && near(scale, 1))
        if (hard->inputs[0] == x && near(hard->real("alpha", 0.2f), 1.0 / 6) && hard->real("beta", 0.5f) == 0.5f)
            return instead(node, "HardSwish", {x});
    if (near(scale, 1.0 / 6) && clipped_to_six(edit, gate) == x) return instead(node, "HardSwish", {x});
    if (near(scale, 1) && argument(edit, argument(edit, gate, "Tanh"), "Softplus") == x) return instead(node, "Mish", {x});
    if (near(scale, 0.5)) {
        const int f = plus(edit, gate, 1);
        if (const int a = argument(edit, f, "Erf"); a >= 0 && factors(edit, a).are(std::sqrt(0.5), {x})) return instead(node, "Gelu", {x});
        if (const int a = argument(edit, f, "Tanh"); a >= 0 && is_tanh_argument(edit, a, x))
            return instead(node, "Gelu", {x}, {{"approximate", text("tanh")}});
    }
    return std::nullopt;
}

std::optional<Node> activation(const Edit& edit, const Node& node) {
    const Factors found = factors(edit, node.outputs[0]);
    if (found.values.size() == 1 && near(found.scale, 1.0 / 6))
        if (const int x = clipped_to_six(edit, found.values[0]); x >= 0)
            return instead(node, "HardSigmoid", {x}, {{"alpha", real(1.0 / 6)}, {"beta", real(0.5)}});
    if (found.values.size() != 2) return std::nullopt;
    for (int i : {0, 1})
        if (auto made = gated(edit, node, found.scale, found.values[i], found.values[1 - i])) return made;
    return std::nullopt;
}

// ---- norms in pieces

// A mean over the last axes, kept as axes of one element: where they begin, counted from the end.
std::optional<std::int64_t> mean_from(const Edit& edit, int value) {
    const Node* mean = made_by(edit, value, "ReduceMean", 1);
    if (mean == nullptr || mean->integer("keepdims", 1) == 0) return std::nullopt;
    std::vector<std::int64_t> axes = mean->integers("axes");
    if (mean->inputs.size() > 1 && mean->inputs[1] >= 0) {
        const Tensor* held = edit.constant(mean->inputs[1]);
        if (held == nullptr || held->type != Type::i64) return std::nullopt;
        axes.assign(held->as<std::int64_t>(), held->as<std::int64_t>() + held->size());
    }
    for (std::int64_t& axis : axes) {
        if (axis < 0) continue;
        const auto& dims = edit.known(mean->inputs[0]).dims;
        if (!dims) return std::nullopt;
        axis -= static_cast<std::int64_t>(dims->size());
    }
    std::sort(axes.begin(), axes.end());
    const std::int64_t size = static_cast<std::int64_t>(axes.size());
    for (std::int64_t i = 0; i < size; ++i)
        if (axes[i] != i - size) return std::nullopt;
    return size == 0 ? std::nullopt : std::optional<std::int64_t>(-size);
}

// What is squared, or -1.
int squared(const Edit& edit, int value) {
    if (const Node* mul = made_by(edit, value, "Mul", 2); mul != nullptr && mul->inputs[0] == mul->inputs[1]) return mul->inputs[0];
    const Node* pow = made_by(edit, value, "Pow", 2);
    return pow != nullptr && is_power(edit, *pow, 2) ? pow->inputs[0] : -1;
}

// The value under the root, where this is 1 / sqrt(value) (`inverse`) or sqrt(value); else -1.
int under_root(const Edit& edit, int value, bool inverse) {
    if (!inverse) return argument(edit, value, "Sqrt");
    if (const int root = argument(edit, value, "Reciprocal"); root >= 0) return argument(edit, root, "Sqrt");
    if (const Node* pow = made_by(edit, value, "Pow", 2); pow != nullptr && is_power(edit, *pow, -0.5)) return pow->inputs[0];
    if (const Node* div = made_by(edit, value, "Div", 2); div != nullptr)
        if (const auto one = edit.scalar(div->inputs[0], div->inputs[1]); one && *one == 1) return argument(edit, div->inputs[1], "Sqrt");
    return -1;
}

bool is_centred(const Edit& edit, const Node* sub, std::int64_t from) {
    return sub != nullptr && argument(edit, sub->inputs[1], "ReduceMean") == sub->inputs[0] && mean_from(edit, sub->inputs[1]) == from;
}

// d / sqrt(mean(d^2) + epsilon), d being x - mean(x) or x.
std::optional<Node> norm(const Edit& edit, const Node& node) {
    for (int i : {0, 1}) {
        if (node.op == "Div" && i == 1) continue;
        const int d = node.inputs[i], sum = under_root(edit, node.inputs[1 - i], node.op == "Mul");
        const Node* add = made_by(edit, sum, "Add", 2);
        if (add == nullptr) continue;
        for (int j : {0, 1}) {
            const auto epsilon = edit.scalar(add->inputs[j], add->inputs[1 - j]);
            const auto from = mean_from(edit, add->inputs[1 - j]);
            if (!epsilon || !from) continue;
            const int t = squared(edit, edit.maker(add->inputs[1 - j])->inputs[0]);
            const Node *sub = made_by(edit, d, "Sub", 2), *other = made_by(edit, t, "Sub", 2);
            const std::map<std::string, Attribute> attributes = {{"axis", integer(*from)}, {"epsilon", real(*epsilon)}};
            if (is_centred(edit, sub, *from) && is_centred(edit, other, *from) && sub->inputs[0] == other->inputs[0])
                return instead(node, "LayerNormalization", {sub->inputs[0]}, attributes);
            if (t >= 0 && t == d) return instead(node, "RMSNormalization", {d}, attributes);
        }
    }
    return std::nullopt;
}

// A norm's scale (Mul) and bias (Add): one number for each element of the last axis.
std::optional<Node> with_weights(const Edit& edit, const Node& node) {
    for (int i : {0, 1}) {
        const Tensor* weights = edit.constant(node.inputs[1 - i]);
        if (weights == nullptr || weights->type != Type::f32 || weights->dims.size() != 1 || !edit.inside(node.inputs[i])) continue;
        const Node* layer = edit.maker(node.inputs[i], "LayerNormalization");
        const Node* norm = layer != nullptr ? layer : edit.maker(node.inputs[i], "RMSNormalization");
        if (norm == nullptr || norm->outputs.size() != 1 || norm->integer("axis", -1) != -1) continue;
        const auto& dims = edit.known(norm->inputs[0]).dims;
        if (dims && (dims->empty() || dims->back() != weights->dims[0]) && weights->dims[0] == 1) continue;
        Node made = *norm;
        made.outputs = node.outputs;
        made.inputs.resize(3, -1);
        int& place = made.inputs[node.op == "Mul" ? 1 : 2];
        // A scale behind a bias is another thing, and so is a second of either.
        if (place >= 0 || made.inputs[2] >= 0 || (node.op == "Add" && layer == nullptr)) continue;
        place = node.inputs[1 - i];
        return made;
    }
    return std::nullopt;
}

}  // namespace

bool recognise(Edit& edit, int number) {
    const Node& node = edit.node(number);
    const bool multiplies = node.op == "Mul" || node.op == "Div";
    if (!node.domain.empty() || (!multiplies && node.op != "Add") || node.inputs.size() != 2 || node.outputs.size() != 1) return false;
    if (node.inputs[0] < 0 || node.inputs[1] < 0 || node.outputs[0] < 0) return false;
    std::optional<Node> made;
    if (multiplies) made = activation(edit, node);
    if (multiplies && !made) made = norm(edit, node);
    if (node.op != "Div" && !made) made = with_weights(edit, node);
    if (!made) return false;
    edit.replace(number, *made);
    return true;
}

}  // namespace featherweight
