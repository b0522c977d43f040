/* A block of a decoder for the tokens of a prompt, but for their attention, which is the caller's.
 *
 * Linears run as tz_ternary_linear runs them; what lies between is shared out token by token. */
#include <string.h>

#include "decoder.h"
#include "threads.h"

enum { CHUNK = 256 };                        /* tokens between which the feed-forward's inner features are held */

typedef struct {
    const tz_decoder *d;
    const block *block;
    const float *ropes;       /* [tokens][ropes][2][head size] */
    const float *entering;    /* [tokens][hidden], the residual stream where the block begins */
    float *x;                 /* ... and behind its attention */
    float *branch;            /* [tokens][hidden], what is about to be added to it */
    float *normal;            /* [tokens][hidden], its norm */
    float *query, *key;       /* [tokens][heads][head size] */
    float *gate, *up;         /* [tokens][inner] */
} prompt;

static int multiply(const prompt *p, int which, const float *x, float *y, int64_t tokens, int threads) {
    const linear *l = &p->block->linear[which];
    return tz_ternary_linear(l->shape, l->packed, l->bias, x, y, tokens, TZ_FLOAT32, p->d->exact, threads);
}

/* -- parts of the work, tokens first .. last ---------------------------------------------------------------------- */

static void enter(void *context, int64_t first, int64_t last) {
    const prompt *p = context;
    const int64_t size = p->d->hidden;
    for (int64_t t = first; t < last; t++)
        tz_normalize(p->d, p->block, TZ_ATTENTION_NORM, p->entering + t * size, size, p->normal + t * size);
}

static void turn(void *context, int64_t first, int64_t last) {
    const prompt *p = context;
    const tz_decoder *d = p->d;
    for (int64_t t = first; t < last; t++) {
        const float *ropes = p->ropes + t * 2 * d->ropes * d->head_size;
        tz_turn_heads(d, p->block, TZ_QUERY_NORM, ropes, d->heads, p->query + t * d->heads * d->head_size);
        tz_turn_heads(d, p->block, TZ_KEY_NORM, ropes, d->key_heads, p->key + t * d->key_heads * d->head_size);
    }
}

static void join_attention(void *context, int64_t first, int64_t last) {
    const prompt *p = context;
    const int64_t size = p->d->hidden;
    for (int64_t t = first; t < last; t++) {
        tz_add_branch(p->d, p->block, TZ_ATTENTION_END_NORM, p->branch + t * size, p->x + t * size);
        tz_normalize(p->d, p->block, TZ_FEED_NORM, p->x + t * size, size, p->normal + t * size);
    }
}

static void apply_gate(void *context, int64_t first, int64_t last) {
    const prompt *p = context;
    const int64_t size = p->d->inner, whole = size / ROWS * ROWS;
    for (int64_t t = first; t < last; t++) {
        float *gate = p->gate + t * size;
        const float *up = p->up + t * size;
        for (int64_t i = 0; i < whole; i += ROWS) p->d->kernels->gate(up + i, p->d->activation, gate + i);
        if (whole < size) {                  /* what lies behind is another token's */
            const size_t left = (size_t)(size - whole) * sizeof(float);
            float last_gate[ROWS] = {0}, last_up[ROWS] = {0};
            memcpy(last_gate, gate + whole, left);
            memcpy(last_up, up + whole, left);
            p->d->kernels->gate(last_up, p->d->activation, last_gate);
            memcpy(gate + whole, last_gate, left);
        }
    }
}

static void join_feed_forward(void *context, int64_t first, int64_t last) {
    const prompt *p = context;
    const int64_t size = p->d->hidden;
    for (int64_t t = first; t < last; t++)
        tz_add_branch(p->d, p->block, TZ_FEED_END_NORM, p->branch + t * size, p->x + t * size);
}

/* act(gate(x)) * up(x) -> gate [tokens][inner]. */
static int feed(prompt *p, const float *x, int64_t tokens, int threads) {
    const linear *gate = &p->block->linear[TZ_GATE], *up = &p->block->linear[TZ_UP];
    if (tz_same_cut(gate->shape, up->shape) && gate->shape->levels == up->shape->levels)
        return tz_gated_linear(gate, up, p->d->activation, x, p->gate, tokens, p->d->exact, threads);
    if (multiply(p, TZ_GATE, x, p->gate, tokens, threads)) return -1;
    if (multiply(p, TZ_UP, x, p->up, tokens, threads)) return -1;
    tz_run_team(apply_gate, p, tokens, 1, threads);
    return 0;
}

/* -- a block ------------------------------------------------------------------------------------------------------ */

static int64_t chunk_of(int64_t tokens) { return tokens < CHUNK ? tokens : CHUNK; }

int64_t tz_prompt_floats(const tz_decoder *d, int64_t tokens) {
    return 2 * tokens * d->hidden + 2 * chunk_of(tokens) * d->inner;
}

static prompt place(const tz_decoder *d, int64_t at, float *room, int64_t tokens) {
    prompt p = {.d = d, .block = &d->block[at], .branch = room, .normal = room + tokens * d->hidden};
    p.gate = p.normal + tokens * d->hidden;
    p.up = p.gate + chunk_of(tokens) * d->inner;
    return p;
}

int tz_enter_attention(const tz_decoder *d, int64_t at, const float *x, const float *ropes, float *query, float *key,
                       float *value, float *room, int64_t tokens, int threads) {
    prompt p = place(d, at, room, tokens);
    p.entering = x;
    p.ropes = ropes;
    p.query = query;
    p.key = key;
    tz_run_team(enter, &p, tokens, 1, threads);
    if (multiply(&p, TZ_QUERY, p.normal, query, tokens, threads)) return -1;
    if (multiply(&p, TZ_KEY, p.normal, key, tokens, threads)) return -1;
    if (multiply(&p, TZ_VALUE, p.normal, value, tokens, threads)) return -1;
    tz_run_team(turn, &p, tokens, 1, threads);
    return 0;
}

int tz_leave_attention(const tz_decoder *d, int64_t at, const float *mixed, float *x, float *room, int64_t tokens,
                       int threads) {
    prompt p = place(d, at, room, tokens);
    p.x = x;
    if (multiply(&p, TZ_OUT, mixed, p.branch, tokens, threads)) return -1;
    tz_run_team(join_attention, &p, tokens, 1, threads);
    for (int64_t first = 0; first < tokens; first += CHUNK) {
        const int64_t count = chunk_of(tokens - first), start = first * d->hidden;
        if (feed(&p, p.normal + start, count, threads)) return -1;
        if (multiply(&p, TZ_DOWN, p.gate, p.branch + start, count, threads)) return -1;
    }
    tz_run_team(join_feed_forward, &p, tokens, 1, threads);
    return 0;
}
