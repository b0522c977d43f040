#include "cpu.h"

#include <stdio.h>

#include "ternarize.h"

#if defined(__x86_64__)
#include <cpuid.h>

enum { SSE_AND_AVX = 0x06, SSE_AVX_AND_AVX512 = 0xe6, TILES = 0x60000 };
enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };     /* of leaf 7; older compilers have no names for them */

/* XCR0: which registers the operating system saves when it changes from one thread to another. */
static unsigned saved_registers(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Linux saves the tiles of processes that have asked for them: 8 KiB a thread once it uses them. It refuses where a
 * signal's stack is too small for that. */
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

static int ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}
#else
static int ask_for_tiles(void) { return 0; }
#endif

tz_features tz_find_features(void) {
    tz_features found = {0};
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
    const unsigned saved = saved_registers();
    if ((saved & SSE_AND_AVX) != SSE_AND_AVX) return found;
    found.fma = !!(c & bit_FMA);
    found.f16c = !!(c & bit_F16C);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    found.avx2 = !!(b & bit_AVX2);
    const unsigned parts = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    found.avx512 = (saved & SSE_AVX_AND_AVX512) == SSE_AVX_AND_AVX512 && (b & parts) == parts;
    found.vnni = found.avx512 && (c & bit_AVX512VNNI);
    found.vbmi = found.avx512 && (c & bit_AVX512VBMI);
    found.amx = (saved & TILES) == TILES && (d & AMX_TILE) && (d & AMX_BF16) && ask_for_tiles();
    return found;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

tz_features tz_find_features(void) {
    const unsigned long dot_product = 1ul << 20;     /* HWCAP_ASIMDDP */
    return (tz_features){.dotprod = !!(getauxval(AT_HWCAP) & dot_product)};
}

#elif defined(__aarch64__) && defined(__APPLE__)

tz_features tz_find_features(void) { return (tz_features){.dotprod = 1}; }     /* every Apple silicon has it */

#else

tz_features tz_find_features(void) { return (tz_features){0}; }

#endif

const char *tz_cpu_features(void) {
    static char text[96];
    const tz_features f = tz_find_features();
    snprintf(text, sizeof text, "%s%s%s%s%s%s%s%s", f.avx2 ? "avx2 " : "", f.fma ? "fma " : "", f.f16c ? "f16c " : "",
             f.avx512 ? "avx512 " : "", f.vnni ? "avx512_vnni " : "", f.vbmi ? "avx512_vbmi " : "",
             f.amx ? "amx_bf16 " : "", f.dotprod ? "dotprod " : "");
    return text;
}
