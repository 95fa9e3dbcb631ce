// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace featherweight {

// What this machine does at most on so many threads, measured: the roof that a profile is held against.
struct Peak {
    double flops = 0;   // a second, of multiply-adds that count two
    double bytes = 0;   // a second, read from memory that no cache holds
    double nearest = 0; // a second, read from the second-level cache
};

Peak measure_peak(int threads, const char* instruction_set);

}  // namespace featherweight
