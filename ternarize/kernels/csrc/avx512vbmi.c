/* AVX-512 with VNNI and VBMI: five trits a byte stay so in memory, 1.6 bits each; comparisons and one table look-up
 * unpack them. */
#define FIELDS 5
#include "avx512.h"

/* The four lower base-3 digits of 0 .. 80, two bits each. */
#define D(n) ((n) % 3 | (n) / 3 % 3 << 2 | (n) / 9 % 3 << 4 | (n) / 27 % 3 << 6)
#define D9(n) D(n), D(n + 1), D(n + 2), D(n + 3), D(n + 4), D(n + 5), D(n + 6), D(n + 7), D(n + 8)
static const uint8_t DIGITS[128] __attribute__((aligned(64))) = {D9(0),  D9(9),  D9(18), D9(27), D9(36),
                                                                D9(45), D9(54), D9(63), D9(72)};

typedef struct {
    __m512i low, high;        /* four digits, two bits each; the fifth */
} codes;

static inline codes unpack(const uint8_t *bytes) {
    const __m512i all = _mm512_loadu_si512(bytes), one = _mm512_set1_epi8(1);
    const __m512i step = _mm512_set1_epi8(81), twice = _mm512_set1_epi8((char)162);
    const __mmask64 some = _mm512_cmpge_epu8_mask(all, step), two = _mm512_cmpge_epu8_mask(all, twice);
    __m512i rest = _mm512_mask_sub_epi8(all, some, all, step);
    rest = _mm512_mask_sub_epi8(rest, two, rest, step);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(DIGITS), rest, _mm512_load_si512(DIGITS + 64));
    const __m512i high = _mm512_maskz_mov_epi8(some, one);
    return (codes){low, _mm512_mask_add_epi8(high, two, high, one)};
}

static inline quad field(codes c, int f, int chains) { return f == 4 ? c.high : two_bits(c.low, f, chains); }

#include "tile.h"

const tz_kernels tz_avx512vbmi = KERNELS("avx512vbmi", 1);
