// SPDX-License-Identifier: Apache-2.0
#include <map>

#include "ops.hpp"
#include "plan.hpp"

namespace featherweight {

namespace {

const std::map<std::string, Rule>& table() {
    static const std::map<std::string, Rule> made = [] {
        std::map<std::string, Rule> all;
        for (const auto& room : {elementwise_ops(), logic_ops(), cast_ops(), movement_ops(), index_ops(), scan_ops(), shape_ops(), row_ops(),
                                 pool_ops(), conv_ops(), matmul_ops()})
            for (const Op& op : room) all.emplace(op.name, op.rule);
        return all;
    }();
    return made;
}

}  // namespace

const Rule* find_rule(const std::string& domain, const std::string& op) {
    if (!domain.empty()) return nullptr;
    const auto found = table().find(op);
    return found == table().end() ? nullptr : &found->second;
}

std::vector<std::string> op_names() {
    std::vector<std::string> names;
    for (const auto& [name, rule] : table()) names.push_back(name);
    return names;
}

}  // namespace featherweight
