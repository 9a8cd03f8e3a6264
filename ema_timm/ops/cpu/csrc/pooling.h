/* Pooling and the cross-spatial weights u: few numbers for each of the n channels. */
#ifndef EMA_POOLING_H
#define EMA_POOLING_H

#include <stdint.h>
#include <string.h>

#include "interface.h"
#include "products.h"
#include "tiles.h"
#include "vectors.h"

/* kernel (9, n) to (n, 9). */
static inline void by_channel(const float *kernel, int64_t n, float *to) {
    for (int64_t c = 0; c < n; c++)
        for (int64_t t = 0; t < 9; t++) to[c * 9 + t] = kernel[t * n + c];
}

/* Up to eight rows of a channel from p on: their means over W to `row`, their sum onto `cols`, of
 * which there are `vectors`. */
INLINE void pool_rows(const float *p, int64_t rows, float by_w, float *row, vec *cols,
                      int64_t vectors) {
    vec sums[LANES] = {{0}};
    for (int64_t h = 0; h < rows; h++)
        for (int64_t i = 0; i < vectors; i++) {
            const vec v = load(p + (h * vectors + i) * LANES);
            cols[i] += v;
            sums[h] += v;
        }
    store(row, hsums(sums) * by_w);
}

/* A channel's pools, (P). Where the compiler knows the number of vectors in a row, the sums of the
 * columns stay in registers. */
INLINE void pool_channel(const float *p, Sizes size, float *pools, vec *cols, int64_t vectors) {
    const float by_w = 1.0f / (float)size.W, by_h = 1.0f / (float)size.H;
    const int64_t whole = size.H / LANES * LANES, step = vectors * LANES;
    for (int64_t i = 0; i < vectors; i++) cols[i] = (vec){0};
    for (int64_t h = 0; h < whole; h += LANES)
        pool_rows(p + h * step, LANES, by_w, pools + h, cols, vectors);
    if (whole < size.H)
        pool_rows(p + whole * step, size.H - whole, by_w, pools + whole, cols, vectors);
    for (int64_t i = 0; i < vectors; i++) store(pools + size.Hp + i * LANES, cols[i] * by_h);
}

/* pools (n, P): means over W, then means over H. */
STEP void pool(Maps g, Sizes size, float *pools) {
    const int64_t vectors = size.Wp / LANES;
    for (int64_t c = 0; c < size.n; c++) {
        const float *p = g.at + c * g.step;
        float *to = pools + c * size.P;
        vec cols[4];
        if (vectors == 1)
            pool_channel(p, size, to, cols, 1);
        else if (vectors == 2)
            pool_channel(p, size, to, cols, 2);
        else if (vectors == 4)
            pool_channel(p, size, to, cols, 4);
        else
            pool_channel(p, size, to, (vec *)(to + size.Hp), vectors);
    }
}

/* Identity c: means (n, 9) of g over what each tap of a zero-padded 3x3 kernel sees, the numbers
 * of one tile `step` apart. */
STEP void shifted_means(Maps g, Sizes size, const float *pools, float *means, int64_t step) {
    const int64_t H = size.H, W = size.W;
    const float by_h = 1.0f / (float)H, by_w = 1.0f / (float)W;
    for (int64_t c = 0; c < size.n; c++) {
        const float *row = pools + c * size.P, *col = row + size.Hp, *p = g.at + c * g.step;
        vec sum = {0}; /* the pools' padding is 0 */
        for (int64_t h = 0; h < size.Hp; h += LANES) sum += load(row + h);
        const float total = hsum(sum) * by_h;
        /* What a shift by -1, 0, +1 pushes out: the last row, nothing, the first row. */
        const float rows[3] = {row[H - 1] * by_h, 0.0f, row[0] * by_h};
        const float cols[3] = {col[W - 1] * by_w, 0.0f, col[0] * by_w};
        for (int64_t i = 0; i < 3; i++)
            for (int64_t j = 0; j < 3; j++) {
                float mean = total - rows[i] - cols[j];
                if (i != 1 && j != 1)
                    mean += p[(i ? 0 : H - 1) * size.Wp + (j ? 0 : W - 1)] * (by_h * by_w);
                means[(c * 9 + i * 3 + j) * step] = mean;
            }
    }
}

/* u (n, LANES) from the shifted means (9 n, LANES) of as many tiles as a vector has lanes: the
 * softmax over channels of the mean 3x3 convolution. */
STEP void cross_spatial_weights(const float *means, const Weights *k, int64_t n, float *u) {
    product((Matrix){k->vote_weight, 9 * n, 1, n, 9 * n}, k->vote_bias, means, u, LANES);
    vec top = load(u), sum = {0};
    for (int64_t o = 1; o < n; o++) {
        const vec logit = load(u + o * LANES);
        const ivec higher = logit > top;
        top = (vec)((higher & (ivec)logit) | (~higher & (ivec)top));
    }
    for (int64_t o = 0; o < n; o++) {
        const vec e = exponential(clamped(load(u + o * LANES) - top));
        store(u + o * LANES, e);
        sum += e;
    }
    for (int64_t o = 0; o < n; o++) store(u + o * LANES, load(u + o * LANES) / sum);
}

#endif
