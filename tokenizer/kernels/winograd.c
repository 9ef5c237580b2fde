/* 3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3), and the gradients of their kernels.

   A picture is cut into tiles that overlap. Of each tile n x n numbers a channel are taken, linear in its pixels, and as
   many of the kernel; their products, summed over the channels, give 4 x 4 pixels of the result, linear again. With
   n = 6 these are 36 products for 144; where the picture is doubled first (nearest neighbour), n = 5 and 25 are enough;
   where every other pixel of the result is left out, n = 5 and 81, as four pictures of every other row and column count
   as channels and some of their numbers are 0.
   Source: Lavin and Gray 2015, arXiv:1509.09308, section 4.3, for the algorithm; Barabasz et al. 2018, arXiv:1803.10986,
   for points that round less.

   Everything is float32; pictures are channels last, (B, H, W, C), and C and O are multiples of V.
   The reference is torch's own convolution. */

#include <omp.h>
#include <string.h>

#include "products.h"

enum { TILES = 44 }; /* of a block: a power of two would let its numbers meet in the same places of the cache */

/* What becomes of the sides of a picture: they are kept, with a padding of 1, doubled before, or halved, so that pixel i
   comes of those at 2 i, 2 i + 1 and 2 i + 2. */
typedef enum { KEPT, DOUBLED, HALVED } sides;

/* Pictures, and how they are cut. C and O are filled up with 0 to whole vectors. */
typedef struct {
    size pictures, height, width; /* of what comes in */
    size in, out;                 /* channels */
    size sides;
} shape;

INLINE size numbers(sides k) { return k == KEPT ? 6 : 5; }                     /* of an axis */
INLINE size step(sides k) { return k == KEPT ? 4 : k == DOUBLED ? 2 : 8; }     /* from one tile to the next, in pixels */
INLINE size after(sides k, size side) { return k == KEPT ? side : k == DOUBLED ? 2 * side : (side + 1) / 2; }
INLINE size across(const shape *s) { return (after(s->sides, s->width) + 3) / 4; }
INLINE size down(const shape *s) { return (after(s->sides, s->height) + 3) / 4; }
INLINE size all_tiles(const shape *s) { return s->pictures * down(s) * across(s); }

/* Parts of a tile, of each of which numbers are taken by itself: all of it, or four, of every other row and column. A part
   that begins with the second row or column has no last number along that axis: those that have one stand together. */
INLINE size parts(sides k) { return k == HALVED ? 4 : 1; }
INLINE size lower(sides k, size part) { return k == HALVED && part > 1; }
INLINE size right(sides k, size part) { return k == HALVED && (part == 0 || part == 3); }
INLINE size first_part(sides k, size x) { return k == HALVED && x == 4; }
INLINE size parts_of(sides k, size y, size x) { return k == HALVED ? 4 >> (y == 4) >> (x == 4) : 1; }

/* Floats from one number to the next, of all kernels, of a block of tiles, and of its sums: not by a power of two, which
   would meet in one place of the cache. */
INLINE size of_kernels(const shape *s) { return parts(s->sides) * s->in * s->out + V; }
INLINE size of_tiles(const shape *s, sides k) { return TILES * parts(k) * s->in + V; }
INLINE size of_sums(const shape *s) { return TILES * s->out + V; }

/* A row of a tile as a polynomial, at 0, P, -P, Q, -Q and infinity. These points have few bits, and round half as much
   as 0, 1, -1, 2, -2, which tests/test_winograd.py would tell. Of a doubled row d0 d1 d1 d2 d2 d3 the pixels need less:
   g0 (d0 - d2), (g0 + g1 + g2) (d1 + d2) / 2, (g0 - g1 - g2) (d1 - d2) / 2, (g0 + g1 - g2) (d1 - d2) / 2, g2 (d1 - d3).
   A part of a halved picture has kernels of two, and the points H, -H, Q, -Q and infinity. */
static const float P = 5 / 8., P2 = 25 / 64., P3 = 125 / 512., Q = 3 / 2., Q2 = 9 / 4., Q3 = 27 / 8.;
static const float H = 1 / 2., H2 = 1 / 4., H3 = 1 / 8.;

INLINE void of_tile(sides k, const vector *d, vector *t) {
    if (k == DOUBLED) {
        t[0] = d[0] - d[2];
        t[1] = d[1] + d[2];
        t[2] = t[3] = d[1] - d[2];
        t[4] = d[1] - d[3];
        return;
    }
    if (k == HALVED) {
        vector even_h = H * (d[2] - Q2 * d[0]), odd_h = d[3] - Q2 * d[1];
        vector even_q = Q * (d[2] - H2 * d[0]), odd_q = d[3] - H2 * d[1];
        t[0] = odd_h + even_h;
        t[1] = odd_h - even_h;
        t[2] = odd_q + even_q;
        t[3] = odd_q - even_q;
        t[4] = H2 * Q2 * d[0] - (H2 + Q2) * d[2] + d[4];
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
INLINE void of_kernel(sides k, const vector *g, vector *t) {
    if (k == DOUBLED) {
        t[0] = g[0];
        t[1] = (g[0] + g[1] + g[2]) / 2;
        t[2] = (g[0] - g[1] - g[2]) / 2;
        t[3] = (g[0] + g[1] - g[2]) / 2;
        t[4] = g[2];
        return;
    }
    if (k == HALVED) {
        vector even_h = g[0] * (1 / (2 * H * (H2 - Q2))), odd_h = g[1] * (1 / (2 * (H2 - Q2)));
        vector even_q = g[0] * (1 / (2 * Q * (Q2 - H2))), odd_q = g[1] * (1 / (2 * (Q2 - H2)));
        t[0] = odd_h + even_h;
        t[1] = odd_h - even_h;
        t[2] = odd_q + even_q;
        t[3] = odd_q - even_q;
        t[4] = g[1];
        return;
    }
    vector even_p = (g[0] + P2 * g[2]) * (1 / (2 * P2 * (P2 - Q2))), odd_p = g[1] * (1 / (2 * P * (P2 - Q2)));
    vector even_q = (g[0] + Q2 * g[2]) * (1 / (2 * Q2 * (Q2 - P2))), odd_q = g[1] * (1 / (2 * Q * (Q2 - P2)));
    t[0] = g[0] * (1 / (P2 * Q2));
    t[1] = even_p + odd_p;
    t[2] = even_p - odd_p;
    t[3] = even_q + odd_q;
    t[4] = even_q - odd_q;
    t[5] = g[2];
}

/* and from its gradient back to that of the row. */
INLINE void to_kernel(sides k, const vector *t, vector *g) {
    if (k == DOUBLED) {
        g[0] = t[0] + (t[1] + t[2] + t[3]) / 2;
        g[1] = (t[1] - t[2] + t[3]) / 2;
        g[2] = (t[1] - t[2] - t[3]) / 2 + t[4];
        return;
    }
    vector even_p = (t[1] + t[2]) * (1 / (2 * P2 * (P2 - Q2))), odd_p = (t[1] - t[2]) * (1 / (2 * P * (P2 - Q2)));
    vector even_q = (t[3] + t[4]) * (1 / (2 * Q2 * (Q2 - P2))), odd_q = (t[3] - t[4]) * (1 / (2 * Q * (Q2 - P2)));
    g[0] = t[0] * (1 / (P2 * Q2)) + even_p + even_q;
    g[1] = odd_p + odd_q;
    g[2] = P2 * even_p + Q2 * even_q + t[5];
}

/* From the products of both to the pixels of a row, */
INLINE void to_pixels(sides k, const vector *t, vector *p) {
    if (k == DOUBLED) {
        p[0] = t[1] - t[2] + t[0];
        p[1] = t[1] + t[3];
        p[2] = t[1] + t[2];
        p[3] = t[1] - t[3] - t[4];
        return;
    }
    if (k == HALVED) {
        vector even_h = t[0] + t[1], odd_h = t[0] - t[1], even_q = t[2] + t[3], odd_q = t[2] - t[3];
        p[0] = even_h + even_q;
        p[1] = H * odd_h + Q * odd_q;
        p[2] = H2 * even_h + Q2 * even_q;
        p[3] = H3 * odd_h + Q3 * odd_q + t[4];
        return;
    }
    vector even_p = t[1] + t[2], odd_p = t[1] - t[2], even_q = t[3] + t[4], odd_q = t[3] - t[4];
    p[0] = t[0] + even_p + even_q;
    p[1] = P * odd_p + Q * odd_q;
    p[2] = P2 * even_p + Q2 * even_q;
    p[3] = P3 * odd_p + Q3 * odd_q + t[5];
}

/* and from their gradient back to that of the products. */
INLINE void of_pixels(sides k, const vector *p, vector *t) {
    if (k == DOUBLED) {
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

typedef void along_axis(sides k, const vector *from, vector *to);

/* A linear map of one axis along both: rows x columns vectors to wide x wide. */
INLINE void along_both(along_axis *map, sides k, vector from[6][6], size tall, vector to[6][6], size wide) {
    vector between[6][6], column[6] = {0}, mapped[6];
    for (size y = 0; y < tall; y++) map(k, from[y], between[y]);
    for (size x = 0; x < wide; x++) {
        for (size y = 0; y < tall; y++) column[y] = between[y][x];
        map(k, column, mapped);
        for (size y = 0; y < wide; y++) to[y][x] = mapped[y];
    }
}

/* The pixels of a part from (top, left) on, tall x tall of them, 0 where the picture has none, mapped to n x n numbers,
   each `apart` from the one before. */
INLINE void take(along_axis *map, sides k, size part, const float *picture, size height, size width, size channels,
                 size top, size left, size tall, float *taken, size apart) {
    size n = numbers(k), by = k == HALVED ? 2 : 1, bottom = top + (tall - 1) * by, end = left + (tall - 1) * by;
    int inside = top >= 0 && left >= 0 && bottom < height && end < width;
    for (size c = 0; c < channels; c += V) {
        vector pixels[6][6], mapped[6][6];
        for (size y = 0; y < tall; y++)
            for (size x = 0; x < tall; x++) {
                size row = top + y * by, column = left + x * by;
                if (inside || (row >= 0 && row < height && column >= 0 && column < width))
                    pixels[y][x] = load(picture + (row * width + column) * channels + c);
                else
                    pixels[y][x] = (vector){0};
            }
        along_both(map, k, pixels, tall, mapped, n);
        for (size y = 0; y < n - lower(k, part); y++)
            for (size x = 0; x < n - right(k, part); x++) store(taken + (y * n + x) * apart + c, mapped[y][x]);
    }
}

/* Beside each other the parts of a tile. */
INLINE void take_tile(const shape *s, sides k, const float *features, size tile, float *taken) {
    size place = tile % (down(s) * across(s)), tall = k == DOUBLED ? 4 : numbers(k), outside = k != HALVED;
    size top = place / across(s) * step(k) - outside, left = place % across(s) * step(k) - outside;
    const float *picture = features + tile / (down(s) * across(s)) * s->height * s->width * s->in;
    for (size part = 0; part < parts(k); part++)
        take(of_tile, k, part, picture, s->height, s->width, s->in, top + lower(k, part), left + right(k, part), tall,
             taken + part * s->in, of_tiles(s, k));
}

/* What `give_tile` goes back to: the gradients of the pixels that come of a tile to those of the sums. */
INLINE void take_pixels(const shape *s, sides k, const float *towards, size tile, float *reached) {
    size place = tile % (down(s) * across(s)), height = after(k, s->height), width = after(k, s->width);
    size top = place / across(s) * 4, left = place % across(s) * 4;
    const float *picture = towards + tile / (down(s) * across(s)) * height * width * s->out;
    take(of_pixels, k, 0, picture, height, width, s->out, top, left, 4, reached, of_sums(s));
}

/* The pixels of the result that come of a tile, from the sums; `bias` and `added`, pixels as the result has them, may be
   missing. */
INLINE void give_tile(const shape *s, sides k, const float *sums, const float *bias, const float *added, size tile,
                      float *result) {
    size n = numbers(k), place = tile % (down(s) * across(s)), beyond = of_sums(s);
    size height = after(k, s->height), width = after(k, s->width);
    size top = place / across(s) * 4, left = place % across(s) * 4;
    size tall = least(4, height - top), wide = least(4, width - left);
    int much = is_much(s->pictures * height * width * s->out);
    size corner = ((tile / (down(s) * across(s)) * height + top) * width + left) * s->out;
    for (size c = 0; c < s->out; c += V) {
        vector products[6][6], pixels[6][6], more = bias ? load(bias + c) : (vector){0};
        for (size y = 0; y < n; y++)
            for (size x = 0; x < n; x++) products[y][x] = load(sums + (y * n + x) * beyond + c);
        along_both(to_pixels, k, products, n, pixels, 4);
        for (size y = 0; y < tall; y++)
            for (size x = 0; x < wide; x++) {
                size at = corner + (y * width + x) * s->out + c;
                vector whole = added ? pixels[y][x] + more + load(added + at) : pixels[y][x] + more;
                put(result + at, whole, much);
            }
    }
}

/* Tiles first ... last - 1: their numbers, the sums, the pixels. */
INLINE void convolve_block(const shape *s, sides k, const float *features, const float *kernel, const float *bias,
                           const float *added, float *result, size first, size last, float *room) {
    size n = numbers(k), wide = parts(k) * s->in;
    float *taken = room, *sums = room + n * n * of_tiles(s, k);
    for (size tile = first; tile < last; tile++) take_tile(s, k, features, tile, taken + (tile - first) * wide);
    for (size y = 0; y < n; y++)
        for (size x = 0; x < n; x++) {
            size i = y * n + x;
            multiply_all(taken + i * of_tiles(s, k) + first_part(k, x) * s->in, wide, 1, kernel + i * of_kernels(s), 1,
                         parts_of(k, y, x) * s->in, sums + i * of_sums(s), 0, last - first, s->out);
        }
    for (size tile = first; tile < last; tile++)
        give_tile(s, k, sums + (tile - first) * s->out, bias, added, tile, result);
}

/* Adds to the gradients of the kernel's numbers, n * n * (O, C), those of tiles first ... last - 1. */
INLINE void gradient_block(const shape *s, sides k, const float *features, const float *towards, size first, size last,
                           float *gradients, float *room) {
    size n = numbers(k) * numbers(k);
    float *taken = room, *reached = room + n * of_tiles(s, k);
    for (size tile = first; tile < last; tile++) {
        take_tile(s, k, features, tile, taken + (tile - first) * s->in);
        take_pixels(s, k, towards, tile, reached + (tile - first) * s->out);
    }
    for (size i = 0; i < n; i++)
        multiply_all(reached + i * of_sums(s), 1, s->out, taken + i * of_tiles(s, k), 0, last - first,
                     gradients + i * of_kernels(s), 1, s->out, s->in);
}

/* Floats of n * n numbers of all kernels. */
size winograd_numbers(const shape *s) { return numbers(s->sides) * numbers(s->sides) * of_kernels(s); }

/* Floats that lie between the steps of a thread. */
size winograd_room(const shape *s) {
    return numbers(s->sides) * numbers(s->sides) * (of_tiles(s, s->sides) + of_sums(s));
}

/* Tiles of a block, of which fewer would not fill a thread. */
size winograd_tiles(void) { return TILES; }

/* What `winograd_pack` does. */
INLINE void pack(const shape *s, sides k, const float *weight, size in, size out, const size steps[4], size turned,
                 float *kernel) {
    size n = numbers(k), by = k == HALVED ? 2 : 1;
    int much = is_much(winograd_numbers(s));
    for (size panel = 0; panel < s->out; panel += COLUMNS * V)
        for (size part = 0; part < parts(k); part++)
            for (size c = 0; c < s->in; c++) {
                size wide = least(s->out - panel, COLUMNS * V);
                for (size o = panel; o < panel + wide; o += V) {
                    vector row[6][6] = {0}, mapped[6][6];
                    for (size y = lower(k, part); y < 3; y += by)
                        for (size x = right(k, part); x < 3; x += by) {
                            const float *from = weight + o * steps[0] + c * steps[1];
                            from += (turned ? 2 - y : y) * steps[2] + (turned ? 2 - x : x) * steps[3];
                            vector *to = &row[y / by][x / by];
                            if (c < in && o + V <= out && steps[0] == 1)
                                *to = load(from);
                            else
                                for (size lane = 0; c < in && lane < V && o + lane < out; lane++)
                                    (*to)[lane] = from[lane * steps[0]];
                        }
                    along_both(of_kernel, k, row, 3, mapped, n);
                    for (size y = 0; y < n - lower(k, part); y++)
                        for (size x = 0; x < n - right(k, part); x++) {
                            size depth = parts_of(k, y, x) * s->in, at = (part - first_part(k, x)) * s->in + c;
                            float *to = kernel + (y * n + x) * of_kernels(s) + panel * depth + at * wide + o - panel;
                            put(to, mapped[y][x], much);
                        }
                }
            }
}

/* A weight of `in` and `out` channels, with the steps along out, in, rows and columns, as `winograd_convolve` wants it:
   for each of the n * n numbers (C, O) in panels, C once for each part that has it, filled up with 0 to whole vectors. It
   may be `turned` over where sides are kept. */
void winograd_pack(const shape *s, const float *weight, size in, size out, const size steps[4], size turned,
                   float *kernel) {
    switch (s->sides) { /* each with its own number of everything */
    case KEPT: pack(s, KEPT, weight, in, out, steps, turned, kernel); break;
    case DOUBLED: pack(s, DOUBLED, weight, in, out, steps, turned, kernel); break;
    default: pack(s, HALVED, weight, in, out, steps, turned, kernel);
    }
}

/* Features to the result (B, H', W', O), each pixel the same whatever the other pictures and the threads. */
void winograd_convolve(const shape *s, const float *features, const float *kernel, const float *bias, const float *added,
                       float *result, float *rooms, size threads) {
    size tiles = all_tiles(s), each = (tiles + threads - 1) / threads;
    size block = each < TILES ? (each + ROWS - 1) / ROWS * ROWS : TILES;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size first = 0; first < tiles; first += block) {
        size last = least(first + block, tiles);
        float *room = rooms + omp_get_thread_num() * winograd_room(s);
        switch (s->sides) { /* each with its own number of everything */
        case KEPT: convolve_block(s, KEPT, features, kernel, bias, added, result, first, last, room); break;
        case DOUBLED: convolve_block(s, DOUBLED, features, kernel, bias, added, result, first, last, room); break;
        default: convolve_block(s, HALVED, features, kernel, bias, added, result, first, last, room);
        }
    }
}

/* The gradient (O, 3, 3, C) of a weight from that of the result, for sides that stay or are doubled. `gradients` holds
   n * n * C * O numbers for each thread; which tiles are whose is fixed, and so is the sum for a number of threads. */
void winograd_weight_gradient(const shape *s, const float *features, const float *towards, float *weight,
                              float *gradients, float *rooms, size threads) {
    size tiles = all_tiles(s), each = (tiles + threads - 1) / threads, n = numbers(s->sides);
    size held = winograd_numbers(s);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size thread = 0; thread < threads; thread++) {
        float *sums = gradients + thread * held, *room = rooms + thread * winograd_room(s);
        size end = least((thread + 1) * each, tiles);
        memset(sums, 0, held * sizeof(float));
        for (size first = thread * each; first < end; first += TILES) {
            size last = least(first + TILES, end);
            if (s->sides == DOUBLED)
                gradient_block(s, DOUBLED, features, towards, first, last, sums, room);
            else
                gradient_block(s, KEPT, features, towards, first, last, sums, room);
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size o = 0; o < s->out; o++)
        for (size c = 0; c < s->in; c += V) {
            vector mapped[6][6], row[6][6];
            for (size y = 0; y < n; y++)
                for (size x = 0; x < n; x++) {
                    const float *from = gradients + (y * n + x) * of_kernels(s) + o * s->in + c;
                    mapped[y][x] = load(from);
                    for (size thread = 1; thread < threads; thread++) mapped[y][x] += load(from + thread * held);
                }
            along_both(to_kernel, s->sides, mapped, n, row, 3);
            for (size y = 0; y < 3; y++)
                for (size x = 0; x < 3; x++) store(weight + ((o * 3 + y) * 3 + x) * s->in + c, row[y][x]);
        }
}
