/* The backward of one tile from the output to the mixed pools, in the order of the derivation: dL,
 * its dot products with every channel, the cross-spatial weights, the norm, the gates. */
#ifndef EMA_GRADIENTS_H
#define EMA_GRADIENTS_H

#include <stdint.h>
#include <string.h>

#include "interface.h"
#include "pooling.h"
#include "scratch.h"
#include "tiles.h"
#include "vectors.h"

typedef struct {
    float *copy, *copy_d;                    /* g and D, (n, area), where not read in place */
    float *pools, *gates, *dmix, *dpool;     /* (n, P) */
    float *means, *dtaps, *dots;             /* (n, 9) */
    float *ydot, *dm, *base, *slope, *scale; /* (n) */
    float *kernel;                           /* (n, 9) */
    float *dlogits;                          /* (H + 2, line): dL in a margin of zeros */
    float *rows;                             /* (LANES, Wp), or a channel (H, Wp) */
    float *map;                              /* A, (H, Wp) */
} BackwardScratch;

static inline BackwardScratch backward_scratch(Arena *arena, Sizes size) {
    const int64_t n = size.n, H = size.H, Wp = size.Wp;
    BackwardScratch m;
    m.copy = take(arena, n * size.area);
    m.copy_d = take(arena, n * size.area);
    m.pools = take(arena, n * size.P);
    m.gates = take(arena, n * size.P);
    m.dmix = take(arena, n * size.P);
    m.dpool = take(arena, n * size.P);
    m.means = take(arena, 9 * n);
    m.dtaps = take(arena, 9 * n);
    m.dots = take(arena, 9 * n);
    m.ydot = take(arena, n);
    m.dm = take(arena, n);
    m.base = take(arena, n);
    m.slope = take(arena, n);
    m.scale = take(arena, n);
    m.kernel = take(arena, 9 * n);
    m.dlogits = take(arena, (H + 2) * size.line);
    m.rows = take(arena, (H > LANES ? H : LANES) * Wp);
    m.map = take(arena, H * Wp);
    return m;
}

/* Row h of dL, inside its margin. */
INLINE float *dlogits_row(BackwardScratch m, Sizes size, int64_t h) {
    return m.dlogits + (h + 1) * size.line + LANES;
}

/* What the backward reads of a tile. */
typedef struct {
    Sizes size;
    Maps g, d;                        /* the input, and the gradient D of the output */
    const float *mean, *rest, *r, *u; /* (n), from the forward */
    uintptr_t next_g, next_d, dx;     /* addresses: the next tile, and what is to be written */
    int64_t bytes;                    /* of a number there, or 0 where channels are not packed */
} Tile;

/* dL = (Σ_c D·g)·A·(1 - A). Returns its sum. */
STEP float gate_gradient(Tile t, BackwardScratch m) {
    const int64_t n = t.size.n, H = t.size.H, Wp = t.size.Wp;
    const Maps g = t.g, d = t.d;
    float sum_dl = 0.0f;
    for (int64_t h = 0; h < H; h++) {
        float *to = dlogits_row(m, t.size, h);
        vec line_sum = {0};
        for (int64_t w = 0; w < Wp; w += LANES) {
            vec sum = {0};
            for (int64_t c = 0; c < n; c++)
                sum += load(g.at + c * g.step + h * Wp + w) * load(d.at + c * d.step + h * Wp + w);
            const vec a = load(m.map + h * Wp + w);
            sum *= a * (1.0f - a);
            store(to + w, sum);
            line_sum += sum;
        }
        sum_dl += hsum(line_sum);
    }
    return sum_dl;
}

/* One channel's dot products of dL: with g under the nine shifts, to dots (9), and with y - μ,
 * which is returned. */
INLINE float channel_dots(Tile t, BackwardScratch m, int64_t c, float *dots) {
    const int64_t H = t.size.H, Wp = t.size.Wp, line = t.size.line;
    const float *gate_h = m.gates + c * t.size.P, *gate_w = gate_h + t.size.Hp;
    const float mean = t.mean[c];
    vec t0 = {0}, t1 = {0}, t2 = {0}, t3 = {0}, t4 = {0}, t5 = {0}, t6 = {0}, t7 = {0}, t8 = {0};
    vec yd = {0};
    for (int64_t h = 0; h < H; h++) {
        const float *p = t.g.at + c * t.g.step + h * Wp;
        const float *q = dlogits_row(m, t.size, h);
        const int64_t ahead = (c * H + h) * t.size.W * t.bytes;
        for (int64_t w = 0; w < Wp; w += LANES) {
            const vec v = load(p + w);
            will_read(t.next_g + ahead + w * t.bytes);
            will_read(t.next_d + ahead + w * t.bytes);
            yd += load(q + w) * (v * load(gate_w + w) * gate_h[h] - mean);
            t0 += load(q + w + line + 1) * v;
            t1 += load(q + w + line) * v;
            t2 += load(q + w + line - 1) * v;
            t3 += load(q + w + 1) * v;
            t4 += load(q + w) * v;
            t5 += load(q + w - 1) * v;
            t6 += load(q + w - line + 1) * v;
            t7 += load(q + w - line) * v;
            t8 += load(q + w - line - 1) * v;
        }
    }
    const vec eight[8] = {t0, t1, t2, t3, t4, t5, t6, t7};
    store(dots, hsums(eight));
    dots[8] = hsum(t8);
    return hsum(yd);
}

/* One number of du (n), the gradient of u. */
INLINE float du_of(const Weights *k, float ydot, float sum_dl, int64_t c) {
    return k->gn_weight[c] * ydot + k->gn_bias[c] * sum_dl;
}

/* dots (n, 9), this tile's gradient of the collapsed kernel k, and ydot (n) = Σ dL·ŷ.
 * Returns u·du. */
STEP float logit_dots(Tile t, const Weights *k, BackwardScratch m, float sum_dl) {
    float inner = 0.0f;
    for (int64_t c = 0; c < t.size.n; c++) {
        const float yd = channel_dots(t, m, c, m.dots + c * 9);
        m.ydot[c] = (yd - t.rest[c] * sum_dl) * t.r[c];
        inner += t.u[c] * du_of(k, m.ydot[c], sum_dl, c);
    }
    return inner;
}

/* dm (n), the gradient of the logits of u: u ⊙ (du - u·du). */
STEP void cross_spatial_gradient(Tile t, const Weights *k, BackwardScratch m, float sum_dl,
                                 float inner) {
    for (int64_t c = 0; c < t.size.n; c++)
        m.dm[c] = t.u[c] * (du_of(k, m.ydot[c], sum_dl, c) - inner);
}

/* The coefficients (n) of dy = scale·dL - base - slope·(y - μ). */
STEP void norm_gradient(Tile t, const Weights *k, BackwardScratch m, float sum_dl) {
    const float area = (float)t.size.H * (float)t.size.W;
    for (int64_t c = 0; c < t.size.n; c++) {
        m.scale[c] = t.u[c] * k->gn_weight[c] * t.r[c];
        m.slope[c] = m.scale[c] * t.r[c] * m.ydot[c] / area;
        m.base[c] = m.scale[c] * sum_dl / area - m.slope[c] * t.rest[c];
    }
}

/* Through the gates along H and W: dmix (n, P), the gradient of the mixed pools. */
STEP void mix_gradient(Tile t, BackwardScratch m) {
    const int64_t n = t.size.n, H = t.size.H, Wp = t.size.Wp, Hp = t.size.Hp, P = t.size.P;
    memset(m.dmix, 0, n * P * sizeof(float));
    for (int64_t c = 0; c < n; c++) {
        const float *gate_h = m.gates + c * P, *gate_w = gate_h + Hp;
        const float scale = m.scale[c], base = m.base[c], slope = m.slope[c];
        const float mean = t.mean[c];
        float *dh = m.dmix + c * P, *dw = dh + Hp;
        for (int64_t first = 0; first < H; first += LANES) {
            vec sums[LANES] = {{0}};
            for (int64_t h = first; h < H && h < first + LANES; h++) {
                const float *p = t.g.at + c * t.g.step + h * Wp;
                const float *q = dlogits_row(m, t.size, h);
                const uintptr_t dx = t.dx + (c * H + h) * t.size.W * t.bytes;
                for (int64_t w = 0; w < Wp; w += LANES) {
                    const vec v = load(p + w), sw = load(gate_w + w);
                    const vec dy = load(q + w) * scale - base - (v * sw * gate_h[h] - mean) * slope;
                    const vec z = dy * v; /* 0 in the padding, as v is */
                    will_write(dx + w * t.bytes);
                    sums[h - first] += z * sw;
                    store(dw + w, load(dw + w) + z * gate_h[h]);
                }
            }
            store(dh + first, hsums(sums));
        }
        for (int64_t i = 0; i < P; i += LANES) {
            const vec a = load(gate_h + i);
            store(dh + i, load(dh + i) * a * (1.0f - a));
        }
    }
}

#endif
