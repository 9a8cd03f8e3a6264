/* One row of a map to floats and back, for every type and layout. Rows inside the kernel are
 * padded with zeros to whole vectors. */
#ifndef EMA_ROWS_H
#define EMA_ROWS_H

#include <stdint.h>
#include <string.h>

#include "interface.h"
#include "vectors.h"

/* Eight numbers of a type to floats and back, by whole vectors. */
typedef uint16_t half_bits __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(32), aligned(4), may_alias));

INLINE vec load_numbers(const void *from, int64_t offset, int64_t dtype) {
    if (dtype == FLOAT32) return load((const float *)from + offset);
    const uint16_t *p = (const uint16_t *)from + offset;
    if (dtype == BFLOAT16) {
#ifdef EMA_AVX /* GCC makes two of this one instruction */
        const uvec bits = (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
        const uvec bits = __builtin_convertvector(*(const half_bits *)p, uvec);
#endif
        return (vec)(bits << 16);
    }
    vec v = {0};
#if defined(EMA_AVX)
    v = (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(EMA_FLOAT16)
    for (int i = 0; i < LANES; i++) v[i] = (float)((const _Float16 *)p)[i];
#endif
    return v;
}

INLINE void store_numbers(void *to, int64_t offset, vec v, int64_t dtype) {
    if (dtype == FLOAT32) {
        store((float *)to + offset, v);
        return;
    }
    uint16_t *p = (uint16_t *)to + offset;
    if (dtype == BFLOAT16) { /* to the nearest, ties to even */
        const uvec bits = (uvec)v, even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const uvec nan = (uvec)((bits & 0x7fffffff) > 0x7f800000);
        *(half_bits *)p = __builtin_convertvector((nan & 0x7fc0) | (~nan & even), half_bits);
        return;
    }
#if defined(EMA_AVX)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, 0));
#elif defined(EMA_FLOAT16)
    for (int i = 0; i < LANES; i++) ((_Float16 *)p)[i] = (_Float16)v[i];
#endif
}

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

/* The first `count` numbers, fewer than a vector, and zeros; `tail` has bits where they are.
 * Nothing is read beyond them. */
INLINE vec load_tail(const void *from, int64_t offset, int64_t count, ivec tail, int64_t dtype) {
#ifdef EMA_AVX
    if (dtype == FLOAT32)
        return (vec)_mm256_maskload_ps((const float *)from + offset, (__m256i)tail);
#endif
    float numbers[LANES] = {0};
    load_row(numbers, from, offset, 1, count, dtype);
    (void)tail;
    return load(numbers);
}

/* The bits of the first `count` lanes. */
INLINE ivec lanes_below(int64_t count) {
    return (ivec){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)count;
}

/* Channels whose rows follow each other without a gap. */
INLINE int is_packed(const int64_t *stride, const Shape *s) {
    return stride[3] == 1 && stride[2] == s->width;
}

/* The H rows of one packed channel by whole vectors and one of `tail` bits. */
INLINE void load_packed(float *to, const void *from, int64_t offset, int64_t H, int64_t W,
                        ivec tail, int64_t dtype) {
    const int64_t whole = W / LANES * LANES, Wp = padded(W);
    for (int64_t h = 0; h < H; h++, offset += W, to += Wp) {
        for (int64_t w = 0; w < whole; w += LANES)
            store(to + w, load_numbers(from, offset + w, dtype));
        if (whole == W) continue;
        if ((H - h) * W - whole >= LANES)
            store(to + whole, (vec)((ivec)load_numbers(from, offset + whole, dtype) & tail));
        else
            store(to + whole, load_tail(from, offset + whole, W - whole, tail, dtype));
    }
}

/* The rows of one packed channel from padded rows. What is written past the end of a row is
 * overwritten by the next; the last rows go number by number. */
INLINE void store_packed(void *to, int64_t offset, const float *from, int64_t H, int64_t W,
                         int64_t dtype) {
    const int64_t whole = W / LANES * LANES, Wp = padded(W);
    for (int64_t h = 0; h < H; h++, offset += W, from += Wp) {
        for (int64_t w = 0; w < whole; w += LANES)
            store_numbers(to, offset + w, load(from + w), dtype);
        if (whole == W) continue;
        if ((H - h) * W - whole >= LANES)
            store_numbers(to, offset + whole, load(from + whole), dtype);
        else
            store_row(to, offset + whole, 1, from + whole, W - whole, dtype);
    }
}

/* Pixels of a vector of channels or more, as in channels-last maps. */
INLINE int has_pixels(const int64_t *stride, const Shape *s) {
    return stride[1] == 1 && s->n >= LANES;
}

/* The first of a vector of channels, the last of which overlap. */
INLINE int64_t vector_from(int64_t c, int64_t n) { return c + LANES <= n ? c : n - LANES; }

/* One row of eight channels: pixels at stride `step` to or from rows at stride `apart`. */
INLINE void load_pixels(float *to, int64_t apart, const void *from, int64_t offset, int64_t step,
                        int64_t W, int64_t dtype) {
    for (int64_t w = 0; w < W; w += LANES) {
        vec v[8];
        for (int64_t i = 0; i < 8; i++)
            v[i] = w + i < W ? load_numbers(from, offset + (w + i) * step, dtype) : (vec){0};
        transpose(v);
        for (int64_t i = 0; i < 8; i++) store(to + i * apart + w, v[i]);
    }
}

/* `factors`, (W), or null, is what every channel is multiplied by. */
INLINE void store_pixels(void *to, int64_t offset, int64_t step, const float *from, int64_t apart,
                         const float *factors, int64_t W, int64_t dtype) {
    for (int64_t w = 0; w < W; w += LANES) {
        vec v[8];
        for (int64_t i = 0; i < 8; i++) {
            v[i] = load(from + i * apart + w);
            if (factors) v[i] *= load(factors + w);
        }
        transpose(v);
        for (int64_t i = 0; i < 8 && w + i < W; i++)
            store_numbers(to, offset + (w + i) * step, v[i], dtype);
    }
}

#endif
