/* AVX-512 with VNNI: 2-bit codes, 64 products an instruction. */
#define FIELDS 4
#include "avx512.h"

static inline codes unpack(const uint8_t *bytes) {
    const __m512i all = _mm512_loadu_si512(bytes), mask = _mm512_set1_epi8(3);
    return (codes){{
        _mm512_and_si512(all, mask),
        _mm512_and_si512(_mm512_srli_epi16(all, 2), mask),
        _mm512_and_si512(_mm512_srli_epi16(all, 4), mask),
        _mm512_and_si512(_mm512_srli_epi16(all, 6), mask),
    }};
}

#include "tile.h"

const tz_kernels tz_avx512vnni = KERNELS("avx512vnni", 0);
