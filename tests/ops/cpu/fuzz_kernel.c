/* Feeds the kernel random calls whose every buffer ends, or begins, at a page that faults.
 *
 * Linked with the kernel's own sources; test_kernel_fuzz.py builds it with sanitizers and runs it:
 * fuzz_kernel FIRST LAST runs the cases of these numbers. A case is a function of its number.
 * Found are: a number read or written outside a buffer, one written inside it where the strides
 * place none, an input that changes, undefined behaviour, memory that is not given back, and
 * instruction sets or layouts that do not agree with the plainest of them.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "interface.h"

typedef struct {
    Forward *forward;
    Backward *backward;
    const char *name;
} Kernel;

static int kernels(Kernel *to) {
    int count = 0;
    to[count++] = (Kernel){forward_baseline, backward_baseline, "baseline"};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        to[count++] = (Kernel){forward_avx2, backward_avx2, "avx2"};
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
        to[count++] = (Kernel){forward_avx512, backward_avx512, "avx512"};
#endif
    return count;
}

/* Random numbers: a case depends on its number alone. */
static uint64_t state;

static uint64_t next(void) {
    state += 0x9e3779b97f4a7c15u;
    uint64_t z = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int64_t below(int64_t end) { return (int64_t)(next() % (uint64_t)end); }

static float normal(void) {
    float sum = -6.0f;
    for (int i = 0; i < 12; i++) sum += (float)(next() >> 40) / 16777216.0f;
    return sum;
}

static int64_t current; /* the case at hand */

static void fail(const char *what, const char *who) {
    fprintf(stderr, "case %lld: %s (%s)\n", (long long)current, what, who);
    exit(1);
}

/* Memory of exactly `size` bytes between pages that fault: against the one behind it, or, where
 * `front`, against the one before. */
typedef struct {
    unsigned char *at, *pages;
    size_t size, mapped;
} Buffer;

static int front;

static Buffer fenced(int64_t size) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t inner = ((size_t)size + page - 1) / page * page;
    Buffer b = {.size = (size_t)size, .mapped = inner + 2 * page};
    b.pages = mmap(NULL, b.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b.pages == MAP_FAILED) fail("no memory for the test itself", "mmap");
    if (inner && mprotect(b.pages + page, inner, PROT_READ | PROT_WRITE))
        fail("no memory for the test itself", "mprotect");
    b.at = b.pages + page + (front ? 0 : inner - (size_t)size);
    return b;
}

static void release(Buffer b) { munmap(b.pages, b.mapped); }

/* Numbers of a map, in any of the kernel's types. */
static int64_t width_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static void put(void *at, int64_t i, int64_t dtype, float value) {
    if (dtype == FLOAT32) {
        ((float *)at)[i] = value;
    } else if (dtype == BFLOAT16) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((uint16_t *)at)[i] = (uint16_t)(bits >> 16);
    } else {
#ifdef EMA_FLOAT16
        ((_Float16 *)at)[i] = (_Float16)value;
#endif
    }
}

static float get(const void *at, int64_t i, int64_t dtype) {
    if (dtype == FLOAT32) return ((const float *)at)[i];
    if (dtype == BFLOAT16) {
        uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
#ifdef EMA_FLOAT16
    return (float)((const _Float16 *)at)[i];
#else
    return 0.0f;
#endif
}

/* A map (B, C, H, W) in one of the layouts that PyTorch hands over. */
enum { CONTIGUOUS, CHANNELS_LAST, TRANSPOSED, SLICED, EXPANDED, LAYOUTS };

typedef struct {
    Buffer buffer;
    int64_t size[4], stride[4], numbers, dtype;
} Map;

static Map new_map(const Shape *s, int layout, int64_t dtype) {
    const int64_t B = s->batch, C = s->groups * s->n, H = s->height, W = s->width;
    Map m = {.size = {B, C, H, W}, .dtype = dtype};
    const int64_t strides[LAYOUTS][4] = {
        {C * H * W, H * W, W, 1},
        {C * H * W, 1, W * C, C},
        {C * H * W, H * W, 1, H},
        {(C + 1) * (H + 1) * 2 * W, (H + 1) * 2 * W, 2 * W, below(2) + 1},
        {0, H * W, W, 1},
    };
    memcpy(m.stride, strides[layout], sizeof m.stride);
    m.numbers = 1; /* up to the last number that the strides reach */
    for (int i = 0; i < 4; i++) m.numbers += (m.size[i] - 1) * m.stride[i];
    m.buffer = fenced(m.numbers * width_of(dtype));
    return m;
}

static int64_t place(const Map *m, int64_t i) {
    int64_t at = 0;
    for (int d = 3; d >= 0; d--) {
        at += i % m->size[d] * m->stride[d];
        i /= m->size[d];
    }
    return at;
}

static int64_t count_of(const Map *m) { return m->size[0] * m->size[1] * m->size[2] * m->size[3]; }

static void fill(Map *m) {
    memset(m->buffer.at, 0x5a, m->buffer.size);
    for (int64_t i = 0; i < count_of(m); i++)
        put(m->buffer.at, place(m, i), m->dtype, normal());
}

/* Every byte is 0x5a, until something is written. */
static void poison(Map *m) { memset(m->buffer.at, 0x5a, m->buffer.size); }

static void check_gaps(const Map *m, const char *who) {
    const int64_t width = width_of(m->dtype);
    unsigned char *own = calloc((size_t)m->numbers, 1);
    for (int64_t i = 0; i < count_of(m); i++) own[place(m, i)] = 1;
    for (int64_t i = 0; i < m->numbers; i++)
        for (int64_t b = 0; !own[i] && b < width; b++)
            if (m->buffer.at[i * width + b] != 0x5a) fail("written between the rows", who);
    free(own);
}

static Buffer numbers(int64_t count, float scale, float mean) {
    Buffer b = fenced(count * 4);
    for (int64_t i = 0; i < count; i++) ((float *)b.at)[i] = normal() * scale + mean;
    return b;
}

static uint64_t hash_of(Buffer b) {
    uint64_t found = 14695981039346656037u;
    for (size_t i = 0; i < b.size; i++) found = (found ^ b.at[i]) * 1099511628211u;
    return found;
}

/* `value` against what the first kernel found; each may round once more in a narrow type. */
static void check_close(float value, float wanted, float scale, int64_t dtype, const char *what,
                        const char *who) {
    const float tolerance = dtype == FLOAT32 ? 2e-3f : dtype == BFLOAT16 ? 2e-2f : 4e-3f;
    if (!(fabsf(value - wanted) <= tolerance * scale)) fail(what, who);
}

static float largest(const float *at, int64_t count) {
    float found = 1e-3f;
    for (int64_t i = 0; i < count; i++) found = fmaxf(found, fabsf(at[i]));
    return found;
}

/* What one kernel found is compared with `first`, or becomes it. */
static void compare(float *first, const float *found, int64_t count, int64_t dtype,
                    const char *what, const Kernel *k, int is_first) {
    if (is_first) memcpy(first, found, (size_t)count * 4);
    const float scale = largest(first, count);
    for (int64_t i = 0; i < count; i++)
        check_close(found[i], first[i], scale, dtype, what, k->name);
}

static float *read_map(const Map *m) {
    float *found = malloc((size_t)count_of(m) * 4);
    for (int64_t i = 0; i < count_of(m); i++) found[i] = get(m->buffer.at, place(m, i), m->dtype);
    return found;
}

enum { MIX, MIX_BIAS, KERNEL, VOTES, VOTE_BIAS, GN_WEIGHT, GN_BIAS, PARAMETERS };

typedef struct {
    Shape shape;
    Map x, grad;
    int out_layout, dx_layout, need_x, need_sums, save;
    Buffer parameter[PARAMETERS];
    Weights weights;
} Case;

static Case new_case(void) {
    Case c = {0};
    Shape *s = &c.shape;
    const int64_t dtypes[] = {FLOAT32, FLOAT32, BFLOAT16, FLOAT16};
    *s = (Shape){.batch = 1 + below(3), .groups = 1 + below(4), .n = 1 + below(below(4) ? 10 : 33),
                 .height = 1 + below(below(4) ? 12 : 40), .width = 1 + below(below(4) ? 20 : 70),
                 .dtype = dtypes[below(4)], .threads = 1 + below(3)};
#ifndef EMA_FLOAT16
    if (s->dtype == FLOAT16) s->dtype = BFLOAT16;
#endif
    const int64_t n = s->n;
    front = (int)below(2);
    c.need_x = below(4) > 0;
    c.need_sums = !c.need_x || below(4) > 0;
    c.save = below(4) > 0; /* else inference */
    c.x = new_map(s, (int)below(LAYOUTS), s->dtype);
    c.grad = new_map(s, (int)below(LAYOUTS), s->dtype);
    fill(&c.x);
    fill(&c.grad);
    c.out_layout = (int)below(EXPANDED);
    c.dx_layout = (int)below(EXPANDED);
    const float scale = 1.0f / sqrtf((float)n);
    c.parameter[MIX] = numbers(n * n, scale, 0);
    c.parameter[MIX_BIAS] = numbers(n, 0.5f, 0);
    c.parameter[KERNEL] = numbers(9 * n, scale / 3, 0);
    c.parameter[VOTES] = numbers(n * 9 * n, scale / 3, 0);
    c.parameter[VOTE_BIAS] = numbers(n, 0.5f, 0);
    c.parameter[GN_WEIGHT] = numbers(n, 0.5f, 1);
    c.parameter[GN_BIAS] = numbers(n, 0.5f, 0);
    const float *at[PARAMETERS];
    for (int i = 0; i < PARAMETERS; i++) at[i] = (const float *)c.parameter[i].at;
    c.weights = (Weights){at[0], at[1], at[2], at[3], at[4], at[5], at[6]};
    memcpy(s->x, c.x.stride, sizeof s->x);
    memcpy(s->grad, c.grad.stride, sizeof s->grad);
    return c;
}

static uint64_t inputs(const Case *c) {
    uint64_t found = hash_of(c->x.buffer) ^ hash_of(c->grad.buffer) * 3;
    for (int i = 0; i < PARAMETERS; i++) found = found * 31 + hash_of(c->parameter[i]);
    return found;
}

/* What is kept of the first kernel's results. */
typedef struct {
    float *out, *dx, *sums;
} Results;

static void run_backward(const Case *c, const Kernel *k, const Saved *saved, Results *first,
                         int is_first) {
    Shape s = c->shape;
    const int64_t n = s.n, tiles = s.batch * s.groups, size = sums_size(n);
    Map dx = new_map(&s, c->dx_layout, s.dtype);
    memcpy(s.out, c->need_x ? dx.stride : c->x.stride, sizeof s.out);
    Buffer sums = fenced(s.threads * size * 4), dm = fenced(tiles * n * 4);
    Buffer means = fenced(tiles * 9 * n * 4);
    memset(sums.at, 0, sums.size);
    poison(&dx);
    const Grads grads = {c->need_x ? dx.buffer.at : NULL, c->need_sums ? (float *)sums.at : NULL,
                         c->need_sums ? (float *)dm.at : NULL,
                         c->need_sums ? (float *)means.at : NULL};
    if (k->backward(&s, &c->weights, c->x.buffer.at, c->grad.buffer.at, saved, &grads))
        fail("no memory", k->name);
    if (c->need_x) {
        check_gaps(&dx, k->name);
        float *found = read_map(&dx);
        if (is_first) first->dx = malloc((size_t)count_of(&dx) * 4);
        compare(first->dx, found, count_of(&dx), s.dtype, "dx differs", k, is_first);
        free(found);
    }
    if (c->need_sums) {
        float *found = calloc((size_t)size, 4);
        for (int64_t i = 0; i < s.threads * size; i++) found[i % size] += ((float *)sums.at)[i];
        if (is_first) first->sums = malloc((size_t)size * 4);
        compare(first->sums, found, size, FLOAT32, "the sums differ", k, is_first);
        for (int64_t i = 0; i < tiles * 9 * n; i++)
            if (!isfinite(((float *)means.at)[i])) fail("a mean was not written", k->name);
        free(found);
    }
    release(dx.buffer), release(sums), release(dm), release(means);
}

static void run_kernel(const Case *c, const Kernel *k, Results *first, int is_first) {
    Shape s = c->shape;
    const int64_t n = s.n, tiles = s.batch * s.groups;
    Map out = new_map(&s, c->out_layout, s.dtype);
    memcpy(s.out, out.stride, sizeof s.out);
    poison(&out);
    Buffer gates = fenced(tiles * n * (s.height + s.width) * 4);
    Buffer map = fenced(tiles * s.height * s.width * 4), vectors = fenced(4 * tiles * n * 4);
    Saved saved = {(float *)gates.at, (float *)map.at, (float *)vectors.at};
    const Saved none = {0};
    const uint64_t before = inputs(c);
    if (k->forward(&s, &c->weights, c->x.buffer.at, out.buffer.at, c->save ? &saved : &none))
        fail("no memory", k->name);
    check_gaps(&out, k->name);
    float *found = read_map(&out);
    if (is_first) first->out = malloc((size_t)count_of(&out) * 4);
    compare(first->out, found, count_of(&out), s.dtype, "the output differs", k, is_first);
    free(found);
    if (c->save) run_backward(c, k, &saved, first, is_first);
    if (inputs(c) != before) fail("an input was written to", k->name);
    release(out.buffer), release(gates), release(map), release(vectors);
}

static void run_case(int64_t number) {
    current = number;
    state = (uint64_t)number * 0x2545f4914f6cdd1du;
    Case c = new_case();
    Kernel all[3];
    const int count = kernels(all);
    Results first = {0};
    for (int i = 0; i < count; i++) run_kernel(&c, &all[i], &first, i == 0);
    free(first.out), free(first.dx), free(first.sums);
    release(c.x.buffer), release(c.grad.buffer);
    for (int i = 0; i < PARAMETERS; i++) release(c.parameter[i]);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const int64_t end = atoll(argv[2]);
    for (int64_t number = atoll(argv[1]); number < end; number++) run_case(number);
    printf("%lld cases\n", (long long)(end - atoll(argv[1])));
    return 0;
}
