/* Attention of one head and its gradients, float32: queries, keys and values (B, n, C), n and C multiples of V.

   No more than ROWS_AT_ONCE * n scores are held, as in Dao et al. 2022, arXiv:2205.14135; what comes of a place is the same
   whatever the other pictures and the threads. The reference is torch's own product, softmax and product. */

#include <math.h>
#include <omp.h>

#include "products.h"

enum { ROWS_AT_ONCE = 64 };

/* A row of scores to weights whose sum is 1. */
INLINE void softmax(float *row, size count, float scale) {
    vector largest = load(row), sum = {0};
    for (size i = V; i < count; i += V) largest = LARGER(largest, load(row + i));
    float most = largest[0], total = 0;
    for (size lane = 1; lane < V; lane++) most = largest[lane] > most ? largest[lane] : most;
    for (size i = 0; i < count; i += V) {
        vector weight = exponential((load(row + i) - most) * scale);
        store(row + i, weight);
        sum += weight;
    }
    for (size lane = 0; lane < V; lane++) total += sum[lane];
    for (size i = 0; i < count; i += V) store(row + i, load(row + i) * (1 / total));
}

/* Of a few queries the weights (rows, n), from keys that were turned into panels. */
INLINE void weigh(const float *queries, const float *turned, size rows, size places, size channels, float *weights) {
    multiply_all(queries, channels, 1, turned, 1, channels, weights, 0, rows, places);
    for (size r = 0; r < rows; r++) softmax(weights + r * places, places, 1 / sqrtf(channels));
}

/* Floats that lie between the steps, with so many threads. */
size attention_room(size pictures, size places, size channels, size threads) {
    return pictures * places * channels + threads * ROWS_AT_ONCE * places;
}

void attention(const float *queries, const float *keys, const float *values, float *result, size pictures, size places,
               size channels, float *room, size threads) {
    size all = places * channels, blocks = (places + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
#pragma omp parallel num_threads(threads)
    {
        float *weights = room + pictures * all + omp_get_thread_num() * ROWS_AT_ONCE * places;
#pragma omp for
        for (size i = 0; i < pictures; i++)
            turn_into_panels(keys + i * all, channels, places, places, room + i * all);
#pragma omp for
        for (size block = 0; block < pictures * blocks; block++) {
            size picture = block / blocks * all, row = block % blocks * ROWS_AT_ONCE;
            size rows = least(ROWS_AT_ONCE, places - row), at = picture + row * channels;
            weigh(queries + at, room + picture, rows, places, channels, weights);
            multiply_all(weights, places, 1, values + picture, 0, places, result + at, 0, rows, channels);
        }
    }
}

size attention_gradients_room(size places, size channels, size threads) {
    return threads * (2 * places * channels + 2 * ROWS_AT_ONCE * places);
}

/* Those of queries, keys and values from that of the result, a picture by one thread. */
void attention_gradients(const float *queries, const float *keys, const float *values, const float *towards,
                         float *to_queries, float *to_keys, float *to_values, size pictures, size places, size channels,
                         float *room, size threads) {
    size all = places * channels;
    float scale = 1 / sqrtf(channels);
#pragma omp parallel for num_threads(threads)
    for (size picture = 0; picture < pictures * all; picture += all) {
        float *turned_keys = room + omp_get_thread_num() * (2 * all + 2 * ROWS_AT_ONCE * places);
        float *turned_values = turned_keys + all, *weights = turned_values + all;
        float *back = weights + ROWS_AT_ONCE * places; /* the gradients of the weights, then of the scores */
        turn_into_panels(keys + picture, channels, places, places, turned_keys);
        turn_into_panels(values + picture, channels, places, places, turned_values);
        for (size row = 0; row < places; row += ROWS_AT_ONCE) {
            size rows = least(ROWS_AT_ONCE, places - row), at = picture + row * channels;
            weigh(queries + at, turned_keys, rows, places, channels, weights);
            multiply_all(weights, 1, places, towards + at, 0, rows, to_values + picture, row > 0, places, channels);
            multiply_all(towards + at, channels, 1, turned_values, 1, channels, back, 0, rows, places);
            for (size r = 0; r < rows; r++) {
                float *weight = weights + r * places, *score = back + r * places, mean = 0;
                vector sum = {0};
                for (size i = 0; i < places; i += V) sum += load(weight + i) * load(score + i);
                for (size lane = 0; lane < V; lane++) mean += sum[lane];
                for (size i = 0; i < places; i += V)
                    store(score + i, load(weight + i) * (load(score + i) - mean) * scale);
            }
            multiply_all(back, places, 1, keys + picture, 0, places, to_queries + at, 0, rows, channels);
            multiply_all(back, 1, places, queries + at, 0, rows, to_keys + picture, row > 0, places, channels);
        }
    }
}
