/* What one path provides. The tables are defined in the file of the instruction set, and joined in dispatch.c. */
#pragma once

#include "layout.h"
#include "ternarize.h"

typedef struct {
    const float *weight;      /* NULL where there is no norm */
    float epsilon;
} tz_norm;

/* The keys and values [positions][size] in `dtype` that a head sees, or several. */
typedef struct {
    const char *keys, *values;
    int64_t positions, size;
    float scale;
    int dtype;
} tz_attention;

typedef struct {
    const char *name;
    int five_a_byte;

    /* x, `dtype` [.., columns], tokens first .. last -> tokens. */
    void (*prepare)(const tz_shape *, const void *x, int dtype, tz_tokens *, int64_t first, int64_t last);

    /* One block of rows and the tile of tokens that begins with `first` -> y [count][16]. */
    void (*ternary)(const tz_shape *, const uint8_t *block, const tz_tokens *, int64_t first, float *y);

    /* As `ternary`, with up to 16 rows of a table. */
    void (*table)(const tz_shape *, const uint8_t *records, int rows, const tz_tokens *, int64_t first, float *y);

    /* y [count][16], of which `rows` count -> out [.., O] in `dtype`. */
    void (*store)(const float *y, const float *bias, int rows, int count, int64_t out_stride, void *out, int dtype);

    /* What a block does between its linears (see block.h). */
    void (*normalize)(const float *x, const tz_norm *, int64_t size, float *out);
    void (*rotate)(float *head, const float *rope, int64_t size);
    void (*attend)(const tz_attention *, int64_t heads, const float *query, float *scores, float *out);
    void (*gate)(const float *up, int activation, float *out);

    /* For many tokens, in tiles of WIDE_TILE, where there is something faster; else NULL. Bytes for their activations,
     * in a form of their own (`halves`); as `prepare`; and up to WIDE_BLOCKS blocks, all tokens
     * -> y [blocks][count][16]. */
    int64_t (*many_bytes)(const tz_shape *, int64_t tokens);
    void (*prepare_many)(const tz_shape *, const void *x, int dtype, tz_tokens *, int64_t first, int64_t last);
    void (*many)(const tz_shape *, const uint8_t *weights, int blocks, const tz_tokens *, float *y);
} tz_kernels;

/* NULL where there is no such path. */
const tz_kernels *tz_find_kernels(int path);

extern const tz_kernels tz_scalar, tz_avx2, tz_avx512vnni, tz_avx512vbmi, tz_amx, tz_neon;
