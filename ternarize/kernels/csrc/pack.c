/* From a file's dense trits to a path's blocks; no float weight is ever made. */
#include <string.h>

#include "layout.h"
#include "ternarize.h"
#include "threads.h"

enum { PER_BYTE = 5, ENTRY = 8, BYTES = 256 };      /* eight bytes are copied faster than five */

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
static uint32_t join_quads(const uint8_t *codes, int first, int fields) {
    const uint32_t base = fields == PER_BYTE ? 3 : 4;
    uint32_t joined = 0;
    for (int f = fields - 1; f >= 0; f--) joined = joined * base + quad_at(codes, first + f);
    return joined;
}

static void pack_piece(const tz_piece *piece, int fields, int row, const uint8_t *codes, uint8_t *vector,
                       uint8_t *tail) {
    for (int v = 0; v < piece->vectors; v++) {
        const uint32_t joined = join_quads(codes, v * fields, fields);
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

/* The codes of a piece, out of bytes that it shares with its neighbours; what lies behind it is 0. */
static const uint8_t *read_codes(const packing *job, int64_t row, const tz_piece *piece, uint8_t *room) {
    const uint8_t *bytes = job->trits + row * divide_up(job->shape->columns, PER_BYTE);
    const int64_t first = piece->start / PER_BYTE, last = (piece->start + piece->columns - 1) / PER_BYTE;
    for (int64_t b = first; b <= last; b++) memcpy(room + (b - first) * PER_BYTE, job->digits[bytes[b]], ENTRY);
    uint8_t *codes = room + piece->start % PER_BYTE;
    memset(codes + piece->columns, 0, QUAD);
    return codes;
}

static void pack_row(const packing *job, int64_t row, uint8_t *out) {
    const tz_shape *s = job->shape;
    if (s->levels == TZ_CODED_SCALES) memcpy(out + row % ROWS * sizeof(float), job->factors + row, sizeof(float));
    out += s->head_bytes;
    for (int64_t p = 0; p < s->pieces; p++) {
        const tz_piece *piece = &s->piece[p];
        uint8_t room[PIECE + 2 * PER_BYTE + ENTRY];
        const uint8_t *codes = read_codes(job, row, piece, room);
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
