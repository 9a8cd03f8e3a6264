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
    float *pools_t;    /* (P, np): the pools, transposed */
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
    sums.pools_t = take(arena, size.P * sums.np);
    sums.padded_mix = take(arena, n * sums.np);
    return sums;
}

/* The norm, the collapsed kernel and its bias. dm and the means are kept for each tile: the gradient
 * of the 3x3 convolution through u is one matrix product of them. */
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

/* Rows o to o + 3 of dmix times the pools, transposed, at `vectors` vectors from c on. */
INLINE void add_outer(const float *dmix, const float *pools_t, Sizes size, int64_t o, int64_t c,
                      Sums sums, const int vectors) {
    const int64_t np = sums.np, last = size.n - 1 - o;
    const float *row[4];
    vec sum[8] = {{0}};
    for (int i = 0; i < 4; i++) row[i] = dmix + (o + (i < last ? i : last)) * size.P;
    for (int64_t p = 0; p < size.H + size.W; p++) {
        const int64_t from = p < size.H ? p : p - size.H + size.Hp;
        for (int v = 0; v < vectors; v++) {
            const vec x = load(pools_t + from * np + c + v * LANES);
            for (int i = 0; i < 4; i++) sum[i * 2 + v] += row[i][from] * x;
        }
    }
    for (int i = 0; i < 4 && i <= last; i++)
        for (int v = 0; v < vectors; v++) {
            float *to = sums.padded_mix + (o + i) * np + c + v * LANES;
            store(to, load(to) + sum[i * 2 + v]);
        }
}

/* The 1x1 convolution and its bias: dmix times the pools, transposed. */
STEP void add_mix_sums(Tile t, BackwardScratch m, Sums sums) {
    const int64_t n = t.size.n, P = t.size.P, np = sums.np;
    float *pools_t = sums.pools_t;
    for (int64_t c = 0; c < n; c++) {
        vec sum = {0};
        for (int64_t p = 0; p < P; p += LANES) sum += load(m.dmix + c * P + p);
        sums.mix_bias[c] += hsum(sum);
    }
    for (int64_t c = 0; c < n; c += LANES)
        for (int64_t p = 0; p < P; p += LANES) {
            vec v[8];
            for (int64_t i = 0; i < 8; i++)
                v[i] = c + i < n ? load(m.pools + (c + i) * P + p) : (vec){0};
            transpose(v);
            for (int64_t i = 0; i < 8; i++) store(pools_t + (p + i) * np + c, v[i]);
        }
    for (int64_t o = 0; o < n; o += 4)
        for (int64_t c = 0; c < np; c += 2 * LANES) {
            const int vectors = c + 2 * LANES <= np ? 2 : 1;
            if (vectors == 2)
                add_outer(m.dmix, pools_t, t.size, o, c, sums, 2);
            else
                add_outer(m.dmix, pools_t, t.size, o, c, sums, 1);
        }
}

/* After the last tile. */
static inline void finish_sums(int64_t n, Sums sums) {
    for (int64_t o = 0; o < n; o++)
        memcpy(sums.mix + o * n, sums.padded_mix + o * sums.np, n * sizeof(float));
}

#endif
