/* The forward opens as many tiles at a time as a vector has lanes (pools, gates, means), computes
 * their cross-spatial weights together and closes them one by one (norm, logits, output). */
#ifndef EMA_FORWARD_H
#define EMA_FORWARD_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "gate.h"
#include "interface.h"
#include "norm.h"
#include "pooling.h"
#include "products.h"
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

/* What an open tile keeps. */
typedef struct {
    Maps g;
    float *copy;   /* (n, area), where the tile is not read in place */
    float *gates;  /* (n, P), zeros in the padding */
    float *centre; /* (n) */
} OpenTile;

typedef struct {
    OpenTile tiles[LANES];
    float *pools;                /* (n, P) */
    float *means, *u;            /* (9 n, LANES) and (n, LANES) */
    float *valid;                /* (P): bits that keep what is not padding */
    int64_t *offsets;            /* (2, n) */
    Ahead next, written;         /* what is read next, and what this tile will write */
    NormScratch norm;
    GateScratch gate;
} ForwardScratch;

/* Tiles that are open at a time: as many as fit into half of a small second-level cache. */
static inline int64_t open_tiles(Sizes size) {
    const int64_t fit = (256 << 10) / ((size.n * size.area + 1) * (int64_t)sizeof(float));
    return fit < 1 ? 1 : fit > LANES ? LANES : fit;
}

static inline ForwardScratch forward_scratch(Arena *arena, Sizes size) {
    const int64_t n = size.n;
    ForwardScratch m;
    for (int64_t i = 0; i < open_tiles(size); i++) {
        m.tiles[i].copy = take(arena, n * size.area);
        m.tiles[i].gates = take(arena, n * size.P);
        m.tiles[i].centre = take(arena, padded(n));
    }
    m.pools = take(arena, n * size.P);
    m.means = take(arena, 9 * n * LANES);
    m.u = take(arena, n * LANES);
    m.valid = take(arena, size.P);
    m.offsets = (int64_t *)take(arena, 4 * n);
    m.norm = norm_scratch(arena, size);
    m.gate = gate_scratch(arena, size);
    return m;
}

/* Gates along H and W, (n, P): sigmoid of the mixed pools, zeros in the padding. */
STEP void mixed_gates(const Weights *k, Sizes size, const float *pools, const float *valid,
                      float *gates) {
    product((Matrix){k->mix_weight, size.n, 1, size.n, size.n}, k->mix_bias, pools, gates, size.P);
    for (int64_t p = 0; p < size.P; p += LANES) {
        const ivec keep = (ivec)load(valid + p);
        for (int64_t c = 0; c < size.n; c++) {
            float *gate = gates + c * size.P + p;
            store(gate, (vec)((ivec)sigmoid(load(gate)) & keep));
        }
    }
}

/* What the backward will need of this tile, without the padding. */
STEP void save_tile(const ForwardCall *call, ForwardScratch m, int64_t lane, int64_t tile) {
    const Sizes size = call->size;
    const int64_t n = size.n, H = size.H, W = size.W;
    const int64_t tiles = call->shape->batch * call->shape->groups;
    for (int64_t c = 0; c < n; c++) {
        float *to = call->saved->gates + (tile * n + c) * (H + W);
        memcpy(to, m.tiles[lane].gates + c * size.P, H * sizeof(float));
        memcpy(to + H, m.tiles[lane].gates + c * size.P + size.Hp, W * sizeof(float));
    }
    memcpy(call->saved->gate_map + tile * H * W, m.gate.map, H * W * sizeof(float));
    const float *vectors[3] = {m.tiles[lane].centre, m.norm.rest, m.norm.r};
    for (int64_t i = 0; i < 3; i++)
        memcpy(call->saved->vectors + (i * tiles + tile) * n, vectors[i], n * sizeof(float));
    float *u = call->saved->vectors + (3 * tiles + tile) * n;
    for (int64_t c = 0; c < n; c++) u[c] = m.u[c * LANES + lane];
}

static inline void open_tile(const ForwardCall *call, ForwardScratch *m, int64_t lane,
                             int64_t tile) {
    const Sizes size = call->size;
    OpenTile *t = m->tiles + lane;
    t->g = load_tile(call->x, call->shape->x, call->shape, size, tile, t->copy);
    pool(t->g, size, m->pools);
    mixed_gates(call->weights, size, m->pools, m->valid, t->gates);
    centres(m->pools, t->gates, size, t->centre);
    shifted_means(t->g, size, m->pools, m->means + lane, LANES);
}

static inline void close_tile(const ForwardCall *call, ForwardScratch m, int64_t lane,
                              int64_t tile, int64_t next) {
    const Sizes size = call->size;
    const OpenTile t = m.tiles[lane];
    normalize(t.g, t.gates, size, t.centre, m.norm);
    const float bias = norm_coefficients(call->weights, size, m.u + lane, m.norm);
    const Shape *s = call->shape;
    m.next.at = address_of(call->x, s->x, s, next);
    m.written.at = address_of(call->out, s->out, s, tile);
    gate_map(t.g, m.norm, size, m.gate, bias, m.next, m.written);
    apply_gate(call->shape, call->x, call->out, tile, t.g, size, m.gate);
    if (call->saved->gates) save_tile(call, m, lane, tile);
}

/* One thread's tiles. `arena` holds zeros. */
static inline void forward_share(const ForwardCall *call, Arena arena) {
    const Sizes size = call->size;
    const Shape *s = call->shape;
    const Share share = share_of(s->batch * s->groups);
    const int64_t at_once = open_tiles(size);
    ForwardScratch m = forward_scratch(&arena, size);
    by_channel(call->weights->kernel, size.n, m.gate.kernel);
    m.next = (Ahead){.offset = m.offsets, .step = lines_of(s->x, s, size, m.offsets)};
    m.written = (Ahead){.offset = m.offsets + size.n,
                        .step = lines_of(s->out, s, size, m.offsets + size.n)};
    memset(m.valid, -1, size.H * sizeof(float));
    memset(m.valid + size.Hp, -1, size.W * sizeof(float));
    for (int64_t first = share.first; first < share.end; first += at_once) {
        const int64_t count = first + at_once < share.end ? at_once : share.end - first;
        for (int64_t i = 0; i < count; i++) open_tile(call, &m, i, first + i);
        cross_spatial_weights(m.means, call->weights, size.n, m.u);
        for (int64_t i = 0; i < count; i++) close_tile(call, m, i, first + i, first + at_once + i);
    }
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
