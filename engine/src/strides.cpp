// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "plan.hpp"

namespace featherweight {

bool Fact::is_row_major() const {
    std::int64_t stride = 1;
    for (std::size_t i = dims.size(); i-- > 0;) {
        if (dims[i] == 1) continue;
        if (strides[i] != stride) return size() == 0;
        stride *= dims[i];
    }
    return true;
}

Fact transposed(const Fact& fact, const std::vector<int>& axes) {
    Fact made = fact;
    for (std::size_t i = 0; i < axes.size(); ++i) {
        made.dims[i] = fact.dims[axes[i]];
        made.strides[i] = fact.strides[axes[i]];
    }
    return made;
}

Dims broadcast_dims(const Dims& a, const Dims& b) {
    Dims made(std::max(a.size(), b.size()));
    for (std::size_t i = 0; i < made.size(); ++i) {
        const std::int64_t left = i < a.size() ? a[a.size() - 1 - i] : 1;
        const std::int64_t right = i < b.size() ? b[b.size() - 1 - i] : 1;
        if (left != right && left != 1 && right != 1)
            throw Error("shapes " + describe(a) + " and " + describe(b) + " cannot be broadcast together");
        made[made.size() - 1 - i] = left == 1 ? right : left;
    }
    return made;
}

Fact broadcast_to(const Fact& fact, const Dims& dims) {
    if (broadcast_dims(fact.dims, dims) != dims)
        throw Error("shape " + describe(fact.dims) + " cannot be broadcast to " + describe(dims));
    Fact made = fact;
    made.dims = dims;
    made.strides.assign(dims.size(), 0);
    const std::size_t lead = dims.size() - fact.dims.size();
    for (std::size_t i = 0; i < fact.dims.size(); ++i)
        made.strides[lead + i] = fact.dims[i] == 1 && dims[lead + i] != 1 ? 0 : fact.strides[i];
    return made;
}

std::optional<Fact> reshaped(const Fact& fact, const Dims& dims) {
    if (count(dims) != fact.size()) throw Error("shape " + describe(fact.dims) + " cannot be reshaped to " + describe(dims));
    Fact made = fact;
    made.dims = dims;
    made.strides.assign(dims.size(), 1);
    if (fact.size() == 0) {
        made.strides = row_major(dims);
        return made;
    }
    // Axes of both shapes are taken in runs of equal product. Within a run the old axes must be evenly strided.
    std::size_t from = 0, to = 0;
    const std::size_t olds = fact.dims.size(), news = dims.size();
    while (from < olds && to < news) {
        std::size_t from_end = from + 1, to_end = to + 1;
        std::int64_t old_size = fact.dims[from], new_size = dims[to];
        while (old_size != new_size) {
            if (old_size < new_size)
                old_size *= fact.dims[from_end++];
            else
                new_size *= dims[to_end++];
        }
        std::int64_t stride = 1;
        bool first = true;
        for (std::size_t i = from_end; i-- > from;) {
            if (fact.dims[i] == 1) continue;
            if (first) {
                stride = fact.strides[i];
                first = false;
            } else if (fact.strides[i] != stride) {
                return std::nullopt;
            }
            stride *= fact.dims[i];
        }
        // `stride` is now that of the axis before the run; walk back from its innermost one.
        std::int64_t inner = 1;
        for (std::size_t i = from_end; i-- > from;)
            if (fact.dims[i] != 1) {
                inner = fact.strides[i];
                break;
            }
        for (std::size_t i = to_end; i-- > to;) {
            made.strides[i] = inner;
            inner *= dims[i];
        }
        from = from_end;
        to = to_end;
    }
    for (; to < news; ++to) made.strides[to] = 1;  // axes of one element are left
    return made;
}

std::vector<int> storage_order(const Fact& fact) {
    // An axis of one element lies anywhere, and one that repeats a single element as well: it goes before the axis that is
    // named after it.
    std::vector<std::int64_t> keys(fact.dims.size());
    std::int64_t key = 0;
    for (std::size_t i = fact.dims.size(); i-- > 0;) {
        if (fact.dims[i] != 1 && fact.strides[i] != 0) key = std::abs(fact.strides[i]);
        keys[i] = key;
    }
    std::vector<int> order(fact.dims.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] > keys[b]; });
    return order;
}

int axis_of(std::int64_t axis, int rank) {
    if (axis < -rank || axis >= rank)
        throw Error("axis " + std::to_string(axis) + " does not exist in a tensor of " + std::to_string(rank) + " axes");
    return static_cast<int>(axis < 0 ? axis + rank : axis);
}

Walk walk(const std::vector<const Fact*>& views) {
    const Fact& lead = *views.front();
    Walk made;
    made.strides.resize(views.size());
    // Outermost first, by the strides of the first view; axes that it broadcasts go outermost.
    std::vector<int> order;
    for (int i = 0; i < lead.rank(); ++i)
        if (lead.dims[i] != 1) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        const std::int64_t left = std::abs(lead.strides[a]), right = std::abs(lead.strides[b]);
        if (left == 0 || right == 0) return left == 0 && right != 0;
        return left > right;
    });
    for (int axis : order) {
        bool merges = !made.dims.empty();
        for (std::size_t v = 0; v < views.size() && merges; ++v)
            merges = made.strides[v].back() == views[v]->strides[axis] * lead.dims[axis];
        if (merges) {
            made.dims.back() *= lead.dims[axis];
            for (std::size_t v = 0; v < views.size(); ++v) made.strides[v].back() = views[v]->strides[axis];
        } else {
            made.dims.push_back(lead.dims[axis]);
            for (std::size_t v = 0; v < views.size(); ++v) made.strides[v].push_back(views[v]->strides[axis]);
        }
    }
    if (made.dims.empty()) {
        made.dims.push_back(1);
        for (Dims& strides : made.strides) strides.push_back(0);
    }
    return made;
}

}  // namespace featherweight
