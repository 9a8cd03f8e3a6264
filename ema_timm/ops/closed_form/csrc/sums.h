/* Gradients of the parameters, summed over the tiles of one thread. */
#ifndef EMA_SUMS_H
#define EMA_SUMS_H

#include <stdint.h>
#include <string.h>

#include "gradients.h"
#include "interface.h"
#include "scratch.h"
#include "vectors.h"

typedef struct {
    int wanted;
    float *mix, *kernel, *mix_bias, *gn_weight, *gn_bias, *logits; /* a row of Grads.sums */
    int64_t np;                                                    /* n up to whole vectors */
    float *pools_t;    /* (H + W, np): the pools without their padding, transposed */
    float *padded_mix; /* (n, np): mix, until the last tile */
} Sums;

/* The parts of `row`, which is null where no sums are wanted, and of scratch memory. */
static inline Sums sums_of(float *row, Arena *arena, Sizes size) {
    const int64_t n = size.n;
    Arena parts = {row, 0};
    Sums sums = {.wanted = row != NULL, .np = padded(n)};
    sums.mix = take(&parts, n * n);
    sums.kernel = take(&parts, 9 * n);
    sums.mix_bias = take(&parts, n);
    sums.gn_weight = take(&parts, n);
    sums.gn_bias = take(&parts, n);
    sums.logits = take(&parts, 1);
    sums.pools_t = take(arena, (size.H + size.W) * sums.np);
    sums.padded_mix = take(arena, n * sums.np);
    return sums;
}

/* The norm, the collapsed kernel and its bias; dm and the means, from which the votes' gradients
 * are one matrix product, are kept for each tile. */
STEP void add_norm_sums(Tile t, BackwardScratch m, const Grads *grads, int64_t tile, float sum_dl,
                        Sums sums) {
    const int64_t n = t.size.n;
    for (int64_t c = 0; c < n; c++) {
        sums.gn_weight[c] += t.u[c] * m.ydot[c];
        sums.gn_bias[c] += t.u[c] * sum_dl;
    }
    for (int64_t i = 0; i < 9 * n; i++) sums.kernel[i] += m.dots[i];
    *sums.logits += sum_dl;
    memcpy(grads->dm + tile * n, m.dm, n * sizeof(float));
    memcpy(grads->means + tile * 9 * n, m.means, 9 * n * sizeof(float));
}

/* The 1x1 convolution and its bias: dmix times the pools, transposed. */
STEP void add_mix_sums(Tile t, BackwardScratch m, Sums sums) {
    const int64_t n = t.size.n, H = t.size.H, W = t.size.W, Hp = t.size.Hp, P = t.size.P;
    const int64_t np = sums.np;
    float *pools_t = sums.pools_t;
    for (int64_t c = 0; c < n; c++) {
        const float *pools = m.pools + c * P;
        float sum = 0.0f;
        for (int64_t i = 0; i < P; i++) sum += m.dmix[c * P + i];
        sums.mix_bias[c] += sum;
        for (int64_t h = 0; h < H; h++) pools_t[h * np + c] = pools[h];
        for (int64_t w = 0; w < W; w++) pools_t[(H + w) * np + c] = pools[Hp + w];
    }
    for (int64_t o = 0; o < n; o++) {
        const float *dmix = m.dmix + o * P;
        for (int64_t c = 0; c < np; c += LANES) {
            vec sum = load(sums.padded_mix + o * np + c);
            for (int64_t h = 0; h < H; h++) sum += dmix[h] * load(pools_t + h * np + c);
            for (int64_t w = 0; w < W; w++) sum += dmix[Hp + w] * load(pools_t + (H + w) * np + c);
            store(sums.padded_mix + o * np + c, sum);
        }
    }
}

/* After the last tile. */
static inline void finish_sums(int64_t n, Sums sums) {
    for (int64_t o = 0; o < n; o++)
        memcpy(sums.mix + o * n, sums.padded_mix + o * sums.np, n * sizeof(float));
}

#endif
