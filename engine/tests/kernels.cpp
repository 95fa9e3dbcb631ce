// SPDX-License-Identifier: Apache-2.0
// Each kind of kernel against loops that anyone can read, in every instruction set that this processor has: the check that
// runs where there is no Python, such as under an emulator. And many threads that run one engine at once.
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <thread>

#include "engine.hpp"
#include "test.hpp"

using namespace featherweight;

namespace {

std::mt19937 random_numbers(7);

std::int64_t whole(std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random_numbers); }

Tensor filled(const Dims& dims, double zeros = 0, float low = -1, float high = 1) {
    Tensor made(Type::f32, dims);
    std::uniform_real_distribution<float> uniform(low, high);
    for (std::int64_t i = 0; i < made.size(); ++i)
        if (std::uniform_real_distribution<double>(0, 1)(random_numbers) >= zeros) made.as<float>()[i] = uniform(random_numbers);
    return made;
}

Tensor numbers(std::vector<std::int64_t> elements) {
    Tensor made(Type::i64, {static_cast<std::int64_t>(elements.size())});
    std::copy(elements.begin(), elements.end(), made.as<std::int64_t>());
    return made;
}

Attribute list(std::vector<std::int64_t> integers) {
    Attribute made;
    made.kind = Attribute::Kind::integers;
    made.integers = std::move(integers);
    return made;
}

Attribute number(std::int64_t integer) {
    Attribute made;
    made.kind = Attribute::Kind::integer;
    made.integer = integer;
    return made;
}

Attribute text(const char* given) {
    Attribute made;
    made.kind = Attribute::Kind::text;
    made.text = given;
    return made;
}

using Attributes = std::map<std::string, Attribute>;

// A graph that grows node by node: value 0 is its input, and the last node's result its output.
struct Chain {
    Graph graph;

    Chain() {
        graph.opset = 20;
        graph.inputs = {value("x")};
    }
    int value(const char* name) {
        graph.values.push_back({name, Type::f32, std::nullopt, std::nullopt});
        return static_cast<int>(graph.values.size()) - 1;
    }
    int constant(Tensor tensor) {
        const int made = value("constant");
        graph.values[made].type = tensor.type;
        graph.values[made].constant = std::move(tensor);
        return made;
    }
    int add(const char* op, std::vector<int> inputs, Attributes attributes = {}) {
        Node node;
        node.op = op;
        node.inputs = std::move(inputs);
        node.attributes = std::move(attributes);
        node.outputs = {value("y")};
        graph.outputs = node.outputs;
        graph.nodes.push_back(std::move(node));
        return graph.outputs[0];
    }
};

// One node: x, and constants behind it, give y.
Graph graph_of(const char* op, std::vector<Tensor> constants, Attributes attributes) {
    Chain chain;
    std::vector<int> inputs{0};
    for (Tensor& each : constants) inputs.push_back(each.memory ? chain.constant(std::move(each)) : -1);
    chain.add(op, inputs, std::move(attributes));
    return chain.graph;
}

// The same of a view: what is computed of x transposed is transposed back, so that the loops walk on strides.
Graph behind_transpose(const char* op, const std::vector<std::int64_t>& order, std::vector<Tensor> constants, Attributes attributes) {
    Chain chain;
    std::vector<std::int64_t> back(order.size());
    for (std::size_t i = 0; i < order.size(); ++i) back[static_cast<std::size_t>(order[i])] = static_cast<std::int64_t>(i);
    std::vector<int> inputs{chain.add("Transpose", {0}, {{"perm", list(back)}})};
    for (Tensor& each : constants) inputs.push_back(chain.constant(std::move(each)));
    chain.add("Transpose", {chain.add(op, inputs, std::move(attributes))}, {{"perm", list(order)}});
    return chain.graph;
}

void compare(const Tensor& found, const Tensor& expected, const std::string& what) {
    bool same = found.dims == expected.dims;
    for (std::int64_t i = 0; same && i < expected.size(); ++i)
        same = std::fabs(found.as<float>()[i] - expected.as<float>()[i]) <= 1e-4f * std::max(1.0f, std::fabs(expected.as<float>()[i]));
    if (!same) std::fprintf(stderr, "%s differs\n", what.c_str());
    EXPECT(same);
}

void check(const Graph& graph, const Tensor& x, const Tensor& expected, const std::string& what) {
    for (const std::string& set : instruction_sets())
        for (const int threads : {1, 3}) {
            Engine engine(graph, Options{threads, set, {}, {}});
            compare(engine.run({{Type::f32, x.dims, x.bytes()}})[0], expected, what + ", " + set + ", " + std::to_string(threads) + " threads");
        }
}

void convolution(double zeros, bool depthwise) {
    const std::int64_t group = depthwise ? whole(3, 12) : whole(1, 3), per = depthwise ? 1 : whole(1, 9), filters = depthwise ? 1 : whole(1, 11);
    const std::int64_t batch = whole(1, 3), rows = whole(4, 21), columns = whole(4, 21), taps = whole(1, 3);
    const std::int64_t stride = whole(1, 2), dilation = whole(1, 2), pad = whole(0, taps);
    const std::int64_t reach = (taps - 1) * dilation + 1;
    if (rows + 2 * pad < reach || columns + 2 * pad < reach) return;
    const std::int64_t channels = group * per, outs = group * filters;
    const std::int64_t high = (rows + 2 * pad - reach) / stride + 1, wide = (columns + 2 * pad - reach) / stride + 1;
    const Tensor x = filled({batch, channels, rows, columns}), w = filled({outs, per, taps, taps}, zeros), b = filled({outs});
    Tensor y(Type::f32, {batch, outs, high, wide});
    float* to = y.as<float>();
    for (std::int64_t n = 0; n < batch; ++n)
        for (std::int64_t o = 0; o < outs; ++o)
            for (std::int64_t i = 0; i < high; ++i)
                for (std::int64_t j = 0; j < wide; ++j) {
                    double sum = b.as<float>()[o];
                    for (std::int64_t c = 0; c < per; ++c)
                        for (std::int64_t k = 0; k < taps; ++k)
                            for (std::int64_t l = 0; l < taps; ++l) {
                                const std::int64_t r = i * stride - pad + k * dilation, s = j * stride - pad + l * dilation;
                                if (r < 0 || s < 0 || r >= rows || s >= columns) continue;
                                const std::int64_t channel = o / filters * per + c;
                                sum += double(w.as<float>()[((o * per + c) * taps + k) * taps + l]) *
                                       x.as<float>()[((n * channels + channel) * rows + r) * columns + s];
                            }
                    *to++ = static_cast<float>(sum);
                }
    check(graph_of("Conv", {w, b}, {{"group", number(group)}, {"pads", list({pad, pad, pad, pad})}, {"strides", list({stride, stride})},
                                    {"dilations", list({dilation, dilation})}}),
          x, y, "Conv of " + describe(x.dims) + " with " + describe(w.dims));
}

void product(double zeros) {
    const std::int64_t batch = whole(1, 3), tokens = whole(1, 40), depth = whole(1, 300), outs = whole(1, 50);
    const Tensor x = filled({batch, tokens, depth}), w = filled({depth, outs}, zeros);
    Tensor y(Type::f32, {batch, tokens, outs});
    for (std::int64_t t = 0; t < batch * tokens; ++t)
        for (std::int64_t o = 0; o < outs; ++o) {
            double sum = 0;
            for (std::int64_t k = 0; k < depth; ++k) sum += double(x.as<float>()[t * depth + k]) * w.as<float>()[k * outs + o];
            y.as<float>()[t * outs + o] = static_cast<float>(sum);
        }
    check(graph_of("MatMul", {w}, {}), x, y, "MatMul of " + describe(x.dims) + " with " + describe(w.dims));
}

// ---- elementwise

using Function = std::function<double(double)>;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

const std::vector<std::pair<const char*, Function>> functions{
    {"Abs", [](double x) { return std::fabs(x); }},
    {"Neg", [](double x) { return -x; }},
    {"Ceil", [](double x) { return std::ceil(x); }},
    {"Floor", [](double x) { return std::floor(x); }},
    {"Round", [](double x) { return std::nearbyint(x); }},
    {"Sign", [](double x) { return (x > 0) - (x < 0); }},
    {"Exp", [](double x) { return std::exp(x); }},
    {"Erf", [](double x) { return std::erf(x); }},
    {"Sin", [](double x) { return std::sin(x); }},
    {"Cos", [](double x) { return std::cos(x); }},
    {"Tanh", [](double x) { return std::tanh(x); }},
    {"Relu", [](double x) { return std::max(x, 0.0); }},
    {"LeakyRelu", [](double x) { return x < 0 ? double{0.01f} * x : x; }},
    {"Sigmoid", sigmoid},
    {"Gelu", [](double x) { return x / 2 * (1 + std::erf(x / std::sqrt(2.0))); }},
    {"HardSigmoid", [](double x) { return std::clamp(double{0.2f} * x + 0.5, 0.0, 1.0); }},
    {"HardSwish", [](double x) { return x * std::clamp(x / 6 + 0.5, 0.0, 1.0); }},
    {"Elu", [](double x) { return x < 0 ? std::expm1(x) : x; }},
    {"Softplus", [](double x) { return std::log1p(std::exp(x)); }},
    {"Softsign", [](double x) { return x / (1 + std::fabs(x)); }},
    {"Mish", [](double x) { return x * std::tanh(std::log1p(std::exp(x))); }},
};

void elementwise(std::int64_t size) {
    const Tensor x = filled({2, size}, 0, -9, 9);
    for (const auto& [op, function] : functions) {
        Tensor y(Type::f32, x.dims);
        for (std::int64_t i = 0; i < x.size(); ++i) y.as<float>()[i] = static_cast<float>(function(x.as<float>()[i]));
        check(graph_of(op, {}, {}), x, y, op + (" of " + describe(x.dims)));
    }
    const Tensor positive = filled({3, size}, 0, 0.1f, 9);
    for (const auto& [op, function] : {std::pair<const char*, Function>{"Sqrt", [](double a) { return std::sqrt(a); }},
                                       {"Log", [](double a) { return std::log(a); }}, {"Reciprocal", [](double a) { return 1 / a; }}}) {
        Tensor y(Type::f32, positive.dims);
        for (std::int64_t i = 0; i < y.size(); ++i) y.as<float>()[i] = static_cast<float>(function(positive.as<float>()[i]));
        check(graph_of(op, {}, {}), positive, y, op + (" of " + describe(y.dims)));
    }
}

const std::vector<std::pair<const char*, std::function<double(double, double)>>> operators{
    {"Add", [](double a, double b) { return a + b; }},       {"Sub", [](double a, double b) { return a - b; }},
    {"Mul", [](double a, double b) { return a * b; }},       {"Div", [](double a, double b) { return a / b; }},
    {"Max", [](double a, double b) { return std::max(a, b); }}, {"Min", [](double a, double b) { return std::min(a, b); }},
    {"Pow", [](double a, double b) { return std::pow(a, b); }},
};

// Of three axes, against an operand that is broadcast along some, of x as it lies and of x as a view.
void broadcast() {
    const Dims dims{whole(1, 4), whole(1, 9), whole(1, 40)};
    for (const auto& [op, function] : operators)
        for (int kept = 0; kept < 8; ++kept) {
            Dims other = dims;
            for (std::size_t axis = 0; axis < 3; ++axis)
                if ((kept >> axis & 1) == 0) other[axis] = 1;
            const Tensor x = filled(dims, 0, 0.2f, 2), b = filled(other, 0, 0.2f, 2);
            Tensor y(Type::f32, dims), turned(Type::f32, {other[1], other[2], other[0]});
            for (std::int64_t i = 0, at = 0; i < dims[0]; ++i)
                for (std::int64_t j = 0; j < dims[1]; ++j)
                    for (std::int64_t k = 0; k < dims[2]; ++k, ++at) {
                        const std::int64_t l = other[0] > 1 ? i : 0, m = other[1] > 1 ? j : 0, n = other[2] > 1 ? k : 0;
                        const float operand = b.as<float>()[(l * other[1] + m) * other[2] + n];
                        y.as<float>()[at] = static_cast<float>(function(x.as<float>()[at], operand));
                        turned.as<float>()[(m * other[2] + n) * other[0] + l] = operand;
                    }
            const std::string what = op + (" of " + describe(dims)) + " with " + describe(other);
            check(graph_of(op, {b}, {}), x, y, what);
            check(behind_transpose(op, {2, 0, 1}, {turned}, {}), x, y, what + " behind a transpose");
        }
}

// ---- rows

// What becomes of one line, in place.
using Line = std::function<void(std::vector<double>&)>;

// Lines along one axis of three.
Tensor by_lines(const Tensor& x, int axis, const Line& line) {
    Tensor y(Type::f32, x.dims);
    const std::int64_t step = row_major(x.dims)[static_cast<std::size_t>(axis)], size = x.dims[static_cast<std::size_t>(axis)];
    for (std::int64_t begin = 0; begin < x.size(); ++begin) {
        if (begin / step % size != 0) continue;
        std::vector<double> values;
        for (std::int64_t i = 0; i < size; ++i) values.push_back(x.as<float>()[begin + i * step]);
        line(values);
        for (std::int64_t i = 0; i < size; ++i) y.as<float>()[begin + i * step] = static_cast<float>(values[static_cast<std::size_t>(i)]);
    }
    return y;
}

void softmax(std::vector<double>& line) {
    double sum = 0;
    for (double& each : line) sum += each = std::exp(each);
    for (double& each : line) each /= sum;
}

void normalise(std::vector<double>& line, double epsilon) {
    double mean = 0, squares = 0;
    for (const double each : line) mean += each / static_cast<double>(line.size());
    for (const double each : line) squares += (each - mean) * (each - mean) / static_cast<double>(line.size());
    for (double& each : line) each = (each - mean) / std::sqrt(squares + epsilon);
}

// The whole line becomes its fold, of which a reduction keeps one.
Line all(const std::function<double(double, double)>& join, double from) {
    return [=](std::vector<double>& line) {
        double sum = from;
        for (const double each : line) sum = join(sum, each);
        std::fill(line.begin(), line.end(), sum);
    };
}

Tensor first_along(const Tensor& x, int axis) {
    Dims dims = x.dims;
    dims[static_cast<std::size_t>(axis)] = 1;
    Tensor made(Type::f32, dims);
    const std::int64_t step = row_major(x.dims)[static_cast<std::size_t>(axis)], size = x.dims[static_cast<std::size_t>(axis)];
    for (std::int64_t i = 0; i < made.size(); ++i) made.as<float>()[i] = x.as<float>()[i / step * step * size + i % step];
    return made;
}

void rows() {
    const Tensor x = filled({whole(1, 3), whole(1, 70), whole(1, 70)});
    const double infinity = std::numeric_limits<double>::infinity();
    for (int axis = 0; axis < 3; ++axis) {
        const std::string what = " of " + describe(x.dims) + " along " + std::to_string(axis);
        check(graph_of("Softmax", {}, {{"axis", number(axis)}}), x, by_lines(x, axis, softmax), "Softmax" + what);
        for (const auto& [op, line] : {std::pair<const char*, Line>{"ReduceSum", all(std::plus<>(), 0)},
                                       {"ReduceMax", all([](double a, double b) { return std::max(a, b); }, -infinity)},
                                       {"ReduceMin", all([](double a, double b) { return std::min(a, b); }, infinity)},
                                       {"ReduceL1", all([](double a, double b) { return a + std::fabs(b); }, 0)},
                                       {"ReduceSumSquare", all([](double a, double b) { return a + b * b; }, 0)}})
            check(graph_of(op, {numbers({axis})}, {}), x, first_along(by_lines(x, axis, line), axis), op + what);
    }
    const std::int64_t channels = x.dims[2];
    const Tensor scale = filled({channels}), shift = filled({channels});
    Tensor y = by_lines(x, 2, [](std::vector<double>& line) { normalise(line, 1e-5); });
    for (std::int64_t i = 0; i < y.size(); ++i) y.as<float>()[i] = y.as<float>()[i] * scale.as<float>()[i % channels] + shift.as<float>()[i % channels];
    check(graph_of("LayerNormalization", {scale, shift}, {{"axis", number(-1)}}), x, y, "LayerNormalization of " + describe(x.dims));
    // Tokens innermost, channels one above: as behind a product.
    const Tensor few = filled({x.dims[1]}), fewer = filled({x.dims[1]});
    Tensor z = by_lines(x, 1, [](std::vector<double>& line) { normalise(line, 1e-5); });
    for (std::int64_t i = 0; i < z.size(); ++i) {
        const std::int64_t c = i / channels % x.dims[1];
        z.as<float>()[i] = z.as<float>()[i] * few.as<float>()[c] + fewer.as<float>()[c];
    }
    check(behind_transpose("LayerNormalization", {0, 2, 1}, {few, fewer}, {{"axis", number(-1)}}), x, z,
          "LayerNormalization of " + describe(x.dims) + " behind a transpose");
}

// ---- windows

void windows() {
    const std::int64_t taps = whole(1, 4), stride = whole(1, 3), pad = whole(0, taps - 1);
    const Dims dims{whole(1, 2), whole(1, 3), whole(4, 40), whole(4, 70)};
    const std::int64_t high = (dims[2] + 2 * pad - taps) / stride + 1, wide = (dims[3] + 2 * pad - taps) / stride + 1;
    const Tensor x = filled(dims);
    Tensor largest(Type::f32, {dims[0], dims[1], high, wide}), average = largest;
    average.memory = std::make_shared<Memory>(largest.memory->size());
    for (std::int64_t n = 0, at = 0; n < dims[0] * dims[1]; ++n)
        for (std::int64_t i = 0; i < high; ++i)
            for (std::int64_t j = 0; j < wide; ++j, ++at) {
                double sum = 0, most = -std::numeric_limits<double>::infinity();
                int seen = 0;
                for (std::int64_t r = i * stride - pad; r < i * stride - pad + taps; ++r)
                    for (std::int64_t s = j * stride - pad; s < j * stride - pad + taps; ++s) {
                        if (r < 0 || s < 0 || r >= dims[2] || s >= dims[3]) continue;
                        const double each = x.as<float>()[(n * dims[2] + r) * dims[3] + s];
                        sum += each, most = std::max(most, each), ++seen;
                    }
                largest.as<float>()[at] = static_cast<float>(most);
                average.as<float>()[at] = static_cast<float>(sum / seen);
            }
    const Attributes attributes{{"kernel_shape", list({taps, taps})}, {"strides", list({stride, stride})}, {"pads", list({pad, pad, pad, pad})}};
    const std::string what = " of " + describe(dims) + ", " + std::to_string(taps) + " taps, stride " + std::to_string(stride);
    check(graph_of("MaxPool", {}, attributes), x, largest, "MaxPool" + what);
    check(graph_of("AveragePool", {}, attributes), x, average, "AveragePool" + what);
}

// Twice as wide and high: each element four times, and weighed by distance.
void doubled() {
    const std::int64_t high = whole(1, 9), wide = whole(1, 40);
    const Tensor x = filled({1, 2, high, wide});
    Tensor nearest(Type::f32, {1, 2, 2 * high, 2 * wide}), linear = nearest;
    linear.memory = std::make_shared<Memory>(nearest.memory->size());
    const auto weighed = [](std::int64_t to, std::int64_t size) {
        const double from = std::clamp((static_cast<double>(to) + 0.5) / 2 - 0.5, 0.0, static_cast<double>(size - 1));
        const auto low = static_cast<std::int64_t>(from);
        return std::tuple(low, std::min(low + 1, size - 1), from - static_cast<double>(low));
    };
    for (std::int64_t c = 0, at = 0; c < 2; ++c)
        for (std::int64_t i = 0; i < 2 * high; ++i)
            for (std::int64_t j = 0; j < 2 * wide; ++j, ++at) {
                const float* plane = x.as<float>() + c * high * wide;
                nearest.as<float>()[at] = plane[i / 2 * wide + j / 2];
                const auto [top, bottom, down] = weighed(i, high);
                const auto [left, right, along] = weighed(j, wide);
                const double above = plane[top * wide + left] * (1 - along) + plane[top * wide + right] * along;
                const double below = plane[bottom * wide + left] * (1 - along) + plane[bottom * wide + right] * along;
                linear.as<float>()[at] = static_cast<float>(above * (1 - down) + below * down);
            }
    const Tensor to = numbers({1, 2, 2 * high, 2 * wide});
    const Attributes floors{{"mode", text("nearest")}, {"coordinate_transformation_mode", text("asymmetric")}, {"nearest_mode", text("floor")}};
    check(graph_of("Resize", {{}, {}, to}, floors), x, nearest, "nearest Resize of " + describe(x.dims));
    check(graph_of("Resize", {{}, {}, to}, {{"mode", text("linear")}}), x, linear, "linear Resize of " + describe(x.dims));
}

// ---- callers

// Two engines, each run by several threads with inputs of several shapes; some callers are wrong, and hear of it alone.
void many_callers() {
    const Tensor w = filled({64, 48}, 0.8);
    const Graph graph = graph_of("MatMul", {w}, {});
    std::vector<Tensor> inputs, expected;
    Engine alone(graph, Options{1, "", {}, {}});
    for (const std::int64_t tokens : {1, 5, 33, 100, 7, 64, 2, 3, 4, 90}) {  // more shapes than plans are kept
        inputs.push_back(filled({tokens, 64}));
        expected.push_back(alone.run({{Type::f32, inputs.back().dims, inputs.back().bytes()}})[0]);
    }
    Engine one(graph, Options{3, "", {}, {}}), other(graph, Options{2, "", {}, {}});
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; ++caller)
        callers.emplace_back([&, caller] {
            Engine& engine = caller % 2 ? one : other;
            for (int round = 0; round < 30; ++round) {
                const std::size_t i = static_cast<std::size_t>(round + caller) % inputs.size();
                if (caller == 5) EXPECT_THROWS(Error, engine.run({{Type::i64, inputs[i].dims, inputs[i].bytes()}}));
                compare(engine.run({{Type::f32, inputs[i].dims, inputs[i].bytes()}})[0], expected[i], "a concurrent run");
            }
        });
    for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 6;
    for (int round = 0; round < 2 * rounds; ++round)
        for (const double zeros : {0.0, 0.9}) {
            convolution(zeros, false);
            convolution(zeros, true);
            product(zeros);
        }
    for (const std::int64_t size : {1, 3, 7, 8, 15, 16, 17, 33, 100}) elementwise(size);
    for (int round = 0; round < rounds; ++round) {
        broadcast();
        rows();
        windows();
        doubled();
    }
    many_callers();
    for (const std::string& set : instruction_sets()) std::printf("%s\n", set.c_str());
}
