/* Group norm of y = g·s_h·s_w with groups of one channel: centred maps, their spread, and what a
 * channel adds to the logits of the gate. */
#ifndef EMA_NORM_H
#define EMA_NORM_H

#include <float.h>
#include <math.h>
#include <stdint.h>

#include "interface.h"
#include "scratch.h"
#include "tiles.h"
#include "vectors.h"

typedef struct {
    float *y;              /* (n, area): y less the centre of its channel, zeros in the padding */
    float *rest, *r, *coef; /* (n), up to whole vectors */
    float *sums, *squares;  /* (n, LANES) */
} NormScratch;

static inline NormScratch norm_scratch(Arena *arena, Sizes size) {
    const int64_t np = padded(size.n);
    NormScratch m;
    m.y = take(arena, size.n * size.area);
    m.rest = take(arena, np);
    m.r = take(arena, np);
    m.coef = take(arena, np);
    m.sums = take(arena, np * LANES);
    m.squares = take(arena, np * LANES);
    return m;
}

/* Close to the mean of y, from the pools alone: what it lacks is how g, less its rows and columns,
 * varies with both gates together. The padding of pools and gates is zero. */
STEP void centres(const float *pools, const float *gates, Sizes size, float *centre) {
    const int64_t n = size.n, Hp = size.Hp, P = size.P;
    const float by_h = 1.0f / (float)size.H, by_w = 1.0f / (float)size.W;
    for (int64_t first = 0; first < n; first += LANES) {
        vec g[LANES] = {{0}}, h[LANES] = {{0}}, w[LANES] = {{0}}, gh[LANES] = {{0}};
        vec gw[LANES] = {{0}};
        for (int64_t i = 0; i < LANES && first + i < n; i++) {
            const float *pool = pools + (first + i) * P, *gate = gates + (first + i) * P;
            for (int64_t p = 0; p < Hp; p += LANES) {
                g[i] += load(pool + p);
                h[i] += load(gate + p);
                gh[i] += load(pool + p) * load(gate + p);
            }
            for (int64_t p = Hp; p < P; p += LANES) {
                w[i] += load(gate + p);
                gw[i] += load(pool + p) * load(gate + p);
            }
        }
        const vec mean_h = hsums(h) * by_h, mean_w = hsums(w) * by_w;
        const vec rows = hsums(gh) * by_h * mean_w, cols = hsums(gw) * by_w * mean_h;
        store(centre + first, rows + cols - hsums(g) * by_h * mean_h * mean_w);
    }
}

/* y less `centre` for one channel, and the sums over it and over its squares, lane by lane. The
 * compiler may know the number of vectors in a row. */
INLINE void centre_channel(const float *g, const float *gate_h, const float *gate_w, float centre,
                           Sizes size, float *y, float *sums, float *squares, int64_t vectors) {
    const int64_t whole = size.W / LANES;
    const vec last = (vec)((ivec)splat(centre) & lanes_below(size.W % LANES));
    vec sum = {0}, square = {0};
    for (int64_t h = 0; h < size.H; h++) {
        const float s = gate_h[h];
        for (int64_t i = 0; i < vectors; i++) {
            const int64_t at = (h * vectors + i) * LANES;
            const vec d = load(g + at) * load(gate_w + i * LANES) * s -
                          (i < whole ? splat(centre) : last);
            store(y + at, d);
            sum += d;
            square += d * d;
        }
    }
    store(sums, sum);
    store(squares, square);
}

/* Channel c: its part of y, sums and squares. */
INLINE void centre_map(Maps g, const float *gates, Sizes size, float centre, NormScratch m,
                       int64_t c) {
    const int64_t vectors = size.Wp / LANES;
    const float *p = g.at + c * g.step, *gate = gates + c * size.P, *gate_w = gate + size.Hp;
    float *y = m.y + c * size.area, *sums = m.sums + c * LANES, *squares = m.squares + c * LANES;
    if (vectors == 1)
        centre_channel(p, gate, gate_w, centre, size, y, sums, squares, 1);
    else if (vectors == 2)
        centre_channel(p, gate, gate_w, centre, size, y, sums, squares, 2);
    else if (vectors == 4)
        centre_channel(p, gate, gate_w, centre, size, y, sums, squares, 4);
    else
        centre_channel(p, gate, gate_w, centre, size, y, sums, squares, vectors);
}

/* y, centred before squaring: E[y²] - μ² cancels where the mean is large. What the centre lacks to
 * the mean is in every centred number, and 1/std would magnify it 316 times on a constant channel:
 * the rest is the mean of the centred numbers. Where most of the squares is the rest's, the centre
 * moves by it, once. Leaves `rest` and r = 1/std. */
STEP void normalize(Maps g, const float *gates, Sizes size, float *centre, NormScratch m) {
    const float by_area = 1.0f / ((float)size.H * (float)size.W);
    for (int64_t c = 0; c < size.n; c++) centre_map(g, gates, size, centre[c], m, c);
    for (int64_t c = 0; c < size.n; c++) {
        float rest = hsum(load(m.sums + c * LANES)) * by_area;
        float square = hsum(load(m.squares + c * LANES)) * by_area;
        if (rest * rest > 0.5f * square) {
            centre[c] += rest;
            centre_map(g, gates, size, centre[c], m, c);
            rest = hsum(load(m.sums + c * LANES)) * by_area;
            square = hsum(load(m.squares + c * LANES)) * by_area;
        }
        /* Squares of numbers over 1e19 are infinite, and so is the variance: r is 0. */
        const float var = square - fminf(rest * rest, FLT_MAX);
        m.rest[c] = rest;
        m.r[c] = 1.0f / sqrtf((var > 0.0f ? var : 0.0f * var) + 1e-5f);
    }
}

/* Identity d: a channel adds coef·(y - μ) to the logits. u (n) is `LANES` apart. Returns what all
 * channels add as one constant, which also takes the rests off. */
STEP float norm_coefficients(const Weights *k, Sizes size, const float *u, NormScratch m) {
    float bias = 0.0f;
    for (int64_t c = 0; c < size.n; c++) {
        m.coef[c] = u[c * LANES] * k->gn_weight[c] * m.r[c];
        bias += u[c * LANES] * k->gn_bias[c] - m.coef[c] * m.rest[c];
    }
    return bias;
}

#endif
