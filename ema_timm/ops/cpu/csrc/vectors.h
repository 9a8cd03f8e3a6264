/* Vectors of eight floats: loads and stores, sums, exponentials, transposes. */
#ifndef EMA_VECTORS_H
#define EMA_VECTORS_H

#include <stdint.h>

#define LANES 8

/* Vectors are passed by value inside inlined functions alone. A step of a tile is a function for
 * good: its loops have all registers to themselves, and a profile shows it by its name. */
#define INLINE static inline __attribute__((always_inline))
#define STEP static __attribute__((noinline))

/* aligned(4): loads and stores through a pointer to it may be unaligned. */
typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(32), aligned(4), may_alias));

INLINE int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

INLINE vec load(const float *p) { return *(const vec *)p; }

INLINE void store(float *p, vec v) { *(vec *)p = v; }

INLINE vec splat(float s) { return (vec){s, s, s, s, s, s, s, s}; }

/* Where registers are wider, the sums over channels of forward.h take sixteen numbers at a time. */
#ifdef EMA_WIDE
#define WIDE 16
typedef float wide __attribute__((vector_size(64), aligned(4), may_alias));
#else
#define WIDE LANES
typedef vec wide;
#endif

INLINE wide load_wide(const float *p) { return *(const wide *)p; }

INLINE void store_wide(float *p, wide v) { *(wide *)p = v; }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* The sum over the lanes: ((0 + 4) + (1 + 5)) + ((2 + 6) + (3 + 7)). */
INLINE float hsum(vec v) {
    v += SHUFFLE(v, v, 4, 5, 6, 7, 4, 5, 6, 7);
    v += SHUFFLE(v, v, 1, 1, 3, 3, 1, 1, 3, 3);
    return v[0] + v[2];
}

/* Eight such sums at once. */
INLINE vec hsums(const vec v[8]) {
    vec half[4], pair[2];
    for (int i = 0; i < 4; i++)
        half[i] = SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
                  SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        pair[i] = SHUFFLE(half[2 * i], half[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14) +
                  SHUFFLE(half[2 * i], half[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
    return SHUFFLE(pair[0], pair[1], 0, 2, 8, 10, 4, 6, 12, 14) +
           SHUFFLE(pair[0], pair[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

/* e^x for x in [-87, 87], 2 ulp: 2^k times a polynomial on [-ln2/2, ln2/2]. */
INLINE vec exponential(vec x) {
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec k = x * 1.44269504f + magic;
    ivec bits = (ivec)k << 23;
    k -= magic;
    vec f = x - k * 0.693359375f;
    f -= k * -2.12194440e-4f;
    vec p = splat(1.0f / 5040);
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return (vec)((ivec)p + bits);
}

/* x within [-87, 87]. A comparison with NaN is false, so NaN comes through. */
INLINE vec clamped(vec x) {
    const vec high = splat(87.0f);
    const ivec above = x > high, below = x < -high;
    return (vec)((above & (ivec)high) | (below & (ivec)-high) | (~(above | below) & (ivec)x));
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-clamped(x))); }

/* Eight vectors, as the rows of a square, become its columns. */
INLINE void transpose(vec v[8]) {
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

#endif
