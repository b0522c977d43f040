/* Instead of csrc/cpu.c where instruction sets are emulated: the processor has them all. */
#include "../../../ternarize/kernels/csrc/cpu.h"

#include "../../../ternarize/kernels/csrc/ternarize.h"

tz_features tz_find_features(void) {
    return (tz_features){.avx2 = 1, .fma = 1, .f16c = 1, .avx512 = 1, .vnni = 1, .vbmi = 1, .amx = 1};
}

const char *tz_cpu_features(void) { return "emulated"; }
