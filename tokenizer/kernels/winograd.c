/* 3x3 convolutions with padding 1 by Winograd's minimal filtering, F(4x4, 3x3), and the gradients of their kernels.

   A picture is cut into tiles that overlap. Of each tile n x n numbers a channel are taken, linear in its pixels, and as
   many of the kernel; their products, summed over the channels, give 4 x 4 pixels of the result, linear again. With
   n = 6 these are 36 products for 144; where the picture is doubled first (nearest neighbour), n = 5 and 25 are enough.
   Source: Lavin and Gray 2015, arXiv:1509.09308, section 4.3, for the algorithm; Barabasz et al. 2018, arXiv:1803.10986,
   for points that round less.

   Everything is float32; pictures are channels last, (B, H, W, C), and C and O are multiples of V.
   The reference is torch's own convolution. */

#include <omp.h>
#include <string.h>

#include "products.h"

enum { TILES = 44 }; /* of a block: a power of two would let its numbers meet in the same places of the cache */

/* Pictures, and how they are cut. C and O are filled up with 0 to whole vectors. */
typedef struct {
    size pictures, height, width; /* of what comes in */
    size in, out;                 /* channels */
    size doubled;                 /* 0, or 1: upsampled before */
} shape;

/* Floats from one number of all kernels to the next: not by a power of two, which would meet in one place of the cache. */
INLINE size apart(const shape *s) { return s->in * s->out + V; }

INLINE size numbers(size doubled) { return doubled ? 5 : 6; } /* of an axis */
INLINE size side(size doubled) { return doubled ? 4 : 6; }    /* of a tile, in pixels */
INLINE size step(size doubled) { return doubled ? 2 : 4; }    /* from one tile to the next */
INLINE size across(const shape *s) { return (s->width + step(s->doubled) - 1) / step(s->doubled); }
INLINE size down(const shape *s) { return (s->height + step(s->doubled) - 1) / step(s->doubled); }
INLINE size all_tiles(const shape *s) { return s->pictures * down(s) * across(s); }

/* A row of a tile as a polynomial, at 0, P, -P, Q, -Q and infinity. These points have few bits, and round half as much
   as 0, 1, -1, 2, -2, which tests/test_winograd.py would tell. Of a doubled row d0 d1 d1 d2 d2 d3 the pixels need less:
   g0 (d0 - d2), (g0 + g1 + g2) (d1 + d2) / 2, (g0 - g1 - g2) (d1 - d2) / 2, (g0 + g1 - g2) (d1 - d2) / 2, g2 (d1 - d3). */
static const float P = 5 / 8., P2 = 25 / 64., P3 = 125 / 512., Q = 3 / 2., Q2 = 9 / 4., Q3 = 27 / 8.;

INLINE void of_tile(size doubled, const vector *d, vector *t) {
    if (doubled) {
        t[0] = d[0] - d[2];
        t[1] = d[1] + d[2];
        t[2] = t[3] = d[1] - d[2];
        t[4] = d[1] - d[3];
        return;
    }
    vector even_p = d[4] - Q2 * d[2], odd_p = P * (d[3] - Q2 * d[1]);
    vector even_q = d[4] - P2 * d[2], odd_q = Q * (d[3] - P2 * d[1]);
    t[0] = P2 * Q2 * d[0] - (P2 + Q2) * d[2] + d[4];
    t[1] = even_p + odd_p;
    t[2] = even_p - odd_p;
    t[3] = even_q + odd_q;
    t[4] = even_q - odd_q;
    t[5] = P2 * Q2 * d[1] - (P2 + Q2) * d[3] + d[5];
}

/* The same of a row of a kernel, */
INLINE void of_kernel(size doubled, const vector *g, vector *t) {
    if (doubled) {
        t[0] = g[0];
        t[1] = (g[0] + g[1] + g[2]) / 2;
        t[2] = (g[0] - g[1] - g[2]) / 2;
        t[3] = (g[0] + g[1] - g[2]) / 2;
        t[4] = g[2];
        return;
    }
    vector even_p = (g[0] + P2 * g[2]) / (2 * P2 * (P2 - Q2)), odd_p = g[1] / (2 * P * (P2 - Q2));
    vector even_q = (g[0] + Q2 * g[2]) / (2 * Q2 * (Q2 - P2)), odd_q = g[1] / (2 * Q * (Q2 - P2));
    t[0] = g[0] / (P2 * Q2);
    t[1] = even_p + odd_p;
    t[2] = even_p - odd_p;
    t[3] = even_q + odd_q;
    t[4] = even_q - odd_q;
    t[5] = g[2];
}

/* and from its gradient back to that of the row. */
INLINE void to_kernel(size doubled, const vector *t, vector *g) {
    if (doubled) {
        g[0] = t[0] + (t[1] + t[2] + t[3]) / 2;
        g[1] = (t[1] - t[2] + t[3]) / 2;
        g[2] = (t[1] - t[2] - t[3]) / 2 + t[4];
        return;
    }
    vector even_p = (t[1] + t[2]) / (2 * P2 * (P2 - Q2)), odd_p = (t[1] - t[2]) / (2 * P * (P2 - Q2));
    vector even_q = (t[3] + t[4]) / (2 * Q2 * (Q2 - P2)), odd_q = (t[3] - t[4]) / (2 * Q * (Q2 - P2));
    g[0] = t[0] / (P2 * Q2) + even_p + even_q;
    g[1] = odd_p + odd_q;
    g[2] = P2 * even_p + Q2 * even_q + t[5];
}

/* From the products of both to the pixels of a row, */
INLINE void to_pixels(size doubled, const vector *t, vector *p) {
    if (doubled) {
        p[0] = t[1] - t[2] + t[0];
        p[1] = t[1] + t[3];
        p[2] = t[1] + t[2];
        p[3] = t[1] - t[3] - t[4];
        return;
    }
    vector even_p = t[1] + t[2], odd_p = t[1] - t[2], even_q = t[3] + t[4], odd_q = t[3] - t[4];
    p[0] = t[0] + even_p + even_q;
    p[1] = P * odd_p + Q * odd_q;
    p[2] = P2 * even_p + Q2 * even_q;
    p[3] = P3 * odd_p + Q3 * odd_q + t[5];
}

/* and from their gradient back to that of the products. */
INLINE void of_pixels(size doubled, const vector *p, vector *t) {
    if (doubled) {
        t[0] = p[0];
        t[1] = p[0] + p[1] + p[2] + p[3];
        t[2] = p[2] - p[0];
        t[3] = p[1] - p[3];
        t[4] = -p[3];
        return;
    }
    vector even_p = p[0] + P2 * p[2], odd_p = P * p[1] + P3 * p[3];
    vector even_q = p[0] + Q2 * p[2], odd_q = Q * p[1] + Q3 * p[3];
    t[0] = p[0];
    t[1] = even_p + odd_p;
    t[2] = even_p - odd_p;
    t[3] = even_q + odd_q;
    t[4] = even_q - odd_q;
    t[5] = p[3];
}

typedef void along_axis(size doubled, const vector *from, vector *to);

/* A linear map of one axis along both: rows x columns vectors to wide x wide. */
INLINE void along_both(along_axis *map, size doubled, vector from[6][6], size tall, vector to[6][6], size wide) {
    vector between[6][6], column[6] = {0}, mapped[6];
    for (size y = 0; y < tall; y++) map(doubled, from[y], between[y]);
    for (size x = 0; x < wide; x++) {
        for (size y = 0; y < tall; y++) column[y] = between[y][x];
        map(doubled, column, mapped);
        for (size y = 0; y < wide; y++) to[y][x] = mapped[y];
    }
}

/* The pixels from (top, left) on, tall x tall of them, 0 where the picture has none, mapped to n x n numbers, each
   `apart` from the one before. */
INLINE void take(along_axis *map, size doubled, const float *picture, size height, size width, size channels, size top,
                 size left, size tall, float *taken, size apart) {
    size n = numbers(doubled), inside = top >= 0 && left >= 0 && top + tall <= height && left + tall <= width;
    for (size c = 0; c < channels; c += V) {
        vector pixels[6][6], mapped[6][6];
        for (size y = 0; y < tall; y++)
            for (size x = 0; x < tall; x++) {
                size row = top + y, column = left + x;
                if (inside || (row >= 0 && row < height && column >= 0 && column < width))
                    pixels[y][x] = load(picture + (row * width + column) * channels + c);
                else
                    pixels[y][x] = (vector){0};
            }
        along_both(map, doubled, pixels, tall, mapped, n);
        for (size y = 0; y < n; y++)
            for (size x = 0; x < n; x++) store(taken + (y * n + x) * apart + c, mapped[y][x]);
    }
}

INLINE void take_tile(const shape *s, size doubled, const float *features, size tile, float *taken) {
    size place = tile % (down(s) * across(s));
    size top = place / across(s) * step(doubled) - 1, left = place % across(s) * step(doubled) - 1;
    const float *picture = features + tile / (down(s) * across(s)) * s->height * s->width * s->in;
    take(of_tile, doubled, picture, s->height, s->width, s->in, top, left, side(doubled), taken, TILES * s->in);
}

/* What `give_tile` goes back to: the gradients of the pixels that come of a tile to those of the sums. */
INLINE void take_pixels(const shape *s, size doubled, const float *towards, size tile, float *reached) {
    size place = tile % (down(s) * across(s)), height = s->height << doubled, width = s->width << doubled;
    size top = place / across(s) * 4, left = place % across(s) * 4;
    const float *picture = towards + tile / (down(s) * across(s)) * height * width * s->out;
    take(of_pixels, doubled, picture, height, width, s->out, top, left, 4, reached, TILES * s->out);
}

/* The pixels of the result that come of a tile, from the sums; `bias` and `added`, pixels as the result has them, may be
   missing. */
INLINE void give_tile(const shape *s, size doubled, const float *sums, const float *bias, const float *added, size tile,
                      float *result) {
    size n = numbers(doubled), place = tile % (down(s) * across(s)), beyond = TILES * s->out;
    size height = s->height << doubled, width = s->width << doubled;
    size top = place / across(s) * 4, left = place % across(s) * 4;
    size tall = height - top < 4 ? height - top : 4, wide = width - left < 4 ? width - left : 4;
    int much = is_much(s->pictures * height * width * s->out);
    size corner = ((tile / (down(s) * across(s)) * height + top) * width + left) * s->out;
    for (size c = 0; c < s->out; c += V) {
        vector products[6][6], pixels[6][6], more = bias ? load(bias + c) : (vector){0};
        for (size y = 0; y < n; y++)
            for (size x = 0; x < n; x++) products[y][x] = load(sums + (y * n + x) * beyond + c);
        along_both(to_pixels, doubled, products, n, pixels, 4);
        for (size y = 0; y < tall; y++)
            for (size x = 0; x < wide; x++) {
                size at = corner + (y * width + x) * s->out + c;
                vector whole = added ? pixels[y][x] + more + load(added + at) : pixels[y][x] + more;
                if (much)
                    store_beyond(result + at, whole);
                else
                    store(result + at, whole);
            }
    }
}

/* Floats of a thread's workspace. */
INLINE size room_of(const shape *s) { return numbers(s->doubled) * numbers(s->doubled) * TILES * (s->in + s->out); }

/* Tiles first ... last - 1: their numbers, the sums, the pixels. */
INLINE void convolve_block(const shape *s, size doubled, const float *features, const float *kernel, const float *bias,
                           const float *added, float *result, size first, size last, float *room) {
    size n = numbers(doubled) * numbers(doubled);
    float *taken = room, *sums = room + n * TILES * s->in;
    for (size tile = first; tile < last; tile++)
        take_tile(s, doubled, features, tile, taken + (tile - first) * s->in);
    for (size i = 0; i < n; i++)
        multiply_all(taken + i * TILES * s->in, s->in, 1, kernel + i * apart(s), 1, s->in,
                     sums + i * TILES * s->out, 0, last - first, s->out);
    for (size tile = first; tile < last; tile++)
        give_tile(s, doubled, sums + (tile - first) * s->out, bias, added, tile, result);
}

/* Adds to the gradients of the kernel's numbers, n * n * (O, C), those of tiles first ... last - 1. */
INLINE void gradient_block(const shape *s, size doubled, const float *features, const float *towards, size first,
                           size last, float *gradients, float *room) {
    size n = numbers(doubled) * numbers(doubled);
    float *taken = room, *reached = room + n * TILES * s->in;
    for (size tile = first; tile < last; tile++) {
        take_tile(s, doubled, features, tile, taken + (tile - first) * s->in);
        take_pixels(s, doubled, towards, tile, reached + (tile - first) * s->out);
    }
    for (size i = 0; i < n; i++)
        multiply_all(reached + i * TILES * s->out, 1, s->out, taken + i * TILES * s->in, 0, last - first,
                     gradients + i * apart(s), 1, s->out, s->in);
}

/* Floats of n * n numbers of all kernels. */
size winograd_numbers(const shape *s) { return numbers(s->doubled) * numbers(s->doubled) * apart(s); }

/* Floats that lie between the steps of so many threads. */
size winograd_room(const shape *s, size threads) { return threads * room_of(s); }

/* Tiles of a block, of which fewer would not fill a thread. */
size winograd_tiles(void) { return TILES; }

/* A weight of `in` and `out` channels, with the steps along out, in, rows and columns, as `winograd_convolve` wants it:
   for each of the n * n numbers (C, O) in panels, filled up with 0 to whole vectors. It may be `turned` over. */
void winograd_pack(const shape *s, const float *weight, size in, size out, const size steps[4], size turned,
                   float *kernel) {
    size n = numbers(s->doubled);
    for (size o = 0; o < s->out; o += V)
        for (size c = 0; c < s->in; c++) {
            vector row[6][6], mapped[6][6];
            size panel = o / (COLUMNS * V) * (COLUMNS * V);
            size wide = s->out - panel < COLUMNS * V ? s->out - panel : COLUMNS * V;
            float *to = kernel + panel * s->in + c * wide + o - panel;
            for (size y = 0; y < 3; y++)
                for (size x = 0; x < 3; x++) {
                    const float *from = weight + o * steps[0] + c * steps[1];
                    from += (turned ? 2 - y : y) * steps[2] + (turned ? 2 - x : x) * steps[3];
                    row[y][x] = (vector){0};
                    if (c < in && o + V <= out && steps[0] == 1)
                        row[y][x] = load(from);
                    else
                        for (size lane = 0; c < in && lane < V && o + lane < out; lane++)
                            row[y][x][lane] = from[lane * steps[0]];
                }
            along_both(of_kernel, s->doubled, row, 3, mapped, n);
            for (size y = 0; y < n; y++)
                for (size x = 0; x < n; x++) store(to + (y * n + x) * apart(s), mapped[y][x]);
        }
}

/* Features to the result (B, H', W', O), each pixel the same whatever the other pictures and the threads. */
void winograd_convolve(const shape *s, const float *features, const float *kernel, const float *bias, const float *added,
                       float *result, float *rooms, size threads) {
    size tiles = all_tiles(s), each = (tiles + threads - 1) / threads;
    size block = each < TILES ? (each + ROWS - 1) / ROWS * ROWS : TILES;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size first = 0; first < tiles; first += block) {
        size last = first + block < tiles ? first + block : tiles;
        float *room = rooms + omp_get_thread_num() * room_of(s);
        if (s->doubled)
            convolve_block(s, 1, features, kernel, bias, added, result, first, last, room);
        else
            convolve_block(s, 0, features, kernel, bias, added, result, first, last, room);
    }
}

/* The gradient (O, 3, 3, C) of a weight from that of the result. `gradients` holds n * n * C * O numbers for each thread;
   which tiles are whose is fixed, and so is the sum for a number of threads. */
void winograd_weight_gradient(const shape *s, const float *features, const float *towards, float *weight,
                              float *gradients, float *rooms, size threads) {
    size tiles = all_tiles(s), each = (tiles + threads - 1) / threads, n = numbers(s->doubled);
    size held = n * n * apart(s);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size thread = 0; thread < threads; thread++) {
        float *sums = gradients + thread * held, *room = rooms + thread * room_of(s);
        size end = (thread + 1) * each < tiles ? (thread + 1) * each : tiles;
        memset(sums, 0, held * sizeof(float));
        for (size first = thread * each; first < end; first += TILES) {
            size last = first + TILES < end ? first + TILES : end;
            if (s->doubled)
                gradient_block(s, 1, features, towards, first, last, sums, room);
            else
                gradient_block(s, 0, features, towards, first, last, sums, room);
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size o = 0; o < s->out; o++)
        for (size c = 0; c < s->in; c += V) {
            vector mapped[6][6], row[6][6];
            for (size y = 0; y < n; y++)
                for (size x = 0; x < n; x++) {
                    const float *from = gradients + (y * n + x) * apart(s) + o * s->in + c;
                    mapped[y][x] = load(from);
                    for (size thread = 1; thread < threads; thread++) mapped[y][x] += load(from + thread * held);
                }
            along_both(to_kernel, s->doubled, mapped, n, row, 3);
            for (size y = 0; y < 3; y++)
                for (size x = 0; x < 3; x++) store(weight + ((o * 3 + y) * 3 + x) * s->in + c, row[y][x]);
        }
}
