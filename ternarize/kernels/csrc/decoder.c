/* All blocks of a decoder for one token, in one call.
 *
 * The rows of linears that share their input are split among the threads as one piece of work, and heads as another;
 * what lies between is a few microseconds and done by the caller. */
#include <stdlib.h>
#include <string.h>

#include "decoder.h"
#include "floats.h"
#include "threads.h"

enum { MOST_SHARING = 3, LEAST_WORK = 1 << 16 };

/* -- a model's description --------------------------------------------------------------------------------------- */

tz_decoder *tz_make_decoder(int path, int64_t blocks, int64_t hidden, int64_t inner, int64_t heads, int64_t key_heads,
                            int64_t head_size, int activation, int exact) {
    const tz_kernels *kernels = tz_find_kernels(path);
    if (!kernels || head_size > HEAD_SIZE) return NULL;
    tz_decoder *d = calloc(1, sizeof *d + (size_t)(blocks + 1) * sizeof(block));
    if (!d) return NULL;
    d->kernels = kernels;
    d->blocks = blocks;
    d->hidden = hidden;
    d->inner = inner;
    d->heads = heads;
    d->key_heads = key_heads;
    d->head_size = head_size;
    d->activation = activation;
    d->exact = exact;
    return d;
}

void tz_free_decoder(tz_decoder *d) { free(d); }

void tz_set_linear(tz_decoder *d, int64_t at, int which, const tz_shape *shape, const uint8_t *packed,
                   const float *bias) {
    d->block[at].linear[which] = (linear){shape, packed, bias};
}

void tz_set_norm(tz_decoder *d, int64_t at, int place, const float *weight, float epsilon) {
    d->block[at].norm[place] = (tz_norm){weight, epsilon};
}

void tz_set_attention(tz_decoder *d, int64_t at, float scale, int64_t window, int rope, int cache, int64_t place) {
    block *b = &d->block[at];
    b->scale = scale;
    b->window = window;
    b->rope = rope;
    d->ropes = rope >= d->ropes ? rope + 1 : d->ropes;
    b->cache = cache;
    b->place = place;
}

/* -- one token --------------------------------------------------------------------------------------------------- */

typedef struct {
    const tz_decoder *d;
    const block *block;
    const tz_cache *cache;    /* the block's */
    int threads;
    float *x;                 /* [hidden], the residual stream */
    float *branch;            /* [hidden], what is about to be added to it */
    float *normal;            /* [hidden], its norm */
    float *query, *key, *value, *mixed, *inner;
    float *scores;            /* [heads][positions] */
    int64_t positions;        /* the most that a head sees */
    char *room;               /* of tokens */
    size_t room_bytes;
} step;

/* Linears that share their input. */
typedef struct {
    const step *s;
    const linear *linear;
    int count;
    float *y[MOST_SHARING];
    tz_tokens tokens[MOST_SHARING];
} product;

static int64_t row_blocks(const linear *l) { return divide_up(l->shape->rows, ROWS); }

static void prepare_input(product *p, const float *x) {
    for (int i = 0; i < p->count; i++) {
        const tz_shape *shape = p->linear[i].shape;
        if (i > 0 && tz_same_cut(shape, p->linear[i - 1].shape)) {
            p->tokens[i] = p->tokens[i - 1];
            continue;
        }
        p->tokens[i] = (tz_tokens){.exact = p->s->d->exact, .tile = TILE, .count = 1};
        tz_place_tokens(shape, &p->tokens[i], p->s->room + (size_t)i * p->s->room_bytes);
        p->s->d->kernels->prepare(shape, x, TZ_FLOAT32, &p->tokens[i], 0, 1);
    }
}

/* 16 rows of one of the linears -> y [rows]. */
static void multiply_block(const product *p, int i, int64_t at, float *y) {
    const linear *l = &p->linear[i];
    const tz_kernels *kernels = p->s->d->kernels;
    const int64_t row = at * ROWS;
    const int rows = (int)(l->shape->rows - row < ROWS ? l->shape->rows - row : ROWS);
    float tile[ROWS];
    kernels->ternary(l->shape, l->packed + at * l->shape->block_bytes, &p->tokens[i], 0, tile);
    kernels->store(tile, l->bias ? l->bias + row : NULL, rows, 1, ROWS, y, TZ_FLOAT32);
}

/* Blocks first .. last of rows, those of one linear behind those of another. */
static void multiply(void *context, int64_t first, int64_t last) {
    const product *p = context;
    for (int i = 0; i < p->count; i++) {
        const int64_t blocks = row_blocks(&p->linear[i]), end = last < blocks ? last : blocks;
        for (int64_t at = first > 0 ? first : 0; at < end; at++) multiply_block(p, i, at, p->y[i] + at * ROWS);
        first -= blocks;
        last -= blocks;
    }
}

/* The same rows of gate and up, and what becomes of them. */
static void multiply_gated(void *context, int64_t first, int64_t last) {
    const product *p = context;
    const step *s = p->s;
    for (int64_t at = first; at < last; at++) {
        const int64_t left = s->d->inner - at * ROWS;
        float gate[ROWS] = {0}, up[ROWS] = {0};
        multiply_block(p, 0, at, gate);
        multiply_block(p, 1, at, up);
        s->d->kernels->gate(up, s->d->activation, gate);
        memcpy(s->inner + at * ROWS, gate, (size_t)(left < ROWS ? left : ROWS) * sizeof(float));
    }
}

/* Below some work, waking another thread costs more than it saves. */
static int useful_threads(const step *s, double products) { return products < LEAST_WORK ? 1 : s->threads; }

/* `work` takes `at_once` blocks of rows in one part. */
static void run_product(product *p, const float *x, tz_work work, int at_once) {
    int64_t blocks = 0;
    for (int i = 0; i < p->count; i++) blocks += row_blocks(&p->linear[i]);
    const int threads = useful_threads(p->s, (double)blocks * ROWS * (double)p->linear->shape->columns);
    prepare_input(p, x);
    tz_run(work, p, blocks / at_once, 1, threads);
}

static void write_half(const float *x, int64_t size, int dtype, uint16_t *out) {
    if (dtype == TZ_BFLOAT16)
        for (int64_t i = 0; i < size; i++) out[i] = to_bfloat16(x[i]);
    else
        for (int64_t i = 0; i < size; i++) out[i] = to_float16(x[i]);
}

/* Keys (0) or values (1) of a head, from a position on. */
static char *cached(const step *s, int values, int64_t head, int64_t position) {
    const tz_cache *c = s->cache;
    const int64_t size = tz_element(c->dtype);
    const int64_t heads = (2 * s->block->place + values) * s->d->key_heads + head;
    return (char *)c->memory + (heads * c->capacity + position) * s->d->head_size * size;
}

static void write_cache(const step *s, int values, const float *x) {
    const int64_t size = s->d->head_size;
    for (int64_t head = 0; head < s->d->key_heads; head++, x += size) {
        char *out = cached(s, values, head, s->cache->end);
        if (s->cache->dtype == TZ_FLOAT32)
            memcpy(out, x, (size_t)size * sizeof(float));
        else
            write_half(x, size, s->cache->dtype, (uint16_t *)out);
    }
}

static void attend(void *context, int64_t first, int64_t last) {
    const step *s = context;
    const tz_cache *c = s->cache;
    const int64_t size = s->d->head_size, sharing = s->d->heads / s->d->key_heads, window = s->block->window;
    const int64_t from = window > 0 && c->end + 1 - window > c->first ? c->end + 1 - window : c->first;
    for (int64_t head = first; head < last;) {
        const int64_t others = (head / sharing + 1) * sharing, end = last < others ? last : others;
        const char *keys = cached(s, 0, head / sharing, from), *values = cached(s, 1, head / sharing, from);
        const tz_attention a = {keys, values, c->end + 1 - from, size, s->block->scale, c->dtype};
        float *scores = s->scores + head * s->positions;
        s->d->kernels->attend(&a, end - head, s->query + head * size, scores, s->mixed + head * size);
        head = end;
    }
}

/* Heads of one piece of work: some that share their keys, if there is one for each thread. */
static int64_t heads_at_once(const tz_decoder *d, int threads) {
    const int64_t sharing = d->heads / d->key_heads;
    int64_t count = TOGETHER;
    while (sharing % count || d->heads / count < threads) count--;
    return count;
}

static void run_attention(step *s, const float *ropes) {
    const tz_decoder *d = s->d;
    const linear *l = s->block->linear;
    product in = {s, l + TZ_QUERY, 3, {s->query, s->key, s->value}, {{0}}};
    product out = {s, l + TZ_OUT, 1, {s->branch}, {{0}}};
    tz_normalize(d, s->block, TZ_ATTENTION_NORM, s->x, d->hidden, s->normal);
    run_product(&in, s->normal, multiply, 1);
    tz_turn_heads(d, s->block, TZ_QUERY_NORM, ropes, d->heads, s->query);
    tz_turn_heads(d, s->block, TZ_KEY_NORM, ropes, d->key_heads, s->key);
    write_cache(s, 0, s->key);
    write_cache(s, 1, s->value);
    const int threads = useful_threads(s, 2.0 * (double)(d->heads * d->head_size * s->positions));
    tz_run(attend, s, d->heads, heads_at_once(d, threads), threads);
    run_product(&out, s->mixed, multiply, 1);
    tz_add_branch(d, s->block, TZ_ATTENTION_END_NORM, s->branch, s->x);
}

static void run_feed_forward(step *s) {
    const linear *l = s->block->linear;
    product up = {s, l + TZ_GATE, 2, {NULL}, {{0}}};
    product down = {s, l + TZ_DOWN, 1, {s->branch}, {{0}}};
    tz_normalize(s->d, s->block, TZ_FEED_NORM, s->x, s->d->hidden, s->normal);
    run_product(&up, s->normal, multiply_gated, 2);
    run_product(&down, s->inner, multiply, 1);
    tz_add_branch(s->d, s->block, TZ_FEED_END_NORM, s->branch, s->x);
}

/* -- memory for one call ----------------------------------------------------------------------------------------- */

static size_t most_token_bytes(const tz_decoder *d) {
    const tz_tokens one = {.exact = d->exact, .tile = TILE, .count = 1};
    size_t most = 0;
    for (int64_t b = 0; b < d->blocks; b++)
        for (int i = 0; i < TZ_LINEARS; i++) {
            const size_t bytes = tz_tokens_bytes(d->block[b].linear[i].shape, &one);
            most = bytes > most ? bytes : most;
        }
    return (size_t)round_up((int64_t)most, 64);
}

static int64_t most_positions(const tz_decoder *d, const tz_cache *caches) {
    int64_t most = 0;
    for (int64_t b = 0; b < d->blocks; b++) {
        const tz_cache *c = &caches[d->block[b].cache];
        most = c->end + 1 - c->first > most ? c->end + 1 - c->first : most;
    }
    return most;
}

static void take(float **part, float **room, int64_t count) {
    *part = *room;
    *room += round_up(count, ROWS);
}

/* All floats of a step, in one piece of memory. */
static int64_t count_floats(const step *s) {
    const tz_decoder *d = s->d;
    const int64_t rows = 3 * d->hidden + 2 * (d->heads + d->key_heads) * d->head_size + d->inner;
    return rows + d->heads * s->positions + 9 * ROWS;                                  /* and the rounding up */
}

static void place_rooms(step *s, float *room) {
    const tz_decoder *d = s->d;
    take(&s->x, &room, d->hidden);
    take(&s->branch, &room, d->hidden);
    take(&s->normal, &room, d->hidden);
    take(&s->query, &room, d->heads * d->head_size);
    take(&s->key, &room, d->key_heads * d->head_size);
    take(&s->value, &room, d->key_heads * d->head_size);
    take(&s->mixed, &room, d->heads * d->head_size);
    take(&s->inner, &room, d->inner);
    take(&s->scores, &room, d->heads * s->positions);
    s->room = (char *)room;
}

int tz_step(const tz_decoder *d, const float *x, float *y, const float *ropes, const tz_cache *caches, int threads) {
    step s = {.d = d, .threads = threads, .positions = most_positions(d, caches), .room_bytes = most_token_bytes(d)};
    float *room = malloc((size_t)count_floats(&s) * sizeof(float) + MOST_SHARING * s.room_bytes);
    if (!room) return -1;
    place_rooms(&s, room);
    memcpy(s.x, x, (size_t)d->hidden * sizeof(float));
    for (int64_t b = 0; b < d->blocks; b++) {
        s.block = &d->block[b];
        s.cache = &caches[s.block->cache];
        run_attention(&s, ropes);
        run_feed_forward(&s);
    }
    s.block = &d->block[d->blocks];
    tz_normalize(d, s.block, TZ_ATTENTION_NORM, s.x, d->hidden, y);
    free(room);
    return 0;
}
