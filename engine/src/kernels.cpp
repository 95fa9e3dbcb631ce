// SPDX-License-Identifier: Apache-2.0
#include "kernels.hpp"

#include "error.hpp"

namespace featherweight {

#if defined(FEATHERWEIGHT_X86)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

namespace {

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#if defined(FEATHERWEIGHT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.push_back(&kernels_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kernels_avx2);
#endif
    found.push_back(&kernels_portable);
    return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* each : usable()) names.emplace_back(each->name);
    return names;
}

const Kernels& kernels(const char* name) {
    if (name == nullptr || *name == '\0') return *usable().front();
    std::string known;
    for (const Kernels* each : usable()) {
        if (std::string(name) == each->name) return *each;
        known += (known.empty() ? "" : ", ") + std::string(each->name);
    }
    throw Error("there is no instruction set '" + std::string(name) + "' here; there are: " + known);
}

}  // namespace featherweight
