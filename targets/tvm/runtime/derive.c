/* Weights that a plan needs and its file of weights does not hold: they are made of others when a plan is opened.
 *
 *     target[o][p][q][c] = sum over k, l of matrix[p][k] * source[o][c][k][l] * matrix[q][l]
 *
 * for `points` p and q, k and l below `edge`: what Winograd's algorithm multiplies with. Source and target are floats,
 * each output's `source_row` and `target_row` apart; the matrix and the sums are doubles. A file of these copies would be
 * two to four times as large, and takes longer to read from flash than to make. */
#include <string.h>

#include "internal.h"

#define MOST_POINTS 16
#define MOST_EDGE 8

/* Whether so many rows of `used` elements lie in a place; rows are `row` elements apart. */
static int holds(const place *at, uint64_t bytes, uint64_t rows, uint64_t row, uint64_t used) {
    const uint64_t elements = at->size / bytes;
    return at->offset % bytes == 0 && used <= row && rows && row <= elements / rows;
}

int dvx_derivation_check(const derivation *d, uint32_t index, char *error) {
    const uint64_t window = (uint64_t)d->edge * d->edge, square = (uint64_t)d->points * d->points;
    if (!d->points || d->points > MOST_POINTS || !d->edge || d->edge > MOST_EDGE || !d->outputs || !d->inputs)
        return dvx_fail(error, "damaged plan: derivation %u has a size out of range", index);
    if (d->source.space != SPACE_WEIGHTS || d->matrix.space != SPACE_WEIGHTS || d->target.space != SPACE_DERIVED)
        return dvx_fail(error, "damaged plan: derivation %u is not from weights", index);
    if (!holds(&d->source, sizeof(float), d->outputs, d->source_row, window * d->inputs) ||
        !holds(&d->target, sizeof(float), d->outputs, d->target_row, square * d->inputs) ||
        !holds(&d->matrix, sizeof(double), d->points, d->edge, d->edge))
        return dvx_fail(error, "damaged plan: derivation %u does not fit its places", index);
    return 0;
}

/* One pair of channels: the window between two copies of the matrix. */
static void transform(const derivation *d, const double *matrix, const float *window, float *target) {
    double half[MOST_POINTS][MOST_EDGE];
    for (uint32_t p = 0; p < d->points; p++)
        for (uint32_t l = 0; l < d->edge; l++) {
            double sum = 0;
            for (uint32_t k = 0; k < d->edge; k++) sum += matrix[p * d->edge + k] * (double)window[k * d->edge + l];
            half[p][l] = sum;
        }
    for (uint32_t p = 0; p < d->points; p++)
        for (uint32_t q = 0; q < d->points; q++) {
            double sum = 0;
            for (uint32_t l = 0; l < d->edge; l++) sum += half[p][l] * matrix[q * d->edge + l];
            target[(size_t)(p * d->points + q) * d->inputs] = (float)sum;
        }
}

void dvx_derive(const plan *p, const uint8_t *weights, uint8_t *derived) {
    for (uint32_t i = 0; i < p->derivations; i++) {
        const derivation *d = &p->derivation[i];
        const size_t window = (size_t)d->edge * d->edge;
        double matrix[MOST_POINTS * MOST_EDGE];
        memcpy(matrix, weights + d->matrix.offset, (size_t)d->points * d->edge * sizeof *matrix);
        for (size_t o = 0; o < d->outputs; o++) {
            const float *source = (const float *)(const void *)(weights + d->source.offset) + o * d->source_row;
            float *target = (float *)(void *)(derived + d->target.offset) + o * d->target_row;
            for (size_t c = 0; c < d->inputs; c++) transform(d, matrix, source + c * window, target + c);
        }
    }
}
