/* What a block does between its linears, in float32. Included by tile.h, once for each path. */

/* exp(x) to 2 ulp, without a call, so that loops become vector code. */
static ALWAYS_INLINE float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 0x1.715476p+0f + 0x1.8p23f, power = shifted - 0x1.8p23f;     /* to the nearest integer */
    const float r = x - power * 0x1.62e4p-1f - power * 0x1.7f7d1cp-20f;                    /* ln 2 in two parts */
    float p = 0x1.a0d2cep-13f;
    p = p * r + 0x1.6e879cp-10f;
    p = p * r + 0x1.1112f6p-7f;
    p = p * r + 0x1.555534p-5f;
    p = p * r + 0x1.55554cp-3f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * float_of((bits_of(shifted) - bits_of(0x1.8p23f) + 127) << 23);
}

static ALWAYS_INLINE float dot(const float *a, const float *b, int64_t size) {
    fvec lanes = f_set(0);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) lanes = f_fma(f_load(a + i), f_load(b + i), lanes);
    float sum = f_sum(lanes);
    for (; i < size; i++) sum += a[i] * b[i];
    return sum;
}

/* 1 / sqrt(x) by Newton's method from a guess at the exponent: no call of the mathematical library. */
static ALWAYS_INLINE float inverse_root(float x) {
    double y = float_of(0x5f375a86 - (bits_of(x) >> 1));
    for (int i = 0; i < 4; i++) y *= 1.5 - 0.5 * (double)x * y * y;
    return (float)y;
}

/* x, out [size]; they may be one. */
static void normalize(const float *x, const tz_norm *norm, int64_t size, float *out) {
    const float factor = inverse_root(dot(x, x, size) / (float)size + norm->epsilon);
    for (int64_t i = 0; i < size; i++) out[i] = x[i] * factor * norm->weight[i];
}

/* Turn each pair (i, i + size / 2) of a head in place; rope [2][size] has its cosines and sines. */
static void rotate(float *head, const float *rope, int64_t size) {
    const int64_t half = size / 2;
    const float *cosine = rope, *sine = rope + size;
    for (int64_t i = 0; i < half; i++) {
        const float low = head[i], high = head[half + i];
        head[i] = low * cosine[i] - high * sine[i];
        head[half + i] = high * cosine[half + i] + low * sine[half + i];
    }
}

/* Sixteen floats of a row of keys or values, and one. */
static ALWAYS_INLINE fvec load_some(const int dtype, const char *rows, int64_t at) {
    if (dtype == TZ_FLOAT32) return f_load((const float *)rows + at);
    const uint8_t *halves = (const uint8_t *)rows + at * HALF_BYTES;
    return dtype == TZ_BFLOAT16 ? f_bfloats(halves) : f_halves(halves);
}

static ALWAYS_INLINE float load_one(const int dtype, const char *rows, int64_t at) {
    if (dtype == TZ_FLOAT32) return ((const float *)rows)[at];
    const uint16_t half = ((const uint16_t *)rows)[at];
    return dtype == TZ_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

static ALWAYS_INLINE float largest_score(const float *scores, int64_t count) {
    float part[LANES], largest = scores[0];
    for (int j = 0; j < LANES; j++) part[j] = scores[0];
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) part[j] = scores[i + j] > part[j] ? scores[i + j] : part[j];
    for (; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int j = 0; j < LANES; j++) largest = part[j] > largest ? part[j] : largest;
    return largest;
}

/* Products of `heads` queries with `keys` keys, of position `first` and on: as many sums as stay in registers. */
static ALWAYS_INLINE void score_some(const int heads, const int keys, const int dtype, const tz_attention *a,
                                     const float *query, int64_t first, float *scores) {
    const int64_t size = a->size, whole = size / LANES * LANES;
    fvec sum[TOGETHER];
    UNROLL for (int s = 0; s < heads * keys; s++) sum[s] = f_set(0);
    for (int64_t i = 0; i < whole; i += LANES)
        UNROLL for (int k = 0; k < keys; k++) {
            const fvec key = load_some(dtype, a->keys, (first + k) * size + i);
            UNROLL for (int h = 0; h < heads; h++)
                sum[h * keys + k] = f_fma(f_load(query + h * size + i), key, sum[h * keys + k]);
        }
    UNROLL for (int k = 0; k < keys; k++)
        UNROLL for (int h = 0; h < heads; h++) {
            float score = f_sum(sum[h * keys + k]);
            for (int64_t i = whole; i < size; i++)
                score += query[h * size + i] * load_one(dtype, a->keys, (first + k) * size + i);
            scores[h * a->positions + first + k] = score * a->scale;
        }
}

/* `parts` times 16 columns from `first` on of the sums of values, each times its weight in one of `heads` heads. */
static ALWAYS_INLINE void mix_some(const int heads, const int parts, const int dtype, const tz_attention *a,
                                   const float *weights, int64_t first, float *out) {
    fvec sum[TOGETHER];
    UNROLL for (int s = 0; s < heads * parts; s++) sum[s] = f_set(0);
    for (int64_t p = 0; p < a->positions; p++)
        UNROLL for (int i = 0; i < parts; i++) {
            const fvec value = load_some(dtype, a->values, p * a->size + first + i * LANES);
            UNROLL for (int h = 0; h < heads; h++)
                sum[h * parts + i] = f_fma(f_set(weights[h * a->positions + p]), value, sum[h * parts + i]);
        }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < parts; i++) f_store(out + h * a->size + first + i * LANES, sum[h * parts + i]);
}

static ALWAYS_INLINE void mix_rest(const int heads, const int dtype, const tz_attention *a, const float *weights,
                                   int64_t first, float *out) {
    for (int h = 0; h < heads; h++)
        for (int64_t i = first; i < a->size; i++) {
            float sum = 0;
            for (int64_t p = 0; p < a->positions; p++)
                sum += weights[h * a->positions + p] * load_one(dtype, a->values, p * a->size + i);
            out[h * a->size + i] = sum;
        }
}

/* Scores become weights that add up to what is returned. */
static float weigh(float *scores, int64_t count) {
    const float largest = largest_score(scores, count);
    for (int64_t p = 0; p < count; p++) scores[p] = exp_of(scores[p] - largest);
    return sum_of(scores, count);
}

static ALWAYS_INLINE void attend_some(const int heads, const int dtype, const tz_attention *a, const float *query,
                                      float *restrict scores, float *restrict out) {
    const int along = TOGETHER / heads;
    float sum[TOGETHER];
    int64_t p = 0, i = 0;
    for (; p + along <= a->positions; p += along) score_some(heads, along, dtype, a, query, p, scores);
    for (; p < a->positions; p++) score_some(heads, 1, dtype, a, query, p, scores);
    for (int h = 0; h < heads; h++) sum[h] = weigh(scores + h * a->positions, a->positions);
    for (; i + along * LANES <= a->size; i += along * LANES) mix_some(heads, along, dtype, a, scores, i, out);
    for (; i + LANES <= a->size; i += LANES) mix_some(heads, 1, dtype, a, scores, i, out);
    mix_rest(heads, dtype, a, scores, i, out);
    for (int h = 0; h < heads; h++)
        for (i = 0; i < a->size; i++) out[h * a->size + i] /= sum[h];
}

#if ANY_COUNT
#define WITH(n) attend_some(n, a->dtype, a, query, scores, out)
#else
#define WITH(n)                                                                                            \
    (a->dtype == TZ_FLOAT32    ? attend_some(n, TZ_FLOAT32, a, query, scores, out)                         \
     : a->dtype == TZ_BFLOAT16 ? attend_some(n, TZ_BFLOAT16, a, query, scores, out)                        \
                               : attend_some(n, TZ_FLOAT16, a, query, scores, out))
#endif

/* Heads that share keys and values, which are read and made floats once for TOGETHER of them: query [heads][size],
 * scores [heads][positions] for their own use, out [heads][size]. */
static void attend(const tz_attention *a, int64_t heads, const float *query, float *scores, float *out) {
    for (int64_t head = 0; head < heads; head += TOGETHER) {
        const int count = (int)(heads - head < TOGETHER ? heads - head : TOGETHER);
        UP_TO_4(WITH)
        query += count * a->size;
        scores += count * a->positions;
        out += count * a->size;
    }
}
#undef WITH

/* out = activation(out) * up, 16 rows of each. */
static void gate(const float *restrict up, int activation, float *restrict out) {
    for (int r = 0; r < ROWS; r++) {
        const float x = out[r], cubic = 0x1.988454p-1f * (x + 0.044715f * x * x * x);       /* sqrt(2 / pi) */
        const float slope = activation == TZ_SILU ? x : 2 * cubic;                           /* tanh as a sigmoid */
        out[r] = x / (1.0f + exp_of(-slope)) * up[r];
    }
}
