/* Primitives of the AVX-512 paths; they differ in how a vector of codes is unpacked. */
#include <immintrin.h>

#include "layout.h"

typedef __m512i ivec;
typedef __m512 fvec;
typedef __m512i quad;

/* vpdpbusd takes four cycles or more, so that few tokens need several sums. With four, field f stays where it is in
 * its byte, 4^f times as large, and its sum is divided: exact, and three shifts fewer a vector. */
#define CHAINS(tokens) ((tokens) <= 4 ? 4 : 1)

static inline ivec i_set(int32_t value) { return _mm512_set1_epi32(value); }
static inline ivec i_add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
static inline fvec f_set(float value) { return _mm512_set1_ps(value); }
static inline fvec f_from(ivec a) { return _mm512_cvtepi32_ps(a); }
static inline fvec f_mul(fvec a, fvec b) { return _mm512_mul_ps(a, b); }
static inline fvec f_fma(fvec a, fvec b, fvec c) { return _mm512_fmadd_ps(a, b, c); }
static inline fvec f_load(const float *values) { return _mm512_loadu_ps(values); }
static inline void f_store(float *out, fvec a) { _mm512_storeu_ps(out, a); }
static inline float f_sum(fvec a) { return _mm512_reduce_add_ps(a); }
static inline fvec f_halves(const uint8_t *halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
}
typedef __m256i steps;
static inline steps load_steps(const uint8_t *halves) { return _mm256_loadu_si256((const __m256i *)halves); }
static inline fvec f_steps(steps s, const uint8_t *codes) {
    const __m128i both = _mm_loadl_epi64((const __m128i *)codes);
    const __m128i code = _mm_and_si128(_mm_unpacklo_epi64(both, _mm_srli_epi16(both, 4)), _mm_set1_epi8(15));
    return _mm512_cvtph_ps(_mm256_permutexvar_epi16(_mm256_cvtepu8_epi16(code), s));
}
static inline fvec f_bfloats(const uint8_t *halves) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)halves));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline ivec four(const int8_t *x) {
    int32_t bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    return _mm512_set1_epi32(bits);
}

static inline ivec dot_quad(ivec sum, quad q, const int8_t *x) { return _mm512_dpbusd_epi32(sum, q, four(x)); }

static inline quad two_bits(__m512i all, int f, int chains) {
    if (chains == 4) return _mm512_and_si512(all, _mm512_set1_epi8((char)(3 << 2 * f)));
    return _mm512_and_si512(_mm512_srli_epi16(all, 2 * f), _mm512_set1_epi8(3));
}

#if FIELDS == 4
typedef __m512i codes;
static inline codes unpack(const uint8_t *bytes) { return _mm512_loadu_si512(bytes); }
static inline quad field(codes c, int f, int chains) { return two_bits(c, f, chains); }
#endif

static inline ivec start(int32_t minus_sum) { return _mm512_set1_epi32(minus_sum); }

static inline ivec join(const ivec *sums, int chains) {
    ivec sum = sums[0];
    for (int c = 1; c < chains; c++) sum = i_add(sum, _mm512_srai_epi32(sums[c], 2 * c));
    return sum;
}

/* Bits 2 f of the 16 bytes belong to rows 4 f .. 4 f + 3: one 128-bit lane each. */
static inline quad unpack_tail(const uint8_t *bytes) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes));
    const __m512i by = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi32(all, by), _mm512_set1_epi8(3));
}

/* A lane's lowest four bits are a code and two zeros, which vpermps looks up. */
static inline fvec fma_quad(fvec sum, quad q, const float *x) {
    const __m512 trit = _mm512_set_ps(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, -1);
    sum = f_fma(_mm512_permutexvar_ps(q, trit), f_set(x[0]), sum);
    sum = f_fma(_mm512_permutexvar_ps(_mm512_srli_epi32(q, 8), trit), f_set(x[1]), sum);
    sum = f_fma(_mm512_permutexvar_ps(_mm512_srli_epi32(q, 16), trit), f_set(x[2]), sum);
    return f_fma(_mm512_permutexvar_ps(_mm512_srli_epi32(q, 24), trit), f_set(x[3]), sum);
}

/* vpdpbusd wants one side unsigned: |w|, and x with w's sign. */
typedef struct {
    __m512i size;
    __mmask64 negative;
} int8s;
static inline int8s load_int8(const int8_t *weights) {
    const __m512i w = _mm512_loadu_si512(weights);
    return (int8s){_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
}
typedef __m512i part;
static inline part dot_int8(int8s w, const int8_t *x) {
    const __m512i a = _mm512_loadu_si512(x), zero = _mm512_setzero_si512();
    return _mm512_dpbusd_epi32(zero, w.size, _mm512_mask_sub_epi8(a, w.negative, zero, a));
}

static inline quad load_six(const uint8_t *bytes) {
    const __m256i all = _mm256_loadu_si256((const __m256i *)bytes);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(all), _mm256_srli_epi16(all, 4), 1);
    const __m512i low = _mm512_and_si512(both, _mm512_set1_epi8(15));
    return _mm512_or_si512(_mm512_slli_epi16(unpack_tail(bytes + LOW_BYTES), 4), low);
}
static inline part dot_six(quad w, const int8_t *x, int32_t more) {
    return _mm512_dpbusd_epi32(_mm512_set1_epi32(2 * more), w, _mm512_loadu_si512(x));
}
static inline fvec fma_part(fvec scale, part p, fvec sum) { return f_fma(scale, f_from(p), sum); }

static inline fvec fma_int8(const int8_t *weights, const float *x) {
    fvec sum = f_set(0);
    _Pragma("GCC unroll 4") for (int i = 0; i < TABLE_PIECE; i += ROWS) {
        const __m512i w = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(weights + i)));
        sum = f_fma(f_from(w), _mm512_loadu_ps(x + i), sum);
    }
    return sum;
}
