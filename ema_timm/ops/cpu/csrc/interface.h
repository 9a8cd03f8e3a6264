/* What the caller hands over, and the kernel's entry points for each instruction set. */
#ifndef EMA_INTERFACE_H
#define EMA_INTERFACE_H

#if !defined(__GNUC__)
#error "The kernel needs the vector extensions of GCC or clang; PyTorch is the fallback."
#endif

#include <stdint.h>

/* The digest of this folder's files: library.py takes only a library built from those it has. */
#ifndef EMA_ABI
#define EMA_ABI 0 /* built by hand, and never taken */
#endif

/* Bits of ema_features(): what not every compiler has. -DEMA_NO_FLOAT16 leaves it out. */
enum { HAS_FLOAT16 = 1 };

#if defined(__FLT16_MANT_DIG__) && !defined(EMA_NO_FLOAT16)
#define EMA_FLOAT16
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef struct {
    int64_t batch, groups, n, height, width;
    int64_t dtype, threads;
    int64_t x[4], out[4], grad[4]; /* strides in numbers: B, C, H, W */
} Shape;

typedef struct { /* layouts as in weights.FoldedWeights, float32 */
    const float *mix_weight, *mix_bias, *kernel, *vote_weight, *vote_bias, *gn_weight, *gn_bias;
} Weights;

typedef struct { /* layouts as in saved.Saved, float32; or all null */
    float *gates, *gate_map, *vectors;
} Saved;

typedef struct { /* what the backward writes; dx null or sums null where not wanted */
    void *dx;
    float *sums;       /* (threads, sums_size(n)) */
    float *dm, *means; /* (tiles, n) and (tiles, 9 n) */
} Grads;

/* mix (n, n), kernel (n, 9), mix_bias, gn_weight and gn_bias (n each), logits (1). */
static inline int64_t sums_size(int64_t n) { return n * n + 12 * n + 1; }

/* 0, or -1 where no memory could be had. */
typedef int Forward(const Shape *, const Weights *, const void *x, void *out, const Saved *);
typedef int Backward(const Shape *, const Weights *, const void *x, const void *grad, const Saved *,
                     const Grads *);

#define EMA_HIDDEN __attribute__((visibility("hidden")))
EMA_HIDDEN Forward forward_baseline, forward_avx2, forward_avx512;
EMA_HIDDEN Backward backward_baseline, backward_avx2, backward_avx512;

#endif
