/* AVX-512 with VNNI: 2-bit codes, 64 products an instruction. */
#define FIELDS 4
#include "avx512.h"

static inline codes unpack(const uint8_t *bytes, int chains) {
    const __m512i all = _mm512_loadu_si512(bytes);
    return (codes){{field(all, 0, chains), field(all, 1, chains), field(all, 2, chains), field(all, 3, chains)}};
}

#include "tile.h"

const tz_kernels tz_avx512vnni = KERNELS("avx512vnni", 0);
