/* The kernel for x86-64 processors with AVX2. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>

#define VARIANT avx2
#define EMA_AVX
#include "kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
