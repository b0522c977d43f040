/* What the processor has, and the operating system saves. */
#pragma once

typedef struct {
    int avx2, fma, f16c, avx512, vnni, vbmi;     /* avx512: F, BW, DQ and VL together */
    int amx;                                     /* tiles and bfloat16, and permission to use them */
    int dotprod;
} tz_features;

tz_features tz_find_features(void);
