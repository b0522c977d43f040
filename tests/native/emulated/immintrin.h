/* Stands in for the compiler's <immintrin.h> where AVX2 and AVX-512 are emulated by SIMDe (Debian: libsimde-dev). */
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

/* What SIMDe 0.7.4 lacks, as Intel's guide defines it. */
typedef uint64_t __mmask64;

#define EACH_LANE for (int i = 0; i < 16; i++)

static inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    const simde__m512i_private from = simde__m512i_to_private(a);
    simde__m512_private out;
    EACH_LANE out.f32[i] = (float)from.i32[i];
    return simde__m512_from_private(out);
}

static inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    const simde__m128i_private from = simde__m128i_to_private(a);
    simde__m512i_private out;
    EACH_LANE out.i32[i] = from.i8[i];
    return simde__m512i_from_private(out);
}

static inline __m512 _mm512_cvtph_ps(__m256i a) {
    simde__m512_private out;
    out.m256[0] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 0));
    out.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
    return simde__m512_from_private(out);
}

static inline __m512i _mm512_srai_epi32(__m512i a, unsigned by) {
    simde__m512i_private out = simde__m512i_to_private(a);
    EACH_LANE out.i32[i] >>= by;
    return simde__m512i_from_private(out);
}

static inline float _mm512_reduce_add_ps(__m512 a) {
    const simde__m512_private from = simde__m512_to_private(a);
    float sum = 0;
    EACH_LANE sum += from.f32[i];
    return sum;
}

#undef EACH_LANE
