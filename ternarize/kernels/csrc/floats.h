/* Sixteen-bit floats in portable C, written so that compilers turn the loops around them into vector code. */
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

static inline float from_float16(uint16_t half) {
    const uint32_t rest = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t special = rest >= 0x0f800000 ? 0x7f800000u : 0;         /* infinity and NaN keep their exponent */
    const float value = float_of(rest) * 0x1p112f;
    return float_of(bits_of(value) | special | (uint32_t)(half & 0x8000) << 16);
}

/* One float16, wherever it lies. */
static inline float half_scalar(const uint8_t *half) {
    uint16_t bits;
    memcpy(&bits, half, sizeof bits);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    return from_float16(bits);
#endif
}

static inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value), even = bits >> 16 & 1;
    const uint32_t rounded = (bits + 0x7fff + even) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

static inline uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value), size = bits & 0x7fffffff, even = size >> 13 & 1;
    const uint32_t normal = (size + 0xfff + even - 0x38000000) >> 13;
    const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);   /* 0.5 has an ulp of 2^-24 */
    uint32_t half = size < 0x38800000 ? subnormal : normal;
    half = size >= 0x47800000 || half > 0x7c00 ? 0x7c00 : half;
    half = size > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}
