/* The backward of one tile from the mixed pools on: what reaches a pixel through its row, its
 * column or its corner, the transposed convolution, and the gradient of the input. */
#ifndef EMA_INPUT_GRADIENT_H
#define EMA_INPUT_GRADIENT_H

#include <stdint.h>
#include <string.h>

#include "gradients.h"
#include "interface.h"
#include "pooling.h"
#include "tiles.h"
#include "vectors.h"

/* Add the gradient of the shifted means, but for the corners, to that of a channel's pools: a tap
 * reaches every pixel but the border row and column that its shift leaves out. */
static inline void spread_taps(const float *dtaps, Sizes size, float *drow, float *dcol) {
    const int64_t H = size.H, W = size.W;
    const float *t = dtaps;
    float all = 0.0f;
    for (int64_t i = 0; i < 9; i++) all += t[i];
    for (int64_t h = 0; h < H; h++) drow[h] = drow[h] / (float)W + all;
    for (int64_t w = 0; w < W; w++) dcol[w] /= (float)H;
    drow[H - 1] -= t[0] + t[1] + t[2];
    drow[0] -= t[6] + t[7] + t[8];
    dcol[W - 1] -= t[0] + t[3] + t[6];
    dcol[0] -= t[2] + t[5] + t[8];
}

/* All that reaches a pixel through its row or its column, dpool (n, P), or its corner, dtaps. */
STEP void pool_gradient(Tile t, const Weights *k, BackwardScratch m) {
    const int64_t n = t.size.n, P = t.size.P;
    const float area = (float)t.size.H * (float)t.size.W;
    mix((Matrix){k->mix_weight, 1, n}, NULL, m.dmix, m.dpool, t.size);
    memset(m.dtaps, 0, 9 * n * sizeof(float));
    for (int64_t o = 0; o < n; o++) {
        const float *votes = k->vote_weight + o * 9 * n;
        const float dm = m.dm[o] / area;
        for (int64_t i = 0; i < 9 * n; i++) m.dtaps[i] += dm * votes[i];
    }
    for (int64_t c = 0; c < n; c++)
        spread_taps(m.dtaps + c * 9, t.size, m.dpool + c * P, m.dpool + c * P + t.size.Hp);
}

/* The transposed convolution of dL with one channel's k (9), at the vector that starts at q. */
INLINE vec transposed_convolution(const float *k, const float *q, int64_t line) {
    vec sum = k[4] * load(q);
    sum += k[0] * load(q + line + 1);
    sum += k[1] * load(q + line);
    sum += k[2] * load(q + line - 1);
    sum += k[3] * load(q + 1);
    sum += k[5] * load(q - 1);
    sum += k[6] * load(q - line + 1);
    sum += k[7] * load(q - line);
    sum += k[8] * load(q - line - 1);
    return sum;
}

/* dg of one row but for the corners: D·A + dy·s_h·s_w + transposed convolution + pools. */
INLINE void input_gradient_row(Tile t, BackwardScratch m, Row row, float *to) {
    const int64_t c = row.c, h = row.h, Wp = t.size.Wp, P = t.size.P;
    const float *gate_h = m.gates + c * P, *gate_w = gate_h + t.size.Hp;
    const float *p = t.g.at + c * t.g.step + h * Wp, *dp = t.d.at + c * t.d.step + h * Wp;
    const float *q = dlogits_row(m, t.size, h), *map = m.map + h * Wp, *k = m.kernel + 9 * c;
    const float *dcol = m.dpool + c * P + t.size.Hp, drow = m.dpool[c * P + h];
    const float scale = m.scale[c], base = m.base[c], slope = m.slope[c], mean = t.mean[c];
    for (int64_t w = 0; w < Wp; w += LANES) {
        const vec both = load(gate_w + w) * gate_h[h];
        const vec dy = load(q + w) * scale - base - (load(p + w) * both - mean) * slope;
        vec sum = dy * both + drow + load(dcol + w);
        sum += load(dp + w) * load(map + w);
        store(to + w, sum + transposed_convolution(k, q + w, t.size.line));
    }
}

STEP void input_gradient(Tile t, BackwardScratch m, Output out) {
    const int64_t H = t.size.H, W = t.size.W;
    for (int64_t i = 0; i < t.size.n * H; i++) {
        const Row row = row_at(out, t.size, i);
        const float *taps = m.dtaps + row.c * 9;
        float *to = row_buffer(out, t.size, row);
        input_gradient_row(t, m, row, to);
        if (row.h == H - 1) {
            to[W - 1] += taps[0];
            to[0] += taps[2];
        }
        if (row.h == 0) {
            to[W - 1] += taps[6];
            to[0] += taps[8];
        }
        store_output(out, t.size, row);
    }
}

#endif
