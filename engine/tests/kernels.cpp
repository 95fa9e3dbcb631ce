// SPDX-License-Identifier: Apache-2.0
// Products of the engine against loops that anyone can read, in every instruction set that this processor has: the check
// that runs where there is no Python, such as under an emulator. And many threads that run one engine at once.
#include <cmath>
#include <random>
#include <thread>

#include "engine.hpp"
#include "test.hpp"

using namespace featherweight;

namespace {

std::mt19937 random_numbers(7);

std::int64_t whole(std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random_numbers); }

Tensor filled(const Dims& dims, double zeros = 0) {
    Tensor made(Type::f32, dims);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (std::int64_t i = 0; i < made.size(); ++i)
        if (std::uniform_real_distribution<double>(0, 1)(random_numbers) >= zeros) made.as<float>()[i] = uniform(random_numbers);
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

// A graph of one node: x, and constants behind it, give y.
Graph graph_of(const char* op, std::vector<Tensor> constants, std::map<std::string, Attribute> attributes) {
    Graph graph;
    graph.opset = 20;
    graph.values.push_back({"x", Type::f32, std::nullopt, std::nullopt});
    Node node;
    node.op = op;
    node.inputs = {0};
    node.attributes = std::move(attributes);
    for (Tensor& constant : constants) {
        node.inputs.push_back(static_cast<int>(graph.values.size()));
        Value value;
        value.name = "constant";
        value.constant = std::move(constant);
        graph.values.push_back(std::move(value));
    }
    node.outputs = {static_cast<int>(graph.values.size())};
    graph.values.push_back({"y", Type::f32, std::nullopt, std::nullopt});
    graph.inputs = {0};
    graph.outputs = node.outputs;
    graph.nodes.push_back(std::move(node));
    return graph;
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
            Engine engine(graph, Options{threads, set, {}});
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

// Two engines, each run by several threads with inputs of several shapes; some callers are wrong, and hear of it alone.
void many_callers() {
    const Tensor w = filled({64, 48}, 0.8);
    const Graph graph = graph_of("MatMul", {w}, {});
    std::vector<Tensor> inputs, expected;
    Engine alone(graph, Options{1, "", {}});
    for (const std::int64_t tokens : {1, 5, 33, 100, 7, 64, 2, 3, 4, 90}) {  // more shapes than plans are kept
        inputs.push_back(filled({tokens, 64}));
        expected.push_back(alone.run({{Type::f32, inputs.back().dims, inputs.back().bytes()}})[0]);
    }
    Engine one(graph, Options{3, "", {}}), other(graph, Options{2, "", {}});
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

int main() {
    for (int round = 0; round < 12; ++round)
        for (const double zeros : {0.0, 0.9}) {
            convolution(zeros, false);
            convolution(zeros, true);
            product(zeros);
        }
    many_callers();
    for (const std::string& set : instruction_sets()) std::printf("%s\n", set.c_str());
}
