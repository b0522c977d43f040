/* How weights and activations lie in memory. Shared by all paths.
 *
 * A row's groups are cut into pieces of at most 128 columns (64 in tables). A piece has one scale and shift of the
 * weight (its group's) and one scale of the activations; sums are exact integers inside it, floats between pieces.
 *
 * A ternary weight is a sequence of blocks of 16 rows (the last is filled up with rows of zeros). A block:
 *
 *   factors    float [16]                   of the rows, and
 *   steps      fp16 [16]                    of the weight, where scales are coded
 *   for each piece
 *     vectors  64 bytes each                  columns in quads: byte 4 r + j holds row r, column 4 i + j of a quad i
 *                2 bits:       4 quads a byte   code0 + 4 code1 + 16 code2 + 64 code3
 *                five a byte:  5 quads a byte   code0 + 3 code1 + 9 code2 + 27 code3 + 81 code4
 *     tails    16 bytes a quad                what no vector is full of, 2 bits: bits 2 f of byte 4 i + j hold
 *                                             row 4 f + i, column j
 *     scales   fp16 [16]; or 4 bits each: byte i holds rows i (low) and 8 + i, scale = factor of its row * steps[code]
 *     shifts   fp16 [16], where there are any
 *
 * with code = trit + 1. Columns behind a piece's end meet activations that are 0.
 *
 * A table's row is a record, the same as in the file: codes of 8 or 6 bits, then scales fp16 [G]. 64 columns in 6 bits,
 * with code = weight + 32:
 *
 *   lows     32 bytes                       byte i holds the lower 4 bits of columns i and 32 + i
 *   highs    16 bytes                       bits 2 f of byte i hold the upper 2 bits of column 16 f + i, as in a tail */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ternarize.h"

enum { TOGETHER = 4 };        /* heads that share keys, which a path reads once for all of them */
enum { ROWS = 16, QUAD = 4, PIECE = 128, TABLE_PIECE = 64, HEAD_SIZE = 512 };
enum { VECTOR_BYTES = 64, TAIL_BYTES = 16, HALF_BYTES = 2, LOW_BYTES = 32, SIX_BYTES = 48 };
enum { FACTOR_BYTES = 64, LEVEL_BYTES = 32, CODED_BYTES = 8 };

typedef struct {
    int64_t start;            /* first column */
    int64_t group;            /* whose scale and shift it has */
    int columns;
    int vectors, tails;       /* of a ternary block */
    int bytes;                /* of a ternary block, scales and shifts too */
} tz_piece;

struct tz_shape {
    int path;
    int levels;               /* of a ternary weight: enum tz_levels */
    int64_t rows, columns, group, groups, pieces;
    int64_t width;            /* columns of a vector: 16 with 2 bits, 20 with five trits a byte */
    int64_t stride;           /* activations of a piece, with its filling */
    int vectors;              /* of all pieces of a ternary weight, if they are alike and have no tails; or 0 */
    int64_t block_bytes;      /* of a ternary weight */
    int64_t head_bytes;       /* ... of them before the first piece */
    int bits;                 /* of a table's codes: 8 or 6 */
    int whole;                /* whether all pieces of a table have 64 columns */
    int64_t code_bytes;       /* of a table's row */
    int64_t record_bytes;     /* ... and its scales */
    tz_piece piece[];
};

/* Activations of some tokens, as kernels read them: tiles of up to `tile` tokens, in each the pieces, in each its
 * tokens, one place each (see tz_place). */
enum { TILE = 8, WIDE_TILE = 16, WIDE_BLOCKS = 2 };

typedef struct {
    int exact;
    int tile;                 /* TILE, or WIDE_TILE for a kernel of many tokens, which has `halves` and nothing else */
    int64_t count;
    int8_t *codes;            /* [places][stride], int8 activations */
    float *values;            /* [places][stride], float activations (exact) */
    uint16_t *halves;         /* activations for a kernel of many tokens, which knows their order */
    float *scale;             /* [places], of the codes; NaN where an activation is not finite */
    int32_t *minus_sum;       /* [places], minus the sum of the codes */
    float *sum;               /* [places], of the activations themselves */
} tz_tokens;

/* Bytes of an element of `dtype` (enum tz_dtype). */
static inline int64_t tz_element(int dtype) { return dtype == TZ_FLOAT32 ? sizeof(float) : sizeof(uint16_t); }

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

/* Bytes of a piece's scales and shifts. */
static inline int tz_level_bytes(const tz_shape *s) {
    if (s->levels == TZ_CODED_SCALES) return CODED_BYTES;
    return s->levels == TZ_SCALES_AND_SHIFTS ? 2 * LEVEL_BYTES : LEVEL_BYTES;
}

/* Tokens in the tile that begins with token `first`. */
static inline int tz_tile(const tz_tokens *t, int64_t first) {
    return (int)(t->count - first < t->tile ? t->count - first : t->tile);
}

/* Bytes for all that `t` points to, and where each begins; kernels are faster where `room` is a multiple of 64. */
static inline size_t tz_tokens_bytes(const tz_shape *s, const tz_tokens *t) {
    const size_t pieces = (size_t)(t->count * s->pieces), all = pieces * (size_t)s->stride;
    return 3 * pieces * sizeof(float) + all * (t->exact ? sizeof(float) : 1);
}

static inline void tz_place_tokens(const tz_shape *s, tz_tokens *t, void *room) {
    const size_t pieces = (size_t)(t->count * s->pieces), all = pieces * (size_t)s->stride;
    t->codes = room;
    t->values = room;
    t->halves = room;
    t->sum = (float *)((char *)room + all * (t->exact ? sizeof(float) : 1));
    t->scale = t->sum + pieces;
    t->minus_sum = (int32_t *)(t->scale + pieces);
}

/* The place of the first of `count` tokens of a tile in a piece; the others follow. */
static inline int64_t tz_place(const tz_shape *s, int64_t first, int count, int64_t piece) {
    return first * s->pieces + piece * count;
}
