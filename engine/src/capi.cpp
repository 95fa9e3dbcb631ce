// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <deque>

#include "engine.hpp"
#include "featherweight/engine.h"

using namespace featherweight;

namespace {

std::int32_t number(Type type) { return static_cast<std::int32_t>(to_onnx(type)); }

// Owns what an fw_value points to.
struct Declared {
    std::vector<std::int64_t> dims;
    std::vector<const char*> symbols;
    fw_value value{};
};

std::deque<Declared> declared(const Graph& graph, const std::vector<int>& numbers) {
    std::deque<Declared> made;
    for (const int index : numbers) {
        const Value& value = graph.values[index];
        Declared& each = made.emplace_back();
        each.value = {value.name.c_str(), value.type ? number(*value.type) : std::int32_t{FW_UNKNOWN}, -1, nullptr, nullptr};
        if (!value.dims) continue;
        for (const Dim& dim : *value.dims) {
            each.dims.push_back(dim.size);
            each.symbols.push_back(dim.symbol.c_str());
        }
        each.value.rank = static_cast<std::int32_t>(each.dims.size());
        each.value.dims = each.dims.data();
        each.value.symbols = each.symbols.data();
    }
    return made;
}

void say(const char* what, char* text, std::size_t room) {
    if (text == nullptr || room == 0) return;
    std::size_t size = std::min(std::strlen(what), room - 1);
    if (what[size] != '\0')  // never cut within a character of UTF-8
        while (size > 0 && (static_cast<unsigned char>(what[size]) & 0xc0) == 0x80) --size;
    std::memcpy(text, what, size);
    text[size] = '\0';
}

// Nothing is thrown through the interface.
template <class Body> fw_status guarded(char* text, std::size_t room, Body body) {
    try {
        say("", text, room);
        body();
        return FW_OK;
    } catch (const Unsupported& refusal) {
        say(refusal.what(), text, room);
        return FW_UNSUPPORTED;
    } catch (const Error& error) {
        say(error.what(), text, room);
        return FW_ERROR;
    } catch (const std::bad_alloc&) {
        say("there is not enough memory", text, room);
        return FW_NO_MEMORY;
    } catch (const std::exception& other) {
        say(other.what(), text, room);
    } catch (...) {
        say("an unknown failure", text, room);
    }
    return FW_INTERNAL;
}

void need(const void* given, const char* name) {
    if (given == nullptr) throw Error(std::string(name) + " is NULL");
}

// Fields that the caller's header lacks keep their defaults; those that this library lacks must be zero.
fw_options known(const fw_options* given) {
    fw_options made = FW_OPTIONS;
    if (given == nullptr) return made;
    if (given->size < sizeof(std::size_t)) throw Error("set the size of fw_options: start from FW_OPTIONS");
    const auto* bytes = reinterpret_cast<const unsigned char*>(given);
    for (std::size_t i = sizeof(made); i < given->size; ++i)
        if (bytes[i] != 0) throw Error("these options are of a newer version than this library, " FW_VERSION);
    std::memcpy(&made, given, std::min(given->size, sizeof(made)));
    return made;
}

std::vector<Input> inputs_of(const fw_tensor* given, std::size_t count, bool data) {
    if (count > 0) need(given, "inputs");
    std::vector<Input> made;
    for (std::size_t i = 0; i < count; ++i) {
        const fw_tensor& each = given[i];
        const std::string name = "input " + std::to_string(i);
        if (each.rank < 0) throw Error(name + " has a negative rank");
        if (each.rank > 0) need(each.dims, "dims");
        Input input{from_onnx(each.type), {}, each.data};
        if (each.rank > 0) input.dims.assign(each.dims, each.dims + each.rank);
        const std::size_t bytes = static_cast<std::size_t>(featherweight::count(input.dims)) * size_of(input.type);
        if (data && each.bytes != bytes)
            throw Error(name + " is given with " + std::to_string(each.bytes) + " bytes; its shape takes " + std::to_string(bytes));
        if (data && bytes > 0) need(each.data, "data");
        made.push_back(std::move(input));
    }
    return made;
}

}  // namespace

struct fw_engine {
    Engine engine;
    std::deque<Declared> inputs, outputs;

    fw_engine(Graph graph, const fw_options& options)
        : engine(std::move(graph), Options{options.threads, options.instruction_set ? options.instruction_set : "", {}, {}}),
          inputs(declared(engine.graph(), engine.graph().inputs)),
          outputs(declared(engine.graph(), engine.graph().outputs)) {}
};

struct fw_result {
    std::vector<Tensor> tensors;
    std::vector<fw_tensor> outputs;
    std::vector<Spent> spent;
    std::vector<fw_step> steps;
};

namespace {

fw_status run(fw_engine* engine, const fw_tensor* inputs, std::size_t count, bool profile, fw_result** result, char* text,
              std::size_t room) {
    if (result != nullptr) *result = nullptr;
    return guarded(text, room, [&] {
        need(engine, "engine");
        need(result, "result");
        auto made = std::make_unique<fw_result>();
        made->tensors = engine->engine.run(inputs_of(inputs, count, true), profile ? &made->spent : nullptr);
        for (const Tensor& each : made->tensors)
            made->outputs.push_back({number(each.type), static_cast<std::int32_t>(each.dims.size()),
                                     each.dims.data(), each.bytes(), static_cast<std::size_t>(each.size()) * size_of(each.type)});
        for (const Spent& each : made->spent)
            made->steps.push_back({each.node.c_str(), each.op.c_str(), each.what.c_str(), each.seconds, each.flops, each.bytes});
        *result = made.release();
    });
}

template <class Read>
fw_status load(const fw_options* options, fw_engine** engine, char* text, std::size_t room, Read read) {
    if (engine != nullptr) *engine = nullptr;
    return guarded(text, room, [&] {
        need(engine, "engine");
        const fw_options chosen = known(options);
        *engine = new fw_engine(read(chosen), chosen);
    });
}

}  // namespace

const char* fw_version(void) { return FW_VERSION; }

std::size_t fw_type_size(std::int32_t type) {
    try {
        return size_of(from_onnx(type));
    } catch (...) {
        return 0;
    }
}

const char* fw_type_name(std::int32_t type) {
    try {
        return name_of(from_onnx(type));
    } catch (...) {
        return nullptr;
    }
}

fw_status fw_engine_load(const char* path, const fw_options* options, fw_engine** engine, char* text, std::size_t room) {
    return load(options, engine, text, room, [&](const fw_options&) {
        need(path, "path");
        return read_onnx_file(path);
    });
}

fw_status fw_engine_load_bytes(const void* model, std::size_t bytes, const fw_options* options, fw_engine** engine, char* text,
                               std::size_t room) {
    return load(options, engine, text, room, [&](const fw_options& chosen) {
        need(model, "model");
        return read_onnx(static_cast<const std::byte*>(model), bytes, chosen.folder ? chosen.folder : "");
    });
}

void fw_engine_free(fw_engine* engine) { delete engine; }

std::int32_t fw_engine_threads(const fw_engine* engine) { return engine->engine.threads(); }
const char* fw_engine_instruction_set(const fw_engine* engine) { return engine->engine.instruction_set(); }
std::size_t fw_engine_input_count(const fw_engine* engine) { return engine->inputs.size(); }
std::size_t fw_engine_output_count(const fw_engine* engine) { return engine->outputs.size(); }

const fw_value* fw_engine_input(const fw_engine* engine, std::size_t index) {
    return index < engine->inputs.size() ? &engine->inputs[index].value : nullptr;
}

const fw_value* fw_engine_output(const fw_engine* engine, std::size_t index) {
    return index < engine->outputs.size() ? &engine->outputs[index].value : nullptr;
}

fw_status fw_engine_prepare(fw_engine* engine, const fw_tensor* inputs, std::size_t count, std::size_t* arena, char* text,
                            std::size_t room) {
    return guarded(text, room, [&] {
        need(engine, "engine");
        const std::size_t bytes = engine->engine.arena_bytes(inputs_of(inputs, count, false));
        if (arena != nullptr) *arena = bytes;
    });
}

fw_status fw_engine_run(fw_engine* engine, const fw_tensor* inputs, std::size_t count, fw_result** result, char* text,
                        std::size_t room) {
    return run(engine, inputs, count, false, result, text, room);
}

fw_status fw_engine_profile(fw_engine* engine, const fw_tensor* inputs, std::size_t count, fw_result** result, char* text,
                            std::size_t room) {
    return run(engine, inputs, count, true, result, text, room);
}

std::size_t fw_result_count(const fw_result* result) { return result->outputs.size(); }

const fw_tensor* fw_result_output(const fw_result* result, std::size_t index) {
    return index < result->outputs.size() ? &result->outputs[index] : nullptr;
}

std::size_t fw_result_step_count(const fw_result* result) { return result->steps.size(); }

const fw_step* fw_result_step(const fw_result* result, std::size_t index) {
    return index < result->steps.size() ? &result->steps[index] : nullptr;
}

void fw_result_free(fw_result* result) { delete result; }
