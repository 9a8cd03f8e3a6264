/* Products of a matrix of weights with columns that are whole vectors. */
#ifndef EMA_PRODUCTS_H
#define EMA_PRODUCTS_H

#include <stdint.h>
#include <string.h>

#include "vectors.h"

/* (rows, cols), or its transpose: the number of row o and column c is at[o * row_step +
 * c * col_step]. */
typedef struct {
    const float *at;
    int64_t row_step, col_step, rows, cols;
} Matrix;

/* As many columns are summed by themselves, so that rounding does not grow with all of them. */
#define SUMMED 64

/* Rows o to o + `rows` - 1 of the product below, at `vectors` vectors from p on: together eight
 * sums, as many as hide the latency of an addition. */
INLINE void product_block(Matrix m, const float *bias, const float *from, float *to, int64_t width,
                          int64_t o, int64_t p, const int rows, const int vectors) {
    const int64_t last = m.rows - 1 - o;
    const float *row[8];
    vec total[8] = {{0}};
    for (int i = 0; i < rows; i++) row[i] = m.at + (o + (i < last ? i : last)) * m.row_step;
    for (int64_t first = 0; first < m.cols; first += SUMMED) {
        const int64_t end = first + SUMMED < m.cols ? first + SUMMED : m.cols;
        vec sum[8] = {{0}};
        for (int64_t c = first; c < end; c++)
            for (int v = 0; v < vectors; v++) {
                const vec x = load(from + c * width + p + v * LANES);
                for (int i = 0; i < rows; i++)
                    sum[i * vectors + v] += row[i][c * m.col_step] * x;
            }
        for (int i = 0; i < 8; i++) total[i] += sum[i];
    }
    for (int i = 0; i < rows && i <= last; i++)
        for (int v = 0; v < vectors; v++)
            store(to + (o + i) * width + p + v * LANES,
                  total[i * vectors + v] + (bias ? bias[o + i] : 0.0f));
}

/* to (rows, width) = m times from (cols, width), plus bias (rows) or nothing. */
INLINE void product(Matrix m, const float *bias, const float *from, float *to, int64_t width) {
    int64_t p = 0;
    for (; p + 2 * LANES <= width; p += 2 * LANES)
        for (int64_t o = 0; o < m.rows; o += 4)
            product_block(m, bias, from, to, width, o, p, 4, 2);
    if (p < width)
        for (int64_t o = 0; o < m.rows; o += 8)
            product_block(m, bias, from, to, width, o, p, 8, 1);
}

/* to (width) += the sum of eight rows, (width) each, times their coefficients. */
INLINE void add_rows(const float *rows, const float *coef, float *to, int64_t width) {
    vec k[8];
    int64_t j = 0;
    for (int i = 0; i < 8; i++) k[i] = splat(coef[i]);
    for (; j + LANES <= width; j += LANES) {
        vec sum = load(to + j), odd = {0};
        for (int i = 0; i < 8; i += 2) {
            sum += k[i] * load(rows + i * width + j);
            odd += k[i + 1] * load(rows + (i + 1) * width + j);
        }
        store(to + j, sum + odd);
    }
    for (; j < width; j++)
        for (int i = 0; i < 8; i++) to[j] += coef[i] * rows[i * width + j];
}

/* to (width) = the sum of `count` rows, (width) each, times their coefficients. */
INLINE void combination(const float *rows, const float *coef, int64_t count, float *to,
                        int64_t width) {
    int64_t o = 0;
    memset(to, 0, width * sizeof(float));
    for (; o + 8 <= count; o += 8) add_rows(rows + o * width, coef + o, to, width);
    for (; o < count; o++)
        for (int64_t j = 0; j < width; j++) to[j] += coef[o] * rows[o * width + j];
}

#endif
