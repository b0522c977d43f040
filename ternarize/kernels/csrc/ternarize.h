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
#define TZ_ABI 6

/* Of a ternary weight's groups: scales in fp16, shifts beside them, or scales of 4 bits. */
enum tz_levels { TZ_SCALES = 0, TZ_SCALES_AND_SHIFTS = 1, TZ_CODED_SCALES = 2 };

enum tz_dtype { TZ_FLOAT32 = 0, TZ_BFLOAT16 = 1, TZ_FLOAT16 = 2 };

typedef struct tz_shape tz_shape;

TZ_API int tz_abi(void);

/* The paths (instruction sets) of this build, best last: names by index from 0, NULL behind the last. */
TZ_API const char *tz_path_name(int path);

/* Whether this processor and operating system can run a path. */
TZ_API int tz_path_supported(int path);

/* What was found that a path could use, separated by spaces. */
TZ_API const char *tz_cpu_features(void);

/* GOMP_parallel of the OpenMP library that the program uses: call work(context) on several threads, and wait for all.
 * Products of many tokens run there once this is set, in this process and not in those that it forks; NULL: nowhere. */
typedef void (*tz_team)(void (*work)(void *context), void *context, unsigned threads, unsigned flags);
TZ_API void tz_set_team(tz_team team);

/* A weight's shape, as one path lays it out. `columns` is I, `group` is S (the last group may be short).
 * NULL where there is no memory; free with tz_free_shape. */
TZ_API tz_shape *tz_ternary_shape(int path, int64_t rows, int64_t columns, int64_t group, int levels);
TZ_API tz_shape *tz_table_shape(int path, int64_t rows, int64_t columns, int64_t group, int bits);
TZ_API void tz_free_shape(tz_shape *shape);

/* Bytes of a ternary weight as tz_pack_ternary writes it; the memory starts at a multiple of 64. */
TZ_API int64_t tz_packed_bytes(const tz_shape *shape);

/* Lay a ternary weight out for its path.
 *   trits  uint8 [O, ceil(I / 5)], five to a byte, as in the file
 *   scale  fp16 [O, G];  shift  fp16 [O, G], or NULL where the shape has none */
TZ_API void tz_pack_ternary(const tz_shape *shape, const uint8_t *trits, const uint16_t *scale, const uint16_t *shift,
                            uint8_t *packed, int threads);

/* The same with coded scales: factor * steps[code].
 *   codes  uint8 [O, ceil(G / 2)], 4 bits each, low ones first;  factors  float [O];  steps  fp16 [16] */
TZ_API void tz_pack_coded(const tz_shape *shape, const uint8_t *trits, const uint8_t *codes, const float *factors,
                          const uint16_t *steps, uint8_t *packed, int threads);

/* y = x W' + bias.   x [M, I] and y [M, O] in `dtype`; bias float [O] or NULL.
 * exact: float activations; otherwise int8, one scale per token and piece of a group (see layout.h), and bfloat16 on
 * both sides where AMX multiplies more than eight tokens. */
TZ_API int tz_ternary_linear(const tz_shape *shape, const uint8_t *packed, const float *bias, const void *x, void *y,
                             int64_t tokens, int dtype, int exact, int threads);

/* The same with a table of records, as in the file: codes, then fp16 scales. uint8 [O, I + 2 G] with 8 bits, and
 * [O, 3 I / 4 + 2 G] with 6, where I and S are multiples of 64 (or S is I). */
TZ_API int tz_table_linear(const tz_shape *shape, const uint8_t *records, const float *bias, const void *x, void *y,
                           int64_t tokens, int dtype, int exact, int threads);

/* -- the blocks of a decoder --------------------------------------------------------------------------------------
 *
 * x + attention(norm(x)), then x + down(act(gate(norm(x))) * up(norm(x))): the shape of Llama and its kin, in float32
 * between the linears. What a model lacks (norms of queries, of a branch's end, biases) is left out. */

enum tz_linear { TZ_QUERY, TZ_KEY, TZ_VALUE, TZ_OUT, TZ_GATE, TZ_UP, TZ_DOWN, TZ_LINEARS };
enum tz_norm_place {
    TZ_ATTENTION_NORM, TZ_QUERY_NORM, TZ_KEY_NORM, TZ_ATTENTION_END_NORM, TZ_FEED_NORM, TZ_FEED_END_NORM, TZ_NORMS
};
enum tz_activation { TZ_SILU = 0, TZ_GELU_TANH = 1 };

typedef struct tz_decoder tz_decoder;

/* Keys and values of blocks that are cached alike, in `dtype`: [block][2][key heads][capacity][head size]. Positions
 * first .. end - 1 are there; the new token's go to `end`, which lies below the capacity. */
typedef struct {
    void *memory;
    int64_t capacity, first, end;
    int dtype;
} tz_cache;

/* NULL where there is no memory; free with tz_free_decoder. What is given to it below must outlive it. */
TZ_API tz_decoder *tz_make_decoder(int path, int64_t blocks, int64_t hidden, int64_t inner, int64_t heads,
                                   int64_t key_heads, int64_t head_size, int activation, int exact);
TZ_API void tz_free_decoder(tz_decoder *decoder);

/* A linear of a block, as tz_ternary_linear takes it; all seven must be given. */
TZ_API void tz_set_linear(tz_decoder *decoder, int64_t block, int linear, const tz_shape *shape, const uint8_t *packed,
                          const float *bias);

/* A norm of a block: x / sqrt(mean(x^2) + epsilon) * weight. Behind the last block: the norm of the result. */
TZ_API void tz_set_norm(tz_decoder *decoder, int64_t block, int place, const float *weight, float epsilon);

/* How a block attends: to the last `window` positions (0: to all), turned by the rope of this number, with its keys and
 * values at `place` of the cache of this number. */
TZ_API void tz_set_attention(tz_decoder *decoder, int64_t block, float scale, int64_t window, int rope, int cache,
                             int64_t place);

/* One token: x float [hidden] -> y float [hidden].
 *   ropes   float [ropes][2][head size]: cosines, then sines, of its position */
TZ_API int tz_step(const tz_decoder *decoder, const float *x, float *y, const float *ropes, const tz_cache *caches,
                   int threads);

/* A block for M tokens: what comes before attention and what comes behind it, with `room` for floats of its own.
 *   x                     float [M, hidden]: the residual stream, which tz_leave_attention brings to the block's end
 *   ropes                 float [M][ropes][2][head size]
 *   query, key, value     float [M][heads or key heads][head size], turned
 *   mixed                 float [M][heads][head size]: what the heads attended to */
TZ_API int64_t tz_prompt_floats(const tz_decoder *decoder, int64_t tokens);
TZ_API int tz_enter_attention(const tz_decoder *decoder, int64_t block, const float *x, const float *ropes,
                              float *query, float *key, float *value, float *room, int64_t tokens, int threads);
TZ_API int tz_leave_attention(const tz_decoder *decoder, int64_t block, const float *mixed, float *x, float *room,
                              int64_t tokens, int threads);

#if defined(__cplusplus)
}
#endif
