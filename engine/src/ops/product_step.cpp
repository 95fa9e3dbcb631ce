// SPDX-License-Identifier: Apache-2.0
#include "product_step.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

namespace featherweight {

static constexpr float infinite = std::numeric_limits<float>::infinity();

std::vector<Fact> Places::touched() const {
    std::vector<Fact> all{in, out};
    for (const auto& each : {scratch, bias, residual})
        if (each) all.push_back(*each);
    return all;
}

Finisher Places::bound(const Frame& frame, Finisher finisher) const {
    if (bias) finisher.bias = frame.at<float>(*bias);
    if (residual) finisher.residual = frame.at<float>(*residual);
    finisher.out = frame.at<float>(out);
    return finisher;
}

Finisher finisher_of(const Finish& finish) {
    Finisher made{nullptr, finish.activation, finish.low, finish.high, nullptr, finish.residual_first, nullptr, 0, nullptr, 0};
    if (finish.activation == Activation::none) made.low = -infinite, made.high = infinite;
    if (finish.activation == Activation::relu) made.low = 0, made.high = infinite;
    return made;
}

void require_floats(const Planner& planner) {
    for (int i = 0; i < planner.inputs(); ++i)
        if (planner.has(i) && planner.in(i).type != Type::f32)
            throw Unsupported(std::string("products are of floats, not of ") + name_of(planner.in(i).type));
}

void require_countable(const Dims& weights, const Fact& out) {
    if (std::max(count(weights), out.size()) > std::numeric_limits<int>::max()) throw Unsupported("it has more than 2^31 weights or results");
}

std::optional<Fact> residual_of(Planner& planner, const Dims& dims, const std::vector<int>& order) {
    const int value = planner.node().finish.residual;
    if (value < 0) return std::nullopt;
    const Fact fact = planner.fact(value);
    if (fact.type != Type::f32) throw Unsupported("its residual is not of floats");
    return planner.dense(broadcast_to(fact, dims), order);
}

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::string text_of(const Geometry& g) {
    std::string text = std::to_string(g.rows) + "x" + std::to_string(g.channels) + "x" + std::to_string(g.in.size());
    for (const Spatial& axis : g.space)
        for (std::int64_t number : {axis.in, axis.out, axis.taps, axis.stride, axis.dilation, axis.pad}) text += "," + std::to_string(number);
    return text + ";" + std::to_string(g.channel_step);
}

std::string text_of(const Choice& choice) {
    if (choice.vector) return choice.sparse ? "sparse vector" : "dense vector";
    return (choice.sparse ? "sparse" : "dense") + std::string(" ") + std::to_string(choice.width) + "x" + std::to_string(choice.block) +
           (choice.packed ? "" : " in place");
}

// The index of what takes least time. All are run in turn, a few rounds, so that whatever else the machine does meanwhile
// strikes all of them; those that will not win any more are left out. Earlier ones win where the difference is noise.
template <class Run>
std::size_t fastest(std::size_t count, const Run& run) {
    constexpr int most_rounds = 5;
    constexpr double patience = 0.04, hopeless = 1.4, noise = 0.98;  // seconds; of the least time
    std::vector<double> shortest(count, infinite);
    double least = infinite, spent = 0;
    for (int round = 0; round < most_rounds && (round < 2 || spent < patience); ++round)
        for (std::size_t i = 0; i < count; ++i) {
            if (shortest[i] < infinite && shortest[i] > hopeless * least) continue;
            const double begin = now();
            run(i);
            const double took = now() - begin;
            spent += took;
            shortest[i] = std::min(shortest[i], took);
            least = std::min(least, took);
        }
    std::size_t best = 0;
    for (std::size_t i = 1; i < count; ++i)
        if (shortest[i] < noise * shortest[best]) best = i;
    return best;
}

// The candidate that is fastest on this machine, measured on the layer itself with numbers of no meaning. Layers that are
// alike share one measurement.
template <class Values>
Choice choose(Planner& planner, const Geometry& g, double share, const Values& values) {
    const Kernels& kernels = planner.kernels();
    const std::vector<Choice> all = candidates(g, share, kernels.lanes);
    if (all.size() == 1) return all.front();
    const std::string key = std::string(kernels.name) + "/" + std::to_string(planner.threads()) + "/" + text_of(g) + "/" +
                            std::to_string(std::lround(share * 40));
    const std::string decision = planner.store().decision(key);
    for (const Choice& choice : all)
        if (text_of(choice) == decision) return choice;

    std::ptrdiff_t in_end = 0, out_end = 0;
    for (std::ptrdiff_t offset : g.in) in_end = std::max(in_end, offset);
    for (std::ptrdiff_t offset : g.out) out_end = std::max(out_end, offset);
    in_end += g.channels * g.channel_step + g.space[0].in * g.space[1].in * g.space[2].in;
    out_end += g.rows * g.row_step + static_cast<std::ptrdiff_t>(g.positions());
    Memory in(static_cast<std::size_t>(in_end) * 4), out(static_cast<std::size_t>(out_end) * 4);
    auto* source = reinterpret_cast<float*>(in.data());
    for (std::ptrdiff_t i = 0; i < in_end; ++i) source[i] = static_cast<float>(i % 7) - 3.0f;
    Finisher finisher = finisher_of({});
    finisher.out = reinterpret_cast<float*>(out.data());
    finisher.stride = g.row_step;
    std::vector<Matrix> matrices;
    std::vector<Tiling> tilings;
    std::size_t scratch = 0;
    for (const Choice& choice : all) {
        matrices.push_back(packed_matrix(values(), g, choice, kernels));
        tilings.push_back(tiling(g, matrices.back(), choice, kernels.lanes, planner.threads()));
        scratch = std::max(scratch, tilings.back().scratch);
    }
    Memory room(scratch * static_cast<std::size_t>(planner.threads()) * 4);
    const Choice best = all[fastest(all.size(), [&](std::size_t i) {
        multiply_all(g, matrices[i], all[i], tilings[i], source, finisher, reinterpret_cast<float*>(room.data()), kernels, planner.pool());
    })];
    planner.store().decide(key, text_of(best));
    return best;
}

}  // namespace

void add_product(Planner& planner, const Geometry& g, int groups, std::ptrdiff_t group_in, std::ptrdiff_t group_out, const Weights& weights,
                 Places places) {
    std::optional<Tensor> made;
    const auto values = [&] {
        if (!made) made = weights.make();
        return made->as<float>();
    };
    const std::int64_t each = static_cast<std::int64_t>(g.rows) * g.depth();
    const double share = *planner.prepared<double>("share", [&] { return density(values(), each * groups); });
    const double first = *planner.prepared<double>("share of the first group", [&] { return groups == 1 ? share : density(values(), each); });
    const Choice choice = choose(planner, g, first, values);
    std::vector<Matrix> matrices;
    const std::string tag = std::to_string(choice.sparse) + "/" + std::to_string(choice.vector) + "/" + std::to_string(choice.block) + "/" +
                            std::to_string(choice.width * !choice.sparse);
    for (int group = 0; group < groups; ++group)
        matrices.push_back(*planner.prepared<Matrix>(tag + "/" + std::to_string(group),
                                                     [&] { return packed_matrix(values() + group * each, g, choice, planner.kernels()); }));
    std::vector<Tiling> tilings;  // rows are cut by each group's own zeros
    for (const Matrix& matrix : matrices) tilings.push_back(tiling(g, matrix, choice, planner.kernels().lanes, planner.threads()));
    std::size_t scratch = 0;
    std::vector<int> before{0};  // tasks of the groups before
    for (const Tiling& tiles : tilings) {
        scratch = std::max(scratch, tiles.scratch);
        before.push_back(before.back() + tiles.tasks());
    }
    places.scratch = planner.scratch(Type::f32, {planner.threads(), static_cast<std::int64_t>(scratch)});
    Finisher finisher = finisher_of(planner.node().finish);
    finisher.stride = g.row_step;

    const double positions = static_cast<double>(g.positions()) * static_cast<double>(g.in.size());
    const double flops = 2 * share * static_cast<double>(each) * groups * positions;
    const double bytes = 4 * (positions * g.rows * groups * (places.residual ? 2 : 1) +
                              static_cast<double>(g.channels) * groups * static_cast<double>(g.in.size() * g.space[0].in * g.space[1].in * g.space[2].in)) +
                         (choice.sparse ? 6 * share : 4) * static_cast<double>(each) * groups;
    planner.step(
        planner.node().op + " " + text_of(choice) + ", " + std::to_string(std::lround((1 - share) * 100)) + " % zeros", places.touched(),
        [=](Frame& frame) {
            const Finisher bound = places.bound(frame, finisher);
            const float* in = frame.at<float>(places.in);
            float* room = frame.at<float>(*places.scratch);
            const int tasks = before.back();
            const int takers = std::min(frame.pool.threads(), tasks);
            Shares shares(tasks, takers);
            frame.pool.run(takers, [&](int part) {
                for (int task; (task = shares.next(part)) >= 0;) {
                    const int group = static_cast<int>(std::upper_bound(before.begin(), before.end(), task) - before.begin()) - 1;
                    Finisher to = bound;
                    if (to.bias != nullptr) to.bias += group * g.rows;
                    if (to.residual != nullptr) to.residual += group * group_out;
                    to.out += group * group_out;
                    multiply(g, matrices[group], choice, tilings[group], task - before[group], in + group * group_in, to,
                             room + part * scratch, frame.kernels);
                }
            });
        },
        flops, bytes);
}

}  // namespace featherweight
