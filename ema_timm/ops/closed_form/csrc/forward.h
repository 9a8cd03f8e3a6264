/* The forward of every tile: pool, gates, votes, norm, logits of the gate, output. */
#ifndef EMA_FORWARD_H
#define EMA_FORWARD_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "interface.h"
#include "pooling.h"
#include "scratch.h"
#include "tiles.h"
#include "vectors.h"

typedef struct {
    const Shape *shape;
    const Weights *weights;
    const void *x;
    void *out;
    const Saved *saved;
    Sizes size;
} ForwardCall;

typedef struct {
    float *copy;                       /* the tile, (n, H, Wp), where it is not read in place */
    float *pools, *gates;              /* (n, P) */
    float *means;                      /* (n, 9) */
    float *u, *mean, *r, *coef, *rest; /* (n) */
    float *kernel;                     /* (n, 9) */
    float *taps;                       /* (9, line) */
    float *logits;                     /* (H + 2, Wp): a row to spare above and below */
    float *rows;                       /* (LANES, Wp) */
} ForwardScratch;

static inline ForwardScratch forward_scratch(Arena *arena, Sizes size) {
    const int64_t n = size.n, Wp = size.Wp;
    ForwardScratch m;
    m.copy = take(arena, n * size.H * Wp);
    m.pools = take(arena, n * size.P);
    m.gates = take(arena, n * size.P);
    m.means = take(arena, 9 * n);
    m.u = take(arena, n);
    m.mean = take(arena, n);
    m.r = take(arena, n);
    m.coef = take(arena, n);
    m.rest = take(arena, n);
    m.kernel = take(arena, 9 * n);
    m.taps = take(arena, 9 * size.line);
    m.logits = take(arena, (size.H + 2) * Wp);
    m.rows = take(arena, LANES * Wp);
    return m;
}

/* Gates along H and W, (n, P): sigmoid of the mixed pools. */
STEP void mixed_gates(const Weights *k, Sizes size, ForwardScratch m) {
    mix((Matrix){k->mix_weight, size.n, 1}, k->mix_bias, m.pools, m.gates, size);
    for (int64_t i = 0; i < size.n * size.P; i += LANES)
        store(m.gates + i, sigmoid(load(m.gates + i)));
}

typedef struct {
    float mean, rest, r;
} Moments;

/* Mean and 1/std of y = g·s_h·s_w, centred before squaring: E[y²] - μ² cancels where the mean is
 * large. The rounded mean leaves a rest in every centred number, which 1/std would magnify 316
 * times on a constant channel: the rest is the mean of the centred numbers. */
INLINE Moments moments(const float *g, const float *gate_h, const float *gate_w, int64_t H,
                       int64_t W) {
    const int64_t Wp = padded(W), whole = W / LANES * LANES;
    const float area = (float)H * (float)W;
    vec sum = {0}, squares = {0}, rests = {0};
    for (int64_t h = 0; h < H; h++) {
        vec row = {0};
        for (int64_t w = 0; w < Wp; w += LANES) row += load(g + h * Wp + w) * load(gate_w + w);
        sum += row * gate_h[h];
    }
    const float mean = hsum(sum) / area;
    float last[LANES];
    for (int64_t i = 0; i < LANES; i++) last[i] = whole + i < W ? mean : 0.0f;
    for (int64_t h = 0; h < H; h++) {
        const float *p = g + h * Wp;
        vec row = {0}, rest = {0};
        for (int64_t w = 0; w < whole; w += LANES) {
            vec d = load(p + w) * load(gate_w + w) * gate_h[h] - mean;
            row += d * d;
            rest += d;
        }
        if (whole < Wp) { /* padding is 0 in g and in the mean, so it adds nothing */
            vec d = load(p + whole) * load(gate_w + whole) * gate_h[h] - load(last);
            row += d * d;
            rest += d;
        }
        squares += row;
        rests += rest;
    }
    const float rest = hsum(rests) / area;
    const float var = hsum(squares) / area - rest * rest;
    return (Moments){mean, rest, 1.0f / sqrtf((var > 0.0f ? var : 0.0f * var) + 1e-5f)};
}

/* Identity d: a channel adds coef·(y - μ) to the logits. Returns what all of them add as one
 * constant, which also takes the rests off. */
STEP float norm_coefficients(Maps g, const Weights *k, Sizes size, ForwardScratch m) {
    float bias = 0.0f;
    for (int64_t c = 0; c < size.n; c++) {
        const float *gate = m.gates + c * size.P;
        const Moments y = moments(g.at + c * g.step, gate, gate + size.Hp, size.H, size.W);
        m.mean[c] = y.mean;
        m.rest[c] = y.rest;
        m.r[c] = y.r;
        m.coef[c] = m.u[c] * k->gn_weight[c] * y.r;
        bias += m.u[c] * k->gn_bias[c] - m.coef[c] * y.rest;
    }
    return bias;
}

/* Identities b and d: the logits of the gate but for the constant, rows 1 to H of m.logits. Row h
 * feeds the rows h - 1, h and h + 1: nine products summed over channels, then shifted adds. `taps`
 * has zeros on both sides. */
STEP void gate_logits(Maps g, Sizes size, ForwardScratch m) {
    const int64_t n = size.n, Wp = size.Wp, Hp = size.Hp, P = size.P, line = size.line;
    memset(m.logits, 0, (size.H + 2) * Wp * sizeof(float));
    for (int64_t h = 0; h < size.H; h++) {
        float *at = m.logits + (h + 1) * Wp;
        for (int64_t w = 0; w < Wp; w += LANES) {
            vec t0 = {0}, t1 = {0}, t2 = {0}, t3 = {0}, t4 = {0}, t5 = {0}, t6 = {0}, t7 = {0};
            vec t8 = {0}, norm = {0};
            for (int64_t c = 0; c < n; c++) {
                const float *q = m.kernel + 9 * c, *gate = m.gates + c * P;
                const vec v = load(g.at + c * g.step + h * Wp + w);
                t0 += q[0] * v;
                t1 += q[1] * v;
                t2 += q[2] * v;
                t3 += q[3] * v;
                t4 += q[4] * v;
                t5 += q[5] * v;
                t6 += q[6] * v;
                t7 += q[7] * v;
                t8 += q[8] * v;
                norm += (v * load(gate + Hp + w) * gate[h] - m.mean[c]) * m.coef[c];
            }
            const vec all[9] = {t0, t1, t2, t3, t4, t5, t6, t7, t8};
            for (int64_t t = 0; t < 9; t++) store(m.taps + t * line + LANES + w, all[t]);
            store(at + w, load(at + w) + norm);
        }
        for (int64_t dy = -1; dy <= 1; dy++) {
            float *to = at - dy * Wp;
            const float *t = m.taps + (dy + 1) * 3 * line + LANES;
            for (int64_t w = 0; w < Wp; w += LANES)
                store(to + w, load(to + w) + load(t + w - 1) + load(t + line + w) +
                                  load(t + 2 * line + w + 1));
        }
    }
}

/* A = sigmoid(L), (H, Wp), for logits that lack the constant `bias`. */
STEP const float *gate_map(Maps g, Sizes size, ForwardScratch m, float bias) {
    gate_logits(g, size, m);
    float *map = m.logits + size.Wp;
    for (int64_t i = 0; i < size.H * size.Wp; i += LANES)
        store(map + i, sigmoid(load(map + i) + bias));
    return map;
}

/* out = g·A. */
STEP void apply_gate(Maps g, const float *map, Sizes size, Output out) {
    for (int64_t i = 0; i < size.n * size.H; i++) {
        const Row row = row_at(out, size, i);
        const float *p = g.at + row.c * g.step + row.h * size.Wp, *a = map + row.h * size.Wp;
        float *to = row_buffer(out, size, row);
        for (int64_t w = 0; w < size.Wp; w += LANES) store(to + w, load(p + w) * load(a + w));
        store_output(out, size, row);
    }
}

/* The same without the detour of a buffer, for packed channels. */
STEP void apply_gate_packed(Maps g, const float *map, Sizes size, Output out) {
    const int64_t H = size.H, W = size.W, Wp = size.Wp, whole = W / LANES * LANES;
    for (int64_t c = 0; c < size.n; c++)
        for (int64_t h = 0; h < H; h++) {
            const float *p = g.at + c * g.step + h * Wp, *a = map + h * Wp;
            float *to = packed_row(out, size, (Row){c, h});
            for (int64_t w = 0; w < whole; w += LANES) store(to + w, load(p + w) * load(a + w));
            if (whole < W) store_tail(to, whole, load(p + whole) * load(a + whole), h, H, W);
        }
}

/* What the backward will need of this tile, without the padding. */
STEP void save_tile(const ForwardCall *call, ForwardScratch m, const float *map, int64_t tile) {
    const Sizes size = call->size;
    const int64_t n = size.n, H = size.H, W = size.W;
    const int64_t tiles = call->shape->batch * call->shape->groups;
    for (int64_t c = 0; c < n; c++) {
        float *to = call->saved->gates + (tile * n + c) * (H + W);
        memcpy(to, m.gates + c * size.P, H * sizeof(float));
        memcpy(to + H, m.gates + c * size.P + size.Hp, W * sizeof(float));
    }
    for (int64_t h = 0; h < H; h++)
        memcpy(call->saved->gate_map + (tile * H + h) * W, map + h * size.Wp, W * sizeof(float));
    const float *vectors[4] = {m.mean, m.rest, m.r, m.u};
    for (int64_t i = 0; i < 4; i++)
        memcpy(call->saved->vectors + (i * tiles + tile) * n, vectors[i], n * sizeof(float));
}

static inline void forward_tile(const ForwardCall *call, ForwardScratch m, int64_t tile) {
    const Shape *s = call->shape;
    const Weights *k = call->weights;
    const Sizes size = call->size;
    const Maps g = load_tile(call->x, s->x, s, tile, m.copy);
    pool(g, size, m.pools);
    mixed_gates(k, size, m);
    shifted_means(g, size, m.pools, m.means);
    vote(m.means, k, size.n, s->votes, m.u);
    const float bias = norm_coefficients(g, k, size, m);
    const float *map = gate_map(g, size, m, bias);
    const Output out = output_tile(call->out, s, tile, m.rows);
    if (out.packed)
        apply_gate_packed(g, map, size, out);
    else
        apply_gate(g, map, size, out);
    if (call->saved->gates) save_tile(call, m, map, tile);
}

/* One thread's tiles. `arena` holds zeros. */
static inline void forward_share(const ForwardCall *call, Arena arena) {
    const Share share = share_of(call->shape->batch * call->shape->groups);
    const ForwardScratch m = forward_scratch(&arena, call->size);
    by_channel(call->weights->kernel, call->size.n, m.kernel);
    for (int64_t tile = share.first; tile < share.end; tile++) forward_tile(call, m, tile);
}

static int forward(const Shape *s, const Weights *k, const void *x, void *out, const Saved *saved) {
    const ForwardCall call = {s, k, x, out, saved, sizes_of(s)};
    Arena plan = {NULL, 0};
    forward_scratch(&plan, call.size);
    int failed = 0;
#pragma omp parallel num_threads(s->threads)
    {
        float *memory = calloc(plan.used, sizeof(float));
        if (memory) {
            forward_share(&call, (Arena){memory, 0});
        } else {
#pragma omp atomic write
            failed = 1;
        }
        free(memory);
    }
    return failed ? -1 : 0;
}

#endif
