/* The closed form on the CPU, one (sample, group) tile at a time.
 *
 * The derivation is the docstring of formula.py; native.py calls this file through
 * ctypes. Nothing here knows PyTorch: pointers, sizes and strides come in, numbers go out.
 *
 * A tile (n channels of H x W) is worked on while it is in cache, so memory sees the input read
 * once and the output written once. Rows are padded with zeros to whole vectors (Wp numbers);
 * contiguous float32 rows of whole vectors are read in place.
 *
 * The body below the variants is compiled once for each instruction set and chosen at run time,
 * so a binary built on one machine runs on another.
 */
#ifndef EMA_VARIANT

#if !defined(__GNUC__)
#error "closed_form.c needs the vector extensions of GCC or clang; PyTorch is the fallback."
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#if !defined(__clang__) /* else short copies of rows become calls to memcpy */
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

#define EMA_ABI 1
#define LANES 8
#define INLINE static inline __attribute__((always_inline))

/* aligned(4): loads and stores through a pointer to it may be unaligned. */
typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(32), aligned(4), may_alias));

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef struct {
    int64_t batch, groups, n, height, width;
    int64_t dtype, threads, votes; /* votes: rows of vote_weight, n or n - 1 */
    int64_t x[4], out[4], grad[4]; /* strides in numbers: B, C, H, W */
} Shape;

typedef struct { /* layouts as in closed_form.FoldedWeights, float32 */
    const float *mix_weight, *mix_bias, *kernel, *vote_weight, *vote_bias, *gn_weight, *gn_bias;
} Weights;

typedef struct { /* layouts as in eager.Saved, float32; or all null */
    float *gates, *gate_map, *vectors;
} Saved;

typedef struct { /* what the backward writes; dx null or sums null where not wanted */
    void *dx;
    float *sums;       /* (threads, sums_size(n)) */
    float *dm, *means; /* (tiles, n) and (tiles, 9 n) */
} Grads;

static int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

/* mix (n, n), kernel (n, 9), mix_bias, gn_weight and gn_bias (n each), logits (1). */
static int64_t sums_size(int64_t n) { return n * n + 12 * n + 1; }

#define EMA_JOIN2(a, b) a##_##b
#define EMA_JOIN(a, b) EMA_JOIN2(a, b)
#define NAME(base) EMA_JOIN(base, EMA_VARIANT)

#define EMA_VARIANT baseline
#include "closed_form.c"
#undef EMA_VARIANT

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define EMA_VARIANT avx2
#include "closed_form.c"
#undef EMA_VARIANT
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl")
#endif
#define EMA_VARIANT avx512
#include "closed_form.c"
#undef EMA_VARIANT
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define CHOOSE(call)                                                                          \
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))              \
        return call(avx512);                                                                  \
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return call(avx2);   \
    return call(baseline)
#else
#define CHOOSE(call) return call(baseline)
#endif

/* glibc hands out blocks from 32 MiB on unmapped, and a page fault for every 4 KiB then takes longer
 * than all the arithmetic on it. The whole of the map will be written, so ask for large pages. */
static void use_large_pages(const Shape *s, void *map) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const int64_t numbers = s->batch * s->groups * s->n * s->height * s->width;
    const int64_t bytes = numbers * (s->dtype == FLOAT32 ? 4 : 2);
    const uintptr_t page = 1 << 16, start = ((uintptr_t)map + page - 1) / page * page;
    if (map && bytes >= (32 << 20))
        madvise((void *)start, ((uintptr_t)map + bytes - start) / page * page, MADV_HUGEPAGE);
#else
    (void)s, (void)map;
#endif
}

int ema_abi(void) { return EMA_ABI; }

int64_t ema_sums_size(int64_t n) { return sums_size(n); }

/* 0, or -1 where no memory could be had. */
int ema_forward(const Shape *shape, const Weights *weights, const void *x, void *out,
                const Saved *saved) {
    use_large_pages(shape, out);
#define CALL(variant) EMA_JOIN(forward, variant)(shape, weights, x, out, saved)
    CHOOSE(CALL);
#undef CALL
}

int ema_backward(const Shape *shape, const Weights *weights, const void *x, const void *grad,
                 const Saved *saved, const Grads *grads) {
    use_large_pages(shape, grads->dx);
#define CALL(variant) EMA_JOIN(backward, variant)(shape, weights, x, grad, saved, grads)
    CHOOSE(CALL);
#undef CALL
}

#else /* the body, once for each variant */

INLINE vec NAME(load)(const float *p) { return *(const vec *)p; }

INLINE void NAME(store)(float *p, vec v) { *(vec *)p = v; }

INLINE vec NAME(splat)(float s) { return (vec){s, s, s, s, s, s, s, s}; }

INLINE float NAME(hsum)(vec v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

/* e^x for x in [-87, 87], 2 ulp: 2^k times a polynomial on [-ln2/2, ln2/2]. */
INLINE vec NAME(exp)(vec x) {
    const vec magic = NAME(splat)(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec k = x * 1.44269504f + magic;
    ivec bits = (ivec)k << 23;
    k -= magic;
    vec f = x - k * 0.693359375f;
    f -= k * -2.12194440e-4f;
    vec p = NAME(splat)(1.0f / 5040);
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return (vec)((ivec)p + bits);
}

INLINE vec NAME(sigmoid)(vec x) {
    /* A comparison with NaN is false, so NaN comes through. */
    const vec high = NAME(splat)(87.0f);
    const ivec above = x > high, below = x < -high;
    x = (vec)((above & (ivec)high) | (below & (ivec)-high) | (~(above | below) & (ivec)x));
    return 1.0f / (1.0f + NAME(exp)(-x));
}

/* One row of `width` numbers at stride `step` to floats, zeros up to the next whole vector. */
INLINE void NAME(load_row)(float *to, const void *from, int64_t offset, int64_t step,
                           int64_t width, int64_t dtype) {
    if (dtype == FLOAT32) {
        const float *p = (const float *)from + offset;
        if (step == 1)
            memcpy(to, p, width * sizeof(float));
        else
            for (int64_t w = 0; w < width; w++) to[w] = p[w * step];
    } else if (dtype == BFLOAT16) {
        const uint16_t *p = (const uint16_t *)from + offset;
        for (int64_t w = 0; w < width; w++) {
            uint32_t bits = (uint32_t)p[w * step] << 16;
            memcpy(to + w, &bits, 4);
        }
    } else {
#ifdef __FLT16_MANT_DIG__
        const _Float16 *p = (const _Float16 *)from + offset;
        for (int64_t w = 0; w < width; w++) to[w] = (float)p[w * step];
#endif
    }
    for (int64_t w = width; w < padded(width); w++) to[w] = 0.0f;
}

INLINE void NAME(store_row)(void *to, int64_t offset, int64_t step, const float *from,
                            int64_t width, int64_t dtype) {
    if (dtype == FLOAT32) {
        float *p = (float *)to + offset;
        if (step == 1)
            memcpy(p, from, width * sizeof(float));
        else
            for (int64_t w = 0; w < width; w++) p[w * step] = from[w];
    } else if (dtype == BFLOAT16) {
        uint16_t *p = (uint16_t *)to + offset;
        for (int64_t w = 0; w < width; w++) {
            uint32_t bits;
            memcpy(&bits, from + w, 4);
            uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            p[w * step] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : even);
        }
    } else {
#ifdef __FLT16_MANT_DIG__
        _Float16 *p = (_Float16 *)to + offset;
        for (int64_t w = 0; w < width; w++) p[w * step] = (_Float16)from[w];
#endif
    }
}

/* kernel (9, n) to (n, 9). */
INLINE void NAME(by_channel)(const float *kernel, int64_t n, float *to) {
    for (int64_t c = 0; c < n; c++)
        for (int64_t t = 0; t < 9; t++) to[c * 9 + t] = kernel[t * n + c];
}

/* Channels of contiguous float32. */
INLINE int NAME(packed)(const int64_t *stride, const Shape *s) {
    return s->dtype == FLOAT32 && stride[3] == 1 && stride[2] == s->width;
}

/* Rows of packed channels by whole vectors: what is read past the end of a row is masked, what is
 * written past it is overwritten by the next row. The last rows of a channel go number by number. */
INLINE void NAME(load_packed)(float *to, const float *from, int64_t H, int64_t W, vec tail) {
    const int64_t whole = W / LANES * LANES, Wp = padded(W);
    for (int64_t h = 0; h < H; h++, from += W, to += Wp) {
        for (int64_t w = 0; w < whole; w += LANES) NAME(store)(to + w, NAME(load)(from + w));
        if (whole == W) continue;
        if ((H - h) * W - whole >= LANES) {
            const vec v = NAME(load)(from + whole);
            NAME(store)(to + whole, (vec)((ivec)v & (ivec)tail));
        } else {
            for (int64_t w = whole; w < Wp; w++) to[w] = w < W ? from[w] : 0.0f;
        }
    }
}

INLINE void NAME(store_tail)(float *to, int64_t w, vec v, int64_t h, int64_t H, int64_t W) {
    if ((H - h) * W - w >= LANES)
        NAME(store)(to + w, v);
    else
        for (int64_t i = 0; w + i < W; i++) to[w + i] = v[i];
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE void NAME(transpose)(vec v[8]) {
    vec t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            v[i + 2 * j + 1] = SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[i + 4] = SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i++) v[i] = t[i];
}

/* Pixels of whole vectors of float32 channels, as in channels-last maps. */
INLINE int NAME(pixels)(const int64_t *stride, const Shape *s) {
    return s->dtype == FLOAT32 && stride[1] == 1 && s->n % LANES == 0;
}

/* One row of eight channels: pixels at stride `step` to or from rows at stride `apart`. */
INLINE void NAME(load_pixels)(float *to, int64_t apart, const float *from, int64_t step,
                              int64_t W) {
    for (int64_t w = 0; w < W; w += LANES) {
        vec v[8];
        for (int64_t i = 0; i < 8; i++)
            v[i] = w + i < W ? NAME(load)(from + (w + i) * step) : (vec){0};
        NAME(transpose)(v);
        for (int64_t i = 0; i < 8; i++) NAME(store)(to + i * apart + w, v[i]);
    }
}

INLINE void NAME(store_pixels)(float *to, int64_t step, const float *from, int64_t apart,
                               int64_t W) {
    for (int64_t w = 0; w < W; w += LANES) {
        vec v[8];
        for (int64_t i = 0; i < 8; i++) v[i] = NAME(load)(from + i * apart + w);
        NAME(transpose)(v);
        for (int64_t i = 0; i < 8 && w + i < W; i++) NAME(store)(to + (w + i) * step, v[i]);
    }
}

/* The tile's maps as rows of Wp floats: in place where they are that already, else a copy. */
INLINE const float *NAME(tile)(const void *from, const int64_t *stride, const Shape *s, int64_t b,
                               int64_t group, float *copy, int64_t *channel_step) {
    const int64_t W = s->width, H = s->height, Wp = padded(W);
    const int64_t start = b * stride[0] + group * s->n * stride[1];
    const int packed = NAME(packed)(stride, s);
    if (packed && W == Wp) {
        *channel_step = stride[1];
        return (const float *)from + start;
    }
    *channel_step = H * Wp;
    if (packed) {
        vec tail;
        for (int64_t i = 0; i < LANES; i++) ((int32_t *)&tail)[i] = i < W % LANES ? -1 : 0;
        for (int64_t c = 0; c < s->n; c++)
            NAME(load_packed)(copy + c * H * Wp, (const float *)from + start + c * stride[1], H, W,
                              tail);
        return copy;
    }
    if (NAME(pixels)(stride, s)) {
        for (int64_t h = 0; h < H; h++)
            for (int64_t c = 0; c < s->n; c += LANES)
                NAME(load_pixels)(copy + (c * H + h) * Wp, H * Wp,
                                  (const float *)from + start + c + h * stride[2], stride[3], W);
        return copy;
    }
    for (int64_t h = 0; h < H; h++) /* rows outside: channels-last rows share cache lines */
        for (int64_t c = 0; c < s->n; c++)
            NAME(load_row)(copy + (c * H + h) * Wp, from,
                           start + c * stride[1] + h * stride[2], stride[3], W, s->dtype);
    return copy;
}

/* pools (n, Hp + Wp): means over W, then means over H, zeros between. */
INLINE void NAME(pool)(const float *g, int64_t step, int64_t n, int64_t H, int64_t W,
                       float *pools) {
    const int64_t Wp = padded(W), Hp = padded(H), P = Hp + Wp;
    const float by_w = 1.0f / (float)W, by_h = 1.0f / (float)H;
    for (int64_t c = 0; c < n; c++) {
        float *row = pools + c * P, *col = row + Hp;
        memset(row, 0, P * sizeof(float));
        for (int64_t h = 0; h < H; h++) {
            const float *p = g + c * step + h * Wp;
            vec sum = {0};
            for (int64_t w = 0; w < Wp; w += LANES) {
                vec v = NAME(load)(p + w);
                sum += v;
                NAME(store)(col + w, NAME(load)(col + w) + v);
            }
            row[h] = NAME(hsum)(sum) * by_w;
        }
        for (int64_t w = 0; w < Wp; w += LANES)
            NAME(store)(col + w, NAME(load)(col + w) * by_h);
    }
}

/* Rows o to o + 3 of the product below, at `vectors` (1 or 2) vectors from p on. */
INLINE void NAME(mix_block)(const float *matrix, int64_t row_step, int64_t col_step,
                            const float *bias, const float *from, float *to, int64_t n,
                            int64_t P, int64_t o, int64_t p, const int vectors) {
    const int64_t last = n - 1 - o;
    const float *m[4];
    for (int64_t i = 0; i < 4; i++) m[i] = matrix + (o + (i < last ? i : last)) * row_step;
    vec a[4] = {{0}}, b[4] = {{0}};
    for (int64_t c = 0; c < n; c++) {
        const vec v = NAME(load)(from + c * P + p);
        vec v2 = v;
        if (vectors == 2) v2 = NAME(load)(from + c * P + p + LANES);
        for (int i = 0; i < 4; i++) {
            a[i] += m[i][c * col_step] * v;
            if (vectors == 2) b[i] += m[i][c * col_step] * v2;
        }
    }
    for (int64_t i = 0; i < 4 && i <= last; i++) {
        const float add = bias ? bias[o + i] : 0.0f;
        NAME(store)(to + (o + i) * P + p, a[i] + add);
        if (vectors == 2) NAME(store)(to + (o + i) * P + p + LANES, b[i] + add);
    }
}

/* to (n, P) = matrix (n, n), or its transpose, times from (n, P), plus bias (n). */
INLINE void NAME(mix)(const float *matrix, int64_t row_step, int64_t col_step, const float *bias,
                      const float *from, float *to, int64_t n, int64_t P) {
    for (int64_t o = 0; o < n; o += 4) {
        int64_t p = 0;
        for (; p + 2 * LANES <= P; p += 2 * LANES)
            NAME(mix_block)(matrix, row_step, col_step, bias, from, to, n, P, o, p, 2);
        if (p < P) NAME(mix_block)(matrix, row_step, col_step, bias, from, to, n, P, o, p, 1);
    }
}

/* means (n, 9), identity c. */
INLINE void NAME(shifted_means)(const float *g, int64_t step, const float *pools, int64_t n,
                                int64_t H, int64_t W, float *means) {
    const int64_t Wp = padded(W), Hp = padded(H), P = Hp + Wp;
    for (int64_t c = 0; c < n; c++) {
        const float *row = pools + c * P, *col = row + Hp, *p = g + c * step;
        float total = 0.0f;
        for (int64_t h = 0; h < H; h++) total += row[h];
        total /= (float)H;
        const float rows[3] = {row[H - 1] / (float)H, 0.0f, row[0] / (float)H};
        const float cols[3] = {col[W - 1] / (float)W, 0.0f, col[0] / (float)W};
        for (int64_t i = 0; i < 3; i++)
            for (int64_t j = 0; j < 3; j++) {
                float mean = total - rows[i] - cols[j];
                if (i != 1 && j != 1)
                    mean += p[(i ? 0 : H - 1) * Wp + (j ? 0 : W - 1)] / ((float)H * (float)W);
                means[c * 9 + i * 3 + j] = mean;
            }
    }
}

/* Dot products of b (size) with four rows of a, or with as many as there are. */
INLINE void NAME(dot4)(const float *a, int64_t step, int64_t rows, const float *b, int64_t size,
                       float *out) {
    const float *r[4];
    for (int64_t i = 0; i < 4; i++) r[i] = a + (i < rows ? i : rows - 1) * step;
    vec s[4] = {{0}};
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) {
        const vec v = NAME(load)(b + j);
        for (int i = 0; i < 4; i++) s[i] += NAME(load)(r[i] + j) * v;
    }
    for (int64_t i = 0; i < 4 && i < rows; i++) {
        out[i] = NAME(hsum)(s[i]);
        for (int64_t l = j; l < size; l++) out[i] += r[i][l] * b[l];
    }
}

/* u (n): softmax of the votes; where the first row was folded away its logit is 0. */
INLINE void NAME(vote)(const float *means, const Weights *k, int64_t n, int64_t votes, float *u) {
    const int64_t skip = n - votes;
    float top = -INFINITY, sum = 0.0f;
    u[0] = 0.0f;
    for (int64_t o = 0; o < votes; o += 4)
        NAME(dot4)(k->vote_weight + o * 9 * n, 9 * n, votes - o, means, 9 * n, u + skip + o);
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

/* Mean and 1/std of y = g·s_h·s_w, centred before squaring: E[y²] - μ² cancels where the mean is
 * large. The rounded mean leaves a rest in every centred number, which 1/std would magnify 316
 * times on a constant channel: the rest is the mean of the centred numbers. */
INLINE void NAME(moments)(const float *g, const float *gate_h, const float *gate_w, int64_t H,
                          int64_t W, float *mean_out, float *rest_out, float *r_out) {
    const int64_t Wp = padded(W), whole = W / LANES * LANES;
    const float area = (float)H * (float)W;
    vec sum = {0}, squares = {0}, rests = {0};
    for (int64_t h = 0; h < H; h++) {
        vec row = {0};
        for (int64_t w = 0; w < Wp; w += LANES)
            row += NAME(load)(g + h * Wp + w) * NAME(load)(gate_w + w);
        sum += row * gate_h[h];
    }
    const float mean = NAME(hsum)(sum) / area;
    float last[LANES];
    for (int64_t i = 0; i < LANES; i++) last[i] = whole + i < W ? mean : 0.0f;
    for (int64_t h = 0; h < H; h++) {
        const float *p = g + h * Wp;
        vec row = {0}, rest = {0};
        for (int64_t w = 0; w < whole; w += LANES) {
            vec d = NAME(load)(p + w) * NAME(load)(gate_w + w) * gate_h[h] - mean;
            row += d * d;
            rest += d;
        }
        if (whole < Wp) { /* padding is 0 in g and in the mean, so it adds nothing */
            vec d = NAME(load)(p + whole) * NAME(load)(gate_w + whole) * gate_h[h] -
                    NAME(load)(last);
            row += d * d;
            rest += d;
        }
        squares += row;
        rests += rest;
    }
    const float rest = NAME(hsum)(rests) / area;
    const float var = NAME(hsum)(squares) / area - rest * rest;
    *mean_out = mean;
    *rest_out = rest;
    *r_out = 1.0f / sqrtf((var > 0.0f ? var : 0.0f * var) + 1e-5f);
}

static int NAME(forward)(const Shape *s, const Weights *k, const void *x, void *out,
                         const Saved *saved) {
    const int64_t n = s->n, H = s->height, W = s->width, Wp = padded(W), Hp = padded(H);
    const int64_t P = Hp + Wp, line = Wp + 2 * LANES, tiles = s->batch * s->groups;
    const int64_t need = n * H * Wp + 2 * n * P + 23 * n + 9 * line + (H + 2) * Wp + LANES * Wp;
    int failed = 0;
#pragma omp parallel num_threads(s->threads)
    {
        int64_t thread = 0, threads = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num();
        threads = omp_get_num_threads();
#endif
        float *scratch = calloc(need, sizeof(float));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
        float *copy = scratch, *pools = copy + n * H * Wp, *gates = pools + n * P;
        float *means = gates + n * P, *u = means + 9 * n, *mean = u + n, *r = mean + n;
        float *coef = r + n, *rest = coef + n, *kernel = rest + n, *taps = kernel + 9 * n, *logits = taps + 9 * line, *row;
        row = logits + (H + 2) * Wp;
        if (scratch) NAME(by_channel)(k->kernel, n, kernel);
        const int64_t end = scratch ? tiles * (thread + 1) / threads : 0;
        for (int64_t tile = tiles * thread / threads; tile < end; tile++) {
            const int64_t b = tile / s->groups, group = tile % s->groups;
            int64_t step;
            const float *g = NAME(tile)(x, s->x, s, b, group, copy, &step);
            NAME(pool)(g, step, n, H, W, pools);
            NAME(mix)(k->mix_weight, n, 1, k->mix_bias, pools, gates, n, P);
            for (int64_t i = 0; i < n * P; i += LANES)
                NAME(store)(gates + i, NAME(sigmoid)(NAME(load)(gates + i)));
            NAME(shifted_means)(g, step, pools, n, H, W, means);
            NAME(vote)(means, k, n, s->votes, u);
            float bias = 0.0f;
            for (int64_t c = 0; c < n; c++) {
                NAME(moments)(g + c * step, gates + c * P, gates + c * P + Hp, H, W, mean + c,
                              rest + c, r + c);
                coef[c] = u[c] * k->gn_weight[c] * r[c];
                bias += u[c] * k->gn_bias[c] - coef[c] * rest[c];
            }

            /* Row h feeds the logits of rows h - 1, h and h + 1: nine products summed over
             * channels, then shifted adds. taps has a margin of zeros on both sides. */
            memset(logits, 0, (H + 2) * Wp * sizeof(float));
            for (int64_t h = 0; h < H; h++) {
                float *at = logits + (h + 1) * Wp;
                for (int64_t w = 0; w < Wp; w += LANES) {
                    vec t0 = {0}, t1 = {0}, t2 = {0}, t3 = {0}, t4 = {0}, t5 = {0}, t6 = {0};
                    vec t7 = {0}, t8 = {0}, norm = {0};
                    for (int64_t c = 0; c < n; c++) {
                        const float *q = kernel + 9 * c, *gate = gates + c * P;
                        const vec v = NAME(load)(g + c * step + h * Wp + w);
                        t0 += q[0] * v;
                        t1 += q[1] * v;
                        t2 += q[2] * v;
                        t3 += q[3] * v;
                        t4 += q[4] * v;
                        t5 += q[5] * v;
                        t6 += q[6] * v;
                        t7 += q[7] * v;
                        t8 += q[8] * v;
                        norm += (v * NAME(load)(gate + Hp + w) * gate[h] - mean[c]) * coef[c];
                    }
                    const vec all[9] = {t0, t1, t2, t3, t4, t5, t6, t7, t8};
                    for (int64_t t = 0; t < 9; t++)
                        NAME(store)(taps + t * line + LANES + w, all[t]);
                    NAME(store)(at + w, NAME(load)(at + w) + norm);
                }
                for (int64_t dy = -1; dy <= 1; dy++) {
                    float *to = at - dy * Wp;
                    const float *t = taps + (dy + 1) * 3 * line + LANES;
                    for (int64_t w = 0; w < Wp; w += LANES)
                        NAME(store)(to + w, NAME(load)(to + w) + NAME(load)(t + w - 1) +
                                                NAME(load)(t + line + w) +
                                                NAME(load)(t + 2 * line + w + 1));
                }
            }
            float *map = logits + Wp;
            for (int64_t i = 0; i < H * Wp; i += LANES)
                NAME(store)(map + i, NAME(sigmoid)(NAME(load)(map + i) + bias));

            const int64_t start = b * s->out[0] + group * n * s->out[1];
            const int packed = NAME(packed)(s->out, s), pixels = NAME(pixels)(s->out, s);
            const int64_t whole = W / LANES * LANES;
            for (int64_t i = 0; i < n * H; i++) {
                /* Packed channels one after another; else rows, whose pixels share cache lines. */
                const int64_t c = packed ? i / H : i % n, h = packed ? i % H : i / n;
                const float *p = g + c * step + h * Wp;
                float *to = (float *)out + start + c * s->out[1] + h * W;
                if (packed) {
                    for (int64_t w = 0; w < whole; w += LANES)
                        NAME(store)(to + w, NAME(load)(p + w) * NAME(load)(map + h * Wp + w));
                    if (whole < W)
                        NAME(store_tail)(to, whole,
                                         NAME(load)(p + whole) * NAME(load)(map + h * Wp + whole),
                                         h, H, W);
                    continue;
                }
                float *line_out = pixels ? row + c % LANES * Wp : row;
                for (int64_t w = 0; w < Wp; w += LANES)
                    NAME(store)(line_out + w, NAME(load)(p + w) * NAME(load)(map + h * Wp + w));
                if (pixels) {
                    if (c % LANES == LANES - 1)
                        NAME(store_pixels)((float *)out + start + c - (LANES - 1) + h * s->out[2],
                                           s->out[3], row, Wp, W);
                    continue;
                }
                NAME(store_row)(out, start + c * s->out[1] + h * s->out[2], s->out[3], row, W,
                                s->dtype);
            }
            if (!saved->gates) continue;
            for (int64_t c = 0; c < n; c++) {
                float *to = saved->gates + (tile * n + c) * (H + W);
                memcpy(to, gates + c * P, H * sizeof(float));
                memcpy(to + H, gates + c * P + Hp, W * sizeof(float));
            }
            for (int64_t h = 0; h < H; h++)
                memcpy(saved->gate_map + (tile * H + h) * W, map + h * Wp, W * sizeof(float));
            const float *vectors[4] = {mean, rest, r, u};
            for (int64_t i = 0; i < 4; i++)
                memcpy(saved->vectors + (i * tiles + tile) * n, vectors[i], n * sizeof(float));
        }
        free(scratch);
    }
    return failed ? -1 : 0;
}

static int NAME(backward)(const Shape *s, const Weights *k, const void *x, const void *grad,
                          const Saved *saved, const Grads *grads) {
    const int64_t n = s->n, H = s->height, W = s->width, Wp = padded(W), Hp = padded(H);
    const int64_t P = Hp + Wp, line = Wp + 2 * LANES, tiles = s->batch * s->groups;
    const int64_t np = padded(n), L = H + W;
    const float area = (float)H * (float)W;
    const int64_t need = 2 * n * H * Wp + 4 * n * P + L * np + n * np + 41 * n + (H + 2) * line +
                         LANES * Wp + H * Wp;
    int failed = 0;
#pragma omp parallel num_threads(s->threads)
    {
        int64_t thread = 0, threads = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num();
        threads = omp_get_num_threads();
#endif
        float *scratch = calloc(need, sizeof(float));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
        float *copy = scratch, *copy_d = copy + n * H * Wp, *pools = copy_d + n * H * Wp;
        float *gates = pools + n * P, *dmix = gates + n * P, *dpool = dmix + n * P;
        float *pools_t = dpool + n * P;           /* (L, np) */
        float *mix_sum = pools_t + L * np;        /* (n, np) */
        float *means = mix_sum + n * np, *dtaps = means + 9 * n, *dots = dtaps + 9 * n;
        float *ydot = dots + 9 * n, *dm = ydot + n, *base = dm + n, *slope = base + n;
        float *scale = slope + n, *kernel = scale + n, *dlogits = kernel + 9 * n;
        float *rows = dlogits + (H + 2) * line, *map = rows + LANES * Wp;
        if (scratch) NAME(by_channel)(k->kernel, n, kernel);
        float *sums = grads->sums ? grads->sums + thread * sums_size(n) : NULL;
        float *sum_kernel = sums + n * n, *sum_mix_bias = sums + n * n + 9 * n;
        float *sum_gn_weight = sum_mix_bias + n, *sum_gn_bias = sum_gn_weight + n;
        float *sum_logits = sums + sums_size(n) - 1;
        const int64_t end = scratch ? tiles * (thread + 1) / threads : 0;
        for (int64_t tile = tiles * thread / threads; tile < end; tile++) {
            const int64_t b = tile / s->groups, group = tile % s->groups;
            int64_t step, dstep;
            const float *g = NAME(tile)(x, s->x, s, b, group, copy, &step);
            const float *d = NAME(tile)(grad, s->grad, s, b, group, copy_d, &dstep);
            const float *mean = saved->vectors + tile * n;
            const float *rest = saved->vectors + (tiles + tile) * n;
            const float *r = saved->vectors + (2 * tiles + tile) * n;
            const float *u = saved->vectors + (3 * tiles + tile) * n;
            const float *saved_map = saved->gate_map + tile * H * W;
            for (int64_t h = 0; h < H; h++)
                memcpy(map + h * Wp, saved_map + h * W, W * sizeof(float));
            for (int64_t c = 0; c < n; c++) {
                const float *from = saved->gates + (tile * n + c) * L;
                memcpy(gates + c * P, from, H * sizeof(float));
                memcpy(gates + c * P + Hp, from + H, W * sizeof(float));
            }
            NAME(pool)(g, step, n, H, W, pools);
            NAME(shifted_means)(g, step, pools, n, H, W, means);

            /* dL, in a margin of zeros one pixel wide and more. */
            float sum_dl = 0.0f;
            for (int64_t h = 0; h < H; h++) {
                float *to = dlogits + (h + 1) * line + LANES;
                vec line_sum = {0};
                for (int64_t w = 0; w < Wp; w += LANES) {
                    vec sum = {0};
                    for (int64_t c = 0; c < n; c++)
                        sum += NAME(load)(g + c * step + h * Wp + w) *
                               NAME(load)(d + c * dstep + h * Wp + w);
                    const vec a = NAME(load)(map + h * Wp + w);
                    sum *= a * (1.0f - a);
                    NAME(store)(to + w, sum);
                    line_sum += sum;
                }
                sum_dl += NAME(hsum)(line_sum);
            }

            /* A channel's dot products of dL: with the centred y, and with g under nine shifts. */
            float inner = 0.0f;
            for (int64_t c = 0; c < n; c++) {
                const float *gate_h = gates + c * P, *gate_w = gate_h + Hp;
                vec t0 = {0}, t1 = {0}, t2 = {0}, t3 = {0}, t4 = {0}, t5 = {0}, t6 = {0};
                vec t7 = {0}, t8 = {0}, yd = {0};
                for (int64_t h = 0; h < H; h++) {
                    const float *p = g + c * step + h * Wp;
                    const float *q = dlogits + (h + 1) * line + LANES;
                    for (int64_t w = 0; w < Wp; w += LANES) {
                        const vec v = NAME(load)(p + w);
                        yd += NAME(load)(q + w) *
                              (v * NAME(load)(gate_w + w) * gate_h[h] - mean[c]);
                        t0 += NAME(load)(q + w + line + 1) * v;
                        t1 += NAME(load)(q + w + line) * v;
                        t2 += NAME(load)(q + w + line - 1) * v;
                        t3 += NAME(load)(q + w + 1) * v;
                        t4 += NAME(load)(q + w) * v;
                        t5 += NAME(load)(q + w - 1) * v;
                        t6 += NAME(load)(q + w - line + 1) * v;
                        t7 += NAME(load)(q + w - line) * v;
                        t8 += NAME(load)(q + w - line - 1) * v;
                    }
                }
                const vec all[9] = {t0, t1, t2, t3, t4, t5, t6, t7, t8};
                for (int64_t t = 0; t < 9; t++) dots[c * 9 + t] = NAME(hsum)(all[t]);
                ydot[c] = (NAME(hsum)(yd) - rest[c] * sum_dl) * r[c];
                inner += u[c] * (k->gn_weight[c] * ydot[c] + k->gn_bias[c] * sum_dl);
            }
            for (int64_t c = 0; c < n; c++) {
                const float du = k->gn_weight[c] * ydot[c] + k->gn_bias[c] * sum_dl;
                dm[c] = u[c] * (du - inner);
                /* dy = scale·dL - base - slope·(y - μ) */
                scale[c] = u[c] * k->gn_weight[c] * r[c];
                slope[c] = scale[c] * r[c] * ydot[c] / area;
                base[c] = scale[c] * sum_dl / area - slope[c] * rest[c];
            }
            if (sums) {
                for (int64_t c = 0; c < n; c++) {
                    sum_gn_weight[c] += u[c] * ydot[c];
                    sum_gn_bias[c] += u[c] * sum_dl;
                }
                for (int64_t i = 0; i < 9 * n; i++) sum_kernel[i] += dots[i];
                *sum_logits += sum_dl;
                memcpy(grads->dm + tile * n, dm, n * sizeof(float));
                memcpy(grads->means + tile * 9 * n, means, 9 * n * sizeof(float));
            }

            /* Through the gates along H and W to the pooled rows and columns. */
            memset(dmix, 0, n * P * sizeof(float));
            for (int64_t c = 0; c < n; c++) {
                const float *gate_h = gates + c * P, *gate_w = gate_h + Hp;
                float *dh = dmix + c * P, *dw = dh + Hp;
                for (int64_t h = 0; h < H; h++) {
                    const float *p = g + c * step + h * Wp;
                    const float *q = dlogits + (h + 1) * line + LANES;
                    vec sum = {0};
                    for (int64_t w = 0; w < Wp; w += LANES) {
                        const vec v = NAME(load)(p + w), sw = NAME(load)(gate_w + w);
                        const vec dy = NAME(load)(q + w) * scale[c] - base[c] -
                                       (v * sw * gate_h[h] - mean[c]) * slope[c];
                        const vec z = dy * v; /* 0 in the padding, as v is */
                        sum += z * sw;
                        NAME(store)(dw + w, NAME(load)(dw + w) + z * gate_h[h]);
                    }
                    dh[h] = NAME(hsum)(sum);
                }
                for (int64_t i = 0; i < P; i += LANES) {
                    const vec a = NAME(load)(gate_h + i);
                    NAME(store)(dh + i, NAME(load)(dh + i) * a * (1.0f - a));
                }
            }
            if (sums) {
                for (int64_t c = 0; c < n; c++) {
                    float sum = 0.0f;
                    for (int64_t i = 0; i < P; i++) sum += dmix[c * P + i];
                    sum_mix_bias[c] += sum;
                    for (int64_t h = 0; h < H; h++) pools_t[h * np + c] = pools[c * P + h];
                    for (int64_t w = 0; w < W; w++)
                        pools_t[(H + w) * np + c] = pools[c * P + Hp + w];
                }
                for (int64_t o = 0; o < n; o++)
                    for (int64_t c = 0; c < np; c += LANES) {
                        vec sum = NAME(load)(mix_sum + o * np + c);
                        for (int64_t h = 0; h < H; h++)
                            sum += dmix[o * P + h] * NAME(load)(pools_t + h * np + c);
                        for (int64_t w = 0; w < W; w++)
                            sum += dmix[o * P + Hp + w] * NAME(load)(pools_t + (H + w) * np + c);
                        NAME(store)(mix_sum + o * np + c, sum);
                    }
            }
            if (!grads->dx) continue;

            /* All that reaches a pixel through its row, its column or its corner. */
            NAME(mix)(k->mix_weight, 1, n, NULL, dmix, dpool, n, P);
            memset(dtaps, 0, 9 * n * sizeof(float));
            for (int64_t o = 0; o < n; o++) {
                const float *votes = k->vote_weight + o * 9 * n;
                const float m = dm[o] / area;
                for (int64_t i = 0; i < 9 * n; i++) dtaps[i] += m * votes[i];
            }
            const int64_t start = b * s->out[0] + group * n * s->out[1];
            for (int64_t c = 0; c < n; c++) {
                const float *t = dtaps + c * 9;
                float *drow = dpool + c * P, *dcol = drow + Hp, all = 0.0f;
                for (int64_t i = 0; i < 9; i++) all += t[i];
                for (int64_t h = 0; h < H; h++) drow[h] = drow[h] / (float)W + all;
                for (int64_t w = 0; w < W; w++) dcol[w] /= (float)H;
                drow[H - 1] -= t[0] + t[1] + t[2];
                drow[0] -= t[6] + t[7] + t[8];
                dcol[W - 1] -= t[0] + t[3] + t[6];
                dcol[0] -= t[2] + t[5] + t[8];
            }
            const int packed = NAME(packed)(s->out, s), pixels = NAME(pixels)(s->out, s);
            const int64_t whole = W / LANES * LANES;
            for (int64_t i = 0; i < n * H; i++) {
                const int64_t c = packed ? i / H : i % n, h = packed ? i % H : i / n;
                const float *gate_h = gates + c * P, *gate_w = gate_h + Hp, *t = dtaps + c * 9;
                const float *p = g + c * step + h * Wp, *dp = d + c * dstep + h * Wp;
                const float *q = dlogits + (h + 1) * line + LANES, *kc = kernel + 9 * c;
                const float *dcol = dpool + c * P + Hp, drow = dpool[c * P + h];
                float *line_out = pixels ? rows + c % LANES * Wp : rows;
                float *to = (float *)grads->dx + start + c * s->out[1] + h * W;
                for (int64_t w = 0; w < Wp; w += LANES) {
                    const vec both = NAME(load)(gate_w + w) * gate_h[h];
                    const vec here = NAME(load)(q + w);
                    const vec dy = here * scale[c] - base[c] -
                                   (NAME(load)(p + w) * both - mean[c]) * slope[c];
                    vec sum = dy * both + drow + NAME(load)(dcol + w);
                    sum += NAME(load)(dp + w) * NAME(load)(map + h * Wp + w);
                    vec conv = kc[4] * here;
                    conv += kc[0] * NAME(load)(q + w + line + 1);
                    conv += kc[1] * NAME(load)(q + w + line);
                    conv += kc[2] * NAME(load)(q + w + line - 1);
                    conv += kc[3] * NAME(load)(q + w + 1);
                    conv += kc[5] * NAME(load)(q + w - 1);
                    conv += kc[6] * NAME(load)(q + w - line + 1);
                    conv += kc[7] * NAME(load)(q + w - line);
                    conv += kc[8] * NAME(load)(q + w - line - 1);
                    NAME(store)(line_out + w, sum + conv);
                }
                if (h == H - 1) {
                    line_out[W - 1] += t[0];
                    line_out[0] += t[2];
                }
                if (h == 0) {
                    line_out[W - 1] += t[6];
                    line_out[0] += t[8];
                }
                if (packed) {
                    for (int64_t w = 0; w < whole; w += LANES)
                        NAME(store)(to + w, NAME(load)(line_out + w));
                    if (whole < W) NAME(store_tail)(to, whole, NAME(load)(line_out + whole), h, H, W);
                } else if (pixels) {
                    if (c % LANES == LANES - 1)
                        NAME(store_pixels)((float *)grads->dx + start + c - (LANES - 1) +
                                               h * s->out[2],
                                           s->out[3], rows, Wp, W);
                } else
                    NAME(store_row)(grads->dx, start + c * s->out[1] + h * s->out[2], s->out[3],
                                    rows, W, s->dtype);
            }
        }
        if (scratch && sums)
            for (int64_t o = 0; o < n; o++)
                memcpy(sums + o * n, mix_sum + o * np, n * sizeof(float));
        free(scratch);
    }
    return failed ? -1 : 0;
}

#endif
