/* The kernel for one instruction set: a .c file names it in VARIANT, sets it as the compiler's
 * target and includes this file.
 *
 * A tile (n channels of H x W: one sample, one group) is worked on while it is in cache, so memory
 * sees the input read once and the output written once.
 */
#if !defined(__clang__) /* else short copies of rows become calls to memcpy */
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

#include "backward.h"
#include "forward.h"
#include "interface.h"

#define JOIN_NOW(name, variant) name##_##variant
#define JOIN(name, variant) JOIN_NOW(name, variant)

int JOIN(forward, VARIANT)(const Shape *shape, const Weights *weights, const void *x, void *out,
                           const Saved *saved) {
    return forward(shape, weights, x, out, saved);
}

int JOIN(backward, VARIANT)(const Shape *shape, const Weights *weights, const void *x,
                            const void *grad, const Saved *saved, const Grads *grads) {
    return backward(shape, weights, x, grad, saved, grads);
}
