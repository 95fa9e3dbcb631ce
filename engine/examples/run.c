/* SPDX-License-Identifier: Apache-2.0 */
/* Runs a model once on a ramp and prints each output's shape and the sum of its elements:
 *
 *     cc -std=c11 run.c $(pkg-config --cflags --libs featherweight-engine) -o run && ./run model.onnx [threads]
 *
 * Sizes that the model leaves open are 1. */
#include <featherweight/engine.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(const char* what) {
    fprintf(stderr, "%s\n", what);
    return 1;
}

/* Element i is (i % 17 - 8) / 8 where it is a float, and i % 2 otherwise. `dims` has room for the value's rank. */
static int ramp(const fw_value* value, fw_tensor* tensor, int64_t* dims) {
    int64_t size = 1;
    for (int32_t axis = 0; axis < value->rank; ++axis) {
        dims[axis] = value->dims[axis] < 0 ? 1 : value->dims[axis];
        size *= dims[axis];
    }
    const size_t unit = fw_type_size(value->type);
    unsigned char* data = unit == 0 ? NULL : calloc((size_t)size + 1, unit);
    if (data == NULL) return 0;
    for (int64_t i = 0; i < size; ++i) {
        if (value->type == FW_FLOAT)
            ((float*)data)[i] = (float)(i % 17 - 8) / 8;
        else
            data[(size_t)i * unit] = (unsigned char)(i % 2); /* the lowest byte of an integer */
    }
    *tensor = (fw_tensor){value->type, value->rank < 0 ? 0 : value->rank, dims, data, (size_t)size * unit};
    return 1;
}

int main(int count, char** arguments) {
    char text[512];
    fw_options options = FW_OPTIONS;
    fw_engine* engine = NULL;
    fw_result* result = NULL;
    if (count < 2) return fail("usage: run model.onnx [threads]");
    if (count > 2) options.threads = atoi(arguments[2]);
    if (fw_engine_load(arguments[1], &options, &engine, text, sizeof text) != FW_OK) return fail(text);

    const size_t inputs = fw_engine_input_count(engine);
    fw_tensor* tensors = calloc(inputs + 1, sizeof *tensors);
    int64_t(*dims)[64] = calloc(inputs + 1, sizeof *dims); /* no model that loads has more axes */
    if (tensors == NULL || dims == NULL) return fail("there is not enough memory");
    for (size_t i = 0; i < inputs; ++i)
        if (!ramp(fw_engine_input(engine, i), &tensors[i], dims[i])) return fail("an input's type is unknown");
    if (fw_engine_run(engine, tensors, inputs, &result, text, sizeof text) != FW_OK) return fail(text);

    for (size_t i = 0; i < fw_result_count(result); ++i) {
        const fw_tensor* output = fw_result_output(result, i);
        double sum = 0;
        if (output->type == FW_FLOAT)
            for (size_t k = 0; k < output->bytes / sizeof(float); ++k) sum += ((const float*)output->data)[k];
        printf("%s", fw_engine_output(engine, i)->name);
        for (int32_t axis = 0; axis < output->rank; ++axis) printf(" %" PRId64, output->dims[axis]);
        printf(" sum %.9g\n", sum);
    }

    fw_result_free(result);
    for (size_t i = 0; i < inputs; ++i) free((void*)tensors[i].data);
    free(tensors);
    free(dims);
    fw_engine_free(engine);
    return 0;
}
