/* AVX-512 with VNNI: 2-bit codes, 64 products an instruction. */
#define FIELDS 4
#include "avx512.h"

#include "tile.h"

const tz_kernels tz_avx512vnni = KERNELS("avx512vnni", 0);
