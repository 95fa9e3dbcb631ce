// SPDX-License-Identifier: Apache-2.0
// Models, inputs and the answers that another runtime gave to them, as tests/engine/nodes.py records them: what the tests in
// Python check, on machines and under emulators that have no Python.
//
//     test_replay FOLDER...     each holds cases, and a case is a folder: model.onnx, input_0.pb, ..., output_0.pb, ..., tolerance
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "engine.hpp"
#include "tensor_proto.hpp"

using namespace featherweight;
namespace fs = std::filesystem;

namespace {

std::vector<Tensor> tensors(const fs::path& folder, const char* stem) {
    Storage storage("", [](Bytes) {});
    std::vector<Tensor> made;
    for (;;) {
        const fs::path path = folder / (stem + std::to_string(made.size()) + ".pb");
        if (!fs::exists(path)) return made;
        const File file(path.string());
        std::vector<std::byte> bytes(file.size());
        file.read(0, bytes.data(), bytes.size());
        made.push_back(storage.tensor({bytes.data(), bytes.size()}));
    }
}

// As NumPy's assert_allclose has it, the absolute tolerance being that of the largest element.
bool close(const Tensor& found, const Tensor& expected, double tolerance) {
    if (found.type != expected.type || found.dims != expected.dims) return false;
    const std::int64_t size = expected.size();
    if (expected.type != Type::f32)
        return std::memcmp(found.bytes(), expected.bytes(), static_cast<std::size_t>(size) * size_of(expected.type)) == 0;
    const float *a = found.as<float>(), *b = expected.as<float>();
    double largest = 1;
    for (std::int64_t i = 0; i < size; ++i)
        if (std::isfinite(b[i])) largest = std::max(largest, std::fabs(double{b[i]}));
    return std::equal(a, a + size, b, [&](double x, double y) {
        return x == y || (std::isnan(x) && std::isnan(y)) || std::fabs(x - y) <= tolerance * (largest + std::fabs(y));
    });
}

bool same(const fs::path& folder, const std::string& set, int threads) {
    double tolerance = 0;
    std::ifstream(folder / "tolerance") >> tolerance;
    const std::vector<Tensor> given = tensors(folder, "input_"), expected = tensors(folder, "output_");
    std::vector<Input> inputs;
    for (const Tensor& each : given) inputs.push_back({each.type, each.dims, each.bytes()});
    Engine engine(read_onnx_file((folder / "model.onnx").string()), Options{threads, set, {}, {}});
    const std::vector<Tensor> found = engine.run(inputs);
    return std::equal(found.begin(), found.end(), expected.begin(), expected.end(),
                      [&](const Tensor& a, const Tensor& b) { return close(a, b, tolerance); });
}

}  // namespace

int main(int count, char** arguments) {
    int cases = 0, failures = 0;
    for (int i = 1; i < count; ++i)
        for (const fs::directory_entry& folder : fs::directory_iterator(arguments[i]))
            for (const std::string& set : instruction_sets()) {
                std::string why = "another answer";
                ++cases;
                try {
                    if (same(folder.path(), set, cases % 2 ? 1 : 3)) continue;
                } catch (const std::exception& error) {
                    why = error.what();
                }
                ++failures;
                std::fprintf(stderr, "%s, %s: %s\n", folder.path().c_str(), set.c_str(), why.c_str());
            }
    std::printf("%d answers, %d of them wrong\n", cases, failures);
    return failures > 0;
}
