/* The loops that all paths share. A path defines the types and primitives below, then includes this file.
 *
 *   ivec, fvec                  16 lanes of int32 and of float
 *   quad                        64 bytes: 4 columns of 16 rows, one code 0..2 a byte
 *   codes                       the FIELDS quads of one vector
 *   CHAINS(tokens)              sums kept apart where one chain of additions would have to wait for itself
 *   unpack(bytes)               64 bytes -> codes
 *   unpack_tail(bytes)          16 bytes -> quad
 *   dot_codes(sums, chains, codes *, x)    add the products with 4 FIELDS int8 activations
 *   dot_quad(sum, quad, x)                 ... with 4
 *   fma_quad(sum, quad, x)                 ... of trits with 4 floats
 *   dot_int8(weights, x)        64 int8 products, summed in any way into 16 lanes
 *   fma_int8(sum, weights, x)   16 products of int8 weights and float activations, one a lane
 *   half_scalar, and i_/f_ functions whose names say what they do
 */
#include "floats.h"
#include "kernels.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define LANES 16

/* -- activations ------------------------------------------------------------------------------------------------ */

static void read_activations(const void *x, int dtype, int64_t start, int columns, float *restrict out) {
    const uint16_t *half = (const uint16_t *)x + start;
    if (dtype == TZ_FLOAT32)
        memcpy(out, (const float *)x + start, (size_t)columns * sizeof(float));
    else if (dtype == TZ_BFLOAT16)
        for (int i = 0; i < columns; i++) out[i] = from_bfloat16(half[i]);
    else
        for (int i = 0; i < columns; i++) out[i] = from_float16(half[i]);
}

static ALWAYS_INLINE float sum_of(const float *restrict values) {
    float part[LANES] = {0}, sum = 0;
    for (int i = 0; i < PIECE; i += LANES)
        for (int j = 0; j < LANES; j++) part[j] += values[i + j];
    for (int j = 0; j < LANES; j++) sum += part[j];
    return sum;
}

static ALWAYS_INLINE float largest_of(const float *restrict values) {
    uint32_t largest = 0;                                     /* bits of |x| are ordered as |x|, and NaN is above all */
    for (int i = 0; i < PIECE; i++) {
        const uint32_t size = bits_of(values[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return float_of(largest);
}

/* Round 128 activations to int8 codes; the scale that undoes it. */
static ALWAYS_INLINE float round_codes(const float *restrict values, int8_t *restrict codes, int32_t *minus_sum) {
    const float largest = largest_of(values);
    const int usable = largest >= 0x1p-118f && largest <= 0x1.fffffep127f;
    const float inverse = usable ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < PIECE; i++) {
        const float value = usable ? values[i] * inverse : 0.0f;
        const int32_t code = (int32_t)(bits_of(value + 0x1.8p23f) - bits_of(0x1.8p23f));   /* to the nearest, even */
        codes[i] = (int8_t)code;
        sum += code;
    }
    *minus_sum = -sum;
    if (usable) return largest / 127.0f;
    return largest < 1.0f ? 0.0f : float_of(0x7fc00000);
}

static void prepare(const tz_shape *s, const void *x, int dtype, tz_tokens *t, int64_t first, int64_t last) {
    const int64_t size = dtype == TZ_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    for (int64_t token = first; token < last; token++) {
        const void *row = (const char *)x + token * s->columns * size;
        for (int64_t p = 0; p < s->pieces; p++) {
            const int64_t at = token * s->pieces + p;
            float values[PIECE] = {0};
            read_activations(row, dtype, s->piece[p].start, s->piece[p].columns, values);
            t->sum[at] = sum_of(values);
            if (t->exact) {
                memcpy(t->values + at * s->stride, values, (size_t)s->stride * sizeof(float));
            } else {
                int8_t codes[PIECE];
                t->scale[at] = round_codes(values, codes, &t->minus_sum[at]);
                memcpy(t->codes + at * s->stride, codes, (size_t)s->stride);
            }
        }
    }
}

/* -- ternary weights -------------------------------------------------------------------------------------------- */

static ALWAYS_INLINE void ternary_int8(const int count, const tz_shape *s, const uint8_t *block, const tz_tokens *t,
                                       int64_t first, float *y) {
    const int chains = CHAINS(count);
    const uint8_t *vector = block, *tail = block + s->tail_offset;
    const int64_t pieces = s->pieces, stride = s->stride;
    const int8_t *x = t->codes + first * pieces * stride;
    fvec out[TILE];
    UNROLL for (int m = 0; m < count; m++) out[m] = f_set(0);
    for (int64_t p = 0; p < pieces; p++, x += stride) {
        const int8_t *at = x;
        ivec dot[TILE][4];
        UNROLL for (int m = 0; m < count; m++) {
            dot[m][0] = i_set(t->minus_sum[(first + m) * pieces + p]);        /* codes are trits + 1 */
            UNROLL for (int c = 1; c < chains; c++) dot[m][c] = i_set(0);
        }
        for (int v = s->piece[p].vectors; v > 0; v--, vector += VECTOR_BYTES, at += QUAD * FIELDS) {
            const codes c = unpack(vector);
            UNROLL for (int m = 0; m < count; m++) dot_codes(dot[m], chains, &c, at + m * pieces * stride);
        }
        for (int v = s->piece[p].tails; v > 0; v--, tail += TAIL_BYTES, at += QUAD) {
            const quad q = unpack_tail(tail);
            UNROLL for (int m = 0; m < count; m++) dot[m][0] = dot_quad(dot[m][0], q, at + m * pieces * stride);
        }
        const fvec scale = f_halves(block + s->scale_offset + p * ROWS * HALF_BYTES);
        UNROLL for (int m = 0; m < count; m++) {
            UNROLL for (int c = 1; c < chains; c++) dot[m][0] = i_add(dot[m][0], dot[m][c]);
            const fvec sum = f_mul(f_from(dot[m][0]), f_set(t->scale[(first + m) * pieces + p]));
            out[m] = f_fma(scale, sum, out[m]);
        }
        if (s->has_shift) {
            const fvec shift = f_halves(block + s->shift_offset + p * ROWS * HALF_BYTES);
            UNROLL for (int m = 0; m < count; m++)
                out[m] = f_fma(shift, f_set(t->sum[(first + m) * pieces + p]), out[m]);
        }
    }
    UNROLL for (int m = 0; m < count; m++) f_store(y + m * ROWS, out[m]);
}

static ALWAYS_INLINE void ternary_exact(const int count, const tz_shape *s, const uint8_t *block, const tz_tokens *t,
                                        int64_t first, float *y) {
    const uint8_t *vector = block, *tail = block + s->tail_offset;
    const int64_t pieces = s->pieces, stride = s->stride;
    const float *x = t->values + first * pieces * stride;
    fvec out[TILE];
    UNROLL for (int m = 0; m < count; m++) out[m] = f_set(0);
    for (int64_t p = 0; p < pieces; p++, x += stride) {
        const float *at = x;
        fvec sum[TILE];
        UNROLL for (int m = 0; m < count; m++) sum[m] = f_set(0);
        for (int v = s->piece[p].vectors; v > 0; v--, vector += VECTOR_BYTES) {
            const codes c = unpack(vector);
            UNROLL for (int f = 0; f < FIELDS; f++, at += QUAD)
                UNROLL for (int m = 0; m < count; m++)
                    sum[m] = fma_quad(sum[m], c.field[f], at + m * pieces * stride);
        }
        for (int v = s->piece[p].tails; v > 0; v--, tail += TAIL_BYTES, at += QUAD) {
            const quad q = unpack_tail(tail);
            UNROLL for (int m = 0; m < count; m++) sum[m] = fma_quad(sum[m], q, at + m * pieces * stride);
        }
        const fvec scale = f_halves(block + s->scale_offset + p * ROWS * HALF_BYTES);
        UNROLL for (int m = 0; m < count; m++) out[m] = f_fma(scale, sum[m], out[m]);
        if (s->has_shift) {
            const fvec shift = f_halves(block + s->shift_offset + p * ROWS * HALF_BYTES);
            UNROLL for (int m = 0; m < count; m++)
                out[m] = f_fma(shift, f_set(t->sum[(first + m) * pieces + p]), out[m]);
        }
    }
    UNROLL for (int m = 0; m < count; m++) f_store(y + m * ROWS, out[m]);
}

/* -- int8 tables ------------------------------------------------------------------------------------------------ */

/* 64 weights of a row, or the last `left` of them and zeros: nothing behind a table's end is read. */
static ALWAYS_INLINE const int8_t *whole_vector(const int8_t *weights, int64_t left, int8_t *room) {
    if (left >= VECTOR_BYTES) return weights;
    memset(room, 0, VECTOR_BYTES);
    memcpy(room, weights, (size_t)left);
    return room;
}

static ALWAYS_INLINE void int8_row(const int count, const tz_shape *s, const uint8_t *record, const tz_tokens *t,
                                   int64_t first, float *y) {
    const int64_t pieces = s->pieces, stride = s->stride;
    const uint8_t *scales = record + s->columns;
    fvec out[TILE];
    UNROLL for (int m = 0; m < count; m++) out[m] = f_set(0);
    for (int64_t p = 0; p < pieces; p++) {
        const tz_piece *piece = &s->piece[p];
        const float scale = half_scalar(scales + piece->group * HALF_BYTES);
        for (int i = 0; i < piece->columns; i += VECTOR_BYTES) {
            int8_t room[VECTOR_BYTES];
            const int8_t *weights = (const int8_t *)record + piece->start + i;
            weights = whole_vector(weights, piece->columns - i, room);
            UNROLL for (int m = 0; m < count; m++) {
                const int64_t token = (first + m) * pieces + p;
                if (t->exact) {
                    fvec sum = f_set(0);
                    for (int j = 0; j < VECTOR_BYTES; j += LANES)
                        sum = fma_int8(sum, weights + j, t->values + token * stride + i + j);
                    out[m] = f_fma(f_set(scale), sum, out[m]);
                } else {
                    const ivec dot = dot_int8(weights, t->codes + token * stride + i);
                    out[m] = f_fma(f_set(scale * t->scale[token]), f_from(dot), out[m]);
                }
            }
        }
    }
    UNROLL for (int m = 0; m < count; m++) y[m * ROWS] = f_sum(out[m]);
}

/* -- one call for each number of tokens, so that all sums stay in registers --------------------------------------- */

#define EACH_COUNT(call)        \
    switch (count) {            \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        case 4: call(4); break; \
        case 5: call(5); break; \
        case 6: call(6); break; \
        case 7: call(7); break; \
        default: call(8);       \
    }

static void ternary(const tz_shape *s, const uint8_t *block, const tz_tokens *t, int64_t first, int count, float *y) {
#define EXACT(n) ternary_exact(n, s, block, t, first, y)
#define INT8(n) ternary_int8(n, s, block, t, first, y)
    if (t->exact)
        EACH_COUNT(EXACT)
    else
        EACH_COUNT(INT8)
#undef EXACT
#undef INT8
}

static void int8(const tz_shape *s, const uint8_t *records, int rows, const tz_tokens *t, int64_t first, int count,
                 float *y) {
#define ROW(n) int8_row(n, s, records + r * s->record_bytes, t, first, y + r)
    for (int r = 0; r < rows; r++) EACH_COUNT(ROW)
#undef ROW
}

static void store(const float *y, const float *bias, int rows, int count, int64_t out_stride, void *out, int dtype) {
    for (int m = 0; m < count; m++) {
        float value[ROWS];
        uint16_t half[ROWS];
        for (int r = 0; r < ROWS; r++) value[r] = y[m * ROWS + r];
        if (bias)
            for (int r = 0; r < rows; r++) value[r] += bias[r];
        if (dtype == TZ_FLOAT32) {
            memcpy((float *)out + m * out_stride, value, (size_t)rows * sizeof(float));
            continue;
        }
        for (int r = 0; r < ROWS; r++) half[r] = dtype == TZ_BFLOAT16 ? to_bfloat16(value[r]) : to_float16(value[r]);
        memcpy((uint16_t *)out + m * out_stride, half, (size_t)rows * sizeof(uint16_t));
    }
}

#define KERNELS(path, five) {path, five, prepare, ternary, int8, store}
