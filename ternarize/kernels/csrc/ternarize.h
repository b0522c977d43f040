/* ternarize: products of packed weights and activations on a CPU. The whole interface of the shared library.
 *
 * Plain C: no torch, no Python. Shapes: O out features, I in features, G groups in a row, S group size, M tokens.
 * Products return 0, or -1 where there is no memory. */
#pragma once

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define TZ_API __attribute__((visibility("default")))

/* Counts up whenever a signature here changes; the Python side refuses another one. */
#define TZ_ABI 1

enum tz_dtype { TZ_FLOAT32 = 0, TZ_BFLOAT16 = 1, TZ_FLOAT16 = 2 };

typedef struct tz_shape tz_shape;

TZ_API int tz_abi(void);

/* The paths (instruction sets) of this build, best last: names by index from 0, NULL behind the last. */
TZ_API const char *tz_path_name(int path);

/* Whether this processor and operating system can run a path. */
TZ_API int tz_path_supported(int path);

/* What was found that a path could use, separated by spaces. */
TZ_API const char *tz_cpu_features(void);

/* A weight's shape, as one path lays it out. `columns` is I, `group` is S (the last group may be short).
 * NULL where there is no memory; free with tz_free_shape. */
TZ_API tz_shape *tz_ternary_shape(int path, int64_t rows, int64_t columns, int64_t group, int has_shift);
TZ_API tz_shape *tz_int8_shape(int path, int64_t rows, int64_t columns, int64_t group);
TZ_API void tz_free_shape(tz_shape *shape);

/* Bytes of a ternary weight as tz_pack_ternary writes it; the memory starts at a multiple of 64. */
TZ_API int64_t tz_packed_bytes(const tz_shape *shape);

/* Lay a ternary weight out for its path.
 *   trits  uint8 [O, ceil(I / 5)], five to a byte, as in the file
 *   scale  fp16 [O, G];  shift  fp16 [O, G], or NULL where the shape has none */
TZ_API void tz_pack_ternary(const tz_shape *shape, const uint8_t *trits, const uint16_t *scale, const uint16_t *shift,
                            uint8_t *packed, int threads);

/* y = x W' + bias.   x [M, I] and y [M, O] in `dtype`; bias float [O] or NULL.
 * exact: float activations; otherwise int8, one scale per token and piece of a group (see layout.h). */
TZ_API int tz_ternary_linear(const tz_shape *shape, const uint8_t *packed, const float *bias, const void *x, void *y,
                             int64_t tokens, int dtype, int exact, int threads);

/* The same with a table of int8 records, uint8 [O, I + 2 G], as in the file: codes, then fp16 scales. */
TZ_API int tz_int8_linear(const tz_shape *shape, const uint8_t *records, const float *bias, const void *x, void *y,
                          int64_t tokens, int dtype, int exact, int threads);

#if defined(__cplusplus)
}
#endif
