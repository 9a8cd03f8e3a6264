/* The backward of every tile: the steps of gradients.h, then sums.h and input_gradient.h where they
 * are wanted. */
#ifndef EMA_BACKWARD_H
#define EMA_BACKWARD_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "gradients.h"
#include "input_gradient.h"
#include "interface.h"
#include "pooling.h"
#include "scratch.h"
#include "sums.h"
#include "tiles.h"

typedef struct {
    const Shape *shape;
    const Weights *weights;
    const void *x, *grad;
    const Saved *saved;
    const Grads *grads;
    Sizes size;
} BackwardCall;

/* The maps of a tile, and what the forward has saved of it, padded again. */
static inline Tile restore_tile(const BackwardCall *call, BackwardScratch m, int64_t tile) {
    const Shape *s = call->shape;
    const int64_t n = s->n, H = s->height, W = s->width, tiles = s->batch * s->groups;
    const float *map = call->saved->gate_map + tile * H * W;
    for (int64_t h = 0; h < H; h++)
        memcpy(m.map + h * call->size.Wp, map + h * W, W * sizeof(float));
    for (int64_t c = 0; c < n; c++) {
        const float *from = call->saved->gates + (tile * n + c) * (H + W);
        float *to = m.gates + c * call->size.P;
        memcpy(to, from, H * sizeof(float));
        memcpy(to + call->size.Hp, from + H, W * sizeof(float));
    }
    const float *vectors = call->saved->vectors + tile * n;
    return (Tile){
        .size = call->size,
        .g = load_tile(call->x, s->x, s, call->size, tile, m.copy),
        .d = load_tile(call->grad, s->grad, s, call->size, tile, m.copy_d),
        .mean = vectors,
        .rest = vectors + tiles * n,
        .r = vectors + 2 * tiles * n,
        .u = vectors + 3 * tiles * n,
        .next_g = address_of(call->x, s->x, s, tile + 1),
        .next_d = address_of(call->grad, s->grad, s, tile + 1),
        .dx = address_of(call->grads->dx, s->out, s, tile),
        .bytes = is_packed(s->x, s) ? bytes_of(s) : 0,
    };
}

static inline void backward_tile(const BackwardCall *call, BackwardScratch m, Sums sums,
                                 int64_t tile) {
    const Weights *k = call->weights;
    const Tile t = restore_tile(call, m, tile);
    pool(t.g, t.size, m.pools);
    shifted_means(t.g, t.size, m.pools, m.means, 1);
    const float sum_dl = gate_gradient(t, m);
    const float inner = logit_dots(t, k, m, sum_dl);
    cross_spatial_gradient(t, k, m, sum_dl, inner);
    norm_gradient(t, k, m, sum_dl);
    mix_gradient(t, m);
    if (sums.wanted) {
        add_norm_sums(t, m, call->grads, tile, sum_dl, sums);
        add_mix_sums(t, m, sums);
    }
    if (call->grads->dx) {
        pool_gradient(t, k, m);
        input_gradient(t, m, call->shape, call->grads->dx, tile);
    }
}

/* One thread's tiles. `arena` holds zeros. */
static inline void backward_share(const BackwardCall *call, Arena arena) {
    const int64_t n = call->size.n;
    const Share share = share_of(call->shape->batch * call->shape->groups);
    float *row = call->grads->sums ? call->grads->sums + share.thread * sums_size(n) : NULL;
    const BackwardScratch m = backward_scratch(&arena, call->size);
    const Sums sums = sums_of(row, &arena, call->size);
    by_channel(call->weights->kernel, n, m.kernel);
    for (int64_t tile = share.first; tile < share.end; tile++) backward_tile(call, m, sums, tile);
    if (sums.wanted) finish_sums(n, sums);
}

static int backward(const Shape *s, const Weights *k, const void *x, const void *grad,
                    const Saved *saved, const Grads *grads) {
    const BackwardCall call = {s, k, x, grad, saved, grads, sizes_of(s)};
    Arena plan = {NULL, 0};
    backward_scratch(&plan, call.size);
    sums_of(NULL, &plan, call.size);
    int failed = 0;
#pragma omp parallel num_threads(s->threads)
    {
        float *memory = calloc(plan.used, sizeof(float));
        if (memory) {
            backward_share(&call, (Arena){memory, 0});
        } else {
#pragma omp atomic write
            failed = 1;
        }
        free(memory);
    }
    return failed ? -1 : 0;
}

#endif
