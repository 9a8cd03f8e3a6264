/* Tiles in and out: the maps of one sample and group, from and to memory. */
#ifndef EMA_TILES_H
#define EMA_TILES_H

#include <stdint.h>

#include "interface.h"
#include "rows.h"
#include "vectors.h"

/* The sizes of a tile inside the kernel, in numbers. */
typedef struct {
    int64_t n, H, W; /* channels of a group, height, width */
    int64_t Hp, Wp;  /* H and W up to whole vectors */
    int64_t P;       /* Hp + Wp: a channel's pooled rows, zeros, its pooled columns, zeros */
    int64_t line;    /* a row with a vector of zeros on both sides */
} Sizes;

INLINE Sizes sizes_of(const Shape *s) {
    const int64_t Hp = padded(s->height), Wp = padded(s->width);
    return (Sizes){s->n, s->height, s->width, Hp, Wp, Hp + Wp, Wp + 2 * LANES};
}

/* A tile to read: row h of channel c is the Wp numbers from at + c * step + h * Wp on. */
typedef struct {
    const float *at;
    int64_t step;
} Maps;

/* Where a tile starts in a map of these strides, in numbers. */
INLINE int64_t start_of(const int64_t *stride, const Shape *s, int64_t tile) {
    return tile / s->groups * stride[0] + tile % s->groups * s->n * stride[1];
}

/* Contiguous float32 rows of whole vectors are read in place; all else is copied to `copy`. */
INLINE Maps load_tile(const void *from, const int64_t *stride, const Shape *s, int64_t tile,
                      float *copy) {
    const int64_t n = s->n, H = s->height, W = s->width, Wp = padded(W);
    const int64_t start = start_of(stride, s, tile);
    if (is_packed(stride, s)) {
        const float *channel = (const float *)from + start;
        if (W == Wp) return (Maps){channel, stride[1]};
        ivec tail = {0};
        for (int64_t i = 0; i < LANES; i++) tail[i] = i < W % LANES ? -1 : 0;
        for (int64_t c = 0; c < n; c++)
            load_packed(copy + c * H * Wp, channel + c * stride[1], H, W, tail);
    } else if (has_pixels(stride, s)) {
        const float *pixel = (const float *)from + start;
        for (int64_t h = 0; h < H; h++)
            for (int64_t c = 0; c < n; c += LANES)
                load_pixels(copy + (c * H + h) * Wp, H * Wp, pixel + c + h * stride[2], stride[3],
                            W);
    } else {
        for (int64_t h = 0; h < H; h++) /* rows outside: channels-last rows share cache lines */
            for (int64_t c = 0; c < n; c++)
                load_row(copy + (c * H + h) * Wp, from, start + c * stride[1] + h * stride[2],
                         stride[3], W, s->dtype);
    }
    return (Maps){copy, H * Wp};
}

/* A tile to write, row by row in the order of `row_at`. */
typedef struct {
    void *to;
    const int64_t *stride;
    int64_t start, dtype;
    int packed, pixels;
    float *rows; /* (LANES, Wp): rows on their way */
} Output;

INLINE Output output_tile(void *to, const Shape *s, int64_t tile, float *rows) {
    return (Output){to,
                    s->out,
                    start_of(s->out, s, tile),
                    s->dtype,
                    is_packed(s->out, s),
                    has_pixels(s->out, s),
                    rows};
}

typedef struct {
    int64_t c, h;
} Row;

/* Packed channels one after another; else rows, whose pixels share cache lines. */
INLINE Row row_at(Output o, Sizes size, int64_t i) {
    return o.packed ? (Row){i / size.H, i % size.H} : (Row){i % size.n, i / size.n};
}

/* Where to work out a row, Wp numbers, before `store_output`. */
INLINE float *row_buffer(Output o, Sizes size, Row row) {
    return o.pixels ? o.rows + row.c % LANES * size.Wp : o.rows;
}

/* Where a row of packed channels goes. */
INLINE float *packed_row(Output o, Sizes size, Row row) {
    return (float *)o.to + o.start + row.c * o.stride[1] + row.h * size.W;
}

INLINE void store_output(Output o, Sizes size, Row row) {
    const int64_t c = row.c, h = row.h, H = size.H, W = size.W;
    if (o.packed) {
        const int64_t whole = W / LANES * LANES;
        const float *from = row_buffer(o, size, row);
        float *to = packed_row(o, size, row);
        for (int64_t w = 0; w < whole; w += LANES) store(to + w, load(from + w));
        if (whole < W) store_tail(to, whole, load(from + whole), h, H, W);
    } else if (o.pixels) {
        const int64_t first = c - (LANES - 1);
        if (c % LANES == LANES - 1)
            store_pixels((float *)o.to + o.start + first + h * o.stride[2], o.stride[3], o.rows,
                         size.Wp, W);
    } else {
        store_row(o.to, o.start + c * o.stride[1] + h * o.stride[2], o.stride[3], o.rows, W,
                  o.dtype);
    }
}

#endif
