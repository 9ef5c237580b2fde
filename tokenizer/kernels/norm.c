/* Group norm and SiLU and their gradients, float32 and channels last: pictures (B, places, C), C a multiple of V.

   Source: Wu and He 2018, arXiv:1803.08494, equations 1 and 2; SiLU is x / (1 + e^-x). The reference is torch's own.
   With s = silu(y), y = weight * n + bias, n = (x - mean) * scale and dy = silu'(y) ds, over the N numbers of a group,

       dx = scale * (weight * dy - M - n * A),   M = sum(weight * dy) / N,   A = sum(weight * dy * n) / N. */

#include <math.h>

#include "vectors.h"

enum { PLACES = 256 }; /* of a part, by which pictures are read, whatever the number of threads */

INLINE size parts_of(size places) { return (places + PLACES - 1) / PLACES; }

/* Floats that lie between the passes, of each channel: three of a part and two of a picture, */
size norm_room(size pictures, size places, size channels) { return pictures * (3 * parts_of(places) + 2) * channels; }

/* and two of a part and four of a picture. */
size norm_gradients_room(size pictures, size places, size channels) {
    return pictures * (2 * parts_of(places) + 4) * channels;
}

/* The i-th of all parts: its places among those of all pictures, as if they were one. */
typedef struct {
    size picture, first, end;
} span;

INLINE span part_at(size i, size places) {
    size picture = i / parts_of(places), first = i % parts_of(places) * PLACES;
    return (span){picture, picture * places + first, picture * places + least(places, first + PLACES)};
}

/* Of a part of a picture the mean of each channel and the sum of squares around it, by way of a rough mean: small
   differences would drown in squares around 0, and squares around a single place could be those of an odd one. */
INLINE void gather(const float *features, size places, size channels, float *roughs, float *means, float *squares) {
    size few = least(places, 16);
    for (size c = 0; c < channels; c++) roughs[c] = means[c] = squares[c] = 0;
    for (size place = 0; place < few; place++)
        for (size c = 0; c < channels; c += V)
            store(roughs + c, load(roughs + c) + load(features + place * channels + c));
    for (size c = 0; c < channels; c += V) store(roughs + c, load(roughs + c) / (float)few);
    for (size place = 0; place < places; place++)
        for (size c = 0; c < channels; c += V) {
            vector apart = load(features + place * channels + c) - load(roughs + c);
            store(means + c, load(means + c) + apart);
            store(squares + c, load(squares + c) + apart * apart);
        }
    for (size c = 0; c < channels; c += V) {
        vector sum = load(means + c);
        store(means + c, load(roughs + c) + sum / (float)places);
        store(squares + c, load(squares + c) - sum * sum / (float)places);
    }
}

/* Of a group, of which each part has means and squares, its mean and scale, and the factor and the summand of each
   channel. */
INLINE void combine(const float *means, const float *squares, size places, size channels, size each, double epsilon,
                    const float *weight, const float *bias, float *factors, float *summands, float *statistics) {
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
    statistics[0] = mean, statistics[1] = scale;
    for (size c = 0; c < each; c++) {
        factors[c] = weight[c] * scale;
        summands[c] = bias[c] - mean * scale * weight[c];
    }
}

/* The result may be the features themselves; statistics (pictures, groups, 2) are for the gradients. */
void norm_silu(const float *features, const float *weight, const float *bias, float *result, float *statistics,
               size pictures, size places, size channels, size groups, double epsilon, float *room, size threads) {
    size parts = parts_of(places), all = pictures * parts, each = channels / groups;
    int much = features != result && is_much(pictures * places * channels);
    float *means = room, *squares = means + all * channels, *roughs = squares + all * channels;
    float *factors = roughs + all * channels, *summands = factors + pictures * channels;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (size i = 0; i < all; i++) {
            span part = part_at(i, places);
            gather(features + part.first * channels, part.end - part.first, channels, roughs + i * channels,
                   means + i * channels, squares + i * channels);
        }
#pragma omp for
        for (size i = 0; i < pictures * groups; i++) {
            size c = i % groups * each, at = i / groups * channels + c, of_parts = i / groups * parts * channels + c;
            combine(means + of_parts, squares + of_parts, places, channels, each, epsilon, weight + c, bias + c,
                    factors + at, summands + at, statistics + 2 * i);
        }
#pragma omp for
        for (size i = 0; i < all; i++) {
            span part = part_at(i, places);
            for (size place = part.first; place < part.end; place++)
                for (size c = 0; c < channels; c += V) {
                    vector scaled = load(features + place * channels + c) * load(factors + part.picture * channels + c);
                    vector x = scaled + load(summands + part.picture * channels + c);
                    vector silu = x / (1 + exponential(-x));
                    put(result + place * channels + c, silu, much);
                }
        }
    }
}

/* The gradient dy before SiLU, of V channels at a place, from the features and the gradient ds. */
INLINE vector before_silu(vector x, vector ds, vector mean, vector scale, vector weight, vector bias, vector *normed) {
    *normed = (x - mean) * scale;
    vector y = *normed * weight + bias, sigmoid = 1 / (1 + exponential(-y));
    return ds * sigmoid * (1 + y * (1 - sigmoid));
}

/* The gradients of features (pictures, places, C), weight and bias (C) from that of the result. */
void norm_silu_gradients(const float *features, const float *towards, const float *weight, const float *bias,
                         const float *statistics, float *to_features, float *to_weight, float *to_bias, size pictures,
                         size places, size channels, size groups, float *room, size threads) {
    size parts = parts_of(places), all = pictures * parts, each = channels / groups, many = pictures * channels;
    int much = is_much(many * places);
    float *sums = room, *products = sums + all * channels; /* of dy and of dy n, of each part */
    float *means = products + all * channels, *scales = means + many, *shifts = scales + many, *slopes = shifts + many;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (size i = 0; i < pictures * groups; i++)
            for (size c = i * each; c < (i + 1) * each; c++)
                means[c] = statistics[2 * i], scales[c] = statistics[2 * i + 1];
#pragma omp for
        for (size i = 0; i < all; i++) {
            span part = part_at(i, places);
            const float *mean = means + part.picture * channels, *scale = scales + part.picture * channels;
            float *sum = sums + i * channels, *product = products + i * channels;
            for (size c = 0; c < channels; c++) sum[c] = product[c] = 0;
            for (size place = part.first; place < part.end; place++)
                for (size c = 0; c < channels; c += V) {
                    size at = place * channels + c;
                    vector normed, dy = before_silu(load(features + at), load(towards + at), load(mean + c),
                                                    load(scale + c), load(weight + c), load(bias + c), &normed);
                    store(sum + c, load(sum + c) + dy);
                    store(product + c, load(product + c) + dy * normed);
                    store(to_features + at, dy);
                }
        }
#pragma omp for nowait
        for (size c = 0; c < channels; c++) {
            double sum = 0, product = 0;
            for (size i = c; i < all * channels; i += channels) sum += sums[i], product += products[i];
            to_bias[c] = sum, to_weight[c] = product;
        }
#pragma omp for
        for (size i = 0; i < pictures * groups; i++) {
            size first = i / groups * parts * channels + i % groups * each;
            double sum = 0, product = 0;
            for (size part = 0; part < parts; part++)
                for (size c = 0; c < each; c++) {
                    size at = first + part * channels + c;
                    sum += (double)weight[i % groups * each + c] * sums[at];
                    product += (double)weight[i % groups * each + c] * products[at];
                }
            double scale = statistics[2 * i + 1] / ((double)places * each);
            for (size c = i * each; c < (i + 1) * each; c++) shifts[c] = sum * scale, slopes[c] = product * scale;
        }
#pragma omp for
        for (size i = 0; i < all; i++) {
            span part = part_at(i, places);
            for (size place = part.first; place < part.end; place++)
                for (size c = 0; c < channels; c += V) {
                    size at = place * channels + c, here = part.picture * channels + c;
                    vector scale = load(scales + here), normed = (load(features + at) - load(means + here)) * scale;
                    vector dy = load(to_features + at);
                    vector dx = scale * load(weight + c) * dy - load(shifts + here) - normed * load(slopes + here);
                    put(to_features + at, dx, much);
                }
        }
    }
}
