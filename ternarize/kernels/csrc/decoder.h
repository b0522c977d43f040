/* What a decoder is made of, and what its blocks do with a token between their linears. */
#pragma once

#include "kernels.h"

typedef struct {
    const tz_shape *shape;
    const uint8_t *packed;
    const float *bias;
} linear;

typedef struct {
    linear linear[TZ_LINEARS];
    tz_norm norm[TZ_NORMS];
    float scale;
    int64_t window, place;
    int rope, cache;
} block;

struct tz_decoder {
    const tz_kernels *kernels;
    int64_t blocks, hidden, inner, heads, key_heads, head_size;
    int activation, exact;
    int64_t ropes;            /* that blocks name */
    block block[];            /* and one more, of which only the first norm counts */
};

/* One of a block's norms, where it has that one; x and out may be the same. */
static inline void tz_normalize(const tz_decoder *d, const block *b, int place, const float *x, int64_t size,
                                float *out) {
    if (b->norm[place].weight) d->kernels->normalize(x, &b->norm[place], size, out);
}

/* The norm of heads, and their rotation by a position's ropes [ropes][2][head size]. */
static inline void tz_turn_heads(const tz_decoder *d, const block *b, int place, const float *ropes, int64_t heads,
                                 float *x) {
    for (int64_t head = 0; head < heads; head++, x += d->head_size) {
        tz_normalize(d, b, place, x, d->head_size, x);
        d->kernels->rotate(x, ropes + 2 * d->head_size * b->rope, d->head_size);
    }
}

/* What a branch came to, added to the residual stream. */
static inline void tz_add_branch(const tz_decoder *d, const block *b, int place, float *branch, float *x) {
    tz_normalize(d, b, place, branch, d->hidden, branch);
    for (int64_t i = 0; i < d->hidden; i++) x[i] += branch[i];
}

/* activation(x gate') * (x up') -> y float [tokens][rows]; gate and up are cut alike (tz_same_cut). */
int tz_gated_linear(const linear *gate, const linear *up, int activation, const float *x, float *y, int64_t tokens,
                    int exact, int threads);

/* Whether activations that were prepared for one weight serve another. */
static inline int tz_same_cut(const tz_shape *a, const tz_shape *b) {
    return a->columns == b->columns && a->group == b->group;
}
