/* AVX-512 with VNNI: 2-bit codes, 64 products an instruction. */
#define FIELDS 4
#include "avx512.h"

typedef __m512i codes;
static inline codes unpack(const uint8_t *bytes) { return _mm512_loadu_si512(bytes); }
static inline quad field(codes c, int f, int chains) { return two_bits(c, f, chains); }

#include "tile.h"

const tz_kernels tz_avx512vnni = KERNELS("avx512vnni", 0);
