/* Random shapes, values and batches through every path of this machine, against sums in double precision.
 *
 *     ./fuzz ROUNDS SEED          tests/test_native.py builds and runs it
 *
 * Every buffer has exactly the size that the interface asks for, so that a sanitizer sees a byte too far. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../ternarize/kernels/csrc/floats.h"
#include "../../ternarize/kernels/csrc/ternarize.h"

static uint64_t state;

static uint32_t draw(uint32_t below) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33) % below;
}

static float uniform(void) { return (float)draw(1u << 24) / (1 << 23) - 1; }

static void *room(size_t bytes) {
    void *out = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!out) exit(2);
    return out;
}

typedef struct {
    int rows, columns, group, groups, tokens, levels, bias, bits, dtype, exact, threads;
} task;

static float stored(float value, int dtype, void *out, size_t at) {
    if (dtype == TZ_FLOAT32) return ((float *)out)[at] = value;
    const uint16_t half = dtype == TZ_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
    ((uint16_t *)out)[at] = half;
    return dtype == TZ_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

static float loaded(const void *in, int dtype, size_t at) {
    if (dtype == TZ_FLOAT32) return ((const float *)in)[at];
    const uint16_t half = ((const uint16_t *)in)[at];
    return dtype == TZ_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

/* What a product may differ by: half a step of the activations times what of each weight meets them rounded (`part`;
 * a shift meets their exact sum), or one part in 256 of both where AMX multiplies many tokens; and rounding of
 * sums and of the result. */
static int compare(const task *t, const char *path, const double *weight, const double *part, const float *x,
                   const float *bias, const void *y) {
    for (int m = 0; m < t->tokens; m++)
        for (int o = 0; o < t->rows; o++) {
            double want = bias ? bias[o] : 0, size = fabs(want), slack = 0;
            for (int g = 0; g < t->groups; g++) {
                float largest = 0;
                double parts = 0;
                for (int i = g * t->group; i < t->columns && i < (g + 1) * t->group; i++) {
                    const double w = weight[(size_t)o * t->columns + i], a = x[(size_t)m * t->columns + i];
                    want += w * a;
                    size += fabs(w * a);
                    parts += fabs(part[(size_t)o * t->columns + i]);
                    largest = fmaxf(largest, fabsf((float)a));
                }
                slack += parts * largest / 254;
            }
            const double relative = t->dtype == TZ_FLOAT32 ? 0 : t->dtype == TZ_BFLOAT16 ? 0x1p-8 : 0x1p-10;
            const double rounded = t->tokens > 8 && !strcmp(path, "amx") ? fmax(slack, 0x1p-7 * size) : slack;
            const double allowed = 2e-6 * size + relative * fabs(want) + 1e-7 + (t->exact ? 0 : 1.01 * rounded);
            const double got = loaded(y, t->dtype, (size_t)m * t->rows + o);
            if (!(fabs(got - want) <= allowed)) {
                printf("%s: %d x %d group %d tokens %d dtype %d exact %d: y[%d][%d] is %g, not %g (within %g)\n", path,
                       t->rows, t->columns, t->group, t->tokens, t->dtype, t->exact, m, o, got, want, allowed);
                return 1;
            }
        }
    return 0;
}

/* Coded scales: factors[row] * steps[code]. */
typedef struct {
    size_t row_bytes;
    uint8_t *codes;
    float *factors;
    uint16_t steps[16];
} coded;

static coded random_codes(int rows, int groups) {
    coded c = {.row_bytes = ((size_t)groups + 1) / 2};
    c.codes = malloc((size_t)rows * c.row_bytes);
    c.factors = malloc((size_t)rows * sizeof(float));
    for (size_t i = 0; i < (size_t)rows * c.row_bytes; i++) c.codes[i] = (uint8_t)draw(256);
    for (int o = 0; o < rows; o++) c.factors[o] = 0.02f + fabsf(uniform());
    for (int i = 0; i < 16; i++) c.steps[i] = to_float16(1.0f / (float)(1 + i));
    return c;
}

static void free_codes(const coded *c) { free(c->codes), free(c->factors); }

static double coded_scale(const coded *c, int row, size_t group) {
    const int code = c->codes[(size_t)row * c->row_bytes + group / 2] >> 4 * (group % 2) & 15;
    return (double)c->factors[row] * from_float16(c->steps[code]);
}

static void pack_weight(const tz_shape *s, int levels, const uint8_t *trits, const uint16_t *scale,
                        const uint16_t *shift, const coded *c, uint8_t *packed, int threads) {
    if (levels == TZ_CODED_SCALES)
        tz_pack_coded(s, trits, c->codes, c->factors, c->steps, packed, threads);
    else
        tz_pack_ternary(s, trits, scale, levels == TZ_SCALES_AND_SHIFTS ? shift : NULL, packed, threads);
}

static int ternary(const task *t, int path, const float *x, const void *input, const float *bias) {
    const size_t rows = (size_t)t->rows, columns = (size_t)t->columns, levels = rows * (size_t)t->groups;
    const size_t bytes = (columns + 4) / 5;
    uint8_t *trits = malloc(rows * bytes);
    uint16_t *scale = malloc(levels * 2), *shift = malloc(levels * 2);
    double *weight = malloc(rows * columns * sizeof *weight), *part = malloc(rows * columns * sizeof *part);
    for (size_t i = 0; i < levels; i++) {
        scale[i] = to_float16(0.02f + fabsf(uniform()));
        shift[i] = to_float16(uniform());
    }
    const coded c = random_codes(t->rows, t->groups);
    for (size_t o = 0; o < rows; o++)
        for (size_t b = 0; b < bytes; b++) {
            int byte = 0;
            for (size_t d = 0, power = 1; d < 5; d++, power *= 3) {
                const size_t i = 5 * b + d, level = o * (size_t)t->groups + i / (size_t)t->group;
                const int digit = i < columns ? (int)draw(3) : 1;
                byte += digit * (int)power;
                if (i >= columns) continue;
                const double size = t->levels == TZ_CODED_SCALES ? coded_scale(&c, (int)o, i / (size_t)t->group)
                                                                 : (double)from_float16(scale[level]);
                part[o * columns + i] = size * (digit - 1);
                weight[o * columns + i] = part[o * columns + i];
                if (t->levels == TZ_SCALES_AND_SHIFTS) weight[o * columns + i] += from_float16(shift[level]);
            }
            trits[o * bytes + b] = (uint8_t)byte;
        }
    tz_shape *s = tz_ternary_shape(path, t->rows, t->columns, t->group, t->levels);
    uint8_t *packed = room((size_t)tz_packed_bytes(s));
    void *y = malloc(rows * (size_t)t->tokens * (t->dtype ? 2 : 4));
    memset(y, 0xff, rows * (size_t)t->tokens * (t->dtype ? 2 : 4));
    pack_weight(s, t->levels, trits, scale, shift, &c, packed, t->threads);
    int failed = tz_ternary_linear(s, packed, bias, input, y, t->tokens, t->dtype, t->exact, t->threads);
    failed |= compare(t, tz_path_name(path), weight, part, x, bias, y);
    tz_free_shape(s);
    free_codes(&c), free(trits), free(scale), free(shift), free(weight), free(part), free(packed), free(y);
    return failed;
}

/* Code number i of a row, in 6 bits: see layout.h. */
static void put_six(uint8_t *codes, int i, int code) {
    const int vector = i / 64, at = i % 64, value = code + 32;
    uint8_t *lows = codes + 48 * vector, *highs = lows + 32;
    lows[at % 32] |= (uint8_t)((value & 15) << (at < 32 ? 0 : 4));
    highs[at % 16] |= (uint8_t)((value >> 4) << 2 * (at / 16));
}

static int table(const task *t, int path, const float *x, const void *input, const float *bias) {
    const size_t rows = (size_t)t->rows, columns = (size_t)t->columns, bytes = columns * (size_t)t->bits / 8;
    const size_t record = bytes + 2 * (size_t)t->groups;
    uint8_t *records = calloc(rows, record);
    double *weight = malloc(rows * columns * sizeof *weight);
    for (size_t o = 0; o < rows; o++) {
        uint8_t *codes = records + o * record;
        for (int g = 0; g < t->groups; g++) {
            const uint16_t scale = to_float16(0.001f + fabsf(uniform()) / 100);
            memcpy(codes + bytes + 2 * g, &scale, 2);
            for (int i = g * t->group; i < t->columns && i < (g + 1) * t->group; i++) {
                const int code = t->bits == 6 ? (int)draw(63) - 31 : (int)draw(255) - 127;
                if (t->bits == 6)
                    put_six(codes, i, code);
                else
                    codes[i] = (uint8_t)code;
                weight[o * columns + (size_t)i] = (double)from_float16(scale) * code;
            }
        }
    }
    tz_shape *s = tz_table_shape(path, t->rows, t->columns, t->group, t->bits);
    void *y = malloc(rows * (size_t)t->tokens * (t->dtype ? 2 : 4));
    int failed = tz_table_linear(s, records, bias, input, y, t->tokens, t->dtype, t->exact, t->threads);
    failed |= compare(t, tz_path_name(path), weight, weight, x, bias, y);
    tz_free_shape(s);
    free(records), free(weight), free(y);
    return failed;
}

static int one_round(void) {
    static const int groups[] = {1, 4, 7, 20, 32, 64, 100, 128, 129, 256, 1000};
    task t = {.rows = 1 + (int)draw(70), .columns = 1 + (int)draw(600), .tokens = 1 + (int)draw(40)};
    t.group = groups[draw(sizeof groups / sizeof *groups)];
    t.bits = draw(2) ? 8 : 6;
    if (t.bits == 6) t.columns = 64 * (1 + (int)draw(9)), t.group = 64 * (1 + (int)draw(4));
    t.group = t.group < t.columns ? t.group : t.columns;
    t.groups = (t.columns + t.group - 1) / t.group;
    t.levels = (int)draw(3), t.bias = (int)draw(2), t.dtype = (int)draw(3), t.exact = (int)draw(2);
    t.threads = 1 + (int)draw(3);
    const size_t count = (size_t)t.tokens * (size_t)t.columns;
    float *x = malloc(count * sizeof *x), *bias = malloc((size_t)t.rows * sizeof *bias);
    void *input = malloc(count * (t.dtype ? 2 : 4));
    for (size_t i = 0; i < count; i++) x[i] = stored(uniform() * (draw(50) ? 1 : 30), t.dtype, input, i);
    for (int o = 0; o < t.rows; o++) bias[o] = uniform();
    const float *added = t.bias ? bias : NULL;
    int failed = 0;
    for (int path = 0; tz_path_name(path); path++)
        if (tz_path_supported(path)) failed |= ternary(&t, path, x, input, added) | table(&t, path, x, input, added);
    free(x), free(bias), free(input);
    return failed;
}

/* -- a decoder, a step or a prompt: every path against the portable one, from the same random numbers ------------- */

enum { BLOCKS = 2 };

typedef struct {
    int hidden, inner, heads, key_heads, size, group, levels, window, first, end, dtype, exact, threads, tokens;
} model;

typedef struct {
    tz_shape *shape[BLOCKS][TZ_LINEARS];
    uint8_t *packed[BLOCKS][TZ_LINEARS];
    float *norm[BLOCKS + 1][TZ_NORMS];
} weights;

static void random_floats(float *out, int count) {
    for (int i = 0; i < count; i++) out[i] = uniform();
}

static uint8_t *random_linear(const model *m, int path, int rows, int columns, tz_shape **shape) {
    const int group = m->group < columns ? m->group : columns;
    const size_t levels = (size_t)rows * (size_t)((columns + group - 1) / group);
    const size_t bytes = (size_t)rows * (size_t)((columns + 4) / 5);
    uint8_t *trits = malloc(bytes);
    uint16_t *scale = malloc(levels * 2), *shift = malloc(levels * 2);
    for (size_t i = 0; i < bytes; i++) trits[i] = (uint8_t)draw(243);
    for (size_t i = 0; i < levels; i++) {
        scale[i] = to_float16(0.02f + fabsf(uniform()) / 10);
        shift[i] = to_float16(uniform() / 50);
    }
    const coded c = random_codes(rows, (columns + group - 1) / group);
    for (int o = 0; o < rows; o++) c.factors[o] /= 10;
    *shape = tz_ternary_shape(path, rows, columns, group, m->levels);
    uint8_t *packed = room((size_t)tz_packed_bytes(*shape));
    pack_weight(*shape, m->levels, trits, scale, shift, &c, packed, 1);
    free_codes(&c), free(trits), free(scale), free(shift);
    return packed;
}

static void add_block(const model *m, int path, int b, tz_decoder *d, weights *w) {
    const int queries = m->heads * m->size, keys = m->key_heads * m->size;
    const int rows[] = {queries, keys, keys, m->hidden, m->inner, m->inner, m->hidden};
    const int columns[] = {m->hidden, m->hidden, m->hidden, queries, m->hidden, m->hidden, m->inner};
    for (int i = 0; i < TZ_LINEARS; i++) {
        w->packed[b][i] = random_linear(m, path, rows[i], columns[i], &w->shape[b][i]);
        tz_set_linear(d, b, i, w->shape[b][i], w->packed[b][i], NULL);
    }
    for (int i = 0; i < TZ_NORMS; i++) {
        const int size = i == TZ_QUERY_NORM || i == TZ_KEY_NORM ? m->size : m->hidden;
        const int must = i == TZ_ATTENTION_NORM || i == TZ_FEED_NORM;
        if (!draw(2) && !must) continue;
        w->norm[b][i] = malloc((size_t)size * sizeof(float));
        random_floats(w->norm[b][i], size);
        tz_set_norm(d, b, i, w->norm[b][i], 1e-5f);
    }
    tz_set_attention(d, b, 0.3f, b ? m->window : 0, b, 0, b);
}

static tz_decoder *make_model(const model *m, int path, weights *w) {
    tz_decoder *d = tz_make_decoder(path, BLOCKS, m->hidden, m->inner, m->heads, m->key_heads, m->size,
                                    (int)draw(2), m->exact);
    for (int b = 0; b < BLOCKS; b++) add_block(m, path, b, d, w);
    float *last = w->norm[BLOCKS][0] = malloc((size_t)m->hidden * sizeof(float));
    random_floats(last, m->hidden);
    tz_set_norm(d, BLOCKS, TZ_ATTENTION_NORM, last, 1e-5f);
    return d;
}

static void free_model(tz_decoder *d, weights *w) {
    tz_free_decoder(d);
    for (int b = 0; b <= BLOCKS; b++)
        for (int i = 0; i < TZ_NORMS; i++) free(w->norm[b][i]);
    for (int b = 0; b < BLOCKS; b++)
        for (int i = 0; i < TZ_LINEARS; i++) tz_free_shape(w->shape[b][i]), free(w->packed[b][i]);
}

static float *random_array(int count) {
    float *out = malloc((size_t)count * sizeof *out);
    random_floats(out, count);
    return out;
}

/* One token -> y [hidden]. */
static void step(const model *m, const tz_decoder *d, float *y) {
    float *x = random_array(m->hidden), *ropes = random_array(4 * m->size);
    const size_t cached = (size_t)(BLOCKS * 2 * m->key_heads * (m->end + 1) * m->size);
    void *memory = malloc(cached * (m->dtype ? 2 : 4));
    for (size_t i = 0; i < cached; i++) stored(uniform(), m->dtype, memory, i);
    const tz_cache cache = {memory, m->end + 1, m->first, m->end, m->dtype};
    if (tz_step(d, x, y, ropes, &cache, m->threads)) exit(2);
    free(x), free(ropes), free(memory);
}

/* Some tokens -> y [tokens][hidden], where all that a head attends to is its own query and value. */
static void read_prompt(const model *m, const tz_decoder *d, float *y) {
    const int queries = m->tokens * m->heads * m->size, keys = m->tokens * m->key_heads * m->size;
    float *query = random_array(queries), *key = random_array(keys), *value = random_array(keys);
    float *ropes = random_array(4 * m->size * m->tokens), *floats = malloc((size_t)tz_prompt_floats(d, m->tokens) * 4);
    random_floats(y, m->tokens * m->hidden);
    for (int b = 0; b < BLOCKS; b++) {
        if (tz_enter_attention(d, b, y, ropes, query, key, value, floats, m->tokens, m->threads)) exit(2);
        for (int i = 0; i < queries; i++) query[i] = query[i] / 2 + value[i / m->heads % keys] - key[i % keys];
        if (tz_leave_attention(d, b, query, y, floats, m->tokens, m->threads)) exit(2);
    }
    free(query), free(key), free(value), free(ropes), free(floats);
}

static int compare_models(void) {
    model m = {.hidden = 1 + (int)draw(90), .inner = 1 + (int)draw(draw(2) ? 150 : 900)};
    m.key_heads = 1 + (int)draw(3);                                 /* and the largest are worth several threads */
    m.heads = m.key_heads * (1 + (int)draw(6)), m.size = 2 + 2 * (int)draw(45), m.group = 1 + (int)draw(140);
    m.levels = (int)draw(3), m.dtype = (int)draw(3), m.exact = (int)draw(4) > 0, m.threads = 1 + (int)draw(3);
    m.end = (int)draw(40), m.first = (int)draw((uint32_t)m.end + 1), m.window = (int)draw(20);
    m.tokens = 1 + (int)draw(draw(8) ? 20 : 300);
    const uint64_t before = state;
    const int count = m.hidden * (1 + m.tokens);
    float *want = malloc((size_t)count * sizeof *want), *got = malloc((size_t)count * sizeof *got);
    int failed = 0;
    for (int path = 0; tz_path_name(path); path++) {
        if (!tz_path_supported(path)) continue;
        state = before;
        weights w = {0};
        tz_decoder *d = make_model(&m, path, &w);
        step(&m, d, path ? got : want);
        read_prompt(&m, d, (path ? got : want) + m.hidden);
        free_model(d, &w);
        for (int i = 0; path && i < count; i++) {
            const float most = m.exact ? 1e-3f * (1 + fabsf(want[i])) : 1e9f;   /* codes at the edge go either way */
            if (fabsf(got[i] - want[i]) <= most) continue;
            printf("%s: %s %d is %g, not %g\n", tz_path_name(path), i < m.hidden ? "step" : "prompt", i,
                   (double)got[i], (double)want[i]);
            failed = 1;
        }
    }
    free(want), free(got);
    return failed;
}

/* Products large enough for helpers, from two threads at once. */
static void *busy(void *unused) {
    (void)unused;
    enum { SIZE = 1024, TOKENS = 8 };
    uint8_t *records = calloc(SIZE, SIZE + 2);
    float *x = calloc(TOKENS * SIZE, sizeof *x), *y = calloc(TOKENS * SIZE, sizeof *y);
    tz_shape *s = tz_table_shape(0, SIZE, SIZE, SIZE, 8);
    for (int i = 0; i < 3; i++) tz_table_linear(s, records, NULL, x, y, TOKENS, TZ_FLOAT32, 0, 3);
    tz_free_shape(s);
    free(records), free(x), free(y);
    return NULL;
}

int main(int count, char **arguments) {
    const int rounds = count > 1 ? atoi(arguments[1]) : 100;
    state = count > 2 ? (uint64_t)atoll(arguments[2]) : 0;
    int failed = 0;
    for (int i = 0; i < rounds && !failed; i++) failed = one_round() | compare_models();
    pthread_t other;
    if (pthread_create(&other, NULL, busy, NULL)) return 2;
    busy(NULL);
    pthread_join(other, NULL);
    printf("%s after %d rounds on:", failed ? "failed" : "passed", rounds);
    for (int path = 0; tz_path_name(path); path++)
        if (tz_path_supported(path)) printf(" %s", tz_path_name(path));
    printf("\n");
    return failed;
}
