/* The loops that all paths share. A path defines the types and primitives below, then includes this file.
 *
 *   ivec, fvec                  16 lanes of int32 and of float
 *   quad                        64 bytes: 4 columns of 16 rows, one code 0..2 a byte
 *   codes                       a vector, as far unpacked as its FIELDS quads share the work
 *   AT_ONCE                     tokens of a tile whose sums a path has registers for, 4 or 8; 8 if undefined
 *   CHAINS(tokens)              into how many sums a path adds, where one would have to wait for itself; 1 if undefined
 *   unpack(bytes)               64 bytes -> codes
 *   field(codes, f, chains)     one of its quads; with several chains a path may leave it multiplied by
 *   join(sums, chains)          ... what this divides by: one sum of several; comes with CHAINS, as does
 *   start(minus_sum)            ... what a piece's first sum begins with, in the form that join takes
 *   unpack_tail(bytes)          16 bytes -> quad
 *   dot_quad(sum, quad, x)      add the products with 4 int8 activations
 *   fma_quad(sum, quad, x)      ... of trits with 4 floats
 *   int8s, load_int8(weights)   64 int8 weights
 *   load_six(bytes)             48 bytes -> quad: 64 codes of 6 bits, in order
 *   part                        int32 lanes, as many as suit the path
 *   dot_int8(int8s, x)          64 products with int8 activations, summed in any way -> part
 *   dot_six(quad, x, more)      the same of codes of 6 bits, and 32 times `more`
 *   fma_part(scale, part, sum)  add the lanes times scale
 *   fma_int8(weights, x)        64 products with float activations, summed in any way into 16 lanes
 *   steps, load_steps(halves)   16 scales in fp16
 *   f_steps(steps, codes)       ... those that 16 codes of 4 bits name
 *   i_/f_ functions whose names say what they do
 */
#include "floats.h"
#include "kernels.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#if ANY_COUNT
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#ifndef AT_ONCE
#define AT_ONCE 8
#endif
#ifndef CHAINS
#define CHAINS(tokens) 1
static inline ivec start(int32_t minus_sum) { return i_set(minus_sum); }
static inline ivec join(const ivec *sums, int chains) {
    (void)chains;
    return *sums;
}
#endif

enum { LANES = 16, CACHE_LINE = 64 };
enum { AHEAD = 6144, TABLE_AHEAD = 3072 };                     /* bytes before their use that a matrix's are asked for */

/* -- activations ------------------------------------------------------------------------------------------------ */

static ALWAYS_INLINE void read_activations(const void *x, int dtype, int64_t start, int columns, float *restrict out) {
    const uint16_t *half = (const uint16_t *)x + start;
    if (dtype == TZ_FLOAT32)
        memcpy(out, (const float *)x + start, (size_t)columns * sizeof(float));
    else if (dtype == TZ_BFLOAT16)
        for (int i = 0; i < columns; i++) out[i] = from_bfloat16(half[i]);
    else
        for (int i = 0; i < columns; i++) out[i] = from_float16(half[i]);
}

static ALWAYS_INLINE float sum_of(const float *values, int64_t count) {
    fvec lanes = f_set(0);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) lanes = f_fma(f_load(values + i), f_set(1), lanes);
    float sum = f_sum(lanes);
    for (; i < count; i++) sum += values[i];
    return sum;
}

static ALWAYS_INLINE float largest_of(const int count, const float *restrict values) {
    uint32_t largest = 0;                                     /* bits of |x| are ordered as |x|, and NaN is above all */
    for (int i = 0; i < count; i++) {
        const uint32_t size = bits_of(values[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return float_of(largest);
}

/* Round activations to int8 codes; the scale that undoes it. */
static ALWAYS_INLINE float round_codes(const int count, const float *restrict values, int8_t *restrict codes,
                                       int32_t *minus_sum) {
    const float largest = largest_of(count, values);
    const int usable = largest >= 0x1p-118f && largest <= 0x1.fffffep127f;
    const float inverse = usable ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < count; i++) {
        const float value = usable ? values[i] * inverse : 0.0f;
        const int32_t code = (int32_t)(bits_of(value + 0x1.8p23f) - bits_of(0x1.8p23f));   /* to the nearest, even */
        codes[i] = (int8_t)code;
        sum += code;
    }
    *minus_sum = -sum;
    if (usable) return largest / 127.0f;
    return largest < 1.0f ? 0.0f : float_of(0x7fc00000);
}

/* A piece of a token's row, at `place`; `count` is at least the stride, and what lies behind the piece is 0. */
static ALWAYS_INLINE void prepare_piece(const int count, const tz_shape *s, const void *row, int dtype,
                                        const tz_piece *piece, const tz_tokens *t, int64_t place) {
    float room[PIECE];
    const float *values = room;
    if (piece->columns < count) {
        read_activations(row, dtype, piece->start, piece->columns, room);
        memset(room + piece->columns, 0, (size_t)(count - piece->columns) * sizeof *room);
    } else if (dtype == TZ_FLOAT32) {                         /* where they lie: to copy them takes as long as the rest */
        values = (const float *)row + piece->start;
    } else {
        read_activations(row, dtype, piece->start, count, room);
    }
    t->sum[place] = sum_of(values, count);
    if (t->exact) {
        memcpy(t->values + place * s->stride, values, (size_t)s->stride * sizeof(float));
    } else {
        int8_t codes[PIECE], *out = t->codes + place * s->stride;
        t->scale[place] = round_codes(count, values, s->stride == count ? out : codes, &t->minus_sum[place]);
        if (s->stride != count) memcpy(out, codes, (size_t)s->stride);
    }
}

/* Loops of a known length are twice as fast. */
static void prepare(const tz_shape *s, const void *x, int dtype, tz_tokens *t, int64_t first, int64_t last) {
    const int64_t size = tz_element(dtype);
    for (int64_t token = first; token < last; token++) {
        const void *row = (const char *)x + token * s->columns * size;
        const int64_t begin = token / t->tile * t->tile;
        for (int64_t p = 0; p < s->pieces; p++) {
            const int64_t place = tz_place(s, begin, tz_tile(t, begin), p) + token - begin;
            if (s->stride <= PIECE / 4)
                prepare_piece(PIECE / 4, s, row, dtype, &s->piece[p], t, place);
            else if (s->stride <= PIECE / 2)
                prepare_piece(PIECE / 2, s, row, dtype, &s->piece[p], t, place);
            else
                prepare_piece(PIECE, s, row, dtype, &s->piece[p], t, place);
        }
    }
}

/* -- ternary weights -------------------------------------------------------------------------------------------- */

/* A matrix is read once, in order, from memory: ask for what comes next, also across blocks. */
static ALWAYS_INLINE void prefetch(const uint8_t *next, int bytes) {
    for (int b = 0; b < bytes; b += CACHE_LINE) __builtin_prefetch(next + b);
}

/* Scales of a piece, whose levels lie at w; the factors of coded ones are left out. */
static ALWAYS_INLINE fvec read_scales(const int coded, const uint8_t *block, const uint8_t *w) {
    return coded ? f_steps(load_steps(block + FACTOR_BYTES), w) : f_halves(w);
}

/* Add a piece's sums, times scale, and its activations' sums, times shift; where the levels at w end. */
static ALWAYS_INLINE const uint8_t *add_levels(const int count, const int coded, const tz_shape *s,
                                               const uint8_t *block, const uint8_t *w, const fvec *sum,
                                               const float *activations, fvec *out) {
    const fvec scale = read_scales(coded, block, w);
    UNROLL for (int m = 0; m < count; m++) out[m] = f_fma(scale, sum[m], out[m]);
    if (coded) return w + CODED_BYTES;
    w += LEVEL_BYTES;
    if (s->levels == TZ_SCALES_AND_SHIFTS) {
        const fvec shift = f_halves(w);
        w += LEVEL_BYTES;
        UNROLL for (int m = 0; m < count; m++) out[m] = f_fma(shift, f_set(activations[m]), out[m]);
    }
    return w;
}

/* The sums of all pieces -> y [count][16]. */
static ALWAYS_INLINE void finish(const int count, const int coded, const uint8_t *block, const fvec *out, float *y) {
    UNROLL for (int m = 0; m < count; m++)
        f_store(y + m * ROWS, coded ? f_mul(f_load((const float *)block), out[m]) : out[m]);
}

/* Add a vector's products with `count` tokens, which are `stride` apart. */
static ALWAYS_INLINE void add_vector(const int count, const int chains, int64_t stride, const uint8_t *w,
                                     const int8_t *x, ivec (*dot)[4]) {
    const codes c = unpack(w);
    UNROLL for (int f = 0; f < FIELDS; f++, x += QUAD) {
        const quad q = field(c, f, chains);
        UNROLL for (int m = 0; m < count; m++)
            dot[m][f % chains] = dot_quad(dot[m][f % chains], q, x + m * stride);
    }
}

/* `count` tokens, whose first place is `at`, of a tile of `tile`; pieces of `vectors` and no tails, if it is not 0. */
static ALWAYS_INLINE void ternary_int8(const int count, const int coded, const int vectors, const tz_shape *s,
                                       const uint8_t *block, const tz_tokens *t, int64_t at, int tile, float *y) {
    const int chains = CHAINS(count);
    const int64_t stride = s->stride;
    const uint8_t *w = block + s->head_bytes;
    fvec out[AT_ONCE];
    UNROLL for (int m = 0; m < count; m++) out[m] = f_set(0);
    for (int64_t p = 0; p < s->pieces; p++, at += tile) {
        const int8_t *x = t->codes + at * stride;
        prefetch(w + AHEAD, s->piece[p].bytes);
        ivec dot[AT_ONCE][4];
        UNROLL for (int m = 0; m < count; m++) {
            dot[m][0] = start(t->minus_sum[at + m]);        /* codes are trits + 1 */
            UNROLL for (int c = 1; c < chains; c++) dot[m][c] = i_set(0);
        }
        UNROLL for (int v = 0; v < vectors; v++, w += VECTOR_BYTES, x += FIELDS * QUAD)
            add_vector(count, chains, stride, w, x, dot);
        for (int v = vectors ? 0 : s->piece[p].vectors; v > 0; v--, w += VECTOR_BYTES, x += FIELDS * QUAD)
            add_vector(count, chains, stride, w, x, dot);
        for (int v = vectors ? 0 : s->piece[p].tails; v > 0; v--, w += TAIL_BYTES, x += QUAD) {
            const quad q = unpack_tail(w);
            UNROLL for (int m = 0; m < count; m++) dot[m][0] = dot_quad(dot[m][0], q, x + m * stride);
        }
        fvec sum[AT_ONCE];
        UNROLL for (int m = 0; m < count; m++)
            sum[m] = f_mul(f_from(join(dot[m], chains)), f_set(t->scale[at + m]));
        w = add_levels(count, coded, s, block, w, sum, t->sum + at, out);
    }
    finish(count, coded, block, out, y);
}

static ALWAYS_INLINE void ternary_exact(const int count, const int coded, const tz_shape *s, const uint8_t *block,
                                        const tz_tokens *t, int64_t at, int tile, float *y) {
    const int64_t stride = s->stride;
    const uint8_t *w = block + s->head_bytes;
    fvec out[AT_ONCE];
    UNROLL for (int m = 0; m < count; m++) out[m] = f_set(0);
    for (int64_t p = 0; p < s->pieces; p++, at += tile) {
        const float *x = t->values + at * stride;
        prefetch(w + AHEAD, s->piece[p].bytes);
        fvec sum[AT_ONCE];
        UNROLL for (int m = 0; m < count; m++) sum[m] = f_set(0);
        for (int v = s->piece[p].vectors; v > 0; v--, w += VECTOR_BYTES) {
            const codes c = unpack(w);
            UNROLL for (int f = 0; f < FIELDS; f++, x += QUAD) {
                const quad q = field(c, f, 1);
                UNROLL for (int m = 0; m < count; m++) sum[m] = fma_quad(sum[m], q, x + m * stride);
            }
        }
        for (int v = s->piece[p].tails; v > 0; v--, w += TAIL_BYTES, x += QUAD) {
            const quad q = unpack_tail(w);
            UNROLL for (int m = 0; m < count; m++) sum[m] = fma_quad(sum[m], q, x + m * stride);
        }
        w = add_levels(count, coded, s, block, w, sum, t->sum + at, out);
    }
    finish(count, coded, block, out, y);
}

/* -- tables ------------------------------------------------------------------------------------------------------ */

enum { SIX_BIAS = 32 };                                        /* of codes of 6 bits */

/* A piece's weights, filled up with zeros to 64: nothing behind a table's end is read. */
static ALWAYS_INLINE const int8_t *whole_vector(const int8_t *weights, int columns, int8_t *room) {
    if (columns == TABLE_PIECE) return weights;
    memset(room, 0, TABLE_PIECE);
    memcpy(room, weights, (size_t)columns);
    return room;
}

/* 48 bytes -> 64 weights. */
static ALWAYS_INLINE void read_six(const uint8_t *restrict bytes, int8_t *restrict out) {
    for (int i = 0; i < LOW_BYTES; i++) {
        out[i] = bytes[i] & 15;
        out[LOW_BYTES + i] = (int8_t)(bytes[i] >> 4);
    }
    for (int f = 0; f < TABLE_PIECE / TAIL_BYTES; f++)
        for (int i = 0; i < TAIL_BYTES; i++) {
            const int high = bytes[LOW_BYTES + i] >> 2 * f & 3;
            out[TAIL_BYTES * f + i] = (int8_t)((out[TAIL_BYTES * f + i] | high << 4) - SIX_BIAS);
        }
}

static ALWAYS_INLINE void table_exact(const int count, const tz_shape *s, const tz_piece *piece, const uint8_t *codes,
                                      fvec scale, const float *x, fvec *out) {
    int8_t room[TABLE_PIECE];
    const int8_t *weights = room;
    if (s->bits == 6)
        read_six(codes, room);
    else
        weights = whole_vector((const int8_t *)codes, piece->columns, room);
    UNROLL for (int m = 0; m < count; m++) out[m] = f_fma(scale, fma_int8(weights, x + m * TABLE_PIECE), out[m]);
}

/* One piece of a row and of a token. */
static ALWAYS_INLINE fvec table_int8(const int six, const uint8_t *codes, int columns, fvec scale, const int8_t *x,
                                     int32_t minus_sum, fvec out) {
    int8_t room[TABLE_PIECE];
    if (six) return fma_part(scale, dot_six(load_six(codes), x, minus_sum), out);
    return fma_part(scale, dot_int8(load_int8(whole_vector((const int8_t *)codes, columns, room)), x), out);
}

static ALWAYS_INLINE void table_row(const int count, const int exact, const tz_shape *s, const uint8_t *record,
                                    const tz_tokens *t, int64_t first, float *y) {
    const int six = s->bits == 6;
    const uint8_t *codes = record;
    fvec out[TILE];
    UNROLL for (int m = 0; m < count; m++) out[m] = f_set(0);
    for (int64_t p = 0; p < s->pieces; p++, codes += six ? SIX_BYTES : TABLE_PIECE) {
        const tz_piece *piece = &s->piece[p];
        const int64_t at = tz_place(s, first, count, p);
        const fvec scale = f_set(half_scalar(record + s->code_bytes + piece->group * HALF_BYTES));
        if (!six) codes = record + piece->start;
        prefetch(codes + TABLE_AHEAD, TABLE_PIECE);
        if (exact)
            table_exact(count, s, piece, codes, scale, t->values + at * TABLE_PIECE, out);
        else
            UNROLL for (int m = 0; m < count; m++)
                out[m] = table_int8(six, codes, piece->columns, f_mul(scale, f_set(t->scale[at + m])),
                                    t->codes + (at + m) * TABLE_PIECE, t->minus_sum[at + m], out[m]);
    }
    UNROLL for (int m = 0; m < count; m++) y[m * ROWS] = f_sum(out[m]);
}

/* One row and one token with int8 activations; all pieces have 64 columns. */
static ALWAYS_INLINE float table_whole(const int six, const tz_shape *s, const uint8_t *record, const tz_tokens *t,
                                       int64_t first) {
    const int bytes = six ? SIX_BYTES : TABLE_PIECE;
    const int64_t places = first * s->pieces;
    const uint8_t *halves = record + s->code_bytes;
    const int8_t *x = t->codes + places * TABLE_PIECE;
    fvec out = f_set(0);
    for (int64_t p = 0; p < s->pieces; p++, x += TABLE_PIECE, record += bytes) {
        const float scale = half_scalar(halves + s->piece[p].group * HALF_BYTES) * t->scale[places + p];
        prefetch(record + TABLE_AHEAD, bytes);
        out = table_int8(six, record, TABLE_PIECE, f_set(scale), x, t->minus_sum[places + p], out);
    }
    prefetch(record + TABLE_AHEAD, (int)(s->record_bytes - s->code_bytes));
    return f_sum(out);
}

/* -- one function for each number of tokens, so that all sums stay in registers; or one for all (ANY_COUNT) -------- */

#if ANY_COUNT
#define UP_TO_4(call) call(count);
#define UP_TO_8(call) call(count);
#else
#define UP_TO_4(call)           \
    switch (count) {            \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        default: call(4);       \
    }
#define UP_TO_8(call)           \
    switch (count) {            \
        case 5: call(5); break; \
        case 6: call(6); break; \
        case 7: call(7); break; \
        case 8: call(8); break; \
        default: UP_TO_4(call)  \
    }
#endif
#if AT_ONCE == 4
#define UP_TO_AT_ONCE UP_TO_4
#else
#define UP_TO_AT_ONCE UP_TO_8
#endif

static void ternary(const tz_shape *s, const uint8_t *block, const tz_tokens *t, int64_t first, float *y) {
    const int tile = tz_tile(t, first), coded = s->levels == TZ_CODED_SCALES;
    for (int m = 0; m < tile; m += AT_ONCE) {
        const int count = tile - m < AT_ONCE ? tile - m : AT_ONCE;
        const int64_t at = tz_place(s, first, tile, 0) + m;
#define EXACT(n) ternary_exact(n, coded, s, block, t, at, tile, y + m * ROWS)
#define RECIPES(n) ternary_int8(n, 1, 2, s, block, t, at, tile, y + m * ROWS)   /* groups of 32 have two vectors */
#define CODED(n) ternary_int8(n, 1, 0, s, block, t, at, tile, y + m * ROWS)
#define INT8(n) ternary_int8(n, 0, 0, s, block, t, at, tile, y + m * ROWS)
        if (t->exact)
            UP_TO_AT_ONCE(EXACT)
        else if (coded && s->vectors == 2)
            UP_TO_AT_ONCE(RECIPES)
        else if (coded)
            UP_TO_AT_ONCE(CODED)
        else
            UP_TO_AT_ONCE(INT8)
#undef EXACT
#undef RECIPES
#undef CODED
#undef INT8
    }
}

static void table(const tz_shape *s, const uint8_t *records, int rows, const tz_tokens *t, int64_t first, float *y) {
    const int count = tz_tile(t, first);
#define EXACT(n) table_row(n, 1, s, records + r * s->record_bytes, t, first, y + r)
#define INT8(n) table_row(n, 0, s, records + r * s->record_bytes, t, first, y + r)
    const int whole = count == 1 && !t->exact && s->whole;
    for (int r = 0; r < rows; r++) {
        if (whole && s->bits == 6)
            y[r] = table_whole(1, s, records + r * s->record_bytes, t, first);
        else if (whole)
            y[r] = table_whole(0, s, records + r * s->record_bytes, t, first);
        else if (t->exact)
            UP_TO_8(EXACT)
        else
            UP_TO_8(INT8)
    }
#undef EXACT
#undef INT8
}

static void store(const float *y, const float *bias, int rows, int count, int64_t out_stride, void *out, int dtype) {
    float added[ROWS] = {0};
    if (bias) memcpy(added, bias, (size_t)rows * sizeof *added);
    for (int m = 0; m < count; m++) {
        const fvec sum = f_fma(f_set(1), f_load(y + m * ROWS), f_load(added));
        if (dtype == TZ_FLOAT32 && rows == ROWS) {
            f_store((float *)out + m * out_stride, sum);
            continue;
        }
        float value[ROWS];
        uint16_t half[ROWS];
        f_store(value, sum);
        if (dtype == TZ_FLOAT32) {
            memcpy((float *)out + m * out_stride, value, (size_t)rows * sizeof *value);
            continue;
        }
        for (int r = 0; r < ROWS; r++) half[r] = dtype == TZ_BFLOAT16 ? to_bfloat16(value[r]) : to_float16(value[r]);
        memcpy((uint16_t *)out + m * out_stride, half, (size_t)rows * sizeof(uint16_t));
    }
}

#include "block.h"

#define KERNELS_WITH(path, five, ...) \
    {path, five, prepare, ternary, table, store, normalize, rotate, attend, gate, __VA_ARGS__}
#define KERNELS(path, five) KERNELS_WITH(path, five, NULL, NULL, NULL)
