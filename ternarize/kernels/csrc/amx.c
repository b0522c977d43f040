/* AVX-512 with VNNI, and AMX for many tokens: products of 16 tokens, 16 rows and up to 64 columns an instruction.
 *
 * A block's codes are unpacked once for all tokens, some pieces at a time so that they stay in the first cache. For each
 * tile of tokens then tile instructions leave a piece's exact sums in memory, and vectors multiply them by the scales and
 * add them up: in the order of tile.h, so that a token's result is the same to the bit.
 *
 * Tiles of registers: 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights. */
#define FIELDS 4
#include "avx512.h"

#include "tile.h"

enum { MOST_PIECES = 64, MOST_BYTES = 16 << 10, TILE_BYTES = 64, SUM_BYTES = ROWS * 4 };

/* Some pieces of a block, as tile instructions read them. */
typedef struct {
    int64_t first, count;     /* pieces */
    int depth, steps;         /* columns of a step; steps of a piece */
    int8_t trits[MOST_BYTES] __attribute__((aligned(CACHE_LINE)));      /* [pieces][steps][depth / 4][16][4] */
    const uint8_t *levels[MOST_PIECES];
} slice;

static void set_tiles(int depth) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? depth : TILE_BYTES);
        config.rows[i] = (uint8_t)(i < 6 ? WIDE_TILE : depth / QUAD);
    }
    __asm__ volatile("" ::"m"(config));             /* GCC 12 believes that the next line reads only eight bytes of it */
    _tile_loadconfig(&config);
}

/* -- a block's codes -> trits ------------------------------------------------------------------------------------- */

static ALWAYS_INLINE int8_t *put_quad(int8_t *out, quad q) {
    _mm512_store_si512(out, _mm512_sub_epi8(q, _mm512_set1_epi8(1)));
    return out + VECTOR_BYTES;
}

/* One piece, filled up with zeros to `bytes`; where its levels begin. */
static const uint8_t *unpack_piece(const tz_piece *piece, const uint8_t *w, int8_t *out, int bytes) {
    const int8_t *end = out + bytes;
    for (int v = piece->vectors; v > 0; v--, w += VECTOR_BYTES) {
        const codes c = unpack(w);
        UNROLL for (int f = 0; f < FIELDS; f++) out = put_quad(out, field(c, f, 1));
    }
    for (int v = piece->tails; v > 0; v--, w += TAIL_BYTES) out = put_quad(out, unpack_tail(w));
    memset(out, 0, (size_t)(end - out));
    return w;
}

/* The pieces from `first` on that there is room for; where the block goes on. */
static const uint8_t *unpack_slice(const tz_shape *s, const uint8_t *w, int64_t first, slice *out) {
    const int bytes = (int)s->stride * ROWS;
    const int64_t most = MOST_BYTES / bytes < MOST_PIECES ? MOST_BYTES / bytes : MOST_PIECES;
    out->first = first;
    out->count = s->pieces - first < most ? s->pieces - first : most;
    for (int64_t i = 0; i < out->count; i++) {
        out->levels[i] = unpack_piece(&s->piece[first + i], w, out->trits + i * bytes, bytes);
        w += s->piece[first + i].bytes;
    }
    return w;
}

/* -- 16 tokens ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const tz_shape *shape;
    const slice *slice;
    const int8_t *activations;
    const float *scale, *sum;                       /* of the activations */
} task;

/* A piece's exact sums into a tile. This is a macro, because a tile's number is part of an instruction. */
#define SUM_PIECE(tile, x_tile, w_tile, t, i)                                               \
    do {                                                                                    \
        const int64_t stride = (t)->shape->stride, depth = (t)->slice->depth;               \
        const int8_t *x = (t)->activations + (i) * stride * WIDE_TILE;                      \
        const int8_t *w = (t)->slice->trits + (i) * stride * ROWS;                          \
        _tile_zero(tile);                                                                   \
        for (int step = (t)->slice->steps; step > 0; step--, x += depth, w += depth * ROWS) { \
            _tile_loadd(x_tile, x, stride);                                                 \
            _tile_loadd(w_tile, w, VECTOR_BYTES);                                           \
            _tile_dpbssd(tile, x_tile, w_tile);                                             \
        }                                                                                   \
    } while (0)

/* Sums as floats, exactly: they are below 2^22. Additions, unlike a conversion, keep their pace beside tiles. */
static ALWAYS_INLINE fvec float_sums(const int32_t *sums) {
    const fvec bias = f_set(0x1.8p23f);
    const ivec biased = i_add(_mm512_load_si512(sums), _mm512_castps_si512(bias));
    return _mm512_sub_ps(_mm512_castsi512_ps(biased), bias);
}

static ALWAYS_INLINE void add_piece(const task *t, int64_t i, const int32_t *sums, fvec *out) {
    fvec sum[WIDE_TILE];
    UNROLL for (int m = 0; m < WIDE_TILE; m++)
        sum[m] = f_mul(float_sums(sums + m * ROWS), f_set(t->scale[i * WIDE_TILE + m]));
    add_levels(WIDE_TILE, t->shape, t->slice->levels[i], sum, t->sum + i * WIDE_TILE, out);
}

/* Piece i's sums leave their tile, the fourth next takes it, and what was stored two pieces ago is added: so neither
 * waits for the other. */
#define STEP(tile, x_tile, w_tile, i)                                                \
    do {                                                                             \
        if ((i) < count) _tile_stored(tile, sums[tile], SUM_BYTES);                  \
        if ((i) + 4 < count) SUM_PIECE(tile, x_tile, w_tile, t, (i) + 4);            \
        if ((i) >= 2 && (i) - 2 < count) add_piece(t, (i) - 2, sums[(tile + 2) % 4], out); \
    } while (0)

static void add_slice(const task *t, float *y) {
    const int64_t count = t->slice->count;
    int32_t sums[4][WIDE_TILE * ROWS] __attribute__((aligned(CACHE_LINE)));
    fvec out[WIDE_TILE];
    UNROLL for (int m = 0; m < WIDE_TILE; m++) out[m] = t->slice->first ? f_load(y + m * ROWS) : f_set(0);
    SUM_PIECE(0, 4, 6, t, 0);
    if (count > 1) SUM_PIECE(1, 5, 7, t, 1);
    if (count > 2) SUM_PIECE(2, 4, 6, t, 2);
    if (count > 3) SUM_PIECE(3, 5, 7, t, 3);
    for (int64_t i = 0; i < count + 2; i += 4) {
        STEP(0, 4, 6, i);
        STEP(1, 5, 7, i + 1);
        STEP(2, 4, 6, i + 2);
        STEP(3, 5, 7, i + 3);
    }
    UNROLL for (int m = 0; m < WIDE_TILE; m++) f_store(y + m * ROWS, out[m]);
}

/* -- all tokens --------------------------------------------------------------------------------------------------- */

static void many(const tz_shape *s, const uint8_t *block, const tz_tokens *t, float *y) {
    slice w;
    w.steps = s->stride > TILE_BYTES ? 2 : 1;
    w.depth = (int)s->stride / w.steps;
    set_tiles(w.depth);
    for (int64_t first = 0; first < s->pieces; first += w.count) {
        block = unpack_slice(s, block, first, &w);
        for (int64_t token = 0; token < t->count; token += WIDE_TILE) {
            const int64_t at = tz_place(s, token, WIDE_TILE, first);
            add_slice(&(task){s, &w, t->codes + at * s->stride, t->scale + at, t->sum + at}, y + token * ROWS);
        }
    }
    _tile_release();                                /* other code of this thread finds its registers as it left them */
}

const tz_kernels tz_amx = KERNELS_WITH("amx", 0, many);
