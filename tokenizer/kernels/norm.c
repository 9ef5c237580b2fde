/* Group norm and SiLU, float32 and channels last: pictures (B, places, C), C a multiple of V.

   Source: Wu and He 2018, arXiv:1803.08494, equations 1 and 2; SiLU is x / (1 + e^-x). The reference is torch's own. */

#include <math.h>

#include "vectors.h"

enum { PLACES = 256 }; /* of a part, by which pictures are read, whatever the number of threads */

INLINE size parts_of(size places) { return (places + PLACES - 1) / PLACES; }

/* Floats that lie between the passes. */
size norm_room(size pictures, size places, size channels) { return 2 * pictures * (parts_of(places) + 1) * channels; }

/* Of a part of a picture the mean of each channel and the sum of squares around it. */
INLINE void gather(const float *features, size places, size channels, float *means, float *squares) {
    for (size c = 0; c < channels; c += V) {
        vector first = load(features + c), sum = {0}, square = {0};
        for (size place = 0; place < places; place++) { /* what differs from the first: else small differences drown */
            vector apart = load(features + place * channels + c) - first;
            sum += apart;
            square += apart * apart;
        }
        store(means + c, first + sum / (float)places);
        store(squares + c, square - sum * sum / (float)places);
    }
}

/* Of a group, of which each part has means and squares, the factor and the summand of each channel. */
INLINE void combine(const float *means, const float *squares, size places, size channels, size each, double epsilon,
                    const float *weight, const float *bias, float *factors, float *summands) {
    double mean = 0, square = 0;
    for (size part = 0; part < parts_of(places); part++)
        for (size c = 0; c < each; c++)
            mean += (double)means[part * channels + c] * least(PLACES, places - part * PLACES);
    mean /= (double)places * each;
    for (size part = 0; part < parts_of(places); part++)
        for (size c = 0; c < each; c++) {
            double apart = means[part * channels + c] - mean;
            square += squares[part * channels + c] + apart * apart * least(PLACES, places - part * PLACES);
        }
    double scale = 1 / sqrt(square / ((double)places * each) + epsilon);
    for (size c = 0; c < each; c++) {
        factors[c] = weight[c] * scale;
        summands[c] = bias[c] - mean * scale * weight[c];
    }
}

/* The result may be the features themselves. */
void norm_silu(const float *features, const float *weight, const float *bias, float *result, size pictures, size places,
               size channels, size groups, double epsilon, float *room, size threads) {
    size parts = parts_of(places), all = pictures * parts, each = channels / groups;
    int much = features != result && is_much(pictures * places * channels);
    float *means = room, *squares = means + all * channels, *factors = squares + all * channels;
    float *summands = factors + pictures * channels;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (size i = 0; i < all; i++) {
            size first = i % parts * PLACES;
            gather(features + (i / parts * places + first) * channels, least(PLACES, places - first), channels,
                   means + i * channels, squares + i * channels);
        }
#pragma omp for
        for (size i = 0; i < pictures * groups; i++) {
            size c = i % groups * each, at = i / groups * channels + c, of_parts = i / groups * parts * channels + c;
            combine(means + of_parts, squares + of_parts, places, channels, each, epsilon, weight + c, bias + c,
                    factors + at, summands + at);
        }
#pragma omp for
        for (size i = 0; i < all; i++) {
            size first = i % parts * PLACES, end = least(places, first + PLACES), picture = i / parts;
            for (size place = picture * places + first; place < picture * places + end; place++)
                for (size c = 0; c < channels; c += V) {
                    vector scaled = load(features + place * channels + c) * load(factors + picture * channels + c);
                    vector x = scaled + load(summands + picture * channels + c);
                    vector silu = x / (1 + exponential(-x));
                    put(result + place * channels + c, silu, much);
                }
        }
    }
}
