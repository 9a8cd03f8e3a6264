/* Pooling and votes: what the gates and u are made of, n channels and few numbers each. */
#ifndef EMA_POOLING_H
#define EMA_POOLING_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "interface.h"
#include "tiles.h"
#include "vectors.h"

/* kernel (9, n) to (n, 9). */
static inline void by_channel(const float *kernel, int64_t n, float *to) {
    for (int64_t c = 0; c < n; c++)
        for (int64_t t = 0; t < 9; t++) to[c * 9 + t] = kernel[t * n + c];
}

/* pools (n, P): means over W, then means over H. */
STEP void pool(Maps g, Sizes size, float *pools) {
    const int64_t n = size.n, H = size.H, W = size.W, Wp = size.Wp, P = size.P;
    const float by_w = 1.0f / (float)W, by_h = 1.0f / (float)H;
    for (int64_t c = 0; c < n; c++) {
        float *row = pools + c * P, *col = row + size.Hp;
        memset(row, 0, P * sizeof(float));
        for (int64_t h = 0; h < H; h++) {
            const float *p = g.at + c * g.step + h * Wp;
            vec sum = {0};
            for (int64_t w = 0; w < Wp; w += LANES) {
                vec v = load(p + w);
                sum += v;
                store(col + w, load(col + w) + v);
            }
            row[h] = hsum(sum) * by_w;
        }
        for (int64_t w = 0; w < Wp; w += LANES) store(col + w, load(col + w) * by_h);
    }
}

/* (n, n), or its transpose: the number of row o and column c is at[o * row_step + c * col_step]. */
typedef struct {
    const float *at;
    int64_t row_step, col_step;
} Matrix;

/* Rows o to o + 3 of the product below, at `vectors` (1 or 2) vectors from p on. */
INLINE void mix_block(Matrix matrix, const float *bias, const float *from, float *to, Sizes size,
                      int64_t o, int64_t p, const int vectors) {
    const int64_t n = size.n, P = size.P, last = n - 1 - o;
    const float *m[4];
    for (int64_t i = 0; i < 4; i++)
        m[i] = matrix.at + (o + (i < last ? i : last)) * matrix.row_step;
    vec a[4] = {{0}}, b[4] = {{0}};
    for (int64_t c = 0; c < n; c++) {
        const vec v = load(from + c * P + p);
        vec v2 = v;
        if (vectors == 2) v2 = load(from + c * P + p + LANES);
        for (int i = 0; i < 4; i++) {
            a[i] += m[i][c * matrix.col_step] * v;
            if (vectors == 2) b[i] += m[i][c * matrix.col_step] * v2;
        }
    }
    for (int64_t i = 0; i < 4 && i <= last; i++) {
        const float add = bias ? bias[o + i] : 0.0f;
        store(to + (o + i) * P + p, a[i] + add);
        if (vectors == 2) store(to + (o + i) * P + p + LANES, b[i] + add);
    }
}

/* The 1x1 convolution: to (n, P) = matrix times from (n, P), plus bias (n) or nothing. */
INLINE void mix(Matrix matrix, const float *bias, const float *from, float *to, Sizes size) {
    for (int64_t o = 0; o < size.n; o += 4) {
        int64_t p = 0;
        for (; p + 2 * LANES <= size.P; p += 2 * LANES)
            mix_block(matrix, bias, from, to, size, o, p, 2);
        if (p < size.P) mix_block(matrix, bias, from, to, size, o, p, 1);
    }
}

/* Identity c: means (n, 9) of g over what each tap of a zero-padded 3x3 kernel sees. */
STEP void shifted_means(Maps g, Sizes size, const float *pools, float *means) {
    const int64_t H = size.H, W = size.W;
    for (int64_t c = 0; c < size.n; c++) {
        const float *row = pools + c * size.P, *col = row + size.Hp, *p = g.at + c * g.step;
        float total = 0.0f;
        for (int64_t h = 0; h < H; h++) total += row[h];
        total /= (float)H;
        /* What a shift by -1, 0, +1 pushes out: the last row, nothing, the first row. */
        const float rows[3] = {row[H - 1] / (float)H, 0.0f, row[0] / (float)H};
        const float cols[3] = {col[W - 1] / (float)W, 0.0f, col[0] / (float)W};
        for (int64_t i = 0; i < 3; i++)
            for (int64_t j = 0; j < 3; j++) {
                float mean = total - rows[i] - cols[j];
                if (i != 1 && j != 1)
                    mean += p[(i ? 0 : H - 1) * size.Wp + (j ? 0 : W - 1)] / ((float)H * (float)W);
                means[c * 9 + i * 3 + j] = mean;
            }
    }
}

/* Dot products of b (size) with four rows of a, or with as many as there are. */
INLINE void dot4(const float *a, int64_t step, int64_t rows, const float *b, int64_t size,
                 float *out) {
    const float *r[4];
    for (int64_t i = 0; i < 4; i++) r[i] = a + (i < rows ? i : rows - 1) * step;
    vec s[4] = {{0}};
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) {
        const vec v = load(b + j);
        for (int i = 0; i < 4; i++) s[i] += load(r[i] + j) * v;
    }
    for (int64_t i = 0; i < 4 && i < rows; i++) {
        out[i] = hsum(s[i]);
        for (int64_t l = j; l < size; l++) out[i] += r[i][l] * b[l];
    }
}

/* u (n): softmax of the votes; where the first row was folded away its logit is 0. */
STEP void vote(const float *means, const Weights *k, int64_t n, int64_t votes, float *u) {
    const int64_t skip = n - votes;
    float top = -INFINITY, sum = 0.0f;
    u[0] = 0.0f;
    for (int64_t o = 0; o < votes; o += 4)
        dot4(k->vote_weight + o * 9 * n, 9 * n, votes - o, means, 9 * n, u + skip + o);
    for (int64_t o = 0; o < n; o++) {
        if (o >= skip) u[o] += k->vote_bias[o - skip];
        top = u[o] > top ? u[o] : top;
    }
    for (int64_t o = 0; o < n; o++) {
        u[o] = expf(u[o] - top);
        sum += u[o];
    }
    for (int64_t o = 0; o < n; o++) u[o] /= sum;
}

#endif
