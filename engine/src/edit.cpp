// SPDX-License-Identifier: Apache-2.0
#include "edit.hpp"

namespace featherweight {

std::vector<int> reads_of(const Node& node) {
    std::vector<int> made;
    for (int input : node.inputs)
        if (input >= 0) made.push_back(input);
    if (node.finish.residual >= 0) made.push_back(node.finish.residual);
    return made;
}

Edit::Edit(Graph graph)
    : graph_(std::move(graph)),
      maker_(graph_.values.size(), -1),
      reads_(graph_.values.size(), 0),
      output_(graph_.values.size(), false),
      gone_(graph_.nodes.size(), false) {
    for (int output : graph_.outputs) {
        output_[output] = true;
        ++reads_[output];
    }
    for (std::size_t i = 0; i < graph_.nodes.size(); ++i) {
        for (int input : reads_of(graph_.nodes[i])) ++reads_[input];
        for (int output : graph_.nodes[i].outputs)
            if (output >= 0) maker_[output] = static_cast<int>(i);
    }
    for (std::size_t i = graph_.nodes.size(); i-- > 0;)
        for (int output : graph_.nodes[i].outputs)
            if (output >= 0) release(output);
    known_ = known_shapes(graph_);
}

const Node* Edit::maker(int value) const { return value >= 0 && maker_[value] >= 0 ? &graph_.nodes[maker_[value]] : nullptr; }

const Node* Edit::maker(int value, const char* op) const {
    const Node* made = maker(value);
    return made != nullptr && made->domain.empty() && made->op == op ? made : nullptr;
}

const Tensor* Edit::constant(int value) const {
    return value >= 0 && graph_.values[value].constant ? &*graph_.values[value].constant : nullptr;
}

std::optional<double> Edit::scalar(int value, int beside) const {
    const Tensor* held = constant(value);
    if (held == nullptr || held->type != Type::f32 || held->size() != 1) return std::nullopt;
    const std::size_t rank = beside >= 0 && known_[beside].dims ? known_[beside].dims->size() : 0;
    if (held->dims.size() > rank) return std::nullopt;
    return held->as<float>()[0];
}

int Edit::add(const std::string& name, Tensor constant) {
    Value value;
    value.name = name;
    value.type = constant.type;
    known_.push_back({constant.type, constant.dims});
    value.constant = std::move(constant);
    graph_.values.push_back(std::move(value));
    maker_.push_back(-1);
    reads_.push_back(0);
    output_.push_back(false);
    return static_cast<int>(graph_.values.size()) - 1;
}

// A value that nothing reads: its maker goes where none of its outputs is read, and what it read is read once less.
void Edit::release(int value) {
    std::vector<int> left = {value};
    while (!left.empty()) {
        const int each = left.back();
        left.pop_back();
        const int number = maker_[each];
        if (reads_[each] > 0 || number < 0 || gone_[number]) continue;
        bool read = false;
        for (int output : graph_.nodes[number].outputs) read = read || (output >= 0 && reads_[output] > 0);
        if (read) continue;
        gone_[number] = true;
        for (int input : reads_of(graph_.nodes[number])) {
            --reads_[input];
            left.push_back(input);
        }
    }
}

void Edit::replace(int number, Node with) {
    const std::vector<int> before = reads_of(graph_.nodes[number]);
    for (int input : reads_of(with)) ++reads_[input];
    graph_.nodes[number] = std::move(with);
    for (int input : before) --reads_[input];
    for (int input : before) release(input);
}

Graph Edit::take() {
    std::vector<Node> nodes;
    std::vector<bool> read(graph_.values.size(), false);
    for (int output : graph_.outputs) read[output] = true;
    for (std::size_t i = 0; i < graph_.nodes.size(); ++i) {
        if (gone_[i]) continue;
        for (int input : reads_of(graph_.nodes[i])) read[input] = true;
        nodes.push_back(std::move(graph_.nodes[i]));
    }
    graph_.nodes = std::move(nodes);
    for (std::size_t i = 0; i < read.size(); ++i)
        if (!read[i]) graph_.values[i].constant.reset();  // weights that others have taken the place of need no memory
    return std::move(graph_);
}

}  // namespace featherweight
