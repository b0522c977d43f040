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

/* Columns of a row of keys or values as floats, in `room` where they have to be converted. */
static ALWAYS_INLINE const float *read_row(const char *rows, int dtype, int64_t at, int columns, float *room) {
    if (dtype == TZ_FLOAT32) return (const float *)rows + at;
    read_activations(rows, dtype, at, columns, room);
    return room;
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

static ALWAYS_INLINE float sum_scores(const float *scores, int64_t count) {
    fvec lanes = f_set(0);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) lanes = f_fma(f_load(scores + i), f_set(1), lanes);
    float sum = f_sum(lanes);
    for (; i < count; i++) sum += scores[i];
    return sum;
}

/* Products of a query with TOGETHER keys, so that no sum waits for itself. */
static ALWAYS_INLINE void score_some(const tz_attention *a, const float *query, int64_t first, float *scores) {
    const int64_t size = a->size, whole = size / LANES * LANES;
    float room[TOGETHER][HEAD_SIZE];
    const float *key[TOGETHER];
    fvec sum[TOGETHER];
    UNROLL for (int p = 0; p < TOGETHER; p++) {
        key[p] = read_row(a->keys, a->dtype, (first + p) * size, (int)size, room[p]);
        sum[p] = f_set(0);
    }
    for (int64_t i = 0; i < whole; i += LANES) {
        const fvec q = f_load(query + i);
        UNROLL for (int p = 0; p < TOGETHER; p++) sum[p] = f_fma(q, f_load(key[p] + i), sum[p]);
    }
    UNROLL for (int p = 0; p < TOGETHER; p++) {
        float score = f_sum(sum[p]);
        for (int64_t i = whole; i < size; i++) score += query[i] * key[p][i];
        scores[first + p] = score * a->scale;
    }
}

static void score(const tz_attention *a, const float *query, float *scores) {
    float room[HEAD_SIZE];
    int64_t p = 0;
    for (; p + TOGETHER <= a->positions; p += TOGETHER) score_some(a, query, p, scores);
    for (; p < a->positions; p++)
        scores[p] = dot(query, read_row(a->keys, a->dtype, p * a->size, (int)a->size, room), a->size) * a->scale;
}

/* Columns first .. first + TOGETHER * LANES of the sum of values, each times its weight; sums stay in registers. */
static ALWAYS_INLINE void mix_some(const tz_attention *a, const float *weights, int64_t first, float *out) {
    float room[TOGETHER * LANES];
    fvec sum[TOGETHER];
    UNROLL for (int i = 0; i < TOGETHER; i++) sum[i] = f_set(0);
    for (int64_t p = 0; p < a->positions; p++) {
        const float *value = read_row(a->values, a->dtype, p * a->size + first, TOGETHER * LANES, room);
        const fvec weight = f_set(weights[p]);
        UNROLL for (int i = 0; i < TOGETHER; i++) sum[i] = f_fma(weight, f_load(value + i * LANES), sum[i]);
    }
    UNROLL for (int i = 0; i < TOGETHER; i++) f_store(out + first + i * LANES, sum[i]);
}

static void mix(const tz_attention *a, const float *weights, float *restrict out) {
    int64_t first = 0;
    for (; first + TOGETHER * LANES <= a->size; first += TOGETHER * LANES) mix_some(a, weights, first, out);
    const int rest = (int)(a->size - first);
    float room[TOGETHER * LANES], sum[TOGETHER * LANES] = {0};
    for (int64_t p = 0; rest > 0 && p < a->positions; p++) {
        const float *value = read_row(a->values, a->dtype, p * a->size + first, rest, room);
        for (int i = 0; i < rest; i++) sum[i] += weights[p] * value[i];
    }
    memcpy(out + first, sum, (size_t)rest * sizeof(float));
}

/* One head's attention: query [size], scores [positions] for its own use, out [size]. */
static void attend(const tz_attention *a, const float *query, float *restrict scores, float *restrict out) {
    score(a, query, scores);
    const float largest = largest_score(scores, a->positions);
    for (int64_t p = 0; p < a->positions; p++) scores[p] = exp_of(scores[p] - largest);
    const float sum = sum_scores(scores, a->positions);
    mix(a, scores, out);
    for (int64_t i = 0; i < a->size; i++) out[i] /= sum;
}

/* out = activation(out) * up, 16 rows of each. */
static void gate(const float *restrict up, int activation, float *restrict out) {
    for (int r = 0; r < ROWS; r++) {
        const float x = out[r], cubic = 0x1.988454p-1f * (x + 0.044715f * x * x * x);       /* sqrt(2 / pi) */
        const float slope = activation == TZ_SILU ? x : 2 * cubic;                           /* tanh as a sigmoid */
        out[r] = x / (1.0f + exp_of(-slope)) * up[r];
    }
}
