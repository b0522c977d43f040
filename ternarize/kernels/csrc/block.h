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

/* y += a x */
static ALWAYS_INLINE void add_scaled(float a, const float *restrict x, int64_t size, float *restrict y) {
    const fvec factor = f_set(a);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) f_store(y + i, f_fma(factor, f_load(x + i), f_load(y + i)));
    for (; i < size; i++) y[i] += a * x[i];
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

/* A row of keys or values as floats, in `room` where it has to be converted. */
static ALWAYS_INLINE const float *read_row(const char *rows, int dtype, int64_t size, int64_t row, float *room) {
    if (dtype == TZ_FLOAT32) return (const float *)rows + row * size;
    read_activations(rows, dtype, row * size, (int)size, room);
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

/* One head's attention: query [size], scores [positions] for its own use, out [size]. */
static void attend(const tz_attention *a, const float *query, float *restrict scores, float *restrict out) {
    float room[HEAD_SIZE];
    for (int64_t p = 0; p < a->positions; p++)
        scores[p] = dot(query, read_row(a->keys, a->dtype, a->size, p, room), a->size) * a->scale;
    const float largest = largest_score(scores, a->positions);
    for (int64_t p = 0; p < a->positions; p++) scores[p] = exp_of(scores[p] - largest);
    const float sum = sum_scores(scores, a->positions);
    memset(out, 0, (size_t)a->size * sizeof(float));
    for (int64_t p = 0; p < a->positions; p++)
        add_scaled(scores[p] / sum, read_row(a->values, a->dtype, a->size, p, room), a->size, out);
}

/* out = activation(out) * up, 16 rows of each. */
static void gate(const float *restrict up, int activation, float *restrict out) {
    for (int r = 0; r < ROWS; r++) {
        const float x = out[r], cubic = 0x1.988454p-1f * (x + 0.044715f * x * x * x);       /* sqrt(2 / pi) */
        const float slope = activation == TZ_SILU ? x : 2 * cubic;                           /* tanh as a sigmoid */
        out[r] = x / (1.0f + exp_of(-slope)) * up[r];
    }
}
