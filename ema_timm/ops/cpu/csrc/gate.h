/* The gate of a tile: logits, sigmoid, product with the map. */
#ifndef EMA_GATE_H
#define EMA_GATE_H

#include <stdint.h>
#include <string.h>

#include "interface.h"
#include "norm.h"
#include "scratch.h"
#include "tiles.h"
#include "vectors.h"

/* The cache lines of a tile, as many in a step as there are channels: line c of a step is at
 * at + offset[c], and `step` bytes lie between steps. */
typedef struct {
    uintptr_t at;
    const int64_t *offset; /* (n) */
    int64_t step;
} Ahead;

/* Offsets (n) for a layout; returns the step, which is what `WIDE` pixels of a tile take. */
static inline int64_t lines_of(const int64_t *stride, const Shape *s, Sizes size, int64_t *offset) {
    const int64_t n = s->n, bytes = bytes_of(s), pixel = stride[3] * bytes;
    const int64_t beside = (n * bytes + CACHE_LINE - 1) / CACHE_LINE; /* lines of a pixel */
    const int pixels = has_pixels(stride, s);
    for (int64_t c = 0; c < n; c++)
        offset[c] = pixels ? c / beside * pixel + c % beside * CACHE_LINE : c * CACHE_LINE;
    return (pixels ? pixel : n * bytes) * WIDE * size.W / size.Wp;
}

typedef struct {
    float *kernel; /* (n, 9) */
    float *taps;   /* (9, plane), a vector before and behind each row of the plane */
    float *logits; /* (H + 2, Wp) and a vector: a row to spare above and below */
    float *map;    /* A (H, W), and a vector */
    float *row;    /* (Wp) */
    int64_t plane; /* one or two rows */
} GateScratch;

/* Rows of Wp that are whole wide vectors together. */
INLINE int64_t rows_at_once(Sizes size) { return size.Wp % WIDE ? 2 : 1; }

static inline GateScratch gate_scratch(Arena *arena, Sizes size) {
    GateScratch m;
    m.plane = rows_at_once(size) * size.Wp + 2 * LANES;
    m.kernel = take(arena, 9 * size.n);
    m.taps = take(arena, 9 * m.plane);
    m.logits = take(arena, (size.H + 2) * size.Wp + LANES);
    m.map = take(arena, size.H * size.W + LANES);
    m.row = take(arena, size.Wp);
    return m;
}

/* Products of `WIDE` pixels, summed over channels: of g with the nine taps, to `taps`, and of y
 * with the norm's coefficients, which is returned. */
INLINE wide tap_products(const float *g, int64_t g_step, const float *y, int64_t y_step,
                         const float *kernel, const float *coef, int64_t n, float *taps,
                         int64_t plane, Ahead next, Ahead out) {
    wide t0 = {0}, t1 = {0}, t2 = {0}, t3 = {0}, t4 = {0}, t5 = {0}, t6 = {0}, t7 = {0}, t8 = {0};
    wide norm = {0};
    for (int64_t c = 0; c < n; c++) {
        const float *q = kernel + 9 * c;
        const wide v = load_wide(g + c * g_step);
        norm += coef[c] * load_wide(y + c * y_step);
        will_read(next.at + next.offset[c]);
        will_write(out.at + out.offset[c]);
        t0 += q[0] * v;
        t1 += q[1] * v;
        t2 += q[2] * v;
        t3 += q[3] * v;
        t4 += q[4] * v;
        t5 += q[5] * v;
        t6 += q[6] * v;
        t7 += q[7] * v;
        t8 += q[8] * v;
    }
    const wide all[9] = {t0, t1, t2, t3, t4, t5, t6, t7, t8};
    for (int64_t t = 0; t < 9; t++) store_wide(taps + t * plane, all[t]);
    return norm;
}

/* Row h feeds the rows h - 1, h and h + 1. `t` is its row of the first tap's plane, `at` its row of
 * the logits. What a shift brings in from beside the row is zero: in the padding the taps are, and
 * where there is none `first` and `last` mask it. */
INLINE void add_shifted(const float *t, int64_t plane, float *at, int64_t Wp, ivec first,
                        ivec last) {
    const ivec all = ~(ivec){0};
    for (int64_t dy = -1; dy <= 1; dy++, t += 3 * plane) {
        float *to = at - dy * Wp;
        for (int64_t w = 0; w < Wp; w += LANES) {
            const ivec left = (ivec)load(t + w - 1) & (w == 0 ? first : all);
            const ivec right =
                (ivec)load(t + 2 * plane + w + 1) & (w + LANES == Wp ? last : all);
            store(to + w, load(to + w) + (vec)left + load(t + plane + w) + (vec)right);
        }
    }
}

/* Identities b and d: the logits of the gate but for the constant, rows 1 to H of m.logits: nine
 * products summed over channels, then shifted adds. */
STEP void gate_logits(Maps g, NormScratch norm, Sizes size, GateScratch m, Ahead next,
                      Ahead out) {
    const int64_t Wp = size.Wp, rows = rows_at_once(size);
    const ivec first = {0, -1, -1, -1, -1, -1, -1, -1}, last = {-1, -1, -1, -1, -1, -1, -1, 0};
    memset(m.logits, 0, (size.H + 2) * Wp * sizeof(float));
    for (int64_t h = 0; h < size.H; h += rows) {
        for (int64_t i = 0; i < rows * Wp; i += WIDE) {
            const int64_t p = h * Wp + i;
            const wide sum = tap_products(g.at + p, g.step, norm.y + p, size.area, m.kernel,
                                          norm.coef, size.n, m.taps + LANES + i, m.plane, next, out);
            next.at += next.step;
            out.at += out.step;
            float *to = m.logits + Wp + p;
            store_wide(to, load_wide(to) + sum);
        }
        for (int64_t r = 0; r < rows && h + r < size.H; r++)
            add_shifted(m.taps + LANES + r * Wp, m.plane, m.logits + (h + r + 1) * Wp, Wp, first,
                        last);
    }
}

/* m.map = A = sigmoid(L), for logits that lack the constant `bias`. */
STEP void gate_map(Maps g, NormScratch norm, Sizes size, GateScratch m, float bias, Ahead next,
                   Ahead out) {
    gate_logits(g, norm, size, m, next, out);
    const float *logits = m.logits + size.Wp;
    for (int64_t h = 0; h < size.H; h++) /* a row's padding goes under the next row */
        for (int64_t w = 0; w < size.W; w += LANES)
            store(m.map + h * size.W + w, sigmoid(load(logits + h * size.Wp + w) + bias));
}

/* out = x·A for a packed channel; the last vector overlaps. */
INLINE void gate_channel(const void *x, int64_t from, void *out, int64_t to, const float *map,
                         int64_t area, int64_t dtype) {
    for (int64_t i = 0; i < area; i += LANES) {
        const int64_t at = i + LANES <= area ? i : area - LANES;
        store_numbers(out, to + at, load_numbers(x, from + at, dtype) * load(map + at), dtype);
    }
}

/* out = x·A for a tile of one type. */
INLINE void gate_tile(const Shape *s, const void *x, void *out, int64_t tile, Maps g, Sizes size,
                      GateScratch m, int64_t dtype) {
    const int64_t n = size.n, H = size.H, W = size.W;
    const int64_t from = start_of(s->x, s, tile), to = start_of(s->out, s, tile);
    if (is_packed(s->x, s) && is_packed(s->out, s) && H * W >= LANES) {
        for (int64_t c = 0; c < n; c++)
            gate_channel(x, from + c * s->x[1], out, to + c * s->out[1], m.map, H * W, dtype);
    } else if (has_pixels(s->out, s)) {
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < n; i += LANES) {
                const int64_t c = vector_from(i, n);
                store_pixels(out, to + c + h * s->out[2], s->out[3],
                             g.at + c * g.step + h * size.Wp, g.step, m.map + h * W, W, dtype);
            }
    } else {
        for (int64_t h = 0; h < H; h++)
            for (int64_t c = 0; c < n; c++) {
                const float *p = g.at + c * g.step + h * size.Wp;
                for (int64_t w = 0; w < W; w++) m.row[w] = p[w] * m.map[h * W + w];
                store_row(out, to + c * s->out[1] + h * s->out[2], s->out[3], m.row, W, dtype);
            }
    }
}

STEP void apply_gate(const Shape *s, const void *x, void *out, int64_t tile, Maps g, Sizes size,
                     GateScratch m) {
    if (s->dtype == FLOAT32)
        gate_tile(s, x, out, tile, g, size, m, FLOAT32);
    else if (s->dtype == BFLOAT16)
        gate_tile(s, x, out, tile, g, size, m, BFLOAT16);
    else
        gate_tile(s, x, out, tile, g, size, m, FLOAT16);
}

#endif
