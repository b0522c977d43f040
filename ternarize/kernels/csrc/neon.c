/* NEON with the dot product of Armv8.2: 2-bit codes, four registers of four rows. */
#define FIELDS 4
#include <arm_neon.h>

#include "floats.h"
#include "layout.h"

typedef int32x4x4_t ivec;
typedef float32x4x4_t fvec;
typedef int8x16x4_t quad;
typedef uint8x16x4_t codes;

#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)

static inline ivec i_set(int32_t value) {
    const int32x4_t all = vdupq_n_s32(value);
    return (ivec){{all, all, all, all}};
}
static inline ivec i_add(ivec a, ivec b) {
    EACH a.val[i] = vaddq_s32(a.val[i], b.val[i]);
    return a;
}
static inline fvec f_set(float value) {
    const float32x4_t all = vdupq_n_f32(value);
    return (fvec){{all, all, all, all}};
}
static inline fvec f_from(ivec a) {
    fvec out;
    EACH out.val[i] = vcvtq_f32_s32(a.val[i]);
    return out;
}
static inline fvec f_mul(fvec a, fvec b) {
    EACH a.val[i] = vmulq_f32(a.val[i], b.val[i]);
    return a;
}
static inline fvec f_fma(fvec a, fvec b, fvec c) {
    EACH c.val[i] = vfmaq_f32(c.val[i], a.val[i], b.val[i]);
    return c;
}
static inline fvec f_load(const float *values) { return vld1q_f32_x4(values); }
static inline void f_store(float *out, fvec a) { EACH vst1q_f32(out + 4 * i, a.val[i]); }
static inline float f_sum(fvec a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.val[0], a.val[1]), vaddq_f32(a.val[2], a.val[3])));
}
static inline fvec f_halves(const uint8_t *halves) {
    fvec out;
    EACH out.val[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves + 8 * i)));
    return out;
}
typedef uint8x16x2_t steps;
static inline steps load_steps(const uint8_t *halves) { return vld2q_u8(halves); }
static inline fvec f_steps(steps s, const uint8_t *codes) {
    const uint8x8_t both = vld1_u8(codes);
    const uint8x16_t code = vcombine_u8(vand_u8(both, vdup_n_u8(15)), vshr_n_u8(both, 4));
    uint8_t halves[LEVEL_BYTES];
    vst2q_u8(halves, (uint8x16x2_t){{vqtbl1q_u8(s.val[0], code), vqtbl1q_u8(s.val[1], code)}});
    return f_halves(halves);
}
static inline fvec f_bfloats(const uint8_t *halves) {
    fvec out;
    EACH out.val[i] = vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(halves + 8 * i)), 16));
    return out;
}

static inline int8x16_t two_bits(uint8x16_t bytes) { return vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(3))); }

static inline codes unpack(const uint8_t *bytes) { return vld1q_u8_x4(bytes); }

static inline quad field(codes c, int f, int chains) {
    (void)chains;
    quad out;
    EACH out.val[i] = two_bits(vshlq_u8(c.val[i], vdupq_n_s8((int8_t)(-2 * f))));
    return out;
}

static inline quad unpack_tail(const uint8_t *bytes) {
    const uint8x16_t all = vld1q_u8(bytes);
    return (quad){
        {two_bits(all), two_bits(vshrq_n_u8(all, 2)), two_bits(vshrq_n_u8(all, 4)), two_bits(vshrq_n_u8(all, 6))}};
}

static inline ivec dot_quad(ivec sum, quad q, const int8_t *x) {
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(bits));
    EACH sum.val[i] = vdotq_s32(sum.val[i], q.val[i], a);
    return sum;
}

static inline float32x4_t trits_of(int8x16_t q, int column) {
    const int32x4_t moved = vshlq_s32(vreinterpretq_s32_s8(q), vdupq_n_s32(-8 * column));
    return vcvtq_f32_s32(vsubq_s32(vandq_s32(moved, vdupq_n_s32(3)), vdupq_n_s32(1)));
}

static inline fvec fma_quad(fvec sum, quad q, const float *x) {
    for (int j = 0; j < QUAD; j++)
        EACH sum.val[i] = vfmaq_n_f32(sum.val[i], trits_of(q.val[i], j), x[j]);
    return sum;
}

typedef int8x16x4_t int8s;
static inline int8s load_int8(const int8_t *weights) { return vld1q_s8_x4(weights); }
typedef int32x4_t part;
static inline part dot_int8(int8s w, const int8_t *x) {
    part sum = vdupq_n_s32(0);
    EACH sum = vdotq_s32(sum, w.val[i], vld1q_s8(x + 16 * i));
    return sum;
}

static inline quad load_six(const uint8_t *bytes) {
    const uint8x16_t first = vld1q_u8(bytes), second = vld1q_u8(bytes + 16), nibble = vdupq_n_u8(15);
    const uint8x16_t low[4] = {vandq_u8(first, nibble), vandq_u8(second, nibble), vshrq_n_u8(first, 4),
                               vshrq_n_u8(second, 4)};
    quad out = unpack_tail(bytes + LOW_BYTES);
    EACH out.val[i] = vorrq_s8(vshlq_n_s8(out.val[i], 4), vreinterpretq_s8_u8(low[i]));
    return out;
}
static inline part dot_six(quad w, const int8_t *x, int32_t more) {
    part sum = vdupq_n_s32(8 * more);
    EACH sum = vdotq_s32(sum, w.val[i], vld1q_s8(x + 16 * i));
    return sum;
}
static inline fvec fma_part(fvec scale, part p, fvec sum) {
    sum.val[0] = vfmaq_f32(sum.val[0], scale.val[0], vcvtq_f32_s32(p));
    return sum;
}

static inline fvec fma_int8(const int8_t *weights, const float *x) {
    fvec sum = f_set(0);
    EACH {
        const int8x16_t w = vld1q_s8(weights + 16 * i);
        const int16x8_t low = vmovl_s8(vget_low_s8(w)), high = vmovl_s8(vget_high_s8(w));
        const ivec wide = {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                            vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
        sum = f_fma(f_from(wide), vld1q_f32_x4(x + 16 * i), sum);
    }
    return sum;
}

#include "tile.h"

const tz_kernels tz_neon = KERNELS("neon", 0);
