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
    product((Matrix){k->mix_weight, 1, n, n, n}, NULL, m.dmix, m.dpool, P);
    for (int64_t o = 0; o < n; o++) m.dm[o] /= area;
    combination(k->vote_weight, m.dm, n, m.dtaps, 9 * n);
    for (int64_t c = 0; c < n; c++)
        spread_taps(m.dtaps + c * 9, t.size, m.dpool + c * P, m.dpool + c * P + t.size.Hp);
}

/* The transposed convolution of dL with one channel's k (9), at the vector that starts at q. */
INLINE vec transposed_convolution(const vec k[9], const float *q, int64_t line) {
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

/* dg of rows first to end - 1 of one channel: D·A + dy·s_h·s_w + transposed convolution + pools,
 * and the corners. */
INLINE void input_gradient_rows(Tile t, BackwardScratch m, int64_t c, int64_t first, int64_t end,
                                float *to) {
    const int64_t H = t.size.H, W = t.size.W, Wp = t.size.Wp, P = t.size.P, line = t.size.line;
    const float *gate_h = m.gates + c * P, *gate_w = gate_h + t.size.Hp;
    const float *drow = m.dpool + c * P, *dcol = drow + t.size.Hp;
    const float *taps = m.dtaps + 9 * c;
    vec k[9];
    for (int j = 0; j < 9; j++) k[j] = splat(m.kernel[9 * c + j]);
    const float scale = m.scale[c], base = m.base[c], slope = m.slope[c], mean = t.mean[c];
    for (int64_t h = first; h < end; h++, to += Wp) {
        const float *p = t.g.at + c * t.g.step + h * Wp, *dp = t.d.at + c * t.d.step + h * Wp;
        const float *q = dlogits_row(m, t.size, h), *map = m.map + h * Wp;
        for (int64_t w = 0; w < Wp; w += LANES) {
            const vec both = load(gate_w + w) * gate_h[h];
            const vec dy = load(q + w) * scale - base - (load(p + w) * both - mean) * slope;
            vec sum = dy * both + drow[h] + load(dcol + w);
            sum += load(dp + w) * load(map + w);
            store(to + w, sum + transposed_convolution(k, q + w, line));
        }
        if (h == H - 1) {
            to[W - 1] += taps[0];
            to[0] += taps[2];
        }
        if (h == 0) {
            to[W - 1] += taps[6];
            to[0] += taps[8];
        }
    }
}

/* The gradient of the input for one type: packed channels one after another; else rows, whose
 * pixels share cache lines. */
INLINE void input_gradient_of(Tile t, BackwardScratch m, const Shape *s, void *dx, int64_t tile,
                              int64_t dtype) {
    const int64_t n = t.size.n, H = t.size.H, W = t.size.W, Wp = t.size.Wp;
    const int64_t *stride = s->out, start = start_of(stride, s, tile);
    if (is_packed(stride, s)) {
        for (int64_t c = 0; c < n; c++) {
            input_gradient_rows(t, m, c, 0, H, m.rows);
            store_packed(dx, start + c * stride[1], m.rows, H, W, dtype);
        }
        return;
    }
    const int64_t lanes = has_pixels(stride, s) ? LANES : 1;
    for (int64_t h = 0; h < H; h++)
        for (int64_t first = 0; first < n; first += lanes) {
            const int64_t c = lanes == LANES ? vector_from(first, n) : first;
            const int64_t to = start + c * stride[1] + h * stride[2];
            for (int64_t i = 0; i < lanes; i++)
                input_gradient_rows(t, m, c + i, h, h + 1, m.rows + i * Wp);
            if (lanes == LANES)
                store_pixels(dx, to, stride[3], m.rows, Wp, NULL, W, dtype);
            else
                store_row(dx, to, stride[3], m.rows, W, dtype);
        }
}

STEP void input_gradient(Tile t, BackwardScratch m, const Shape *s, void *dx, int64_t tile) {
    if (s->dtype == FLOAT32)
        input_gradient_of(t, m, s, dx, tile, FLOAT32);
    else if (s->dtype == BFLOAT16)
        input_gradient_of(t, m, s, dx, tile, BFLOAT16);
    else
        input_gradient_of(t, m, s, dx, tile, FLOAT16);
}

#endif
