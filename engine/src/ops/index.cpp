// SPDX-License-Identifier: Apache-2.0
// Ops in which a tensor of indices says where elements go or come from. Indices are checked as they are read.
#include <algorithm>

#include "../ops.hpp"
#include "../runs.hpp"
#include "views.hpp"

namespace featherweight {

namespace {

// How many threads so many elements are worth that come in `pieces`.
int parts_of(const Planner& planner, std::int64_t elements, std::int64_t pieces) {
    constexpr std::int64_t least = 1 << 14;
    const std::int64_t most = std::min<std::int64_t>(std::max<std::int64_t>(pieces, 1), planner.threads());
    return static_cast<int>(std::clamp<std::int64_t>(elements / least, 1, most));
}

// An axis's index, counted from its beginning.
std::int64_t checked(std::int64_t index, std::int64_t size) {
    if (index < -size || index >= size)
        throw Error("index " + std::to_string(index) + " lies outside of an axis of " + std::to_string(size));
    return index < 0 ? index + size : index;
}

struct Indices {
    Fact fact;
    std::int64_t at(const Frame& frame, std::int64_t offset) const {
        return fact.type == Type::i32 ? frame.at<std::int32_t>(fact)[offset] : frame.at<std::int64_t>(fact)[offset];
    }
};

void check_type(const Fact& indices) {
    if (indices.type != Type::i32 && indices.type != Type::i64) throw Error(std::string("its indices are of type ") + name_of(indices.type));
}

// Known indices at even steps are a view.
bool gather_as_view(Planner& planner, const Fact& from, const Fact& indices, int axis) {
    if (!indices.constant || indices.rank() > 1 || indices.size() == 0) return false;
    std::vector<std::int64_t> known = planner.integers(1);
    const std::int64_t size = from.dims[axis];
    for (std::int64_t& index : known) index = checked(index, size);
    const std::int64_t step = known.size() > 1 ? known[1] - known[0] : 1;
    for (std::size_t i = 1; i < known.size(); ++i)
        if (known[i] - known[i - 1] != step || step < 0) return false;
    Fact made = sliced(from, axis, known[0], indices.size(), step);
    if (indices.rank() == 0) {
        made.dims.erase(made.dims.begin() + axis);
        made.strides.erase(made.strides.begin() + axis);
    }
    planner.alias(0, made);
    return true;
}

Fact without_axes(const Fact& fact, int axis, int many) {
    Fact made = fact;
    made.dims.erase(made.dims.begin() + axis, made.dims.begin() + axis + many);
    made.strides.erase(made.strides.begin() + axis, made.strides.begin() + axis + many);
    return made;
}

// One slice from place to place, by one thread.
template <class T>
void move_slice(const Walk& walk, std::int64_t size, const T* from, T* to) {
    const std::int64_t step_to = walk.strides[0].back(), step_from = walk.strides[1].back();
    each_run<2>(walk.dims, {&walk.strides[0], &walk.strides[1]}, 0, size, [&](const auto& offsets, std::int64_t run) {
        T* target = to + offsets[0];
        const T* source = from + offsets[1];
        if (step_to == 1 && step_from == 1)
            std::copy_n(source, run, target);
        else
            for (std::int64_t i = 0; i < run; ++i) target[i * step_to] = source[i * step_from];
    });
}

void gather(Planner& planner) {
    const Fact from = planner.in(0);
    const Fact given = planner.in(1);
    check_type(given);
    const int axis = axis_of(planner.node().integer("axis", 0), from.rank()), more = given.rank();
    if (gather_as_view(planner, from, given, axis)) return;
    Dims dims = from.dims;
    dims.erase(dims.begin() + axis);
    dims.insert(dims.begin() + axis, given.dims.begin(), given.dims.end());
    // Stored as the source is, the indices' axes in the place of the one that they pick from.
    std::vector<int> order;
    for (int each : storage_order(from)) {
        if (each != axis) order.push_back(each < axis ? each : each + more - 1);
        for (int i = 0; each == axis && i < more; ++i) order.push_back(axis + i);
    }
    const Indices indices{planner.dense(given)};
    const Fact out = planner.make(0, from.type, dims, order);
    const Fact source = without_axes(from, axis, 1), target = without_axes(out, axis, more);
    const Walk steps = walk({&target, &source});
    const std::int64_t many = given.size(), slice = source.size(), size = from.dims[axis];
    const std::int64_t step_to = more > 0 ? out.strides[axis + more - 1] : 0, step_from = from.strides[axis];
    const int parts = parts_of(planner, many * slice, many);
    const auto work = [=](Frame& frame) {
        by_size(from.type, [&](auto zero) {
            using T = decltype(zero);
            const T* data = reinterpret_cast<const T*>(frame.bytes(source));
            T* made = reinterpret_cast<T*>(frame.bytes(target));
            frame.pool.run(parts, [&](int part) {
                for (std::int64_t i = many * part / parts; i < many * (part + 1) / parts; ++i) {
                    const std::int64_t index = checked(indices.at(frame, i), size);
                    move_slice(steps, slice, data + index * step_from, made + i * step_to);
                }
            });
        });
    };
    const double bytes = 2.0 * static_cast<double>(out.size()) * static_cast<double>(size_of(out.type));
    planner.step("Gather", {from, indices.fact, out}, work, 0, bytes);
}

void gather_elements(Planner& planner) {
    const Fact from = planner.in(0);
    const Indices indices{planner.in(1)};
    check_type(indices.fact);
    const int axis = axis_of(planner.node().integer("axis", 0), from.rank());
    if (indices.fact.rank() != from.rank()) throw Error("its indices have " + std::to_string(indices.fact.rank()) + " axes, its data " + std::to_string(from.rank()));
    for (int i = 0; i < from.rank(); ++i)
        if (i != axis && indices.fact.dims[i] > from.dims[i]) throw Error("its indices are of shape " + describe(indices.fact.dims) + ", its data " + describe(from.dims));
    const Fact out = planner.make(0, from.type, indices.fact.dims, storage_order(from));
    Fact source = from;
    source.dims = out.dims;
    source.strides[axis] = 0;
    const Walk steps = walk({&out, &indices.fact, &source});
    const std::int64_t all = out.size(), size = from.dims[axis], step = from.strides[axis];
    const int parts = parts_of(planner, all, all);
    const auto work = [=](Frame& frame) {
        by_size(from.type, [&](auto zero) {
            using T = decltype(zero);
            const T* data = reinterpret_cast<const T*>(frame.bytes(source));
            T* made = reinterpret_cast<T*>(frame.bytes(out));
            const std::int64_t by_out = steps.strides[0].back(), by_index = steps.strides[1].back(), by_data = steps.strides[2].back();
            frame.pool.run(parts, [&](int part) {
                each_run<3>(steps.dims, {&steps.strides[0], &steps.strides[1], &steps.strides[2]}, all * part / parts,
                            all * (part + 1) / parts, [&](const auto& offsets, std::int64_t run) {
                                for (std::int64_t i = 0; i < run; ++i) {
                                    const std::int64_t index = checked(indices.at(frame, offsets[1] + i * by_index), size);
                                    made[offsets[0] + i * by_out] = data[offsets[2] + i * by_data + index * step];
                                }
                            });
            });
        });
    };
    planner.step("GatherElements", {from, indices.fact, out}, work);
}

// Tuples of indices along the last axis of `indices`, each of which picks a slice of `data`.
struct Tuples {
    Indices indices;   // row-major
    Fact data;
    int batch, length;  // axes of data that go along with those of the indices, and that a tuple picks from
    std::int64_t many;

    std::int64_t offset(const Frame& frame, std::int64_t tuple) const {
        std::int64_t made = 0, rest = tuple;
        for (int i = indices.fact.rank() - 2; i >= 0; --i) {
            if (i < batch) made += rest % indices.fact.dims[i] * data.strides[i];
            rest /= indices.fact.dims[i];
        }
        for (int i = 0; i < length; ++i)
            made += checked(indices.at(frame, tuple * length + i), data.dims[batch + i]) * data.strides[batch + i];
        return made;
    }
};

Tuples tuples_of(Planner& planner, const Fact& data, const Fact& given, std::int64_t batch) {
    check_type(given);
    if (given.rank() < 1 || data.rank() < 1) throw Error("its inputs must not be scalars");
    if (batch < 0 || batch >= given.rank() || batch >= data.rank()) throw Error("it has " + std::to_string(batch) + " batch axes");
    const std::int64_t length = given.dims.back();
    if (length < 1 || length > data.rank() - batch) throw Error("indices of " + std::to_string(length) + " numbers for data of shape " + describe(data.dims));
    for (int i = 0; i < batch; ++i)
        if (given.dims[i] != data.dims[i]) throw Error("its batch axes are of two sizes");
    return {{planner.dense(given)}, data, static_cast<int>(batch), static_cast<int>(length), given.size() / length};
}

void gather_nd(Planner& planner) {
    const Fact from = planner.in(0);
    const Tuples tuples = tuples_of(planner, from, planner.in(1), planner.node().integer("batch_dims", 0));
    const Fact source = without_axes(from, 0, tuples.batch + tuples.length);
    Dims dims(tuples.indices.fact.dims.begin(), tuples.indices.fact.dims.end() - 1);
    dims.insert(dims.end(), source.dims.begin(), source.dims.end());
    const Fact out = planner.make(0, from.type, dims);
    const Fact target = without_axes(out, 0, tuples.indices.fact.rank() - 1);
    const Walk steps = walk({&target, &source});
    const std::int64_t slice = source.size();
    const int parts = parts_of(planner, out.size(), tuples.many);
    const auto work = [=](Frame& frame) {
        by_size(from.type, [&](auto zero) {
            using T = decltype(zero);
            const T* data = reinterpret_cast<const T*>(frame.bytes(source));
            T* made = reinterpret_cast<T*>(frame.bytes(target));
            frame.pool.run(parts, [&](int part) {
                for (std::int64_t i = tuples.many * part / parts; i < tuples.many * (part + 1) / parts; ++i)
                    move_slice(steps, slice, data + tuples.offset(frame, i), made + i * slice);
            });
        });
    };
    planner.step("GatherND", {from, tuples.indices.fact, out}, work);
}

// By one thread: where indices repeat, the last update stays.
void scatter_nd(Planner& planner) {
    if (planner.node().text("reduction", "none") != "none") throw Unsupported("a reduction");
    const Fact from = planner.in(0), given = planner.in(1), updates = planner.in(2);
    if (updates.type != from.type) throw Error("its updates are not of its data's type");
    Tuples tuples = tuples_of(planner, from, given, 0);
    Dims dims(given.dims.begin(), given.dims.end() - 1);
    dims.insert(dims.end(), from.dims.begin() + tuples.length, from.dims.end());
    if (updates.dims != dims) throw Error("its updates are of shape " + describe(updates.dims) + ", not " + describe(dims));
    const Fact dense = planner.dense(updates);
    const Fact out = planner.make(0, from.type, from.dims, storage_order(from));
    tuples.data = out;
    add_moves(planner, "ScatterND", out, {{from, out}});
    const Fact target = without_axes(out, 0, tuples.length), source = without_axes(dense, 0, given.rank() - 1);
    const Walk steps = walk({&target, &source});
    const std::int64_t slice = target.size();
    const auto work = [=](Frame& frame) {
        by_size(out.type, [&](auto zero) {
            using T = decltype(zero);
            const T* data = reinterpret_cast<const T*>(frame.bytes(source));
            T* made = reinterpret_cast<T*>(frame.bytes(target));
            for (std::int64_t i = 0; i < tuples.many; ++i) move_slice(steps, slice, data + i * slice, made + tuples.offset(frame, i));
        });
    };
    planner.step("ScatterND", {dense, tuples.indices.fact, out}, work);
}

void one_hot(Planner& planner) {
    const Fact given = planner.in(0), values = planner.in(2);
    const Tensor deep = planner.constant(1);
    if (deep.size() != 1) throw Error("its depth must be one number");
    const std::int64_t depth = deep.type == Type::f32 ? static_cast<std::int64_t>(*deep.as<float>()) : planner.integers(1)[0];
    if (values.dims != Dims{2}) throw Error("its values are of shape " + describe(values.dims) + ", not 2");
    if (given.type != Type::i32 && given.type != Type::i64) throw Unsupported(std::string("indices of ") + name_of(given.type));
    const int axis = axis_of(planner.node().integer("axis", -1), given.rank() + 1);
    Dims dims = given.dims;
    dims.insert(dims.begin() + axis, depth);
    const Indices indices{planner.dense(given)};
    const Fact out = planner.make(0, values.type, dims);
    add_moves(planner, "OneHot", out, {{broadcast_to(*reshaped(sliced(values, 0, 0, 1), {}), dims), out}});
    const Fact on = sliced(values, 0, 1, 1);
    const std::int64_t inner = count({dims.begin() + axis + 1, dims.end()});
    const auto work = [=](Frame& frame) {
        by_size(out.type, [&](auto zero) {
            using T = decltype(zero);
            const T value = *reinterpret_cast<const T*>(frame.bytes(on));
            T* made = reinterpret_cast<T*>(frame.bytes(out));
            for (std::int64_t i = 0; i < given.size(); ++i) {
                std::int64_t index = indices.at(frame, i);
                if (index < 0) index += depth;
                if (index >= 0 && index < depth) made[(i / inner * depth + index) * inner + i % inner] = value;
            }
        });
    };
    planner.step("OneHot", {values, indices.fact, out}, work);
}

// What lies on one side of a diagonal stays, the rest is zero.
void triangle(Planner& planner) {
    const Fact from = planner.in(0);
    if (from.rank() < 2) throw Error("its input must have two axes at least");
    const bool upper = planner.node().integer("upper", 1) != 0;
    std::int64_t diagonal = 0;
    if (planner.has(1)) {
        const std::vector<std::int64_t> given = planner.integers(1);
        if (given.size() != 1) throw Error("its diagonal must be one number");
        diagonal = given[0];
    }
    const std::int64_t rows = from.dims[from.rank() - 2], columns = from.dims[from.rank() - 1];
    diagonal = std::clamp(diagonal, -rows - columns, rows + columns);
    const Fact source = planner.dense(from);
    const Fact out = planner.make(0, from.type, from.dims);
    const std::int64_t all = columns > 0 ? out.size() / columns : 0;
    const auto work = [=](Frame& frame) {
        by_size(out.type, [&](auto zero) {
            using T = decltype(zero);
            const T* data = reinterpret_cast<const T*>(frame.bytes(source));
            T* made = reinterpret_cast<T*>(frame.bytes(out));
            for (std::int64_t row = 0; row < all; ++row, data += columns, made += columns) {
                const std::int64_t middle = std::clamp<std::int64_t>(row % rows + diagonal + (upper ? 0 : 1), 0, columns);
                const std::int64_t begin = upper ? middle : 0, end = upper ? columns : middle;
                std::fill_n(made, begin, T{0});
                std::copy(data + begin, data + end, made + begin);
                std::fill_n(made + end, columns - end, T{0});
            }
        });
    };
    planner.step("Trilu", {source, out}, work);
}

}  // namespace

std::vector<Op> index_ops() {
    return {{"Gather", gather},
            {"GatherElements", gather_elements},
            {"GatherND", gather_nd},
            {"OneHot", one_hot},
            {"ScatterND", scatter_nd},
            {"Trilu", triangle}};
}

}  // namespace featherweight
