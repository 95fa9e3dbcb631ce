/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FEATHERWEIGHT_ENGINE_H
#define FEATHERWEIGHT_ENGINE_H

/* The engine without Python: plain C, opaque handles, nothing thrown through it.
 *
 * A call that can fail returns an fw_status and, where `text` is not NULL, writes what went wrong there: at most `room`
 * bytes with the closing zero, cut where it is longer, empty where all went well. There is no global state: engines live
 * side by side, and one engine may be run by any number of threads at once. Whatever is handed out (names, shapes, data)
 * belongs to the handle that it came from and lives as long as that. A result outlives its engine. */

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FW_API __attribute__((visibility("default")))
#else
#define FW_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define FW_VERSION "0.1.0"

typedef struct fw_engine fw_engine;
typedef struct fw_result fw_result;

typedef enum fw_status {
    FW_OK = 0,
    FW_ERROR = 1,       /* the model, the inputs or the arguments are wrong */
    FW_UNSUPPORTED = 2, /* a sound model asks for what this engine does not do */
    FW_NO_MEMORY = 3,
    FW_INTERNAL = 4     /* a defect of the engine */
} fw_status;

/* Element types, by the numbers of ONNX's TensorProto.DataType. */
enum {
    FW_UNKNOWN = 0,
    FW_FLOAT = 1,
    FW_UINT8 = 2,
    FW_INT8 = 3,
    FW_UINT16 = 4,
    FW_INT16 = 5,
    FW_INT32 = 6,
    FW_INT64 = 7,
    FW_BOOL = 9,
    FW_FLOAT16 = 10,
    FW_DOUBLE = 11,
    FW_UINT32 = 12,
    FW_UINT64 = 13,
    FW_BFLOAT16 = 16
};

/* Set `size` to sizeof(fw_options), so that a newer library knows which fields an older program has: FW_OPTIONS does. */
typedef struct fw_options {
    size_t size;
    int32_t threads;             /* the caller's own included; at least 1 */
    const char* instruction_set; /* NULL: the best that this processor has */
    const char* folder;          /* of external data, for models given as bytes; NULL: none is looked up */
} fw_options;
#define FW_OPTIONS {sizeof(fw_options), 1, NULL, NULL}

/* Elements are dense and row-major. */
typedef struct fw_tensor {
    int32_t type;
    int32_t rank;
    const int64_t* dims;
    const void* data;
    size_t bytes; /* at `data` */
} fw_tensor;

/* An input or output, as the model declares it. */
typedef struct fw_value {
    const char* name;
    int32_t type;               /* FW_UNKNOWN where the model does not say */
    int32_t rank;               /* -1 where it does not say; then dims and symbols are NULL */
    const int64_t* dims;        /* -1 where a size is known only when the model is run */
    const char* const* symbols; /* the names of such sizes, "" where they have none */
} fw_value;

/* One step's share of a run. */
typedef struct fw_step {
    const char* node;
    const char* op;
    const char* what;
    double seconds;
    double flops; /* a multiply-add counts two; zeros that are skipped count none */
    double bytes; /* read and written */
} fw_step;

FW_API const char* fw_version(void);
FW_API size_t fw_type_size(int32_t type);      /* bytes of an element; 0 where there is no such type */
FW_API const char* fw_type_name(int32_t type); /* ONNX's word for it: "float"; NULL where there is no such type */

/* `options` may be NULL. */
FW_API fw_status fw_engine_load(const char* path, const fw_options* options, fw_engine** engine, char* text, size_t room);
/* The bytes may be freed once the call has returned. */
FW_API fw_status fw_engine_load_bytes(const void* model, size_t bytes, const fw_options* options, fw_engine** engine, char* text,
                                      size_t room);
FW_API void fw_engine_free(fw_engine* engine); /* NULL is fine; no run may be under way */

FW_API int32_t fw_engine_threads(const fw_engine* engine);
FW_API const char* fw_engine_instruction_set(const fw_engine* engine);
FW_API size_t fw_engine_input_count(const fw_engine* engine);
FW_API size_t fw_engine_output_count(const fw_engine* engine);
FW_API const fw_value* fw_engine_input(const fw_engine* engine, size_t index); /* NULL where there is none */
FW_API const fw_value* fw_engine_output(const fw_engine* engine, size_t index);

/* Makes ready for inputs of these types and shapes; `data` and `bytes` are not looked at. The first run with new shapes
 * does it otherwise. `arena` may be NULL: it is given the bytes of activations that a run needs at once. */
FW_API fw_status fw_engine_prepare(fw_engine* engine, const fw_tensor* inputs, size_t count, size_t* arena, char* text, size_t room);
/* One tensor an input, in the engine's order. */
FW_API fw_status fw_engine_run(fw_engine* engine, const fw_tensor* inputs, size_t count, fw_result** result, char* text, size_t room);
/* The same, and the result has what each step took. */
FW_API fw_status fw_engine_profile(fw_engine* engine, const fw_tensor* inputs, size_t count, fw_result** result, char* text,
                                   size_t room);

FW_API size_t fw_result_count(const fw_result* result);
FW_API const fw_tensor* fw_result_output(const fw_result* result, size_t index); /* NULL where there is none */
FW_API size_t fw_result_step_count(const fw_result* result);                     /* 0 where it is of fw_engine_run */
FW_API const fw_step* fw_result_step(const fw_result* result, size_t index);
FW_API void fw_result_free(fw_result* result); /* NULL is fine */

#ifdef __cplusplus
}
#endif

#endif
