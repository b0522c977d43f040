/* Stands in for the compiler's <immintrin.h> where AVX2, AVX-512 and, by hand, AMX are emulated by SIMDe (Debian:
 * libsimde-dev). */
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

/* What SIMDe 0.7.4 lacks, as Intel's guide defines it. */
typedef uint32_t __mmask32;
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

static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    const simde__m256i_private from = simde__m256i_to_private(a);
    simde__m512i_private out;
    EACH_LANE out.u32[i] = from.u16[i];
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

/* In each 128 bits, the lower (upper) four of eight lanes in the order that two bits of `by` each name. */
static inline __m512i four_of_eight(__m512i a, int first, int by) {
    const simde__m512i_private from = simde__m512i_to_private(a);
    simde__m512i_private out = from;
    for (int i = 0; i < 32; i++)
        if (i % 8 / 4 * 4 == first) out.i16[i] = from.i16[i / 8 * 8 + first + (by >> 2 * (i % 4) & 3)];
    return simde__m512i_from_private(out);
}
static inline __m512i _mm512_shufflelo_epi16(__m512i a, int by) { return four_of_eight(a, 0, by); }
static inline __m512i _mm512_shufflehi_epi16(__m512i a, int by) { return four_of_eight(a, 4, by); }

static inline float _mm512_reduce_add_ps(__m512 a) {
    const simde__m512_private from = simde__m512_to_private(a);
    float sum = 0;
    EACH_LANE sum += from.f32[i];
    return sum;
}

#undef EACH_LANE

/* AMX, which SIMDe does not have: one set of tiles for each thread, and the checks that a processor makes. */
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

static _Thread_local struct {
    tile_config config;
    uint8_t tile[8][16][64];
} tiles;

static inline void must(int true_here) {
    if (!true_here) abort();
}

static inline void _tile_loadconfig(const void *config) {
    memset(&tiles, 0, sizeof tiles);
    memcpy(&tiles.config, config, sizeof tiles.config);
    must(tiles.config.palette == 1);
    for (int t = 0; t < 8; t++) must(tiles.config.rows[t] <= 16 && tiles.config.row_bytes[t] <= 64);
}

static inline void _tile_release(void) { memset(&tiles, 0, sizeof tiles); }

static inline void _tile_zero(int t) {
    must(tiles.config.palette == 1 && tiles.config.rows[t] > 0);
    memset(tiles.tile[t], 0, sizeof tiles.tile[t]);
}

static inline void _tile_loadd(int t, const void *from, long stride) {
    _tile_zero(t);
    for (int r = 0; r < tiles.config.rows[t]; r++)
        memcpy(tiles.tile[t][r], (const char *)from + r * stride, tiles.config.row_bytes[t]);
}

static inline void _tile_stored(int t, void *to, long stride) {
    must(tiles.config.palette == 1 && tiles.config.rows[t] > 0);
    for (int r = 0; r < tiles.config.rows[t]; r++)
        memcpy((char *)to + r * stride, tiles.tile[t][r], tiles.config.row_bytes[t]);
}

static inline float bfloat16_at(const uint8_t *from) {
    const uint32_t bits = (uint32_t)from[0] << 16 | (uint32_t)from[1] << 24;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline void _tile_dpbf16ps(int to, int a, int b) {
    const tile_config *c = &tiles.config;
    must(c->rows[to] == c->rows[a] && c->row_bytes[a] == 4 * c->rows[b] && c->row_bytes[to] == c->row_bytes[b]);
    for (int m = 0; m < c->rows[to]; m++)
        for (int k = 0; k < c->row_bytes[a] / 2; k++)
            for (int n = 0; n < c->row_bytes[b] / 4; n++) {
                float sum;
                memcpy(&sum, &tiles.tile[to][m][4 * n], sizeof sum);
                sum += bfloat16_at(&tiles.tile[a][m][2 * k]) * bfloat16_at(&tiles.tile[b][k / 2][4 * n + 2 * (k % 2)]);
                memcpy(&tiles.tile[to][m][4 * n], &sum, sizeof sum);
            }
}
