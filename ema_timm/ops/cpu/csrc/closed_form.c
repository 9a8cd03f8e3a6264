/* The closed form on the CPU: what native.py calls, and the choice of the instruction set.
 *
 * The derivation is the docstring of formula.py. Nothing in this folder knows PyTorch: pointers,
 * sizes and strides come in, numbers go out. The kernel (kernel.h) is compiled once for each
 * instruction set and chosen at run time, so a binary built on one machine runs on another.
 */
#include "interface.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

typedef struct {
    Forward *forward;
    Backward *backward;
} Variant;

#if defined(__x86_64__)
/* Not every clang knows the name "f16c" below. Asked once: a virtual machine stops for cpuid. */
static int has_f16c;

__attribute__((constructor)) static void ask_for_f16c(void) {
    unsigned a, b, c = 0, d;
    has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

/* All that a variant's target names is asked for. */
static Variant best_variant(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
            return (Variant){forward_avx512, backward_avx512};
        return (Variant){forward_avx2, backward_avx2};
    }
#endif
    return (Variant){forward_baseline, backward_baseline};
}

/* glibc hands out blocks from 32 MiB on unmapped, and a page fault for every 4 KiB then takes
 * longer than all the arithmetic on it. The whole of the map will be written, so ask for large
 * pages. */
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

uint64_t ema_abi(void) { return EMA_ABI; }

int ema_features(void) {
#ifdef EMA_FLOAT16
    return HAS_FLOAT16;
#else
    return 0;
#endif
}

int64_t ema_sums_size(int64_t n) { return sums_size(n); }

int ema_forward(const Shape *shape, const Weights *weights, const void *x, void *out,
                const Saved *saved) {
    use_large_pages(shape, out);
    return best_variant().forward(shape, weights, x, out, saved);
}

int ema_backward(const Shape *shape, const Weights *weights, const void *x, const void *grad,
                 const Saved *saved, const Grads *grads) {
    use_large_pages(shape, grads->dx);
    return best_variant().backward(shape, weights, x, grad, saved, grads);
}
