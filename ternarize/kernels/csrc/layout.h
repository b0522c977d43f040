/* How weights and activations lie in memory. Shared by all paths.
 *
 * A row's groups are cut into pieces of at most 128 columns. A piece has one scale and shift of the weight (its
 * group's) and one scale of the activations; sums are exact integers inside it and floats between pieces.
 *
 * A ternary weight is a sequence of blocks of 16 rows (the last is filled up with rows of zeros). A block:
 *
 *   vectors  of all pieces, 64 bytes each     columns in quads: byte 4 r + j holds row r, column 4 i + j of a quad i
 *              2 bits:       4 quads a byte   code0 + 4 code1 + 16 code2 + 64 code3
 *              five a byte:  5 quads a byte   code0 + 3 code1 + 9 code2 + 27 code3 + 81 code4
 *   tails    of all pieces, 16 bytes a quad   what no vector is full of; 2 bits: bits 2 f of byte 4 i + j hold
 *                                             row 4 f + i, column j
 *   scales   fp16 [pieces][16]
 *   shifts   fp16 [pieces][16], where there are any
 *
 * with code = trit + 1. Columns behind a piece's end meet activations that are 0. */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { ROWS = 16, QUAD = 4, PIECE = 128, VECTOR_BYTES = 64, TAIL_BYTES = 16, HALF_BYTES = 2 };

typedef struct {
    int64_t start;            /* first column */
    int64_t group;            /* whose scale and shift it has */
    int columns;              /* 1 .. 128 */
    int vectors, tails;       /* of a ternary block */
} tz_piece;

struct tz_shape {
    int path;
    int has_shift;
    int64_t rows, columns, groups, pieces;
    int64_t width;            /* columns of a vector: 16 with 2 bits, 20 with five trits a byte */
    int64_t stride;           /* activations of a piece, with its filling */
    int64_t tail_offset, scale_offset, shift_offset, block_bytes;
    int64_t record_bytes;     /* of an int8 row */
    tz_piece piece[];
};

/* Activations of some tokens, as kernels read them. */
typedef struct {
    int exact;
    int64_t count;
    int8_t *codes;            /* [count][pieces][stride], int8 activations */
    float *values;            /* [count][pieces][stride], float activations (exact) */
    float *scale;             /* [count][pieces], of the codes; NaN where an activation is not finite */
    int32_t *minus_sum;       /* [count][pieces], minus the sum of the codes */
    float *sum;               /* [count][pieces], of the activations themselves */
} tz_tokens;

typedef struct tz_shape tz_shape;

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
