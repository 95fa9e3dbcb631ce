// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <cstdlib>

// A sanitizer needs address space by the terabyte, and knows no process without it.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define SANITIZED 0
#endif

// What is expected does not hold: say where, and end with a failure.
#define EXPECT(condition)                                                             \
    do {                                                                              \
        if (!(condition)) {                                                           \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
            std::exit(1);                                                             \
        }                                                                             \
    } while (false)

// The expression throws an exception of this type.
#define EXPECT_THROWS(type, expression)                                               \
    do {                                                                              \
        bool thrown = false;                                                          \
        try {                                                                         \
            expression;                                                               \
        } catch (const type&) {                                                       \
            thrown = true;                                                            \
        }                                                                             \
        if (!thrown) {                                                                \
            std::fprintf(stderr, "%s:%d: %s did not throw\n", __FILE__, __LINE__, #expression); \
            std::exit(1);                                                             \
        }                                                                             \
    } while (false)
