/* 1x1 convolutions and their gradients: products of matrices in float32, whose rows are the N places of all pictures,
   channels last. What comes of a place is the same whatever the others, and all of it with any number of threads.
   The reference is torch's own convolution. */

#include <string.h>

#include "products.h"

enum {
    BLOCK = 64,  /* rows at a time, that stay in the cache while the weight is read */
    DEPTH = 128, /* places at a time, that stay there while a weight's gradient grows */
};

/* Rows first ... last - 1 of left (N, depth) by right, on top of `bias` or 0. A last few go by the room, as ROWS go at
   once. */
INLINE void multiply_rows(const float *left, const float *right, int packed, const float *bias, size depth, size columns,
                          float *result, size first, size last, float *room) {
    size rest = (last - first) % ROWS, whole = last - rest;
    for (size row = first; row < last; row++)
        for (size c = 0; c < columns; c += V) store(result + row * columns + c, bias ? load(bias + c) : (vector){0});
    multiply_all(left + first * depth, depth, 1, right, packed, depth, result + first * columns, 1, whole - first, columns);
    if (!rest) return;
    float *given = room, *sums = room + ROWS * depth;
    memcpy(given, left + whole * depth, rest * depth * sizeof(float));
    memcpy(sums, result + whole * columns, rest * columns * sizeof(float));
    multiply_all(given, depth, 1, right, packed, depth, sums, 1, rest, columns);
    memcpy(result + whole * columns, sums, rest * columns * sizeof(float));
}

/* Floats that a last few rows take, in and out. */
size pointwise_rest(size in, size out) { return ROWS * (in + out); }

/* And with the weight turned over, of O filled up to whole vectors. */
size pointwise_room(size in, size out) { return in * out + pointwise_rest(in, out); }

/* Features (N, C) by a weight (O, C) to (N, filled), and a bias of as many added. */
void pointwise_convolve(const float *features, const float *weight, const float *bias, float *result, size places,
                        size in, size out, size filled, float *room, size threads) {
    turn_into_panels(weight, in, out, filled, room);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size first = 0; first < places; first += BLOCK)
        multiply_rows(features, room, 1, bias, in, filled, result, first, least(places, first + BLOCK), room + in * filled);
}

/* The gradient (N, C) of features from that of the result (N, O), C a multiple of V. */
void pointwise_to_features(const float *towards, const float *weight, float *result, size places, size in, size out,
                           float *room, size threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size first = 0; first < places; first += BLOCK)
        multiply_rows(towards, weight, 0, 0, out, in, result, first, least(places, first + BLOCK), room);
}

/* The gradient (O, C) of a weight, C and O multiples of V. */
void pointwise_to_weight(const float *features, const float *towards, float *result, size places, size in, size out,
                         size threads) {
#pragma omp parallel num_threads(threads)
    for (size first = 0; first < places; first += DEPTH)
#pragma omp for schedule(static) nowait /* the same rows each time */
        for (size o = 0; o < out; o += ROWS)
            multiply_all(towards + first * out + o, 1, out, features + first * in, 0, least(DEPTH, places - first),
                         result + o * in, first > 0, ROWS, in);
}
