// SPDX-License-Identifier: Apache-2.0
#include "loops.hpp"

#include <algorithm>
#include <array>

#include "runs.hpp"

namespace featherweight {

namespace {

constexpr std::int64_t piece = 1024;      // elements that go through all stages at once: operands and result fit the nearest cache
constexpr std::int64_t shortest_run = 16;  // below, runs cost more than gathering
constexpr int most_operands = 3;

enum class Reading { flat, by_run, gathered };  // flat: as the output lies

struct Operand {
    Fact view;
    Reading reading;
};

struct Loops {
    Fact out;
    Walk walk;  // of the output, then the views
    std::vector<Operand> operands;
    std::vector<Stage> stages;
    std::vector<std::size_t> sizes;  // of an element, by view
};

Reading reading_of(const Walk& walk, std::size_t view) {
    if (walk.strides[view] == walk.strides[0]) return Reading::flat;
    const std::int64_t inner = walk.strides[view].back();
    const bool worth = walk.dims.size() == 1 || walk.dims.back() >= shortest_run;
    return worth && (inner == 0 || inner == 1) ? Reading::by_run : Reading::gathered;
}

// Where a run begins, in a view.
std::int64_t offset_of_run(const Walk& walk, std::size_t view, std::int64_t run) {
    std::int64_t offset = 0;
    for (std::size_t i = walk.dims.size() - 1; i-- > 0;) {
        offset += run % walk.dims[i] * walk.strides[view][i];
        run /= walk.dims[i];
    }
    return offset;
}

// Elements [begin, end) of a view, in the walk's order.
template <class T>
void gather_as(const Walk& walk, std::size_t view, std::int64_t begin, std::int64_t end, const void* source, void* target) {
    const T* from = static_cast<const T*>(source);
    T* to = static_cast<T*>(target);
    const std::int64_t stride = walk.strides[view].back();
    each_run<1>(walk.dims, {&walk.strides[view]}, begin, end, [&](const auto& offsets, std::int64_t size) {
        const T* each = from + offsets[0];
        if (stride == 0)
            std::fill_n(to, size, *each);
        else
            for (std::int64_t i = 0; i < size; ++i) to[i] = each[i * stride];
        to += size;
    });
}

void gather(std::size_t size, const Walk& walk, std::size_t view, std::int64_t begin, std::int64_t end, const void* from, void* to) {
    switch (size) {
        case 1: return gather_as<std::uint8_t>(walk, view, begin, end, from, to);
        case 2: return gather_as<std::uint16_t>(walk, view, begin, end, from, to);
        case 4: return gather_as<std::uint32_t>(walk, view, begin, end, from, to);
        default: return gather_as<std::uint64_t>(walk, view, begin, end, from, to);
    }
}

// One stage over elements [begin, end) of the output: at once where no operand goes by runs, else as many whole runs at a
// time as the axis before the innermost has.
void carry_out(const Frame& frame, const Loops& loops, const Stage& stage, std::int64_t begin, std::int64_t end) {
    alignas(64) std::byte room[most_operands][piece * 8];
    Runs runs{};
    runs.low = stage.low;
    runs.high = stage.high;
    std::byte* out = frame.bytes(loops.out);
    const std::int64_t out_size = static_cast<std::int64_t>(size_of(loops.out.type));
    const std::int64_t start = begin;
    bool by_run = false;
    std::array<const std::byte*, most_operands> base{};
    for (std::size_t k = 0; k < stage.in.size(); ++k) {
        if (stage.in[k] == made) {
            base[k] = out + start * out_size;
            continue;
        }
        const Operand& operand = loops.operands[stage.in[k]];
        const std::size_t size = loops.sizes[stage.in[k]];
        base[k] = frame.bytes(operand.view);
        if (operand.reading == Reading::gathered) {
            gather(size, loops.walk, stage.in[k] + 1, begin, end, base[k], room[k]);
            base[k] = room[k];
        } else if (operand.reading == Reading::flat) {
            base[k] += start * static_cast<std::int64_t>(size);
        } else {
            by_run = true;
        }
    }
    const Walk& walk = loops.walk;
    const std::int64_t inner = by_run ? walk.dims.back() : end - begin;
    const std::int64_t outer = by_run && walk.dims.size() > 1 ? walk.dims[walk.dims.size() - 2] : 1;
    while (begin < end) {
        const std::int64_t run = by_run ? begin / inner : 0, first = by_run ? begin % inner : 0;
        if (first != 0 || end - begin < inner) {
            runs.size = std::min(inner - first, end - begin);
            runs.count = 1;
        } else {
            runs.size = inner;
            runs.count = std::min(outer - run % outer, (end - begin) / inner);
        }
        for (std::size_t k = 0; k < stage.in.size(); ++k) {
            Runs::Operand& in = runs.in[k];
            const int view = stage.in[k];
            if (view == made || loops.operands[view].reading != Reading::by_run) {
                const std::size_t size = view == made ? static_cast<std::size_t>(out_size) : loops.sizes[view];
                in = {base[k] + (begin - start) * static_cast<std::int64_t>(size), runs.size, true};
                continue;
            }
            const Dims& strides = walk.strides[view + 1];
            const std::int64_t offset = offset_of_run(walk, view + 1, run) + first * strides.back();
            in.at = base[k] + offset * static_cast<std::int64_t>(loops.sizes[view]);
            in.step = strides.size() > 1 ? strides[strides.size() - 2] : 0;
            in.moves = strides.back() == 1;
        }
        runs.out = out + begin * out_size;
        stage.loop(runs);
        begin += runs.size * runs.count;
    }
}

}  // namespace

void add_loops(Planner& planner, std::string what, const Fact& out, const std::vector<Fact>& views, std::vector<Stage> stages,
               std::int64_t least) {
    const double flops = static_cast<double>(out.size()) * static_cast<double>(stages.size());
    Loops loops{out, {}, {}, std::move(stages), {}};
    std::vector<Fact> touches{out};
    double bytes = static_cast<double>(out.size()) * static_cast<double>(size_of(out.type));
    std::vector<Fact> shaped;
    for (const Fact& view : views) shaped.push_back(broadcast_to(view, out.dims));
    std::vector<const Fact*> walked{&out};
    for (const Fact& view : shaped) walked.push_back(&view);
    loops.walk = walk(walked);
    bool pieces = loops.stages.size() > 1;
    for (std::size_t v = 0; v < shaped.size(); ++v) {
        touches.push_back(views[v]);
        bytes += static_cast<double>(views[v].size()) * static_cast<double>(size_of(views[v].type));
        loops.operands.push_back({shaped[v], reading_of(loops.walk, v + 1)});
        loops.sizes.push_back(size_of(views[v].type));
        pieces = pieces || loops.operands.back().reading == Reading::gathered;
    }
    const std::int64_t size = out.size();
    const int parts = static_cast<int>(std::clamp<std::int64_t>(size / least, 1, planner.threads()));
    const auto work = [loops = std::move(loops), size, parts, pieces](Frame& frame) {
        frame.pool.run(parts, [&](int part) {
            // Parts begin at whole cache lines of every type.
            const auto border = [&](int i) { return i == parts ? size : size * i / parts / 64 * 64; };
            const std::int64_t end = border(part + 1);
            for (std::int64_t begin = border(part); begin < end;) {
                const std::int64_t next = pieces ? std::min(begin + piece, end) : end;
                for (const Stage& stage : loops.stages) carry_out(frame, loops, stage, begin, next);
                begin = next;
            }
        });
    };
    planner.step(std::move(what), std::move(touches), work, flops, bytes);
}

const Fact& leader(const std::vector<Fact>& inputs) {
    const Fact* lead = &inputs.front();
    for (const Fact& input : inputs)
        if (input.size() > lead->size() || (input.size() == lead->size() && lead->constant && !input.constant)) lead = &input;
    return *lead;
}

std::vector<int> leading_order(const std::vector<Fact>& inputs, const Dims& dims) {
    return storage_order(broadcast_to(leader(inputs), dims));
}

Fact alongside(Planner& planner, const Fact& fact, const Fact& out) {
    const Fact view = broadcast_to(fact, out.dims);
    const std::vector<int> order = storage_order(out);
    int inner = -1;
    for (int axis : order)
        if (out.dims[axis] != 1) inner = axis;
    if (inner < 0) return view;
    // Gathering along one axis what lies along another fetches a cache line for each element.
    const bool across = view.strides[inner] != 0 && view.strides[inner] != 1 &&
                        std::any_of(view.strides.begin(), view.strides.end(), [](std::int64_t stride) { return stride == 1; });
    constexpr std::int64_t near = 1 << 12;
    if (!across || (fact.size() < near && !fact.constant)) return view;
    const int lead = out.rank() - fact.rank();
    std::vector<int> axes;
    for (int axis : order)
        if (axis >= lead) axes.push_back(axis - lead);
    return broadcast_to(planner.dense(fact, axes), out.dims);
}

void add_finish(Planner& planner, const Fact& out, std::vector<Fact>& views, std::vector<Stage>& stages) {
    const Finish& finish = planner.node().finish;
    const Kernels& kernels = planner.kernels();
    const auto add_residual = [&] {
        if (finish.residual < 0) return;
        views.push_back(alongside(planner, planner.fact(finish.residual), out));
        const auto add = [&kernels](const Runs& runs) { kernels.elementwise.binary(Binary::add, runs); };
        stages.push_back({add, {made, static_cast<int>(views.size()) - 1}, true});
    };
    if (finish.residual_first) add_residual();
    if (finish.activation == Activation::relu && stages.back().clamps) {
        stages.back().low = 0;
    } else if (finish.activation == Activation::clip && stages.back().clamps) {
        stages.back().low = finish.low;
        stages.back().high = finish.high;
    } else if (finish.activation != Activation::none) {
        const auto activate = [&kernels, f = finish.activation](const Runs& runs) { kernels.elementwise.activation(f, runs); };
        stages.push_back({activate, {made}, false, finish.low, finish.high});
    }
    if (!finish.residual_first) add_residual();
}

}  // namespace featherweight
