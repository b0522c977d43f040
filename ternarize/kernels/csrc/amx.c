/* AVX-512 with VNNI, and AMX for many tokens: products of 16 tokens, 16 rows and 32 columns an instruction.
 *
 * Weights are unpacked to bfloat16, scales and shifts in them, and meet activations in bfloat16: both lose a sixth of a
 * percent, where int8 with a scale for each group loses half of one. A sum then passes through all groups in its tile,
 * in float32; sums of int8 products would leave theirs behind every group, to be scaled.
 *
 * A slice of two blocks is unpacked for all tokens, so much that it stays in the first cache; 32 tokens then pass at a
 * time. Columns of a slice are those of whole pieces, `stride` apart, filled up to whole steps of 32; in each four, the
 * order is 0, 2, 1, 3, in which 16-bit lanes find the bits of their codes.
 *
 * Tiles of registers: 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights. */
#define FIELDS 4
#include "avx512.h"

#include "tile.h"

enum { STEP = 32, STEPS = 16, TILE_HALVES = STEP * WIDE_TILE, TILE_BYTES = 64, SWAP_MIDDLE = 0xd8 };

/* How a row of weights and of activations is cut. */
typedef struct {
    int64_t pieces, steps;      /* of a slice; the last may have fewer */
    int64_t last_steps, count;  /* slices */
} cut;

static cut find_cut(const tz_shape *s) {
    const int64_t pieces = STEPS * STEP / s->stride, count = divide_up(s->pieces, pieces);
    return (cut){pieces, divide_up(pieces * s->stride, STEP),
                 divide_up((s->pieces - (count - 1) * pieces) * s->stride, STEP), count};
}

static int64_t all_steps(const cut *c) { return (c->count - 1) * c->steps + c->last_steps; }

/* -- activations: [tiles of 16 tokens][steps][16][32], bfloat16 ---------------------------------------------------- */

static int64_t many_bytes(const tz_shape *s, int64_t tokens) {
    const cut c = find_cut(s);
    return round_up(tokens, WIDE_TILE) * all_steps(&c) * TILE_BYTES;
}

/* Pieces first .. last of a token's row, `stride` apart, with zeros behind them -> [columns]. */
static void read_pieces(const tz_shape *s, const void *row, int dtype, int64_t first, int64_t last, int64_t columns,
                        float *out) {
    const tz_piece *piece = &s->piece[first], *end = &s->piece[last];
    if (end[-1].start - piece->start == (last - 1 - first) * s->stride) {      /* so they lie in the row */
        const int64_t count = end[-1].start + end[-1].columns - piece->start;
        read_activations(row, dtype, piece->start, (int)count, out);
        memset(out + count, 0, (size_t)(columns - count) * sizeof *out);
        return;
    }
    memset(out, 0, (size_t)columns * sizeof *out);
    for (; piece < end; piece++, out += s->stride) read_activations(row, dtype, piece->start, piece->columns, out);
}

static ALWAYS_INLINE void round_step(const float *restrict values, uint16_t *restrict out) {
    uint16_t halves[STEP];
    for (int i = 0; i < STEP; i++) halves[i] = to_bfloat16(values[i]);
    const __m512i low = _mm512_shufflelo_epi16(_mm512_loadu_si512(halves), SWAP_MIDDLE);
    _mm512_storeu_si512(out, _mm512_shufflehi_epi16(low, SWAP_MIDDLE));
}

static void prepare_many(const tz_shape *s, const void *x, int dtype, tz_tokens *t, int64_t first, int64_t last) {
    const cut c = find_cut(s);
    const int64_t size = tz_element(dtype), tile_size = all_steps(&c) * TILE_HALVES;
    for (int64_t token = first; token < last; token++) {
        const void *row = (const char *)x + token * s->columns * size;
        uint16_t *out = t->halves + token / WIDE_TILE * tile_size + token % WIDE_TILE * STEP;
        for (int64_t p = 0; p < s->pieces; p += c.pieces) {
            const int whole = p + c.pieces < s->pieces;
            const int64_t steps = whole ? c.steps : c.last_steps;
            float values[STEPS * STEP];
            read_pieces(s, row, dtype, p, whole ? p + c.pieces : s->pieces, steps * STEP, values);
            for (int64_t i = 0; i < steps; i++, out += TILE_HALVES) round_step(values + i * STEP, out);
        }
    }
}

/* -- weights: [steps][16 pairs of columns][16 rows][2], bfloat16 --------------------------------------------------- */

/* Each lane rounded, twice. Not by to_bfloat16, which GCC 12 leaves in scalars here: products took a third longer. */
static ALWAYS_INLINE __m512i pair_of(fvec value) {
    const __m512i bits = _mm512_castps_si512(value), half = _mm512_set1_epi32(0x7fff);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(i_add(bits, i_add(half, even)), 16);
    return _mm512_or_si512(rounded, _mm512_slli_epi32(rounded, 16));
}

typedef struct {
    __m512i low, middle, high;
} levels;

/* Two columns of 16 rows, whose codes are in the bits 1 and 2 times `bit` of each 16. */
static ALWAYS_INLINE uint16_t *put_pair(uint16_t *out, __m512i codes, int bit, const levels *l) {
    const __mmask32 is_middle = _mm512_test_epi16_mask(codes, _mm512_set1_epi16((short)bit));
    const __mmask32 is_high = _mm512_test_epi16_mask(codes, _mm512_set1_epi16((short)(bit << 1)));
    const __m512i value = _mm512_mask_mov_epi16(l->low, is_middle, l->middle);
    _mm512_store_si512(out, _mm512_mask_mov_epi16(value, is_high, l->high));
    return out + STEP;
}

/* One piece, filled up with zeros to `stride` columns; where the block goes on. */
static const uint8_t *unpack_piece(const tz_shape *s, const uint8_t *block, const tz_piece *piece, const uint8_t *w,
                                   uint16_t *out) {
    const uint16_t *end = out + s->stride * ROWS;
    const uint8_t *at = w + piece->vectors * VECTOR_BYTES + piece->tails * TAIL_BYTES;
    const int coded = s->levels == TZ_CODED_SCALES;
    const fvec factors = coded ? f_load((const float *)block) : f_set(1);
    const fvec scale = f_mul(factors, read_scales(coded, block, at));
    const fvec shift = s->levels == TZ_SCALES_AND_SHIFTS ? f_halves(at + LEVEL_BYTES) : f_set(0);
    const levels l = {pair_of(_mm512_sub_ps(shift, scale)), pair_of(shift), pair_of(_mm512_add_ps(shift, scale))};
    for (int v = piece->vectors; v > 0; v--, w += VECTOR_BYTES) {
        const __m512i codes = _mm512_loadu_si512(w);
        UNROLL for (int f = 0; f < FIELDS; f++) {
            out = put_pair(out, codes, 1 << 2 * f, &l);
            out = put_pair(out, codes, 1 << (2 * f + 8), &l);
        }
    }
    for (int v = piece->tails; v > 0; v--, w += TAIL_BYTES) {
        const __m512i codes = unpack_tail(w);
        out = put_pair(put_pair(out, codes, 1, &l), codes, 1 << 8, &l);
    }
    memset(out, 0, (size_t)((const char *)end - (const char *)out));
    return w + tz_level_bytes(s);
}

/* Some pieces of a block, filled up with zeros to whole steps; where the block goes on. */
static const uint8_t *unpack_slice(const tz_shape *s, const uint8_t *block, int64_t first, int64_t pieces,
                                   const uint8_t *w, uint16_t *out) {
    for (int64_t p = first; p < first + pieces; p++, out += s->stride * ROWS)
        w = unpack_piece(s, block, &s->piece[p], w, out);
    memset(out, 0, (size_t)(round_up(pieces * s->stride, STEP) - pieces * s->stride) * ROWS * sizeof *out);
    return w;
}

/* -- products ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const uint16_t *x;          /* of the first tile of tokens; `x_next` on, the second */
    int64_t x_next;
    const uint16_t *w;          /* of the first block; `w_next` on, the second */
    int64_t w_next, steps;
    float *y;                   /* [tokens][16] of the first tile and block; `y_next` on, the second block */
    int64_t y_next;
    int begun;                  /* whether y holds sums to be added to */
} task;

#define BEGIN(tile, y) \
    if (t->begun)      \
        _tile_loadd(tile, y, CACHE_LINE); \
    else               \
        _tile_zero(tile)

/* One or two tiles of tokens by one or two blocks. */
static ALWAYS_INLINE void add_slice(const int tiles, const int blocks, const task *t) {
    float *y = t->y, *below = y + WIDE_TILE * ROWS, *right = y + t->y_next, *corner = right + WIDE_TILE * ROWS;
    const uint16_t *x = t->x, *w = t->w;
    BEGIN(0, y);
    if (tiles > 1) { BEGIN(1, below); }
    if (blocks > 1) { BEGIN(2, right); }
    if (tiles > 1 && blocks > 1) { BEGIN(3, corner); }
    for (int64_t step = 0; step < t->steps; step++, x += TILE_HALVES, w += TILE_HALVES) {
        _tile_loadd(6, w, TILE_BYTES);
        _tile_loadd(4, x, TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        if (tiles > 1) {
            _tile_loadd(5, x + t->x_next, TILE_BYTES);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (blocks > 1) {
            _tile_loadd(7, w + t->w_next, TILE_BYTES);
            _tile_dpbf16ps(2, 4, 7);
            if (tiles > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y, CACHE_LINE);
    if (tiles > 1) _tile_stored(1, below, CACHE_LINE);
    if (blocks > 1) _tile_stored(2, right, CACHE_LINE);
    if (tiles > 1 && blocks > 1) _tile_stored(3, corner, CACHE_LINE);
}

static void set_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = TILE_BYTES, config.rows[i] = WIDE_TILE;
    __asm__ volatile("" ::"m"(config));             /* GCC 12 believes that the next line reads only eight bytes of it */
    _tile_loadconfig(&config);
}

static void many(const tz_shape *s, const uint8_t *weights, int blocks, const tz_tokens *t, float *y) {
    uint16_t unpacked[WIDE_BLOCKS][STEPS * TILE_HALVES] __attribute__((aligned(CACHE_LINE)));
    const cut c = find_cut(s);
    const int64_t tile_size = all_steps(&c) * TILE_HALVES, y_next = t->count * ROWS;
    const uint8_t *block[WIDE_BLOCKS] = {weights, weights + s->block_bytes};
    const uint8_t *w[WIDE_BLOCKS] = {block[0] + s->head_bytes, block[1] + s->head_bytes};
    set_tiles();
    for (int64_t slice = 0; slice < c.count; slice++) {
        const int64_t first = slice * c.pieces, left = s->pieces - first;
        for (int b = 0; b < blocks; b++)
            w[b] = unpack_slice(s, block[b], first, left < c.pieces ? left : c.pieces, w[b], unpacked[b]);
        task own = {t->halves + slice * c.steps * TILE_HALVES, tile_size, unpacked[0], STEPS * TILE_HALVES,
                    slice < c.count - 1 ? c.steps : c.last_steps, y, y_next, slice > 0};
        for (int64_t token = 0; token < t->count; token += 2 * WIDE_TILE) {
            const int two = token + WIDE_TILE < t->count;
            if (two && blocks > 1)
                add_slice(2, 2, &own);
            else if (two)
                add_slice(2, 1, &own);
            else if (blocks > 1)
                add_slice(1, 2, &own);
            else
                add_slice(1, 1, &own);
            own.x += 2 * tile_size, own.y += 2 * WIDE_TILE * ROWS;
        }
    }
    _tile_release();                                /* other code of this thread finds its registers as it left them */
}

const tz_kernels tz_amx = KERNELS_WITH("amx", 0, many_bytes, prepare_many, many);
