// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "engine.hpp"
#include "fuse.hpp"
#include "peak.hpp"

namespace nb = nanobind;
using namespace featherweight;

namespace {

using Names = std::vector<std::string>;
using Array = nb::ndarray<nb::ro, nb::device::cpu, nb::c_contig>;

Type type_from(nb::dlpack::dtype dtype, const std::string& name) {
    using Code = nb::dlpack::dtype_code;
    const auto code = static_cast<Code>(dtype.code);
    if (code == Code::Float) {
        if (dtype.bits == 32) return Type::f32;
        if (dtype.bits == 64) return Type::f64;
        if (dtype.bits == 16) return Type::f16;
    } else if (code == Code::Int) {
        if (dtype.bits == 8) return Type::i8;
        if (dtype.bits == 16) return Type::i16;
        if (dtype.bits == 32) return Type::i32;
        if (dtype.bits == 64) return Type::i64;
    } else if (code == Code::UInt) {
        if (dtype.bits == 8) return Type::u8;
        if (dtype.bits == 16) return Type::u16;
        if (dtype.bits == 32) return Type::u32;
        if (dtype.bits == 64) return Type::u64;
    } else if (code == Code::Bool) {
        return Type::boolean;
    }
    throw Error("input '" + name + "' is of a type that ONNX lacks");
}

nb::dlpack::dtype dtype_of(Type type) {
    switch (type) {
        case Type::f32: return nb::dtype<float>();
        case Type::f64: return nb::dtype<double>();
        case Type::f16: return {static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
        case Type::i8: return nb::dtype<std::int8_t>();
        case Type::i16: return nb::dtype<std::int16_t>();
        case Type::i32: return nb::dtype<std::int32_t>();
        case Type::i64: return nb::dtype<std::int64_t>();
        case Type::u8: return nb::dtype<std::uint8_t>();
        case Type::u16: return nb::dtype<std::uint16_t>();
        case Type::u32: return nb::dtype<std::uint32_t>();
        case Type::u64: return nb::dtype<std::uint64_t>();
        case Type::boolean: return nb::dtype<bool>();
        default: throw Unsupported(std::string("an output of type ") + name_of(type));
    }
}

nb::object to_numpy(const Tensor& tensor) {
    auto* kept = new std::shared_ptr<Memory>(tensor.memory);
    nb::capsule owner(kept, [](void* memory) noexcept { delete static_cast<std::shared_ptr<Memory>*>(memory); });
    std::vector<std::size_t> shape(tensor.dims.begin(), tensor.dims.end());
    return nb::cast(nb::ndarray<nb::numpy>(tensor.bytes(), shape.size(), shape.data(), owner, nullptr, dtype_of(tensor.type)));
}

std::vector<Input> inputs_of(const Engine& engine, const std::vector<Array>& arrays) {
    std::vector<Input> inputs;
    const Graph& graph = engine.graph();
    for (std::size_t i = 0; i < arrays.size(); ++i) {
        const Array& array = arrays[i];
        Dims dims(array.ndim());
        for (std::size_t a = 0; a < dims.size(); ++a) dims[a] = static_cast<std::int64_t>(array.shape(a));
        const std::string name = i < graph.inputs.size() ? graph.values[graph.inputs[i]].name : "?";
        inputs.push_back({type_from(array.dtype(), name), dims, array.data()});
    }
    return inputs;
}

// What a value is, as far as the file says: its name, its type's, its sizes (-1 or a symbol's name where they may change).
nb::list values_of(const Graph& graph, const std::vector<int>& numbers) {
    nb::list made;
    for (int number : numbers) {
        const Value& value = graph.values[number];
        nb::object shape = nb::none();
        if (value.dims) {
            nb::list sizes;
            for (const Dim& dim : *value.dims) {
                if (dim.size >= 0)
                    sizes.append(dim.size);
                else
                    sizes.append(dim.symbol.empty() ? nb::object(nb::none()) : nb::object(nb::str(dim.symbol.c_str())));
            }
            shape = sizes;
        }
        made.append(nb::make_tuple(value.name, value.type ? nb::object(nb::str(name_of(*value.type))) : nb::object(nb::none()), shape));
    }
    return made;
}

}  // namespace

NB_MODULE(_core, m) {
    m.doc() = "The sparse engine's core.";
    nb::exception<Error> error(m, "Error", PyExc_ValueError);
    nb::exception<Unsupported> unsupported(m, "Unsupported", error.ptr());
    unsupported.attr("makes") = nb::make_tuple();  // the names of the values that the refused node makes
    // Asked before the translators above, which know no attributes.
    nb::register_exception_translator(
        [](const std::exception_ptr& thrown, void* type) {
            try {
                std::rethrow_exception(thrown);
            } catch (const Unsupported& refusal) {
                nb::object made = nb::handle(static_cast<PyObject*>(type))(refusal.what());
                made.attr("makes") = nb::tuple(nb::cast(refusal.makes));
                PyErr_SetObject(static_cast<PyObject*>(type), made.ptr());
            }
        },
        unsupported.ptr());
    m.def("instruction_sets", &instruction_sets, "Those that this build has and this processor runs, the best first.");
    m.def("op_names", &op_names, "The ONNX ops that the engine has a rule for.");

    m.def(
        "peak",
        [](int threads, const std::string& instruction_set) {
            nb::gil_scoped_release free;
            const Peak peak = measure_peak(threads, instruction_set.c_str());
            return std::vector<double>{peak.flops, peak.bytes, peak.nearest};
        },
        nb::arg("threads") = 1, nb::arg("instruction_set") = "",
        "Measured: multiply-adds (two each) a second, and bytes a second from memory and from the second-level cache.");

    nb::class_<Engine>(m, "Engine", "A model that is ready to run: `Engine(model, threads=1)`, `model` being a ModelProto's bytes, or a file's path.")
        .def("__init__",
             [](Engine* self, nb::bytes model, int threads, const std::string& instruction_set, const std::string& folder, const Names& known,
                const Decisions& decisions) {
                 nb::gil_scoped_release free;
                 Graph graph = read_onnx(static_cast<const std::byte*>(static_cast<const void*>(model.c_str())), model.size(), folder);
                 new (self) Engine(std::move(graph), Options{threads, instruction_set, known, decisions});
             },
             nb::arg("model"), nb::arg("threads") = 1, nb::arg("instruction_set") = "", nb::arg("folder") = "", nb::arg("known") = Names(),
             nb::arg("decisions") = Decisions())
        .def("__init__",
             [](Engine* self, const std::filesystem::path& model, int threads, const std::string& instruction_set, const Names& known, const Decisions& decisions) {
                 nb::gil_scoped_release free;
                 new (self) Engine(read_onnx_file(model.string()), Options{threads, instruction_set, known, decisions});
             },
             nb::arg("model"), nb::arg("threads") = 1, nb::arg("instruction_set") = "", nb::arg("known") = Names(),
             nb::arg("decisions") = Decisions())
        .def_prop_ro("inputs", [](const Engine& self) { return values_of(self.graph(), self.graph().inputs); })
        .def_prop_ro("outputs", [](const Engine& self) { return values_of(self.graph(), self.graph().outputs); })
        .def_prop_ro("nodes",
                     [](const Engine& self) {
                         nb::list made;
                         for (const Node& node : self.graph().nodes)
                             made.append(nb::make_tuple(node.domain, node.op, node.name, nb::tuple(nb::cast(self.graph().made_by(node)))));
                         return made;
                     },
                     "(domain, op, name, names of the outputs) of each node that is left after fusing, in the order of running.")
        .def_prop_ro("finishes",
                     [](const Engine& self) {
                         std::vector<std::string> made;
                         for (const Node& node : self.graph().nodes) made.push_back(describe(self.graph(), node.finish));
                         return nb::cast(made);
                     },
                     "For each of `nodes` what was fused into its end: \"+ value, relu\", or nothing.")
        .def_prop_ro("instruction_set", [](const Engine& self) { return std::string(self.instruction_set()); })
        .def_prop_ro("threads", &Engine::threads)
        .def_prop_ro("decided", &Engine::decided, "How many `decisions` there are.")
        .def_prop_ro("decisions", &Engine::decisions, "What was found by measuring: give it to the next Engine of this model, and it need not measure.")
        .def("run",
             [](Engine& self, const std::vector<Array>& arrays) {
                 const std::vector<Input> inputs = inputs_of(self, arrays);
                 std::vector<Tensor> outputs;
                 {
                     nb::gil_scoped_release free;
                     outputs = self.run(inputs);
                 }
                 nb::list made;
                 for (const Tensor& output : outputs) made.append(to_numpy(output));
                 return made;
             },
             nb::arg("inputs"), "Outputs for one array an input, in the graph's order.")
        .def("arena_bytes", [](Engine& self, const std::vector<Array>& arrays) { return self.arena_bytes(inputs_of(self, arrays)); },
             nb::arg("inputs"), "Bytes of activations that a run with these shapes needs at once.")
        .def("profile",
             [](Engine& self, const std::vector<Array>& arrays) {
                 const std::vector<Input> inputs = inputs_of(self, arrays);
                 std::vector<Spent> spent;
                 {
                     nb::gil_scoped_release free;
                     self.run(inputs, &spent);
                 }
                 nb::list made;
                 for (const Spent& each : spent) {
                     nb::dict row;
                     row["node"] = each.node;
                     row["op"] = each.op;
                     row["what"] = each.what;
                     row["seconds"] = each.seconds;
                     row["flops"] = each.flops;
                     row["bytes"] = each.bytes;
                     made.append(row);
                 }
                 return made;
             },
             nb::arg("inputs"), "What each step of one run took, in order.");
}
