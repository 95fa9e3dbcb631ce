// SPDX-License-Identifier: Apache-2.0
#include "elementwise.hpp"

#include <cmath>

#include "../ops.hpp"

namespace featherweight {

namespace {

Loop loop_of(Planner& planner, Unary function, Type type) {
    if (type != Type::f32) return integer_loop(function, type);
    return [call = planner.kernels().elementwise.unary, function](const Runs& runs) { call(function, runs); };
}

Loop loop_of(Planner& planner, Activation function, Type type) {
    if (type != Type::f32) throw Unsupported(std::string("an activation of ") + name_of(type));
    return [call = planner.kernels().elementwise.activation, function](const Runs& runs) { call(function, runs); };
}

Loop loop_of(Planner& planner, Binary function, Type type) {
    if (type != Type::f32) return integer_loop(function, type);
    return [call = planner.kernels().elementwise.binary, function](const Runs& runs) { call(function, runs); };
}

// One input through one function.
void apply(Planner& planner, Stage stage, std::int64_t least = light) {
    const Fact from = planner.in(0);
    const Fact out = planner.make(0, from.type, from.dims, storage_order(from));
    stage.in = {0};
    add_loops(planner, planner.node().op, out, {from}, {std::move(stage)}, least);
}

template <class Function>
void apply(Planner& planner, Function function, float low = 0, float high = 0, std::int64_t least = light) {
    apply(planner, {loop_of(planner, function, planner.in(0).type), {}, false, low, high}, least);
}

template <Unary function, bool slow = false>
void unary(Planner& planner) {
    apply(planner, function, 0, 0, slow ? heavy : light);
}

template <Activation function>
void activation(Planner& planner) {
    apply(planner, function, 0, 0, function == Activation::relu || function == Activation::hard_swish ? light : heavy);
}

void leaky_relu(Planner& planner) { apply(planner, Activation::leaky_relu, planner.node().real("alpha", 0.01f)); }

void hard_sigmoid(Planner& planner) {
    apply(planner, Activation::hard_sigmoid, planner.node().real("alpha", 0.2f), planner.node().real("beta", 0.5f));
}

void gelu(Planner& planner) {
    const std::string approximate = planner.node().text("approximate", "none");
    if (approximate != "none" && approximate != "tanh") throw Error("its attribute 'approximate' is '" + approximate + "'");
    apply(planner, approximate == "tanh" ? Activation::gelu_tanh : Activation::gelu, 0, 0, heavy);
}

void elu(Planner& planner) { apply(planner, Unary::elu, planner.node().real("alpha", 1), 0, heavy); }

void selu(Planner& planner) {
    apply(planner, Unary::selu, planner.node().real("alpha", 1.67326319217681884765625f),
          planner.node().real("gamma", 1.05070102214813232421875f), heavy);
}

void swish(Planner& planner) {
    const float alpha = planner.node().real("alpha", 1);
    if (alpha == 1) return apply(planner, Activation::silu, 0, 0, heavy);
    apply(planner, Unary::swish, alpha, 0, heavy);
}

void thresholded_relu(Planner& planner) { apply(planner, Unary::thresholded_relu, planner.node().real("alpha", 1)); }

void identity(Planner& planner) { planner.alias(0, planner.in(0)); }

// Refuses what arithmetic before opset 7 could say: an axis from which on the second input is broadcast.
void refuse_old_broadcasting(const Planner& planner) {
    if (planner.node().has("broadcast") || planner.node().has("axis")) throw Unsupported("broadcasting along an axis, of opset 6 and earlier");
}

std::vector<Fact> same_typed_inputs(const Planner& planner) {
    std::vector<Fact> inputs;
    for (int i = 0; i < planner.inputs(); ++i) {
        inputs.push_back(planner.in(i));
        if (inputs[i].type != inputs[0].type)
            throw Error(std::string("its inputs are of two types, ") + name_of(inputs[0].type) + " and " + name_of(inputs[i].type));
    }
    if (inputs.empty()) throw Error("it has no inputs");
    return inputs;
}

// Any number of inputs, one after the other; then `finally`, and what was fused into the node.
void combine(Planner& planner, const std::vector<Fact>& inputs, const Loop& loop, bool clamps, std::vector<Stage> finally = {}) {
    refuse_old_broadcasting(planner);
    Dims dims;
    for (const Fact& input : inputs) dims = broadcast_dims(dims, input.dims);
    const Finish& finish = planner.node().finish;
    if (inputs[0].type != Type::f32 && (finish.activation != Activation::none || finish.residual >= 0))
        throw Unsupported(std::string("something fused into arithmetic on ") + name_of(inputs[0].type));
    const Fact out = planner.make(0, inputs[0].type, dims, leading_order(inputs, dims));
    std::vector<Fact> views;
    std::vector<Stage> stages;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        views.push_back(alongside(planner, inputs[i], out));
        if (i > 0) stages.push_back({loop, {i == 1 ? 0 : made, static_cast<int>(i)}, clamps});
    }
    for (Stage& stage : finally) stages.push_back(std::move(stage));
    add_finish(planner, out, views, stages);
    add_loops(planner, planner.node().op, out, views, std::move(stages));
}

template <Binary function, bool clamps = false>
void binary(Planner& planner) {
    const std::vector<Fact> inputs = same_typed_inputs(planner);
    if (inputs.size() != 2) throw Error("it has " + std::to_string(inputs.size()) + " inputs, not 2");
    const Loop loop = loop_of(planner, function, inputs[0].type);
    if (function == Binary::divide && inputs[1].type != Type::f32) refuse_zeros(planner, inputs[1]);
    combine(planner, inputs, loop, clamps);
}

template <Binary function, bool mean = false>
void variadic(Planner& planner) {
    const std::vector<Fact> inputs = same_typed_inputs(planner);
    if (inputs[0].type != Type::f32 && (function == Binary::add || mean)) throw Unsupported(std::string("a sum of ") + name_of(inputs[0].type));
    const Loop loop = loop_of(planner, function, inputs[0].type);
    if (inputs.size() == 1) return identity(planner);
    std::vector<Stage> finally;
    if (mean) finally.push_back({loop_of(planner, Unary::scaled, Type::f32), {made}, false, 1.0f / static_cast<float>(inputs.size())});
    combine(planner, inputs, loop, false, std::move(finally));
}

void leaky_by_input(Planner& planner) {
    const std::vector<Fact> inputs = same_typed_inputs(planner);
    if (inputs.size() != 2) throw Error("it has " + std::to_string(inputs.size()) + " inputs, not 2");
    if (broadcast_dims(inputs[0].dims, inputs[1].dims) != inputs[0].dims)
        throw Error("a slope of shape " + describe(inputs[1].dims) + " does not fit an input of shape " + describe(inputs[0].dims));
    if (inputs[0].type != Type::f32) throw Unsupported(std::string("an activation of ") + name_of(inputs[0].type));
    combine(planner, inputs, loop_of(planner, Binary::leak, Type::f32), false);
}

void remainder(Planner& planner) {
    const std::vector<Fact> inputs = same_typed_inputs(planner);
    if (inputs.size() != 2) throw Error("it has " + std::to_string(inputs.size()) + " inputs, not 2");
    const bool as_in_c = planner.node().integer("fmod", 0) != 0;
    const Loop loop = loop_of(planner, as_in_c ? Binary::remainder : Binary::floored_remainder, inputs[0].type);
    if (inputs[0].type != Type::f32) refuse_zeros(planner, inputs[1]);
    combine(planner, inputs, loop, false);
}

// Where an input is one known number, that number.
std::optional<double> number(const Planner& planner, int input) {
    const Fact& fact = planner.in(input);
    if (!fact.constant || fact.size() != 1) return std::nullopt;
    if (fact.type == Type::f32) return *planner.constant(input).as<float>();
    if (fact.type == Type::i32 || fact.type == Type::i64) return static_cast<double>(planner.integers(input)[0]);
    return std::nullopt;
}

void power(Planner& planner) {
    const Fact base = planner.in(0), exponent = planner.in(1);
    if (base.type != Type::f32) return combine(planner, {base, exponent}, integer_power(base.type, exponent.type), false);
    const std::optional<double> known = number(planner, 1);
    if (known && (*known == 2 || *known == 3) && exponent.rank() <= base.rank())
        return *known == 2 ? apply(planner, Unary::square) : apply(planner, Unary::cube);
    const Fact same = exponent.type == Type::f32 ? exponent : converted(planner, exponent, Type::f32);
    combine(planner, {base, same}, loop_of(planner, Binary::power, Type::f32), false);
}

void clip(Planner& planner) {
    const Fact from = planner.in(0);
    constexpr float most = std::numeric_limits<float>::max();
    if (planner.opset() < 11)
        return apply(planner, Activation::clip, planner.node().real("min", -most), planner.node().real("max", most));
    for (int i = 1; i <= 2; ++i) {
        if (!planner.has(i)) continue;
        if (planner.in(i).type != from.type) throw Error("its bounds are not of its input's type");
        if (planner.in(i).size() != 1) throw Error("its bounds must be scalars, not of shape " + describe(planner.in(i).dims));
    }
    const bool known = (!planner.has(1) || planner.in(1).constant) && (!planner.has(2) || planner.in(2).constant);
    if (from.type == Type::f32 && known) {
        constexpr float inf = std::numeric_limits<float>::infinity();
        const float low = planner.has(1) ? *planner.constant(1).as<float>() : -inf;
        const float high = planner.has(2) ? *planner.constant(2).as<float>() : inf;
        return apply(planner, Activation::clip, low, high);
    }
    const Loop loops[] = {loop_of(planner, Binary::maximum, from.type), loop_of(planner, Binary::minimum, from.type)};
    std::vector<Fact> views{from};
    std::vector<Stage> stages;
    for (int i = 1; i <= 2; ++i) {
        if (!planner.has(i)) continue;
        views.push_back(*reshaped(planner.in(i), {}));
        stages.push_back({loops[i - 1], {stages.empty() ? 0 : made, static_cast<int>(views.size()) - 1}});
    }
    if (stages.empty()) return identity(planner);
    const Fact out = planner.make(0, from.type, from.dims, storage_order(from));
    add_loops(planner, "Clip", out, views, std::move(stages));
}

// x * factor + shift by channel, both worked out while planning where the four inputs are constants, as they mostly are.
void batch_normalization(Planner& planner) {
    const Node& node = planner.node();
    if (node.integer("training_mode", 0) != 0) throw Unsupported("training mode");
    if (node.integer("spatial", 1) == 0) throw Unsupported("spatial=0, statistics of each position");
    for (int i = 1; i < planner.wanted(); ++i)
        if (planner.wants(i)) throw Unsupported("statistics as outputs");
    const Fact from = planner.in(0);
    const std::int64_t channels = from.rank() > 1 ? from.dims[1] : 1;
    std::vector<Fact> parameters;
    bool constant = true;
    for (int i = 1; i < 5; ++i) {
        parameters.push_back(planner.in(i));
        constant = constant && parameters.back().constant;
        if (parameters.back().dims != Dims{channels})
            throw Error("a parameter of shape " + describe(parameters.back().dims) + " for " + std::to_string(channels) + " channels");
        if (parameters.back().type != Type::f32) throw Unsupported(std::string("parameters of ") + name_of(parameters.back().type));
    }
    if (from.type != Type::f32) throw Unsupported(std::string("an input of ") + name_of(from.type));
    const float epsilon = node.real("epsilon", 1e-5f);
    const auto fill = [=](const float* scale, const float* bias, const float* mean, const float* variance, float* factor, float* shift) {
        for (std::int64_t c = 0; c < channels; ++c) {
            factor[c] = scale[c] / std::sqrt(variance[c] + epsilon);
            shift[c] = bias[c] - mean[c] * factor[c];
        }
    };
    const Fact out = planner.make(0, Type::f32, from.dims, storage_order(from));
    Fact factor, shift;
    if (constant) {
        const Tensor factors(Type::f32, {channels}), shifts(Type::f32, {channels});
        fill(planner.constant(1).as<float>(), planner.constant(2).as<float>(), planner.constant(3).as<float>(),
             planner.constant(4).as<float>(), factors.as<float>(), shifts.as<float>());
        factor = planner.hold(factors);
        shift = planner.hold(shifts);
    } else {
        factor = planner.scratch(Type::f32, {channels});
        shift = planner.scratch(Type::f32, {channels});
        std::vector<Fact> touches{factor, shift};
        for (Fact& parameter : parameters) touches.push_back(parameter = planner.dense(parameter));
        planner.step("parameters", touches, [=](Frame& frame) {
            fill(frame.at<float>(parameters[0]), frame.at<float>(parameters[1]), frame.at<float>(parameters[2]),
                 frame.at<float>(parameters[3]), frame.at<float>(factor), frame.at<float>(shift));
        });
    }
    // [C] stands beside [N, C, ...].
    Dims beside(from.rank() > 1 ? from.rank() - 1 : 1, 1);
    beside[0] = channels;
    std::vector<Fact> views{from, *reshaped(factor, beside), *reshaped(shift, beside)};
    std::vector<Stage> stages{{planner.kernels().elementwise.multiply_add, {0, 1, 2}, true}};
    add_finish(planner, out, views, stages);
    add_loops(planner, "BatchNormalization", out, views, std::move(stages));
}

void dropout(Planner& planner) {
    if (planner.has(2)) {
        const Tensor training = planner.constant(2);
        if (training.size() == 1 && *training.as<bool>()) throw Unsupported("training mode");
    }
    if (planner.wants(1)) {
        if (planner.opset() < 10) throw Unsupported("a mask of floats, of opset 9 and earlier");
        const Tensor kept(Type::boolean, {});
        *kept.as<bool>() = true;
        planner.alias(1, broadcast_to(planner.hold(kept), planner.in(0).dims));
    }
    identity(planner);
}

}  // namespace

bool accepts_finish(const std::string& op) {
    for (const char* each : {"Add", "Sub", "Mul", "Div", "BatchNormalization", "Conv", "Gemm", "MatMul"})
        if (op == each) return true;
    return false;
}

std::vector<Op> elementwise_ops() {
    return {{"Abs", unary<Unary::absolute>},
            {"Add", binary<Binary::add, true>},
            {"BatchNormalization", batch_normalization},
            {"Ceil", unary<Unary::ceiling>},
            {"Clip", clip},
            {"Cos", unary<Unary::cosine, true>},
            {"Div", binary<Binary::divide>},
            {"Dropout", dropout},
            {"Elu", elu},
            {"Erf", unary<Unary::error_function, true>},
            {"Exp", unary<Unary::exponential, true>},
            {"Floor", unary<Unary::floor>},
            {"Gelu", gelu},
            {"HardSigmoid", hard_sigmoid},
            {"HardSwish", activation<Activation::hard_swish>},
            {"Identity", identity},
            {"LeakyRelu", leaky_relu},
            {"Log", unary<Unary::logarithm, true>},
            {"Max", variadic<Binary::maximum>},
            {"Mean", variadic<Binary::add, true>},
            {"Min", variadic<Binary::minimum>},
            {"Mish", unary<Unary::mish, true>},
            {"Mod", remainder},
            {"Mul", binary<Binary::multiply, true>},
            {"Neg", unary<Unary::negative>},
            {"PRelu", leaky_by_input},
            {"Pow", power},
            {"Reciprocal", unary<Unary::reciprocal>},
            {"Relu", activation<Activation::relu>},
            {"Round", unary<Unary::round>},
            {"Selu", selu},
            {"Sigmoid", activation<Activation::sigmoid>},
            {"Sign", unary<Unary::sign>},
            {"Sin", unary<Unary::sine, true>},
            {"Softplus", unary<Unary::softplus, true>},
            {"Softsign", unary<Unary::softsign>},
            {"Sqrt", unary<Unary::square_root>},
            {"Sub", binary<Binary::subtract, true>},
            {"Sum", variadic<Binary::add>},
            {"Swish", swish},
            {"Tanh", activation<Activation::tanh>},
            {"ThresholdedRelu", thresholded_relu}};
}

}  // namespace featherweight
