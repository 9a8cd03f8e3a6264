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
    int64_t area;    /* a channel: H rows of Wp, zeros up to whole wide vectors */
} Sizes;

INLINE Sizes sizes_of(const Shape *s) {
    const int64_t Hp = padded(s->height), Wp = padded(s->width);
    const int64_t area = (s->height * Wp + WIDE - 1) / WIDE * WIDE;
    return (Sizes){s->n, s->height, s->width, Hp, Wp, Hp + Wp, Wp + 2 * LANES, area};
}

/* A tile to read: row h of channel c is the Wp numbers from at + c * step + h * Wp on, and a
 * channel `area` numbers, of which those below the last row mean nothing. */
typedef struct {
    const float *at;
    int64_t step;
} Maps;

/* Where a tile starts in a map of these strides, in numbers. */
INLINE int64_t start_of(const int64_t *stride, const Shape *s, int64_t tile) {
    return tile / s->groups * stride[0] + tile % s->groups * s->n * stride[1];
}

INLINE int64_t bytes_of(const Shape *s) { return s->dtype == FLOAT32 ? 4 : 2; }

/* Where a tile lies in memory, to ask for it while there is much to compute. Any address will do:
 * nothing is read there. */
INLINE uintptr_t address_of(const void *map, const int64_t *stride, const Shape *s, int64_t tile) {
    return (uintptr_t)map + start_of(stride, s, tile) * bytes_of(s);
}

#define CACHE_LINE 64

INLINE void will_read(uintptr_t at) { __builtin_prefetch((const void *)at, 0, 2); }

INLINE void will_write(uintptr_t at) { __builtin_prefetch((const void *)at, 1, 2); }

/* A tile of one type into `copy`, (n, area). */
INLINE void copy_tile(const void *from, const int64_t *stride, const Shape *s, int64_t start,
                      float *copy, int64_t area, int64_t dtype) {
    const int64_t n = s->n, H = s->height, W = s->width, Wp = padded(W);
    if (is_packed(stride, s)) {
        const ivec tail = lanes_below(W % LANES);
        for (int64_t c = 0; c < n; c++)
            load_packed(copy + c * area, from, start + c * stride[1], H, W, tail, dtype);
    } else if (has_pixels(stride, s)) {
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < n; i += LANES) {
                const int64_t c = vector_from(i, n);
                load_pixels(copy + c * area + h * Wp, area, from, start + c + h * stride[2],
                            stride[3], W, dtype);
            }
    } else {
        for (int64_t h = 0; h < H; h++) /* rows outside: channels-last rows share cache lines */
            for (int64_t c = 0; c < n; c++)
                load_row(copy + c * area + h * Wp, from, start + c * stride[1] + h * stride[2],
                         stride[3], W, dtype);
    }
}

/* Contiguous float32 channels of whole vectors are read in place; all else is copied to `copy`. */
INLINE Maps load_tile(const void *from, const int64_t *stride, const Shape *s, Sizes size,
                      int64_t tile, float *copy) {
    const int64_t start = start_of(stride, s, tile);
    if (s->dtype == FLOAT32 && is_packed(stride, s) && s->width == size.Wp &&
        s->height * s->width == size.area)
        return (Maps){(const float *)from + start, stride[1]};
    if (s->dtype == FLOAT32)
        copy_tile(from, stride, s, start, copy, size.area, FLOAT32);
    else if (s->dtype == BFLOAT16)
        copy_tile(from, stride, s, start, copy, size.area, BFLOAT16);
    else
        copy_tile(from, stride, s, start, copy, size.area, FLOAT16);
    return (Maps){copy, size.area};
}

#endif
