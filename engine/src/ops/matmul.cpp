// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <numeric>

#include "product_step.hpp"

namespace featherweight {

namespace {

// Weights [rows][depth] times x along `axis`, which the output has `rows` long. Whatever other axes x has are positions;
// those that are innermost in memory stay so, behind the rows.
void linear(Planner& planner, const Weights& weights, const Fact& x, int axis, const std::optional<Fact>& bias, const std::optional<Fact>& added) {
    const std::int64_t rows = weights.dims[0], depth = weights.dims[1];
    const int rank = x.rank();
    Dims dims = x.dims;
    dims[axis] = rows;

    const auto others_of = [&](const Fact& fact) {  // outermost first
        std::vector<int> others;
        for (int each : storage_order(fact))
            if (each != axis && fact.dims[each] != 1) others.push_back(each);
        return others;
    };
    std::vector<int> others = others_of(x);
    Places places;
    places.in = x;
    // How many of the innermost axes make one line of positions.
    const auto run_of = [&](const Fact& fact, const std::vector<int>& axes) {
        std::size_t run = 0;
        std::int64_t stride = 1;
        while (run < axes.size() && fact.strides[axes[axes.size() - 1 - run]] == stride) {
            stride *= fact.dims[axes[axes.size() - 1 - run]];
            ++run;
        }
        return run;
    };
    std::size_t run = run_of(x, others);
    std::int64_t line = 1;
    for (std::size_t i = 0; i < run; ++i) line *= x.dims[others[others.size() - 1 - i]];
    const std::int64_t all = x.size() / std::max<std::int64_t>(depth, 1);
    if (depth > 0 && all > 0 && (run == 0 || (line < 16 && line < all)) && !others.empty()) {
        // Positions are brought side by side: behind k, all of them where lines would be short.
        std::vector<int> order;
        for (int i = 0; i < rank; ++i)
            if (i != axis && x.dims[i] == 1) order.push_back(i);
        const bool whole = line < 16 && x.dims[others.back()] < 16;
        if (!whole) order.insert(order.end(), others.begin(), others.end() - 1);
        order.push_back(axis);
        if (whole) order.insert(order.end(), others.begin(), others.end());
        else order.push_back(others.back());
        places.in = planner.dense(x, order);
        others = others_of(places.in);
        run = run_of(places.in, others);
        line = 1;
        for (std::size_t i = 0; i < run; ++i) line *= x.dims[others[others.size() - 1 - i]];
    } else if (others.empty()) {
        places.in = planner.dense(x);
    }
    std::vector<int> order;  // of the output: what is outside, rows, positions
    for (int i = 0; i < rank; ++i)
        if (i != axis && x.dims[i] == 1) order.push_back(i);
    order.insert(order.end(), others.begin(), others.end() - static_cast<std::ptrdiff_t>(run));
    order.push_back(axis);
    order.insert(order.end(), others.end() - static_cast<std::ptrdiff_t>(run), others.end());

    places.bias = bias;
    std::optional<Fact> extra = residual_of(planner, dims, order);
    if (added) {
        if (extra) throw Unsupported("it adds two tensors to its product");
        extra = planner.dense(broadcast_to(*added, dims), order);
    }
    places.residual = extra;
    places.out = planner.make(0, Type::f32, dims, order);
    if (places.out.size() == 0) return;
    require_countable(weights.dims, places.out);

    Geometry g;
    g.rows = static_cast<int>(rows);
    g.channels = static_cast<int>(depth);
    g.space[2].in = g.space[2].out = line;
    g.channel_step = places.in.strides[axis];
    g.row_step = places.out.strides[axis];
    g.in = {0};
    g.out = {0};
    for (std::size_t i = 0; i + run < others.size(); ++i) {
        std::vector<std::ptrdiff_t> in, out;
        for (std::size_t j = 0; j < g.in.size(); ++j)
            for (std::int64_t at = 0; at < x.dims[others[i]]; ++at) {
                in.push_back(g.in[j] + at * places.in.strides[others[i]]);
                out.push_back(g.out[j] + at * places.out.strides[others[i]]);
            }
        g.in = std::move(in);
        g.out = std::move(out);
    }
    add_product(planner, g, 1, 0, 0, weights, places);
}

// Both operands change: the rows of one are packed when it runs. `v` has the positions, innermost in memory, `a` the rows.
struct Batched {
    Fact a, v, out;
    int a_rows, a_k, v_k, v_positions, out_rows, out_positions;  // axes
};

void add_batched(Planner& planner, const Batched& b, double scale_flops) {
    const std::int64_t rows = b.a.dims[b.a_rows], depth = b.a.dims[b.a_k], positions = b.v.dims[b.v_positions];
    struct Image {
        std::ptrdiff_t a, v, out;
    };
    auto images = std::make_shared<std::vector<Image>>(std::vector<Image>{{0, 0, 0}});
    for (int axis = 0; axis < b.out.rank() - 2; ++axis) {
        std::vector<Image> next;
        for (const Image& image : *images)
            for (std::int64_t i = 0; i < b.out.dims[axis]; ++i)
                next.push_back({image.a + i * b.a.strides[axis], image.v + i * b.v.strides[axis], image.out + i * b.out.strides[axis]});
        *images = std::move(next);
    }
    Geometry g;
    g.rows = static_cast<int>(rows);
    g.channels = static_cast<int>(depth);
    g.space[2].in = g.space[2].out = positions;
    g.channel_step = b.v.strides[b.v_k];
    g.row_step = b.out.strides[b.out_rows];
    g.in = {0};
    g.out = {0};
    const int lanes = planner.kernels().lanes;
    const std::int64_t vectors = (positions + lanes - 1) / lanes;
    const Choice choice{false, static_cast<int>(std::clamp<std::int64_t>(vectors, 1, vectors % 3 == 0 ? 3 : 4)), 256, positions % lanes != 0};
    const int group = planner.kernels().product.dense_rows(choice.width);
    // Columns are the same for every image; the values are packed in the thread's own room.
    Matrix pattern;
    auto dense = std::make_shared<DenseMatrix>();
    *dense = dense_matrix(std::vector<float>(static_cast<std::size_t>(rows * depth)).data(), g.rows, g.channels, 1, choice.block, group);
    const std::int64_t packed = static_cast<std::int64_t>(dense->values.size());
    dense->values.clear();
    pattern.dense = dense;
    const Tiling tiles = tiling(g, pattern, choice, lanes, 1);
    const int threads = planner.threads();
    // Few images: their tiles are shared out, and each thread packs the rows for itself.
    const int parts = static_cast<int>(images->size()) >= threads ? 1 : std::min<int>(static_cast<int>(tiles.tiles.size()), threads);
    const std::int64_t room = packed + 16 + static_cast<std::int64_t>(tiles.scratch);
    Places places{b.v, b.out, planner.scratch(Type::f32, {threads, room}), b.a, residual_of(planner, b.out.dims, storage_order(b.out))};
    Finisher finisher = finisher_of(planner.node().finish);
    finisher.stride = g.row_step;
    const double flops = scale_flops * static_cast<double>(rows * depth * positions) * static_cast<double>(images->size());
    const double bytes = 4.0 * static_cast<double>(images->size()) * static_cast<double>(rows * depth + depth * positions + rows * positions);
    planner.step(
        planner.node().op + " of two that change", places.touched(),
        [=](Frame& frame) {
            Places own = places;
            own.bias.reset();
            const Finisher bound = own.bound(frame, finisher);
            const float *a = frame.at<float>(b.a), *v = frame.at<float>(b.v);
            float* scratch = frame.at<float>(*places.scratch);
            const int tasks = static_cast<int>(images->size()) * parts;
            const int takers = std::min(frame.pool.threads(), tasks);
            Shares shares(tasks, takers);
            const std::int64_t row = b.a.strides[b.a_rows], step = b.a.strides[b.a_k];
            frame.pool.run(takers, [&](int part) {
                float* values = scratch + part * room;
                float* rest = values + packed + 16 - packed % 16;
                for (int task; (task = shares.next(part)) >= 0;) {
                    const Image& image = (*images)[task / parts];
                    frame.kernels.product.pack_rows(a + image.a, row, step, g.rows, g.channels, group, values);
                    Finisher to = bound;
                    to.out += image.out;
                    if (to.residual != nullptr) to.residual += image.out;
                    const int count = static_cast<int>(tiles.tiles.size()), share = task % parts;
                    for (int tile = count * share / parts; tile < count * (share + 1) / parts; ++tile)
                        multiply(g, pattern, choice, tiles, tile, v + image.v, to, rest, frame.kernels, values);
                }
            });
        },
        flops, bytes);
}

Fact with_axes(const Fact& fact, const Dims& batch) {  // leading axes broadcast to `batch`
    Dims dims = batch;
    dims.insert(dims.end(), fact.dims.end() - 2, fact.dims.end());
    return broadcast_to(fact, dims);
}

Tensor transposed_matrix(const Tensor& matrix) {
    const std::int64_t rows = matrix.dims[0], columns = matrix.dims[1];
    Tensor made(Type::f32, {columns, rows});
    const float* from = matrix.as<float>();
    float* to = made.as<float>();
    constexpr std::int64_t side = 32;
    for (std::int64_t r = 0; r < rows; r += side)
        for (std::int64_t c = 0; c < columns; c += side)
            for (std::int64_t i = r; i < std::min(r + side, rows); ++i)
                for (std::int64_t j = c; j < std::min(c + side, columns); ++j) to[j * rows + i] = from[i * columns + j];
    return made;
}

// MatMul's optional third input is a bias over the last axis, put there by `fused`.
void matmul(Planner& planner) {
    require_floats(planner);
    Fact a = planner.in(0), b = planner.in(1);
    if (a.rank() == 0 || b.rank() == 0) throw Error("a product needs axes");
    if (a.rank() == 1 || b.rank() == 1) throw Unsupported("one of its inputs has one axis");
    const std::int64_t depth = a.dims.back();
    if (depth != b.dims[b.rank() - 2]) throw Error("shapes " + describe(a.dims) + " and " + describe(b.dims) + " cannot be multiplied");
    std::optional<Fact> bias;
    if (planner.has(2)) bias = planner.dense(planner.in(2));
    if (b.constant && b.rank() == 2 && (!a.constant || bias)) {
        const Weights weights({b.dims[1], b.dims[0]}, [&] { return transposed_matrix(planner.constant(1)); });
        return linear(planner, weights, a, a.rank() - 1, bias, std::nullopt);
    }
    if (a.constant && a.rank() == 2 && !b.constant && !bias) return linear(planner, planner.constant(0), b, b.rank() - 2, std::nullopt, std::nullopt);
    const Dims batch = broadcast_dims(Dims(a.dims.begin(), a.dims.end() - 2), Dims(b.dims.begin(), b.dims.end() - 2));
    a = with_axes(a, batch);
    b = with_axes(b, batch);
    const int rank = static_cast<int>(batch.size()) + 2, m = rank - 2, n = rank - 1;
    Dims dims = batch;
    dims.push_back(a.dims[m]);
    dims.push_back(b.dims[n]);
    if (bias) throw Unsupported("a bias on a product of two that change");
    std::vector<int> order(rank);
    std::iota(order.begin(), order.end(), 0);
    // Positions are the tokens of the left operand where they are innermost; then they stay so.
    const bool left = a.strides[m] == 1 && a.dims[m] > 1 && !(a.dims[n] == 1);
    if (left) std::swap(order[m], order[n]);
    if (!left && b.strides[n] != 1 && b.dims[n] != 1) b = planner.dense(b);
    const Fact out = planner.make(0, Type::f32, dims, order);
    if (out.size() == 0) return;
    if (left)
        add_batched(planner, {b, a, out, n, m, n, m, n, m}, 2);
    else
        add_batched(planner, {a, b, out, m, n, m, n, m, n}, 2);
}

void gemm(Planner& planner) {
    require_floats(planner);
    const Node& node = planner.node();
    const float alpha = node.real("alpha", 1), beta = node.real("beta", 1);
    Fact a = planner.in(0);
    const Fact& b = planner.in(1);
    if (a.rank() != 2 || b.rank() != 2) throw Error("Gemm is of matrices");
    if (node.integer("transA", 0) != 0) a = transposed(a, {1, 0});
    const bool turned = node.integer("transB", 0) != 0;
    const std::int64_t rows = b.dims[turned ? 0 : 1];
    if (a.dims[1] != b.dims[turned ? 1 : 0]) throw Error("shapes " + describe(a.dims) + " and " + describe(b.dims) + " cannot be multiplied");
    const Weights weights({rows, a.dims[1]}, [&] {
        const Tensor given = planner.constant(1);
        Tensor made = turned ? given : transposed_matrix(given);
        if (alpha != 1) {
            Tensor scaled(Type::f32, made.dims);
            for (std::int64_t i = 0; i < made.size(); ++i) scaled.as<float>()[i] = alpha * made.as<float>()[i];
            made = scaled;
        }
        return made;
    });
    std::optional<Fact> bias, added;
    if (planner.has(2) && beta != 0) {
        Fact c = planner.in(2);
        if (beta != 1) throw Unsupported("beta is " + std::to_string(beta));
        const bool by_row = c.rank() == 0 || c.dims.back() == rows || c.dims.back() == 1;
        if (by_row && (c.rank() < 2 || c.dims[0] == 1)) {
            Fact line = c;
            if (c.rank() == 2) line = *reshaped(planner.dense(c), {c.dims[1]});
            bias = planner.dense(broadcast_to(line, {rows}));
        } else {
            if (node.finish.activation != Activation::none && !node.finish.residual_first) throw Unsupported("its matrix C is added after an activation");
            added = c;
        }
    }
    linear(planner, weights, a, 1, bias, added);
}

}  // namespace

std::vector<Op> matmul_ops() { return {{"MatMul", matmul}, {"Gemm", gemm}}; }

}  // namespace featherweight
