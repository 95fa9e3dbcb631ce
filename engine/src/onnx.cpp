// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <functional>
#include <queue>
#include <string_view>
#include <unordered_map>

#include "graph.hpp"
#include "protobuf.hpp"
#include "tensor_proto.hpp"

namespace featherweight {

namespace {

constexpr std::int64_t newest_opset = 28;  // ops change their meaning with the opset, so that one still unknown is refused

// What is known of a value besides what Graph says.
struct Origin {
    enum class Kind : std::uint8_t { unknown, input, initializer, node };
    Kind kind = Kind::unknown;
    Bytes tensor;     // initializer: its TensorProto, read once a node is known to want it
    bool sparse = false;
    int node = -1;       // its producer
    bool typed = false;  // its type and shape have been told
};

// The type is told by a number of its own; files of the first versions lack it, and then it is whatever is there.
void read_attribute(Message message, Storage& storage, std::map<std::string, Attribute>& into) {
    using Kind = Attribute::Kind;
    Attribute made;
    std::string name;
    std::int64_t type = 0;
    bool reference = false, text = true;
    Kind seen = Kind::other;
    std::optional<Bytes> tensor;
    while (message.next()) {
        switch (message.field()) {
            case 1: name = message.text(); break;
            case 2: made.real = message.real(); seen = Kind::real; break;
            case 3: made.integer = message.integer(); seen = Kind::integer; break;
            case 4: {
                const Bytes bytes = message.bytes();
                made.text.assign(reinterpret_cast<const char*>(bytes.data), bytes.size);
                text = Message::is_text(made.text);
                seen = Kind::text;
                break;
            }
            case 5: tensor = message.bytes(); seen = Kind::tensor; break;
            case 7: message.each_real<float>([&](float each) { made.reals.push_back(each); }); seen = Kind::reals; break;
            case 8: message.each_integer([&](std::int64_t each) { made.integers.push_back(each); }); seen = Kind::integers; break;
            case 9: {
                const Bytes bytes = message.bytes();
                made.texts.emplace_back(reinterpret_cast<const char*>(bytes.data), bytes.size);
                text = text && Message::is_text(made.texts.back());
                seen = Kind::texts;
                break;
            }
            case 20: type = message.integer(); break;
            case 21: reference = true; break;
            default: break;
        }
    }
    switch (type) {
        case 0: made.kind = seen; break;
        case 1: made.kind = Kind::real; break;
        case 2: made.kind = Kind::integer; break;
        case 3: made.kind = Kind::text; break;
        case 4: made.kind = Kind::tensor; break;
        case 6: made.kind = Kind::reals; break;
        case 7: made.kind = Kind::integers; break;
        case 8: made.kind = Kind::texts; break;
        default: made.kind = Kind::other; break;
    }
    if (name.empty()) throw Error("it has an attribute without a name");
    if (reference || ((made.kind == Kind::text || made.kind == Kind::texts) && !text)) made.kind = Kind::other;
    if (made.kind == Kind::tensor) {
        if (!tensor) throw Error("its attribute '" + name + "' lacks the tensor that it should be");
        try {
            made.tensor = storage.tensor(*tensor);
        } catch (const Unsupported&) {
            made.kind = Kind::other;
        } catch (const Error& error) {
            throw Error("its attribute '" + name + "': " + error.what());
        }
    }
    if (!into.emplace(name, std::move(made)).second) throw Error("it has two attributes '" + name + "'");
}

// A tensor's type and shape, as far as they are told; whether the value is a tensor at all.
bool read_type(Message type, Value& value) {
    bool tensor = true;
    while (type.next()) {
        if (type.field() != 1 && type.field() != 6) tensor = false;  // a sequence, a map, an optional, a sparse tensor
        if (type.field() != 1) continue;
        for (Message facts(type.bytes()); facts.next();) {
            if (facts.field() == 1) {
                const std::int64_t number = facts.integer();
                if (number == 0) continue;
                try {
                    value.type = from_onnx(number);
                } catch (const Unsupported&) {
                    tensor = false;  // of strings, or of a type that the engine cannot hold
                }
            } else if (facts.field() == 2) {
                std::vector<Dim> dims;
                for (Message shape(facts.bytes()); shape.next();) {
                    if (shape.field() != 1) continue;
                    if (dims.size() == most_axes) throw Unsupported("it has more than " + std::to_string(most_axes) + " axes");
                    Dim dim;
                    for (Message each(shape.bytes()); each.next();) {
                        if (each.field() == 1) dim.size = std::max<std::int64_t>(each.integer(), -1);
                        if (each.field() == 2) dim.symbol = each.text();
                    }
                    dims.push_back(std::move(dim));
                }
                value.dims = std::move(dims);
            }
        }
    }
    return tensor;
}

// Reads a GraphProto. `graph` refers to values by number; `numbers` has the number of each name.
struct Reader {
    Storage storage;
    Graph graph;
    std::vector<Origin> origins;                          // by value
    std::unordered_map<std::string_view, int> numbers;    // the names lie in the model's bytes

    int number(std::string_view name) {
        if (name.empty()) return -1;
        const auto [found, fresh] = numbers.emplace(name, static_cast<int>(graph.values.size()));
        if (fresh) {
            Value value;
            value.name = name;
            graph.values.push_back(std::move(value));
            origins.emplace_back();
        }
        return found->second;
    }

    void read(Bytes bytes) {
        std::vector<Bytes> nodes, inputs, outputs, infos, initializers, sparse;
        for (Message message(bytes); message.next();) {
            switch (message.field()) {
                case 1: nodes.push_back(message.bytes()); break;
                case 2: graph.name = message.text(); break;
                case 5: initializers.push_back(message.bytes()); break;
                case 11: inputs.push_back(message.bytes()); break;
                case 12: outputs.push_back(message.bytes()); break;
                case 13: infos.push_back(message.bytes()); break;
                case 15: sparse.push_back(message.bytes()); break;
                default: break;
            }
        }
        for (const Bytes each : initializers) initializer(each, each, false);
        for (const Bytes each : sparse)
            for (Message message(each); message.next();)
                if (message.field() == 1) initializer(message.bytes(), each, true);
        for (const Bytes each : inputs) input(each);
        for (const Bytes each : nodes) node(Message(each));
        for (const Bytes each : outputs) {
            const int value = described(each, "output");
            if (value < 0) throw Error("one of the graph's outputs has no name");
            graph.outputs.push_back(value);
        }
        for (const Bytes each : infos) described(each, nullptr);
        sort();
        constants();
    }

    void initializer(Bytes tensor, Bytes whole, bool sparse) {
        std::string_view name;
        for (Message message(tensor); message.next();)
            if (message.field() == 8) name = message.text();
        const int value = number(name);
        if (value < 0) throw Error("an initializer has no name");
        Origin& origin = origins[value];
        if (origin.kind != Origin::Kind::unknown) throw Error("there are two initializers '" + std::string(name) + "'");
        origin.kind = Origin::Kind::initializer;
        origin.tensor = whole;
        origin.sparse = sparse;
    }

    // Reads a ValueInfoProto. `place`: "input" or "output" where it is one of the graph's, and must be a tensor that can be
    // held; of others it is only noted what they are.
    int described(Bytes bytes, const char* place) {
        std::string_view name;
        std::optional<Bytes> type;
        for (Message message(bytes); message.next();) {
            if (message.field() == 1) name = message.text();
            if (message.field() == 2) type = message.bytes();
        }
        const int value = number(name);
        if (value < 0 || !type) return value;
        Value said;
        try {
            if (!read_type(Message(*type), said) && place != nullptr)
                throw Unsupported("it is no tensor, or a tensor of elements that the engine cannot hold");
        } catch (const Unsupported& refusal) {
            if (place != nullptr) throw Unsupported(std::string(place) + " '" + std::string(name) + "': " + refusal.what());
            return value;
        }
        if (origins[value].typed) return value;
        origins[value].typed = true;
        graph.values[value].type = said.type;
        graph.values[value].dims = std::move(said.dims);
        return value;
    }

    void input(Bytes bytes) {
        // An initializer that is listed as an input too, as the first versions asked for, may be of any type while unused.
        std::string_view name;
        for (Message message(bytes); message.next();)
            if (message.field() == 1) name = message.text();
        const int known = number(name);
        if (known < 0) throw Error("one of the graph's inputs has no name");
        if (origins[known].kind == Origin::Kind::initializer) return;
        if (origins[known].kind == Origin::Kind::input) throw Error("there are two inputs '" + std::string(name) + "'");
        origins[known].kind = Origin::Kind::input;
        described(bytes, "input");
        graph.inputs.push_back(known);
    }

    void node(Message message) {
        Node made;
        std::vector<Bytes> attributes;
        while (message.next()) {
            switch (message.field()) {
                case 1: made.inputs.push_back(number(message.text())); break;
                case 2: made.outputs.push_back(number(message.text())); break;
                case 3: made.name = message.text(); break;
                case 4: made.op = message.text(); break;
                case 5: attributes.push_back(message.bytes()); break;
                case 7: made.domain = message.text(); break;
                default: break;
            }
        }
        const int index = static_cast<int>(graph.nodes.size());
        if (made.op.empty()) throw Error("node " + std::to_string(index) + " does not say what op it is");
        if (made.domain == "ai.onnx") made.domain.clear();
        try {
            for (const Bytes each : attributes) read_attribute(Message(each), storage, made.attributes);
        } catch (const Error& error) {
            throw Error(made.describe() + ": " + error.what());
        }
        for (const int output : made.outputs) {
            if (output < 0) continue;
            Origin& origin = origins[output];
            if (origin.kind != Origin::Kind::unknown)
                throw Error("value '" + graph.values[output].name + "' is made twice: by " + made.describe() + " and by " +
                            maker(origin));
            origin.kind = Origin::Kind::node;
            origin.node = index;
        }
        graph.nodes.push_back(std::move(made));
    }

    std::string maker(const Origin& origin) const {
        const bool read = origin.node >= 0 && origin.node < static_cast<int>(graph.nodes.size());
        if (origin.kind == Origin::Kind::node) return read ? graph.nodes[origin.node].describe() : "itself";
        return origin.kind == Origin::Kind::input ? "the graph's input" : "an initializer";
    }

    // Topological order: of the nodes that are ready, the first in the file is next, so that a sorted file stays as it is.
    void sort() {
        const std::size_t count = graph.nodes.size();
        std::vector<int> missing(count, 0);
        std::vector<std::vector<int>> readers(count);
        for (std::size_t i = 0; i < count; ++i)
            for (const int input : graph.nodes[i].inputs) {
                if (input < 0) continue;
                const Origin& origin = origins[input];
                if (origin.kind == Origin::Kind::unknown)
                    throw Error(graph.nodes[i].describe() + " reads '" + graph.values[input].name + "', which nothing makes");
                if (origin.kind != Origin::Kind::node) continue;
                readers[origin.node].push_back(static_cast<int>(i));
                ++missing[i];
            }
        for (const int output : graph.outputs)
            if (origins[output].kind == Origin::Kind::unknown)
                throw Error("the graph's output '" + graph.values[output].name + "' is made by nothing");
        std::priority_queue<int, std::vector<int>, std::greater<>> ready;
        for (std::size_t i = 0; i < count; ++i)
            if (missing[i] == 0) ready.push(static_cast<int>(i));
        std::vector<Node> sorted;
        sorted.reserve(count);
        while (!ready.empty()) {
            const int next = ready.top();
            ready.pop();
            for (const int reader : readers[next])
                if (--missing[reader] == 0) ready.push(reader);
            sorted.push_back(std::move(graph.nodes[next]));
        }
        if (sorted.size() < count) {
            const auto stuck = std::find_if(missing.begin(), missing.end(), [](int each) { return each > 0; });
            throw Error("the graph has a cycle: " + graph.nodes[stuck - missing.begin()].describe() +
                        " waits for its own result, or for that of a node that does");
        }
        graph.nodes = std::move(sorted);
    }

    // Initializers that something reads, and Constant nodes, become constants; a Constant that cannot be held stays a node.
    void constants() {
        std::vector<Node> rest;
        for (Node& node : graph.nodes) {
            const int output = node.op == "Constant" && node.domain.empty() && node.outputs.size() == 1 ? node.outputs[0] : -1;
            std::optional<Tensor> tensor;
            if (output >= 0 && node.attributes.size() == 1) tensor = constant(*node.attributes.begin());
            if (tensor)
                hold(output, std::move(*tensor));
            else
                rest.push_back(std::move(node));
        }
        graph.nodes = std::move(rest);
        std::vector<int> reader(graph.values.size(), -2);  // a node, or -1: the graph's output
        for (const int output : graph.outputs) reader[output] = -1;
        for (std::size_t i = graph.nodes.size(); i-- > 0;)
            for (const int input : graph.nodes[i].inputs)
                if (input >= 0) reader[input] = static_cast<int>(i);
        for (std::size_t value = 0; value < origins.size(); ++value) {
            const Origin& origin = origins[value];
            if (origin.kind != Origin::Kind::initializer || reader[value] == -2) continue;
            const std::string what = "initializer '" + graph.values[value].name + "'";
            const std::string who = reader[value] < 0 ? what : graph.nodes[reader[value]].describe() + ": its " + what;
            try {
                if (origin.sparse) throw Unsupported("it is stored as a sparse tensor");
                hold(static_cast<int>(value), storage.tensor(origin.tensor));
            } catch (const Unsupported& refusal) {
                const int node = reader[value];
                throw Unsupported(who + ": " + refusal.what(), node, node < 0 ? std::vector<std::string>() : graph.made_by(graph.nodes[node]));
            } catch (const Error& error) {
                throw Error(what + ": " + error.what());
            }
        }
    }

    void hold(int number, Tensor tensor) {
        Value& value = graph.values[number];
        value.type = tensor.type;
        value.dims.emplace();
        for (const std::int64_t size : tensor.dims) value.dims->push_back({size, ""});
        value.constant = std::move(tensor);
    }

    template <class T> static Tensor tensor_of(const T* from, Dims dims) {
        Tensor made(type_of<T>(), std::move(dims));
        std::copy_n(from, made.size(), made.as<T>());
        return made;
    }

    static std::optional<Tensor> constant(const std::pair<const std::string, Attribute>& named) {
        using Kind = Attribute::Kind;
        const Attribute& attribute = named.second;
        const auto is = [&](const char* wanted, Kind kind) { return named.first == wanted && named.second.kind == kind; };
        const auto axis = [](const auto& list) { return Dims{static_cast<std::int64_t>(list.size())}; };
        if (is("value", Kind::tensor)) return attribute.tensor;
        if (is("value_float", Kind::real)) return tensor_of(&attribute.real, {});
        if (is("value_int", Kind::integer)) return tensor_of(&attribute.integer, {});
        if (is("value_floats", Kind::reals)) return tensor_of(attribute.reals.data(), axis(attribute.reals));
        if (is("value_ints", Kind::integers)) return tensor_of(attribute.integers.data(), axis(attribute.integers));
        return std::nullopt;
    }
};

Graph read_model(Bytes bytes, const std::string& folder, std::function<void(Bytes)> read) {
    if (bytes.size == 0) throw Error("this is no ONNX file: it is empty");
    std::optional<Bytes> graph;
    std::optional<std::int64_t> ir_version, opset;
    for (Message message(bytes); message.next();) {
        if (message.field() == 1) ir_version = message.integer();
        if (message.field() == 7) {
            if (graph) Message::damaged("it has two graphs");
            graph = message.bytes();
        }
        if (message.field() != 8) continue;
        std::string_view domain;
        std::int64_t version = 0;
        for (Message entry(message.bytes()); entry.next();) {
            if (entry.field() == 1) domain = entry.text();
            if (entry.field() == 2) version = entry.integer();
        }
        if (!domain.empty() && domain != "ai.onnx") continue;
        if (version < 1) throw Error("opset " + std::to_string(version) + " does not exist");
        if (version > newest_opset)
            throw Unsupported("the model is of opset " + std::to_string(version) + ", and the engine knows those up to " +
                              std::to_string(newest_opset));
        if (opset && *opset != version)
            throw Error("the model names two opsets: " + std::to_string(*opset) + " and " + std::to_string(version));
        opset = version;
    }
    if (!graph) Message::damaged("it has no graph");
    if (!ir_version) Message::damaged("it has no version");
    Reader reader{Storage(folder, std::move(read)), {}, {}, {}};
    reader.read(*graph);
    if (!opset && *ir_version < 3) opset = 1;  // the first files had one set of ops and did not name it
    reader.graph.opset = opset.value_or(0);
    for (const Node& node : reader.graph.nodes)
        if (!opset && node.domain.empty()) throw Error(node.describe() + ": the model does not say of which opset it is");
    return std::move(reader.graph);
}

}  // namespace

Graph read_onnx(const std::byte* data, std::size_t size, const std::string& folder) {
    return read_model({data, size}, folder, [](Bytes) {});
}

Graph read_onnx_file(const std::string& path) {
    try {
        const File file(path);
        const Mapping mapping(file);
        const std::size_t slash = path.rfind('/');
        const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
        return read_model(mapping.bytes(), folder, [&](Bytes part) { mapping.drop(part); });
    } catch (const Unsupported& refusal) {
        throw Unsupported("'" + path + "': " + refusal.what(), refusal.node, refusal.makes);
    } catch (const Error& error) {
        const std::string text = error.what();
        throw Error(text.rfind("'" + path + "'", 0) == 0 ? text : "'" + path + "': " + text);
    }
}

}  // namespace featherweight
