/* The kernel for x86-64 processors with AVX-512. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl")
#endif

#include <immintrin.h>

#define VARIANT avx512
#define EMA_AVX
#define EMA_WIDE
#include "kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
