// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "../ops.hpp"

namespace featherweight {

namespace {

// Positions are walked in pieces of the innermost axis, each with its first element's offset in every view.
constexpr std::size_t most_views = 4;
using Offsets = std::array<std::int64_t, most_views>;

template <class Visit>
void pieces(const Walk& walk, std::int64_t begin, std::int64_t end, Visit visit) {
    const std::int64_t inner = walk.dims.back();
    while (begin < end) {
        const std::int64_t at = begin % inner;
        std::int64_t rest = begin / inner;
        const std::int64_t size = std::min(inner - at, end - begin);
        Offsets offsets{};
        for (std::size_t v = 0; v < walk.strides.size(); ++v) offsets[v] = at * walk.strides[v].back();
        for (std::size_t i = walk.dims.size() - 1; i-- > 0;) {
            const std::int64_t index = rest % walk.dims[i];
            rest /= walk.dims[i];
            for (std::size_t v = 0; v < walk.strides.size(); ++v) offsets[v] += index * walk.strides[v][i];
        }
        visit(offsets, size);
        begin += size;
    }
}

// The same by several threads, where `each` (elements a position) makes it worth it.
template <class Visit>
void in_parallel(Pool& pool, const Walk& walk, std::int64_t each, const Visit& visit) {
    constexpr std::int64_t least = 1 << 14, line = 16;  // positions of one cache line stay together
    const std::int64_t size = count(walk.dims);
    const int parts = static_cast<int>(std::clamp<std::int64_t>(size * each / least, 1, pool.threads()));
    const auto border = [&](int part) { return part == parts ? size : size * part / parts / line * line; };
    if (parts == 1)
        pieces(walk, 0, size, visit);
    else
        pool.run(parts, [&](int part) { pieces(walk, border(part), border(part + 1), visit); });
}

// One axis has stride 1 and none is broadcast or walked backwards: registers are filled either along the axis that is
// folded or across lines. Anything else is copied first.
Fact for_registers(Planner& planner, const Fact& fact) {
    bool contiguous = fact.size() <= 1, plain = true;
    for (int i = 0; i < fact.rank(); ++i) {
        if (fact.dims[i] == 1) continue;
        contiguous = contiguous || fact.strides[i] == 1;
        plain = plain && fact.strides[i] > 0;
    }
    return contiguous && plain ? fact : planner.dense(fact, storage_order(fact));
}

// Some of a view's axes as a view of their own.
Fact only(const Fact& fact, const std::vector<int>& axes) {
    Fact made = fact;
    made.dims.clear();
    made.strides.clear();
    for (int axis : axes) {
        made.dims.push_back(fact.dims[axis]);
        made.strides.push_back(fact.strides[axis]);
    }
    return made;
}

// Axes of `rank` that are in the list, and those that are not.
std::pair<std::vector<int>, std::vector<int>> sorted_out(const std::vector<std::int64_t>& list, int rank) {
    std::vector<bool> in(static_cast<std::size_t>(rank), false);
    for (std::int64_t axis : list) in[axis_of(axis, rank)] = true;
    std::pair<std::vector<int>, std::vector<int>> made;
    for (int i = 0; i < rank; ++i) (in[i] ? made.first : made.second).push_back(i);
    return made;
}

std::vector<int> from_axis_on(int axis, int rank) {
    std::vector<int> axes(static_cast<std::size_t>(rank - axis));
    std::iota(axes.begin(), axes.end(), axis);
    return axes;
}

Fact float_input(Planner& planner, int input = 0) {
    const Fact& fact = planner.in(input);
    if (fact.type != Type::f32) throw Unsupported(std::string("it computes in float, not ") + name_of(fact.type));
    return fact;
}

// ---- reductions

enum class After { nothing, mean, root, logarithm, log_sum_exp };

// The axes: an input or an attribute, by opset and by op.
std::vector<std::int64_t> reduced_axes(Planner& planner) {
    const int rank = planner.in(0).rank();
    std::vector<std::int64_t> axes;
    if (planner.has(1))
        axes = planner.integers(1);
    else
        axes = planner.node().integers("axes");
    if (axes.empty() && planner.node().integer("noop_with_empty_axes", 0) == 0)
        for (int i = 0; i < rank; ++i) axes.push_back(i);
    return axes;
}

struct Shape {
    std::vector<int> folded, kept;  // axes of the input
    Dims dims;                      // of the output
    std::vector<int> order;         // likewise
    std::vector<int> made;          // axes of the output that are kept ones of the input
};

Shape reduced_shape(const Fact& x, const std::vector<std::int64_t>& axes, bool keep) {
    Shape shape;
    std::tie(shape.folded, shape.kept) = sorted_out(axes, x.rank());
    std::vector<int> to(x.dims.size(), -1);
    for (int i = 0; i < x.rank(); ++i) {
        const bool folds = std::count(shape.folded.begin(), shape.folded.end(), i) != 0;
        if (folds && !keep) continue;
        to[i] = static_cast<int>(shape.dims.size());
        if (!folds) shape.made.push_back(to[i]);
        shape.dims.push_back(folds ? 1 : x.dims[i]);
    }
    for (int axis : storage_order(x))
        if (to[axis] >= 0) shape.order.push_back(to[axis]);
    return shape;
}

float start_of(Fold fold) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    return fold == Fold::largest ? -infinity : fold == Fold::smallest ? infinity : fold == Fold::product ? 1.0f : 0.0f;
}

float joined(Fold fold, float a, float b) {
    switch (fold) {
        case Fold::largest: return std::max(a, b);
        case Fold::smallest: return std::min(a, b);
        case Fold::product: return a * b;
        default: return a + b;
    }
}

// `size` neighbouring lines of x are folded into `out`, `step_out` apart.
struct Lines {
    Walk inner;               // the folded axes
    std::int64_t step = 0;    // from line to line in x
    std::int64_t step_out = 0;
    bool across = false;      // registers are filled by neighbouring lines
};

void fold_lines(const RowKernels& kernels, Fold fold, const Lines& lines, const float* x, std::int64_t size, const float* shift,
                float* out) {
    const std::int64_t n = lines.inner.dims.back(), elements = count(lines.inner.dims);
    const std::int64_t stride = lines.inner.strides[0].back();
    for (std::int64_t j = 0; j < size; ++j) out[j * lines.step_out] = start_of(fold);
    pieces(lines.inner, 0, elements, [&](const Offsets& at, std::int64_t) {
        if (lines.across) {
            kernels.fold_columns(fold, x + at[0], stride, n, size, shift, out);
            return;
        }
        for (std::int64_t j = 0; j < size; ++j) {
            float& to = out[j * lines.step_out];
            to = joined(fold, to, kernels.fold(fold, x + at[0] + j * lines.step, n, shift != nullptr ? shift[j] : 0.0f));
        }
    });
}

void finish(After after, std::int64_t elements, float* out, std::int64_t size, std::int64_t step) {
    for (std::int64_t j = 0; j < size; ++j) {
        float& value = out[j * step];
        if (after == After::mean) value /= static_cast<float>(elements);
        if (after == After::root) value = std::sqrt(value);
        if (after == After::logarithm) value = std::log(value);
    }
}

// log(sum of exp(x)) = top + log(sum of exp(x - top)), a few lines at a time.
void log_sum_exp(const RowKernels& kernels, const Lines& lines, const float* x, std::int64_t size, float* out) {
    constexpr std::int64_t few = 256;
    float top[few], sum[few];
    Lines to = lines;
    to.step_out = 1;
    for (std::int64_t begin = 0; begin < size; begin += few) {
        const std::int64_t there = std::min(few, size - begin);
        const float* from = x + begin * lines.step;
        fold_lines(kernels, Fold::largest, to, from, there, nullptr, top);
        for (std::int64_t j = 0; j < there; ++j)
            if (std::isinf(top[j])) top[j] = 0;  // inf - inf is no number
        fold_lines(kernels, Fold::exponentials, to, from, there, top, sum);
        for (std::int64_t j = 0; j < there; ++j) out[(begin + j) * lines.step_out] = top[j] + std::log(sum[j]);
    }
}

void reduce_floats(Planner& planner, Fold fold, After after, const std::vector<std::int64_t>& axes, bool keep) {
    const Fact x = for_registers(planner, planner.in(0));
    const Shape shape = reduced_shape(x, axes, keep);
    const Fact y = planner.make(0, Type::f32, shape.dims, shape.order);
    const Fact kept = only(x, shape.kept), made = only(y, shape.made), folded = only(x, shape.folded);
    const Walk outer = walk({&kept, &made});
    Lines lines{walk({&folded}), outer.strides[0].back(), outer.strides[1].back(), false};
    lines.across = outer.dims.back() > 1 && lines.step == 1 && lines.step_out == 1;
    const std::int64_t elements = count(folded.dims);
    planner.step(
        lines.across ? "across lines" : "along lines", {x, y},
        [=](Frame& frame) {
            const RowKernels& kernels = frame.kernels.rows;
            const float* from = frame.at<float>(x);
            float* to = frame.at<float>(y);
            in_parallel(frame.pool, outer, elements, [&](const Offsets& at, std::int64_t size) {
                if (after == After::log_sum_exp) return log_sum_exp(kernels, lines, from + at[0], size, to + at[1]);
                fold_lines(kernels, fold, lines, from + at[0], size, nullptr, to + at[1]);
                finish(after, elements, to + at[1], size, lines.step_out);
            });
        },
        static_cast<double>(x.size()), 4.0 * static_cast<double>(x.size() + y.size()));
}

template <class T>
T folded_integer(Fold fold, T a, T b) {
    switch (fold) {
        case Fold::largest: return std::max(a, b);
        case Fold::smallest: return std::min(a, b);
        // Overflow wraps, as it does elsewhere.
        case Fold::product: return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
        default: return static_cast<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
    }
}

template <class T>
void reduce_integers(Planner& planner, Fold fold, After after, const std::vector<std::int64_t>& axes, bool keep) {
    const Fact x = planner.in(0);
    const Shape shape = reduced_shape(x, axes, keep);
    const Fact y = planner.make(0, x.type, shape.dims, shape.order);
    const Fact kept = only(x, shape.kept), made = only(y, shape.made), folded = only(x, shape.folded);
    const Walk outer = walk({&kept, &made}), inner = walk({&folded});
    const std::int64_t elements = count(folded.dims);
    const T start = fold == Fold::largest    ? std::numeric_limits<T>::lowest()
                    : fold == Fold::smallest ? std::numeric_limits<T>::max()
                                             : static_cast<T>(fold == Fold::product ? 1 : 0);
    planner.step("integers", {x, y}, [=](Frame& frame) {
        const auto* from = reinterpret_cast<const T*>(frame.bytes(x));
        auto* to = reinterpret_cast<T*>(frame.bytes(y));
        in_parallel(frame.pool, outer, elements, [&](const Offsets& at, std::int64_t size) {
            for (std::int64_t j = 0; j < size; ++j) {
                T whole = start;
                pieces(inner, 0, elements, [&](const Offsets& first, std::int64_t n) {
                    const T* line = from + at[0] + j * outer.strides[0].back() + first[0];
                    for (std::int64_t i = 0; i < n; ++i) whole = folded_integer(fold, whole, line[i * inner.strides[0].back()]);
                });
                if (after == After::mean && elements > 0) whole = static_cast<T>(whole / static_cast<T>(elements));
                to[at[1] + j * outer.strides[1].back()] = whole;
            }
        });
    });
}

void reduce_over(Planner& planner, Fold fold, After after, const std::vector<std::int64_t>& axes, bool keep) {
    const Type type = planner.in(0).type;
    if (type == Type::f32) return reduce_floats(planner, fold, after, axes, keep);
    const bool orders = fold == Fold::largest || fold == Fold::smallest;
    const bool plain = (after == After::nothing || after == After::mean) && fold != Fold::absolute && fold != Fold::squares;
    if (type == Type::i64 && plain) return reduce_integers<std::int64_t>(planner, fold, after, axes, keep);
    if (type == Type::i32 && plain) return reduce_integers<std::int32_t>(planner, fold, after, axes, keep);
    if (type == Type::i8 && orders) return reduce_integers<std::int8_t>(planner, fold, after, axes, keep);
    if ((type == Type::u8 || type == Type::boolean) && orders) return reduce_integers<std::uint8_t>(planner, fold, after, axes, keep);
    throw Unsupported(std::string("it does not reduce elements of type ") + name_of(type));
}

template <Fold fold, After after = After::nothing>
void reduce(Planner& planner) {
    reduce_over(planner, fold, after, reduced_axes(planner), planner.node().integer("keepdims", 1) != 0);
}

template <Fold fold, After after>
void global_pool(Planner& planner) {
    float_input(planner);
    std::vector<std::int64_t> axes;
    for (int i = 2; i < planner.in(0).rank(); ++i) axes.push_back(i);
    reduce_over(planner, fold, after, axes, true);
}

template <class T>
void best_of(Planner& planner, int axis, bool largest, bool last, bool keep) {
    const Fact x = planner.in(0);
    const Shape shape = reduced_shape(x, {axis}, keep);
    const Fact y = planner.make(0, Type::i64, shape.dims, shape.order);
    const Fact kept = only(x, shape.kept), made = only(y, shape.made);
    const Walk outer = walk({&kept, &made});
    const std::int64_t n = x.dims[axis], stride = x.strides[axis];
    if (n == 0 && y.size() != 0) throw Error("there is nothing along axis " + std::to_string(axis));
    planner.step("index", {x, y}, [=](Frame& frame) {
        const T* from = frame.at<T>(x);
        auto* to = frame.at<std::int64_t>(y);
        in_parallel(frame.pool, outer, n, [&](const Offsets& at, std::int64_t size) {
            for (std::int64_t j = 0; j < size; ++j) {
                const T* line = from + at[0] + j * outer.strides[0].back();
                std::int64_t best = 0;
                for (std::int64_t i = 1; i < n; ++i) {
                    const T here = line[i * stride], there = line[best * stride];
                    if ((largest ? here > there : here < there) || (last && here == there)) best = i;
                }
                to[at[1] + j * outer.strides[1].back()] = best;
            }
        });
    });
}

template <bool largest>
void best(Planner& planner) {
    const Fact& x = planner.in(0);
    const int axis = axis_of(planner.node().integer("axis", 0), x.rank());
    const bool keep = planner.node().integer("keepdims", 1) != 0;
    const bool last = planner.node().integer("select_last_index", 0) != 0;
    if (x.type == Type::f32) return best_of<float>(planner, axis, largest, last, keep);
    if (x.type == Type::i32) return best_of<std::int32_t>(planner, axis, largest, last, keep);
    if (x.type == Type::i64) return best_of<std::int64_t>(planner, axis, largest, last, keep);
    throw Unsupported(std::string("it does not compare elements of type ") + name_of(x.type));
}

// ---- softmax and norms: lines are read and written

// x as lines along `axes`, which must be evenly strided as if they were one; else x is copied.
struct Normalised {
    Fact x, y, mean, inverse;
    Walk outer;  // views: x, y and, where they are wanted, mean and inverse
    std::int64_t n = 0, step = 0, step_out = 0;
    bool across = false;
    std::vector<Fact> touches;
};

Normalised lines_along(Planner& planner, const Fact& input, const std::vector<int>& axes, bool statistics = false) {
    Normalised made;
    made.x = for_registers(planner, input);
    Fact along = only(made.x, axes);
    const bool even = along.size() == 0 || reshaped(along, {along.size()}).has_value();
    std::vector<int> order = storage_order(made.x);
    if (!even) {
        // The axes go innermost, in their own order.
        order = sorted_out({axes.begin(), axes.end()}, made.x.rank()).second;
        order.insert(order.end(), axes.begin(), axes.end());
        made.x = planner.dense(made.x, order);
        along = only(made.x, axes);
    }
    made.y = planner.make(0, Type::f32, made.x.dims, order);
    made.n = along.size();
    if (made.n > 0) {
        made.step = reshaped(along, {made.n})->strides[0];
        made.step_out = reshaped(only(made.y, axes), {made.n})->strides[0];
    }
    const std::vector<int> kept = sorted_out({axes.begin(), axes.end()}, made.x.rank()).second;
    made.touches = {made.x, made.y};
    std::vector<Fact> views = {only(made.x, kept), only(made.y, kept)};
    if (statistics) {
        Dims dims = made.x.dims;
        for (int axis : axes) dims[axis] = 1;
        // One that is not wanted is never written: y stands for it, so that the other keeps its place among the views.
        made.mean = planner.wants(1) ? planner.make(1, Type::f32, dims, order) : made.y;
        made.inverse = planner.wants(2) ? planner.make(2, Type::f32, dims, order) : made.y;
        for (const Fact& fact : {made.mean, made.inverse}) {
            made.touches.push_back(fact);
            views.push_back(only(fact, kept));
        }
    }
    std::vector<const Fact*> pointers;
    for (const Fact& view : views) pointers.push_back(&view);
    made.outer = walk(pointers);
    made.across = made.outer.dims.back() > 1 && made.n > 0;
    for (const Dims& strides : made.outer.strides) made.across = made.across && strides.back() == 1;
    return made;
}

template <bool logarithm>
void softmax(Planner& planner) {
    const Fact x = float_input(planner);
    const bool flattens = planner.opset() < 13;
    const int axis = axis_of(planner.node().integer("axis", flattens ? 1 : -1), std::max(x.rank(), 1));
    std::vector<int> axes = {axis};
    if (x.rank() == 0) axes.clear();
    if (flattens && x.rank() > 0) axes = from_axis_on(axis, x.rank());
    const Normalised lines = lines_along(planner, x, axes);
    planner.step(
        lines.across ? "across lines" : "along lines", lines.touches,
        [lines](Frame& frame) {
            const RowKernels& kernels = frame.kernels.rows;
            const float* from = frame.at<float>(lines.x);
            float* to = frame.at<float>(lines.y);
            in_parallel(frame.pool, lines.outer, 4 * lines.n, [&](const Offsets& at, std::int64_t size) {
                if (lines.across)
                    return kernels.softmax_columns(from + at[0], lines.step, lines.n, size, logarithm, to + at[1], lines.step_out);
                for (std::int64_t j = 0; j < size; ++j)
                    kernels.softmax(from + at[0] + j * lines.outer.strides[0].back(), lines.n, logarithm,
                                    to + at[1] + j * lines.outer.strides[1].back());
            });
        },
        5.0 * static_cast<double>(x.size()), 8.0 * static_cast<double>(x.size()));
}

// A weight of the normalised axes: row-major and dense.
std::optional<Fact> along_lines(Planner& planner, int input, const Dims& dims) {
    if (!planner.has(input)) return std::nullopt;
    return planner.dense(broadcast_to(float_input(planner, input), dims));
}

void normalise(Planner& planner, const Fact& x, const std::vector<int>& axes, Normal normal, const std::optional<Fact>& scale,
               const std::optional<Fact>& bias) {
    const bool statistics = planner.wants(1) || planner.wants(2);
    Normalised lines = lines_along(planner, x, axes, statistics);
    if (scale) lines.touches.push_back(*scale);
    if (bias) lines.touches.push_back(*bias);
    const bool mean = planner.wants(1), inverse = planner.wants(2);
    planner.step(
        lines.across ? "across lines" : "along lines", lines.touches,
        [=](Frame& frame) {
            const RowKernels& kernels = frame.kernels.rows;
            const float* from = frame.at<float>(lines.x);
            float* to = frame.at<float>(lines.y);
            float* mean_to = mean ? frame.at<float>(lines.mean) : nullptr;
            float* inverse_to = inverse ? frame.at<float>(lines.inverse) : nullptr;
            Normal with = normal;
            with.scale = scale ? frame.at<float>(*scale) : nullptr;
            with.bias = bias ? frame.at<float>(*bias) : nullptr;
            in_parallel(frame.pool, lines.outer, 3 * lines.n, [&](const Offsets& at, std::int64_t size) {
                if (lines.across)
                    return kernels.normalise_columns(from + at[0], lines.step, lines.n, size, with, to + at[1], lines.step_out,
                                                     mean ? mean_to + at[2] : nullptr, inverse ? inverse_to + at[3] : nullptr);
                const auto step = [&](int view) { return lines.outer.strides[view].back(); };
                for (std::int64_t j = 0; j < size; ++j)
                    kernels.normalise(from + at[0] + j * step(0), lines.n, with, to + at[1] + j * step(1),
                                      mean ? mean_to + at[2] + j * step(2) : nullptr, inverse ? inverse_to + at[3] + j * step(3) : nullptr);
            });
        },
        7.0 * static_cast<double>(x.size()), 8.0 * static_cast<double>(x.size()));
}

Dims of_axes(const Fact& x, const std::vector<int>& axes) { return only(x, axes).dims; }

template <bool centred>
void layer_norm(Planner& planner) {
    const Fact x = float_input(planner);
    const std::vector<int> axes = from_axis_on(axis_of(planner.node().integer("axis", -1), x.rank()), x.rank());
    if (planner.node().integer("stash_type", 1) != 1) throw Unsupported("it computes in float only");
    const Dims dims = of_axes(x, axes);
    const auto scale = along_lines(planner, 1, dims);
    const auto bias = along_lines(planner, 2, dims);
    const Normal normal{centred, static_cast<float>(count(dims)), planner.node().real("epsilon", 1e-5f), nullptr, nullptr};
    normalise(planner, x, axes, normal, scale, bias);
}

void lp_normalization(Planner& planner) {
    const Fact x = float_input(planner);
    if (planner.node().integer("p", 2) != 2) throw Unsupported("it divides by the norm of p = 2 only");
    // A line of zeros stays one: the least epsilon keeps 0 / 0 out.
    const Normal normal{false, 1.0f, std::numeric_limits<float>::min(), nullptr, nullptr};
    normalise(planner, x, {axis_of(planner.node().integer("axis", -1), x.rank())}, normal, std::nullopt, std::nullopt);
}

// Groups of channels of one image, each normalised over all it holds; scale and bias by channel, or by group.
void normalise_groups(Planner& planner, std::int64_t groups, bool by_channel) {
    if (float_input(planner).rank() < 2) throw Error("it needs at least two axes: batch and channels");
    const Fact scale = planner.dense(float_input(planner, 1)), bias = planner.dense(float_input(planner, 2));
    const Fact x = planner.dense(planner.in(0));
    const std::int64_t channels = x.dims[1];
    if (groups < 1 || channels % groups != 0)
        throw Error(std::to_string(channels) + " channels do not make " + std::to_string(groups) + " groups");
    const std::int64_t weights = by_channel ? channels : groups;
    if (scale.size() != weights || bias.size() != weights)
        throw Error("its scale and bias must be of " + std::to_string(weights) + " elements");
    const float epsilon = planner.node().real("epsilon", 1e-5f);
    const Fact y = planner.make(0, Type::f32, x.dims);
    const std::int64_t plane = x.size() / std::max<std::int64_t>(x.dims[0] * channels, 1), each = channels / groups;
    const Fact all{Type::f32, {x.dims[0] * groups}, {1}, 0, x.buffer, false};
    const Walk outer = walk({&all});
    planner.step(
        "groups", {x, y, scale, bias},
        [=](Frame& frame) {
            const RowKernels& kernels = frame.kernels.rows;
            const float *from = frame.at<float>(x), *by = frame.at<float>(scale), *plus = frame.at<float>(bias);
            float* to = frame.at<float>(y);
            const std::int64_t size = each * plane;
            in_parallel(frame.pool, outer, 3 * size, [&](const Offsets& at, std::int64_t there) {
                for (std::int64_t g = at[0]; g < at[0] + there; ++g) {
                    const float* in = from + g * size;
                    const float mean = kernels.fold(Fold::sum, in, size, 0) / static_cast<float>(size);
                    const float variance = kernels.fold(Fold::squares, in, size, mean) / static_cast<float>(size);
                    const float inverse = 1.0f / std::sqrt(variance + epsilon);
                    for (std::int64_t c = 0; c < each; ++c) {
                        const std::int64_t weight = by_channel ? g % groups * each + c : g % groups;
                        const float slope = inverse * by[weight];
                        kernels.affine(in + c * plane, plane, slope, plus[weight] - mean * slope, to + g * size + c * plane);
                    }
                }
            });
        },
        5.0 * static_cast<double>(x.size()), 8.0 * static_cast<double>(x.size()));
}

void instance_norm(Planner& planner) {
    normalise_groups(planner, planner.in(0).rank() < 2 ? 1 : planner.in(0).dims[1], true);
}

void group_norm(Planner& planner) {
    if (planner.node().integer("stash_type", 1) != 1) throw Unsupported("it computes in float only");
    const bool by_channel = planner.opset() >= 21;
    normalise_groups(planner, planner.node().integer("num_groups", 0), by_channel);
}

}  // namespace

std::vector<Op> row_ops() {
    return {
        {"ReduceSum", reduce<Fold::sum>},
        {"ReduceMean", reduce<Fold::sum, After::mean>},
        {"ReduceMax", reduce<Fold::largest>},
        {"ReduceMin", reduce<Fold::smallest>},
        {"ReduceProd", reduce<Fold::product>},
        {"ReduceL1", reduce<Fold::absolute>},
        {"ReduceL2", reduce<Fold::squares, After::root>},
        {"ReduceSumSquare", reduce<Fold::squares>},
        {"ReduceLogSum", reduce<Fold::sum, After::logarithm>},
        {"ReduceLogSumExp", reduce<Fold::sum, After::log_sum_exp>},
        {"ArgMax", best<true>},
        {"ArgMin", best<false>},
        {"GlobalAveragePool", global_pool<Fold::sum, After::mean>},
        {"GlobalMaxPool", global_pool<Fold::largest, After::nothing>},
        {"Softmax", softmax<false>},
        {"LogSoftmax", softmax<true>},
        {"LayerNormalization", layer_norm<true>},
        {"RMSNormalization", layer_norm<false>},
        {"LpNormalization", lp_normalization},
        {"InstanceNormalization", instance_norm},
        {"GroupNormalization", group_norm},
    };
}

}  // namespace featherweight
