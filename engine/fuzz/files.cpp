// SPDX-License-Identifier: Apache-2.0
// The fuzzer's target on files that are there already, for compilers without libFuzzer: `test_files FOLDER...`.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int count, char** arguments) {
    int files = 0;
    for (int i = 1; i < count; ++i)
        for (const std::filesystem::directory_entry& each : std::filesystem::directory_iterator(arguments[i])) {
            std::ifstream file(each.path(), std::ios::binary);
            const std::string bytes{std::istreambuf_iterator<char>(file), {}};
            std::fprintf(stderr, "%s\n", each.path().c_str());  // the last one is at fault where this ends early
            LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
            ++files;
        }
    std::printf("%d files\n", files);
}
