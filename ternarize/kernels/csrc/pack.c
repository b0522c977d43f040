/* From a file's dense trits to a path's blocks; no float weight is ever made. */
#include <string.h>

#include "layout.h"
#include "ternarize.h"
#include "threads.h"

enum { PER_BYTE = 5, ENTRY = 8, BYTES = 256 };      /* eight bytes are copied faster than five */
enum { STRIP = 256 };                               /* bytes of trits that are read together */

typedef struct {
    const tz_shape *shape;
    const uint8_t *trits;
    const uint16_t *scale, *shift;
    const uint8_t *codes;                   /* instead of them, with what they stand for */
    const float *factors;
    const uint16_t *steps;
    uint8_t *packed;
    uint8_t digits[BYTES][ENTRY];
} packing;

/* Codes of columns 4 i .. 4 i + 3 of a piece, one a byte. */
static uint32_t quad_at(const uint8_t *codes, int i) {
    uint32_t quad;
    memcpy(&quad, codes + QUAD * i, sizeof quad);
    return quad;
}

/* Bytes do not overflow into each other: 2 (1 + 4 + 16 + 64) and 2 (1 + 3 + 9 + 27 + 81) are below 256. */
static uint32_t join_quads(const uint8_t *codes, int fields) {
    if (fields != PER_BYTE)
        return quad_at(codes, 0) | quad_at(codes, 1) << 2 | quad_at(codes, 2) << 4 | quad_at(codes, 3) << 6;
    uint32_t joined = 0;
    for (int f = PER_BYTE - 1; f >= 0; f--) joined = joined * 3 + quad_at(codes, f);
    return joined;
}

static void pack_piece(const tz_piece *piece, int fields, int row, const uint8_t *codes, uint8_t *vector,
                       uint8_t *tail) {
    for (int v = 0; v < piece->vectors; v++) {
        const uint32_t joined = join_quads(codes + v * fields * QUAD, fields);
        memcpy(vector + v * VECTOR_BYTES + QUAD * row, &joined, sizeof joined);
    }
    for (int q = 0; q < piece->tails; q++) {
        const uint32_t quad = quad_at(codes, piece->vectors * fields + q);
        uint8_t *at = tail + q * TAIL_BYTES + QUAD * (row % QUAD);
        for (int j = 0; j < QUAD; j++) at[j] |= (uint8_t)((quad >> 8 * j & 3) << 2 * (row / QUAD));
    }
}

static void pack_level(const tz_shape *s, int64_t row, int64_t group, const uint16_t *levels, uint8_t *out) {
    memcpy(out + row % ROWS * HALF_BYTES, levels + row * s->groups + group, HALF_BYTES);
}

static void pack_code(const packing *job, int64_t row, int64_t group, uint8_t *out) {
    const int nibble = job->codes[row * divide_up(job->shape->groups, 2) + group / 2] >> 4 * (group % 2) & 15;
    out[row % CODED_BYTES] |= (uint8_t)(nibble << (row % ROWS < CODED_BYTES ? 0 : 4));
}

/* A row's codes from byte `first` on, as many as fit, and three zeros; returns the column behind them. Many at once,
 * because the processor waits where it reads what it has just written in other pieces. */
static int64_t read_codes(const packing *job, int64_t row, int64_t first, uint8_t *strip) {
    const int64_t all = divide_up(job->shape->columns, PER_BYTE), left = all - first;
    const int64_t count = left < STRIP ? left : STRIP;
    const uint8_t *bytes = job->trits + row * all + first;
    for (int64_t b = 0; b < count; b++) memcpy(strip + b * PER_BYTE, job->digits[bytes[b]], ENTRY);
    return (first + count) * PER_BYTE;
}

static void pack_row(const packing *job, int64_t row, uint8_t *out) {
    const tz_shape *s = job->shape;
    if (s->levels == TZ_CODED_SCALES) memcpy(out + row % ROWS * sizeof(float), job->factors + row, sizeof(float));
    out += s->head_bytes;
    uint8_t strip[STRIP * PER_BYTE + ENTRY];
    int64_t first = 0, end = 0;
    for (int64_t p = 0; p < s->pieces; p++) {
        const tz_piece *piece = &s->piece[p];
        if (piece->start + piece->columns > end) {
            first = piece->start / PER_BYTE;
            end = read_codes(job, row, first, strip);
        }
        const uint8_t *codes = strip + piece->start - first * PER_BYTE;
        uint8_t *tail = out + piece->vectors * VECTOR_BYTES, *scale = tail + piece->tails * TAIL_BYTES;
        pack_piece(piece, (int)(s->width / QUAD), (int)(row % ROWS), codes, out, tail);
        if (s->levels == TZ_CODED_SCALES)
            pack_code(job, row, piece->group, scale);
        else
            pack_level(s, row, piece->group, job->scale, scale);
        if (s->levels == TZ_SCALES_AND_SHIFTS) pack_level(s, row, piece->group, job->shift, scale + LEVEL_BYTES);
        out += piece->bytes;
    }
}

static void pack_blocks(void *context, int64_t first, int64_t last) {
    const packing *job = context;
    const tz_shape *s = job->shape;
    for (int64_t b = first; b < last; b++) {
        uint8_t *block = job->packed + b * s->block_bytes;
        memset(block, 0, (size_t)s->block_bytes);
        if (s->levels == TZ_CODED_SCALES) memcpy(block + FACTOR_BYTES, job->steps, LEVEL_BYTES);
        for (int64_t row = b * ROWS; row < s->rows && row < (b + 1) * ROWS; row++) pack_row(job, row, block);
    }
}

static void pack(packing *job, int threads) {
    for (int byte = 0; byte < BYTES; byte++)
        for (int d = 0, rest = byte; d < PER_BYTE; d++, rest /= 3) job->digits[byte][d] = (uint8_t)(rest % 3);
    tz_run(pack_blocks, job, divide_up(job->shape->rows, ROWS), 1, threads);
}

void tz_pack_ternary(const tz_shape *s, const uint8_t *trits, const uint16_t *scale, const uint16_t *shift,
                     uint8_t *packed, int threads) {
    packing job = {.shape = s, .trits = trits, .scale = scale, .shift = shift, .packed = packed};
    pack(&job, threads);
}

void tz_pack_coded(const tz_shape *s, const uint8_t *trits, const uint8_t *codes, const float *factors,
                   const uint16_t *steps, uint8_t *packed, int threads) {
    packing job = {.shape = s, .trits = trits, .codes = codes, .factors = factors, .steps = steps, .packed = packed};
    pack(&job, threads);
}
