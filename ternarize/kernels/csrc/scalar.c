/* Portable C: right everywhere, fast nowhere. The other paths are checked against the reference as this one is. */
#define FIELDS 4
#include "floats.h"
#include "layout.h"

typedef struct {
    int32_t lane[ROWS];
} ivec;
typedef struct {
    float lane[ROWS];
} fvec;
typedef struct {
    uint8_t byte[VECTOR_BYTES];
} quad;
typedef quad codes;

#undef ANY_COUNT
#define ANY_COUNT 1
#define EACH_LANE for (int i = 0; i < ROWS; i++)

static inline ivec i_set(int32_t value) {
    ivec out;
    EACH_LANE out.lane[i] = value;
    return out;
}
static inline ivec i_add(ivec a, ivec b) {
    EACH_LANE a.lane[i] += b.lane[i];
    return a;
}
static inline fvec f_set(float value) {
    fvec out;
    EACH_LANE out.lane[i] = value;
    return out;
}
static inline fvec f_from(ivec a) {
    fvec out;
    EACH_LANE out.lane[i] = (float)a.lane[i];
    return out;
}
static inline fvec f_mul(fvec a, fvec b) {
    EACH_LANE a.lane[i] *= b.lane[i];
    return a;
}
static inline fvec f_fma(fvec a, fvec b, fvec c) {
    EACH_LANE c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
static inline fvec f_load(const float *values) {
    fvec out;
    memcpy(out.lane, values, sizeof out.lane);
    return out;
}
static inline void f_store(float *out, fvec a) { memcpy(out, a.lane, sizeof a.lane); }
static inline float f_sum(fvec a) {
    float sum = 0;
    EACH_LANE sum += a.lane[i];
    return sum;
}
static inline fvec f_halves(const uint8_t *halves) {
    fvec out;
    EACH_LANE out.lane[i] = half_scalar(halves + HALF_BYTES * i);
    return out;
}
typedef const uint8_t *steps;
static inline steps load_steps(const uint8_t *halves) { return halves; }
static inline fvec f_steps(steps s, const uint8_t *codes) {
    fvec out;
    EACH_LANE out.lane[i] = half_scalar(s + HALF_BYTES * (codes[i % CODED_BYTES] >> 4 * (i / CODED_BYTES) & 15));
    return out;
}
static inline fvec f_bfloats(const uint8_t *halves) {
    uint16_t half[ROWS];
    fvec out;
    memcpy(half, halves, sizeof half);
    EACH_LANE out.lane[i] = from_bfloat16(half[i]);
    return out;
}

static inline codes unpack(const uint8_t *bytes) {
    codes out;
    memcpy(out.byte, bytes, VECTOR_BYTES);
    return out;
}

static inline quad field(codes c, int f, int chains) {
    (void)chains;
    for (int i = 0; i < VECTOR_BYTES; i++) c.byte[i] = c.byte[i] >> 2 * f & 3;
    return c;
}

static inline quad unpack_tail(const uint8_t *bytes) {
    quad out;
    for (int i = 0; i < VECTOR_BYTES; i++) out.byte[i] = bytes[i % TAIL_BYTES] >> 2 * (i / TAIL_BYTES) & 3;
    return out;
}

static inline ivec dot_quad(ivec sum, quad q, const int8_t *x) {
    EACH_LANE for (int j = 0; j < QUAD; j++) sum.lane[i] += q.byte[QUAD * i + j] * x[j];
    return sum;
}

static inline fvec fma_quad(fvec sum, quad q, const float *x) {
    EACH_LANE for (int j = 0; j < QUAD; j++) sum.lane[i] += (float)(q.byte[QUAD * i + j] - 1) * x[j];
    return sum;
}

typedef const int8_t *int8s;
static inline int8s load_int8(const int8_t *weights) { return weights; }
typedef ivec part;
static inline part dot_int8(int8s w, const int8_t *x) {
    part sum = i_set(0);
    for (int j = 0; j < TABLE_PIECE; j += ROWS) EACH_LANE sum.lane[i] += w[j + i] * x[j + i];
    return sum;
}

static inline quad load_six(const uint8_t *bytes) {
    quad out = unpack_tail(bytes + LOW_BYTES);
    for (int i = 0; i < LOW_BYTES; i++) {
        out.byte[i] = (uint8_t)(out.byte[i] << 4 | (bytes[i] & 15));
        out.byte[LOW_BYTES + i] = (uint8_t)(out.byte[LOW_BYTES + i] << 4 | bytes[i] >> 4);
    }
    return out;
}
static inline part dot_six(quad w, const int8_t *x, int32_t more) {
    part sum = i_set(2 * more);
    for (int j = 0; j < TABLE_PIECE; j += ROWS) EACH_LANE sum.lane[i] += w.byte[j + i] * x[j + i];
    return sum;
}
static inline fvec fma_part(fvec scale, part p, fvec sum) { return f_fma(scale, f_from(p), sum); }

static inline fvec fma_int8(const int8_t *weights, const float *x) {
    fvec sum = f_set(0);
    for (int j = 0; j < TABLE_PIECE; j += ROWS) EACH_LANE sum.lane[i] += (float)weights[j + i] * x[j + i];
    return sum;
}

#include "tile.h"

const tz_kernels tz_scalar = KERNELS("scalar", 0);
