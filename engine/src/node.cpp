// SPDX-License-Identifier: Apache-2.0
#include "graph.hpp"

namespace featherweight {

namespace {

const Attribute* find(const Node& node, const char* key, Attribute::Kind kind) {
    const auto found = node.attributes.find(key);
    if (found == node.attributes.end()) return nullptr;
    if (found->second.kind != kind) throw Error(node.describe() + ": its attribute '" + key + "' is of the wrong type");
    return &found->second;
}

}  // namespace

std::int64_t Node::integer(const char* key, std::int64_t otherwise) const {
    const Attribute* found = find(*this, key, Attribute::Kind::integer);
    return found ? found->integer : otherwise;
}

float Node::real(const char* key, float otherwise) const {
    const Attribute* found = find(*this, key, Attribute::Kind::real);
    return found ? found->real : otherwise;
}

std::string Node::text(const char* key, const char* otherwise) const {
    const Attribute* found = find(*this, key, Attribute::Kind::text);
    return found ? found->text : otherwise;
}

std::vector<std::int64_t> Node::integers(const char* key, std::vector<std::int64_t> otherwise) const {
    const Attribute* found = find(*this, key, Attribute::Kind::integers);
    return found ? found->integers : otherwise;
}

std::string Node::describe() const {
    return (domain.empty() ? op : domain + "." + op) + " '" + (name.empty() ? "without a name" : name) + "'";
}

std::vector<std::string> Graph::made_by(const Node& node) const {
    std::vector<std::string> names;
    for (const int output : node.outputs)
        if (output >= 0) names.push_back(values[output].name);
    return names;
}

}  // namespace featherweight
