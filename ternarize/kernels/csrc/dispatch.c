/* Chooses a path's kernels and splits a product into blocks of rows and tiles of tokens. */
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "decoder.h"
#include "threads.h"

/* The last that a processor supports is chosen. Five trits a byte read a seventh less memory and take a third more
 * instructions, which pays only where memory is slower than on the machines measured so far. */
static const tz_kernels *const PATHS[] = {
    &tz_scalar,
#if defined(TZ_X86)
    &tz_avx2, &tz_avx512vbmi, &tz_avx512vnni, &tz_amx,
#elif defined(TZ_NEON)
    &tz_neon,
#endif
};

enum { PATH_COUNT = sizeof PATHS / sizeof *PATHS };

int tz_abi(void) { return TZ_ABI; }

const tz_kernels *tz_find_kernels(int path) { return path >= 0 && path < PATH_COUNT ? PATHS[path] : NULL; }

const char *tz_path_name(int path) { return path >= 0 && path < PATH_COUNT ? PATHS[path]->name : NULL; }

int tz_path_supported(int path) {
    const tz_features f = tz_find_features();
    const char *name = tz_path_name(path);
    if (!name) return 0;
    if (!strcmp(name, "avx2")) return f.avx2 && f.fma && f.f16c;
    if (!strcmp(name, "avx512vnni")) return f.avx512 && f.vnni;
    if (!strcmp(name, "avx512vbmi")) return f.avx512 && f.vnni && f.vbmi;
    if (!strcmp(name, "amx")) return f.avx512 && f.vnni && f.amx;
    if (!strcmp(name, "neon")) return f.dotprod;
    return 1;
}

/* -- shapes ------------------------------------------------------------------------------------------------------ */

static void cut_into_pieces(tz_shape *s, int64_t group, int64_t most, int64_t width) {
    tz_piece *piece = s->piece;
    for (int64_t g = 0; g < s->groups; g++) {
        const int64_t end = (g + 1) * group < s->columns ? (g + 1) * group : s->columns;
        for (int64_t start = g * group; start < end; start += most, piece++) {
            const int columns = (int)(end - start < most ? end - start : most);
            const int vectors = columns / (int)width, left = columns - vectors * (int)width;
            *piece = (tz_piece){start, g, columns, vectors, (int)divide_up(left, QUAD), 0};
        }
    }
}

static tz_shape *make_shape(int path, int64_t rows, int64_t columns, int64_t group, int64_t most, int64_t width) {
    const int64_t groups = divide_up(columns, group), last = columns - (groups - 1) * group;
    const int64_t pieces = (groups - 1) * divide_up(group, most) + divide_up(last, most);
    tz_shape *s = calloc(1, sizeof *s + (size_t)pieces * sizeof(tz_piece));
    if (!s) return NULL;
    s->path = path;
    s->rows = rows;
    s->columns = columns;
    s->group = group;
    s->groups = groups;
    s->pieces = pieces;
    s->width = width;
    s->stride = round_up(group < most ? group : most, 2 * QUAD);
    cut_into_pieces(s, group, most, width);
    return s;
}

tz_shape *tz_ternary_shape(int path, int64_t rows, int64_t columns, int64_t group, int levels) {
    const int64_t width = PATHS[path]->five_a_byte ? 5 * QUAD : 4 * QUAD;
    tz_shape *s = make_shape(path, rows, columns, group, PIECE, width);
    if (!s) return NULL;
    s->levels = levels;
    s->head_bytes = levels == TZ_CODED_SCALES ? FACTOR_BYTES + LEVEL_BYTES : 0;
    s->block_bytes = s->head_bytes;
    s->vectors = s->piece->vectors;
    for (int64_t p = 0; p < s->pieces; p++) {
        tz_piece *piece = &s->piece[p];
        if (piece->tails || piece->vectors != s->vectors) s->vectors = 0;
        piece->bytes = piece->vectors * VECTOR_BYTES + piece->tails * TAIL_BYTES + tz_level_bytes(s);
        s->block_bytes += piece->bytes;
    }
    return s;
}

tz_shape *tz_table_shape(int path, int64_t rows, int64_t columns, int64_t group, int bits) {
    tz_shape *s = make_shape(path, rows, columns, group, TABLE_PIECE, TABLE_PIECE);
    if (!s) return NULL;
    s->bits = bits;
    s->whole = columns % TABLE_PIECE == 0 && (group % TABLE_PIECE == 0 || s->groups == 1);
    s->code_bytes = columns * bits / 8;
    s->record_bytes = s->code_bytes + s->groups * HALF_BYTES;
    s->stride = TABLE_PIECE;
    return s;
}

void tz_free_shape(tz_shape *s) { free(s); }

int64_t tz_packed_bytes(const tz_shape *s) { return divide_up(s->rows, ROWS) * s->block_bytes; }

/* -- products ---------------------------------------------------------------------------------------------------- */

enum { CHUNK = 256, LEAST_CHUNK = 64, TOKEN_GRAIN = 4, LEAST_WORK = 1 << 19, MANY_TOKENS = 16, ALIGNMENT = 64 };
enum { SECOND_CACHE = 1 << 20 };             /* bytes of it for the activations of a kernel of many tokens */

typedef struct {
    const tz_shape *shape;
    const tz_kernels *kernels;
    const uint8_t *weights;
    const float *bias;
    const char *x;
    char *y;
    int dtype;
    tz_tokens tokens;
    int64_t count;            /* of tokens, without filling */
    const uint8_t *up;        /* weights of the same shape, whose product the activation of this one gates; or NULL */
    const float *up_bias;
    int activation;
} product;

static int wide(const product *p) { return p->tokens.tile == WIDE_TILE; }

static void prepare_tokens(void *context, int64_t first, int64_t last) {
    product *p = context;
    (wide(p) ? p->kernels->prepare_many : p->kernels->prepare)(p->shape, p->x, p->dtype, &p->tokens, first, last);
}

/* 16 rows and all tokens, tile by tile -> y [count][16]. */
static void multiply_tiles(const product *p, const uint8_t *weights, int rows, float *y) {
    for (int64_t token = 0; token < p->tokens.count; token += TILE, y += TILE * ROWS)
        if (p->shape->record_bytes)
            p->kernels->table(p->shape, weights, rows, &p->tokens, token, y);
        else
            p->kernels->ternary(p->shape, weights, &p->tokens, token, y);
}

static int rows_of(const tz_shape *s, int64_t block) {
    return (int)(s->rows - block * ROWS < ROWS ? s->rows - block * ROWS : ROWS);
}

/* Some blocks of 16 rows, all tokens -> y [blocks][count][16]. */
static void multiply_blocks(const product *p, const uint8_t *weights, int64_t block, int blocks, float *y) {
    const tz_shape *s = p->shape;
    weights += block * (s->record_bytes ? ROWS * s->record_bytes : s->block_bytes);
    if (wide(p))
        p->kernels->many(s, weights, blocks, &p->tokens, y);
    else
        multiply_tiles(p, weights, rows_of(s, block), y);
}

static void add_bias(const product *p, const float *bias, int64_t block, int blocks, float *y) {
    for (int b = 0; bias && b < blocks; b++, block++)
        for (int64_t t = 0; t < p->tokens.count; t++, y += ROWS)
            for (int r = 0; r < rows_of(p->shape, block); r++) y[r] += bias[block * ROWS + r];
}

/* y becomes activation(y) * up while both are in the cache, biases added before. */
static void apply_gate(const product *p, int64_t block, int blocks, float *y) {
    float up[WIDE_BLOCKS * CHUNK * ROWS] __attribute__((aligned(ALIGNMENT)));
    multiply_blocks(p, p->up, block, blocks, up);
    add_bias(p, p->bias, block, blocks, y);
    add_bias(p, p->up_bias, block, blocks, up);
    for (int64_t i = 0; i < blocks * p->tokens.count * ROWS; i += ROWS) p->kernels->gate(up + i, p->activation, y + i);
}

/* Blocks first .. last of 16 rows, all tokens; a block's weights stay in the cache while the tokens pass. */
static void multiply(void *context, int64_t first, int64_t last) {
    product *p = context;
    const tz_shape *s = p->shape;
    const int64_t size = tz_element(p->dtype);
    for (int64_t block = first; block < last;) {
        const int64_t end = wide(p) && block + WIDE_BLOCKS <= last ? block + WIDE_BLOCKS : block + 1;
        float y[WIDE_BLOCKS * CHUNK * ROWS] __attribute__((aligned(ALIGNMENT)));
        multiply_blocks(p, p->weights, block, (int)(end - block), y);
        if (p->up) apply_gate(p, block, (int)(end - block), y);
        for (const float *own = y; block < end; block++, own += p->tokens.count * ROWS) {
            const int64_t row = block * ROWS;
            const float *bias = p->bias && !p->up ? p->bias + row : NULL;
            p->kernels->store(own, bias, rows_of(s, block), (int)p->count, s->rows, p->y + row * size, p->dtype);
        }
    }
}

/* A second thread costs some microseconds: below half a million products one is faster. */
static int useful_threads(const tz_shape *s, int64_t tokens, int threads) {
    return (double)s->rows * (double)s->columns * (double)tokens < LEAST_WORK ? 1 : threads;
}

/* Tokens of a chunk for `many`: their activations are read again for every block, from the second cache. */
static int64_t wide_chunk(const tz_kernels *k, const tz_shape *s) {
    const int64_t fit = SECOND_CACHE / k->many_bytes(s, WIDE_TILE) * WIDE_TILE;
    return fit > CHUNK ? CHUNK : fit < LEAST_CHUNK ? LEAST_CHUNK : fit;
}

/* The next chunk out of the tokens that are left. For `many`, if they are enough for it, it is filled up with tokens
 * whose results nobody wants, or a few are left to `ternary`. */
static void take_chunk(product *p, int64_t left) {
    const int many = p->kernels->many && !p->shape->record_bytes && !p->tokens.exact && left > TILE;
    const int64_t most = many ? wide_chunk(p->kernels, p->shape) : CHUNK;
    int64_t count = left < most ? left : most;
    if (many && count % WIDE_TILE <= TILE) count -= count % WIDE_TILE;
    p->count = count;
    p->tokens.tile = many ? WIDE_TILE : TILE;
    p->tokens.count = many ? round_up(count, WIDE_TILE) : count;
}

/* Bytes for the activations of this chunk, which is the largest, and of a few tokens that it leaves. */
static size_t room_for(const product *p) {
    if (!wide(p)) return (size_t)round_up((int64_t)tz_tokens_bytes(p->shape, &p->tokens) + 1, ALIGNMENT);
    const tz_tokens few = {.count = TILE};
    const int64_t left = (int64_t)tz_tokens_bytes(p->shape, &few);
    const int64_t many = p->kernels->many_bytes(p->shape, p->tokens.count);
    return (size_t)round_up(left > many ? left : many, ALIGNMENT);
}

/* y for all tokens; p has what does not change from chunk to chunk. */
static int run(product *p, int64_t tokens, int threads) {
    const tz_shape *s = p->shape;
    const int64_t size = tz_element(p->dtype);
    const char *x = p->x;
    char *y = p->y;
    take_chunk(p, tokens);
    const size_t bytes = room_for(p);
    void *room = aligned_alloc(ALIGNMENT, bytes);
    if (!room) return -1;
    if (p->count < p->tokens.count) memset(room, 0, bytes);
    for (int64_t token = 0; token < tokens; token += p->count) {
        take_chunk(p, tokens - token);
        p->x = x + token * s->columns * size;
        p->y = y + token * s->rows * size;
        tz_place_tokens(s, &p->tokens, room);
        threads = useful_threads(s, p->count, threads);
        void (*const share)(tz_work, void *, int64_t, int64_t, int) = tokens < MANY_TOKENS ? tz_run : tz_run_team;
        share(prepare_tokens, p, p->count, TOKEN_GRAIN, threads);
        share(multiply, p, divide_up(s->rows, ROWS), wide(p) ? WIDE_BLOCKS : 1, threads);
    }
    free(room);
    return 0;
}

static product product_of(const tz_shape *s, const uint8_t *weights, const float *bias, const void *x, void *y,
                          int dtype, int exact) {
    return (product){s, PATHS[s->path], weights, bias, x, y, dtype, {.exact = exact}, 0, NULL, NULL, 0};
}

int tz_ternary_linear(const tz_shape *s, const uint8_t *packed, const float *bias, const void *x, void *y,
                      int64_t tokens, int dtype, int exact, int threads) {
    product p = product_of(s, packed, bias, x, y, dtype, exact);
    return run(&p, tokens, threads);
}

int tz_table_linear(const tz_shape *s, const uint8_t *records, const float *bias, const void *x, void *y,
                    int64_t tokens, int dtype, int exact, int threads) {
    product p = product_of(s, records, bias, x, y, dtype, exact);
    return run(&p, tokens, threads);
}

int tz_gated_linear(const linear *gate, const linear *up, int activation, const float *x, float *y, int64_t tokens,
                    int exact, int threads) {
    product p = product_of(gate->shape, gate->packed, gate->bias, x, y, TZ_FLOAT32, exact);
    p.up = up->packed;
    p.up_bias = up->bias;
    p.activation = activation;
    return run(&p, tokens, threads);
}
