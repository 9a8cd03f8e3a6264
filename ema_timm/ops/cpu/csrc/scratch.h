/* What a thread has to itself: its scratch memory, and its share of the tiles. */
#ifndef EMA_SCRATCH_H
#define EMA_SCRATCH_H

#include <stddef.h>
#include <stdint.h>
#ifdef _OPENMP
/* What is needed of omp.h, which compilers without an OpenMP of their own do not bring. */
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#endif

/* Memory handed out part by part. A layout is taken twice: without memory, to learn in `used` how
 * many numbers it needs, and with it. */
typedef struct {
    float *memory; /* or null */
    int64_t used;
} Arena;

static inline float *take(Arena *arena, int64_t numbers) {
    float *part = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += numbers;
    return part;
}

/* Tiles first to end - 1 are this thread's. */
typedef struct {
    int64_t thread, first, end;
} Share;

static inline Share share_of(int64_t tiles) {
    int64_t thread = 0, threads = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num();
    threads = omp_get_num_threads();
#endif
    return (Share){thread, tiles * thread / threads, tiles * (thread + 1) / threads};
}

#endif
