/* One row of a map to floats and back, for every type and layout. Rows inside the kernel are
 * padded with zeros to whole vectors. */
#ifndef EMA_ROWS_H
#define EMA_ROWS_H

#include <stdint.h>
#include <string.h>

#include "interface.h"
#include "vectors.h"

/* Any layout: `width` numbers at stride `step`. */
INLINE void load_row(float *to, const void *from, int64_t offset, int64_t step, int64_t width,
                     int64_t dtype) {
    if (dtype == FLOAT32) {
        const float *p = (const float *)from + offset;
        if (step == 1)
            memcpy(to, p, width * sizeof(float));
        else
            for (int64_t w = 0; w < width; w++) to[w] = p[w * step];
    } else if (dtype == BFLOAT16) {
        const uint16_t *p = (const uint16_t *)from + offset;
        for (int64_t w = 0; w < width; w++) {
            uint32_t bits = (uint32_t)p[w * step] << 16;
            memcpy(to + w, &bits, 4);
        }
    } else {
#ifdef EMA_FLOAT16
        const _Float16 *p = (const _Float16 *)from + offset;
        for (int64_t w = 0; w < width; w++) to[w] = (float)p[w * step];
#endif
    }
    for (int64_t w = width; w < padded(width); w++) to[w] = 0.0f;
}

INLINE void store_row(void *to, int64_t offset, int64_t step, const float *from, int64_t width,
                      int64_t dtype) {
    if (dtype == FLOAT32) {
        float *p = (float *)to + offset;
        if (step == 1)
            memcpy(p, from, width * sizeof(float));
        else
            for (int64_t w = 0; w < width; w++) p[w * step] = from[w];
    } else if (dtype == BFLOAT16) {
        uint16_t *p = (uint16_t *)to + offset;
        for (int64_t w = 0; w < width; w++) {
            uint32_t bits;
            memcpy(&bits, from + w, 4);
            uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            p[w * step] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : even);
        }
    } else {
#ifdef EMA_FLOAT16
        _Float16 *p = (_Float16 *)to + offset;
        for (int64_t w = 0; w < width; w++) p[w * step] = (_Float16)from[w];
#endif
    }
}

/* Channels of contiguous float32. */
INLINE int is_packed(const int64_t *stride, const Shape *s) {
    return s->dtype == FLOAT32 && stride[3] == 1 && stride[2] == s->width;
}

/* The H rows of one packed channel by whole vectors: what is read past the end of a row is masked,
 * what is written past it is overwritten by the next row. The last rows go number by number. */
INLINE void load_packed(float *to, const float *from, int64_t H, int64_t W, ivec tail) {
    const int64_t whole = W / LANES * LANES, Wp = padded(W);
    for (int64_t h = 0; h < H; h++, from += W, to += Wp) {
        for (int64_t w = 0; w < whole; w += LANES) store(to + w, load(from + w));
        if (whole == W) continue;
        if ((H - h) * W - whole >= LANES) {
            store(to + whole, (vec)((ivec)load(from + whole) & tail));
        } else {
            for (int64_t w = whole; w < Wp; w++) to[w] = w < W ? from[w] : 0.0f;
        }
    }
}

/* The numbers of row h of a packed channel from w on, fewer than a vector, at the front of v. */
INLINE void store_tail(float *to, int64_t w, vec v, int64_t h, int64_t H, int64_t W) {
    if ((H - h) * W - w >= LANES)
        store(to + w, v);
    else
        for (int64_t i = 0; w + i < W; i++) to[w + i] = v[i];
}

/* Pixels of whole vectors of float32 channels, as in channels-last maps. */
INLINE int has_pixels(const int64_t *stride, const Shape *s) {
    return s->dtype == FLOAT32 && stride[1] == 1 && s->n % LANES == 0;
}

/* One row of eight channels: pixels at stride `step` to or from rows at stride `apart`. */
INLINE void load_pixels(float *to, int64_t apart, const float *from, int64_t step, int64_t W) {
    for (int64_t w = 0; w < W; w += LANES) {
        vec v[8];
        for (int64_t i = 0; i < 8; i++) v[i] = w + i < W ? load(from + (w + i) * step) : (vec){0};
        transpose(v);
        for (int64_t i = 0; i < 8; i++) store(to + i * apart + w, v[i]);
    }
}

INLINE void store_pixels(float *to, int64_t step, const float *from, int64_t apart, int64_t W) {
    for (int64_t w = 0; w < W; w += LANES) {
        vec v[8];
        for (int64_t i = 0; i < 8; i++) v[i] = load(from + i * apart + w);
        transpose(v);
        for (int64_t i = 0; i < 8 && w + i < W; i++) store(to + (w + i) * step, v[i]);
    }
}

#endif
