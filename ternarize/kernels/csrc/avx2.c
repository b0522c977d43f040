/* AVX2 with FMA and F16C: 2-bit codes, products of pairs in 16 bits. */
#define FIELDS 4
#define AT_ONCE 4
#include <immintrin.h>

#include "layout.h"

typedef struct {
    __m256i low, high;
} ivec;
typedef struct {
    __m256 low, high;
} fvec;
typedef ivec quad;
typedef ivec codes;

static inline ivec i_set(int32_t value) { return (ivec){_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
static inline fvec f_set(float value) { return (fvec){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
static inline fvec f_from(ivec a) { return (fvec){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
static inline fvec f_mul(fvec a, fvec b) {
    return (fvec){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
static inline fvec f_fma(fvec a, fvec b, fvec c) {
    return (fvec){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
static inline fvec f_load(const float *values) {
    return (fvec){_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}
static inline void f_store(float *out, fvec a) {
    _mm256_storeu_ps(out, a.low);
    _mm256_storeu_ps(out + 8, a.high);
}
static inline float f_sum(fvec a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
static inline fvec f_halves(const uint8_t *halves) {
    return (fvec){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves)),
                  _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + 16)))};
}

/* The 16 halves' lower bytes, and their upper ones: what vpshufb looks up. */
typedef struct {
    __m128i low, high;
} steps;
static inline steps load_steps(const uint8_t *halves) {
    const __m128i first = _mm_loadu_si128((const __m128i *)halves), last = _mm_loadu_si128((const __m128i *)halves + 1);
    const __m128i byte = _mm_set1_epi16(255);
    return (steps){_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte)),
                   _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8))};
}
static inline fvec f_steps(steps s, const uint8_t *codes) {
    const __m128i both = _mm_loadl_epi64((const __m128i *)codes);
    const __m128i code = _mm_and_si128(_mm_unpacklo_epi64(both, _mm_srli_epi16(both, 4)), _mm_set1_epi8(15));
    const __m128i low = _mm_shuffle_epi8(s.low, code), high = _mm_shuffle_epi8(s.high, code);
    return (fvec){_mm256_cvtph_ps(_mm_unpacklo_epi8(low, high)), _mm256_cvtph_ps(_mm_unpackhi_epi8(low, high))};
}

static inline fvec f_bfloats(const uint8_t *halves) {
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)halves));
    const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(halves + 16)));
    return (fvec){_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}

static inline codes unpack(const uint8_t *bytes) {
    return (codes){_mm256_loadu_si256((const __m256i *)bytes), _mm256_loadu_si256((const __m256i *)(bytes + 32))};
}

static inline quad field(codes c, int f, int chains) {
    const __m256i mask = _mm256_set1_epi8(3);
    (void)chains;
    return (quad){_mm256_and_si256(_mm256_srli_epi16(c.low, 2 * f), mask),
                  _mm256_and_si256(_mm256_srli_epi16(c.high, 2 * f), mask)};
}

/* Bits 2 f of the 16 bytes belong to rows 4 f .. 4 f + 3: one 128-bit lane each. */
static inline quad unpack_tail(const uint8_t *bytes) {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    const __m256i mask = _mm256_set1_epi8(3), by = _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0);
    const __m256i low = _mm256_srlv_epi32(all, by);
    return (quad){_mm256_and_si256(low, mask), _mm256_and_si256(_mm256_srli_epi32(low, 4), mask)};
}

static inline __m256i four(const int8_t *x) {
    int32_t bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    return _mm256_set1_epi32(bits);
}

static inline __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

/* Sums of pairs stay in 16 bits for a whole piece: 32 quads of at most 2 * 2 * 127, and its codes' sum of 128 * 127,
 * which the lower half of each pair begins with. */
#define CHAINS(tokens) 1
static inline ivec start(int32_t minus_sum) { return i_set(minus_sum & 0xffff); }
static inline ivec join(const ivec *sums, int chains) {
    (void)chains;
    return (ivec){widen(sums->low), widen(sums->high)};
}

/* Added at once: compilers would rather keep many products and add them later, for which there are no registers. */
static inline ivec dot_quad(ivec sum, quad q, const int8_t *x) {
    const __m256i a = four(x);
    sum.low = _mm256_add_epi16(sum.low, _mm256_maddubs_epi16(q.low, a));
    sum.high = _mm256_add_epi16(sum.high, _mm256_maddubs_epi16(q.high, a));
#if defined(__AVX2__)                                         /* not where it is emulated */
    __asm__ volatile("" : "+x"(sum.low), "+x"(sum.high));
#endif
    return sum;
}

/* A lane's lowest three bits are a code and a zero, which vpermps looks up. */
static inline fvec fma_quad(fvec sum, quad q, const float *x) {
    const __m256 trit = _mm256_set_ps(0, 0, 0, 0, 0, 1, 0, -1);
#define COLUMN(j)                                                                        \
    sum = f_fma((fvec){_mm256_permutevar8x32_ps(trit, _mm256_srli_epi32(q.low, 8 * j)),  \
                       _mm256_permutevar8x32_ps(trit, _mm256_srli_epi32(q.high, 8 * j))}, \
                f_set(x[j]), sum)
    COLUMN(0);
    COLUMN(1);
    COLUMN(2);
    COLUMN(3);
#undef COLUMN
    return sum;
}

typedef ivec int8s;
static inline int8s load_int8(const int8_t *weights) {
    return (int8s){_mm256_loadu_si256((const __m256i *)weights), _mm256_loadu_si256((const __m256i *)(weights + 32))};
}
typedef __m256i part;
/* vpmaddubsw wants one side unsigned: |w|, and x with w's sign; 2 * 127 * 127 still fits 16 bits. */
static inline __m256i dot_32(__m256i w, const int8_t *x) {
    const __m256i a = _mm256_loadu_si256((const __m256i *)x);
    return widen(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)));
}
static inline part dot_int8(int8s w, const int8_t *x) {
    return _mm256_add_epi32(dot_32(w.low, x), dot_32(w.high, x + 32));
}
static inline quad load_six(const uint8_t *bytes) {
    const __m256i low = _mm256_loadu_si256((const __m256i *)bytes), nibble = _mm256_set1_epi8(15);
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(bytes + LOW_BYTES)));
    const __m256i left = _mm256_set_epi32(2, 2, 2, 2, 4, 4, 4, 4), right = _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0);
    const __m256i upper = _mm256_set1_epi8(0x30);
    return (quad){_mm256_or_si256(_mm256_and_si256(low, nibble),
                                  _mm256_and_si256(_mm256_sllv_epi32(high, left), upper)),
                  _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 4), nibble),
                                  _mm256_and_si256(_mm256_srlv_epi32(high, right), upper))};
}
/* 4 * 63 * 127 fits 16 bits. */
static inline part dot_six(quad w, const int8_t *x, int32_t more) {
    const __m256i low = _mm256_loadu_si256((const __m256i *)x), high = _mm256_loadu_si256((const __m256i *)(x + 32));
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, low), _mm256_maddubs_epi16(w.high, high));
    return _mm256_add_epi32(_mm256_set1_epi32(4 * more), widen(pairs));
}
static inline fvec fma_part(fvec scale, part p, fvec sum) {
    return (fvec){_mm256_fmadd_ps(scale.low, _mm256_cvtepi32_ps(p), sum.low), sum.high};
}

static inline fvec fma_int8(const int8_t *weights, const float *x) {
    fvec sum = f_set(0);
    _Pragma("GCC unroll 4") for (int i = 0; i < TABLE_PIECE; i += ROWS) {
        const __m128i w = _mm_loadu_si128((const __m128i *)(weights + i));
        const ivec wide = {_mm256_cvtepi8_epi32(w), _mm256_cvtepi8_epi32(_mm_srli_si128(w, 8))};
        sum = f_fma(f_from(wide), (fvec){_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8)}, sum);
    }
    return sum;
}

#include "tile.h"

const tz_kernels tz_avx2 = KERNELS("avx2", 0);
