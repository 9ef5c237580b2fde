/* 3x3 convolutions with padding 1 by Winograd's minimal filtering, F(4x4, 3x3), and the gradients of their kernels.

   A picture is cut into tiles that overlap. Of each tile n x n numbers a channel are taken, linear in its pixels, and as
   many of the kernel; their products, summed over the channels, give 4 x 4 pixels of the result, linear again. With
   n = 6 these are 36 products for 144; where the picture is doubled first (nearest neighbour), one of six numbers is
   always 0, and 25 are left. Source: Lavin and Gray 2015, arXiv:1509.09308, section 4.3 and equation 15.

   Everything is float32 and channels last: pictures (B, H, W, C), kernels (3, 3, C, O), and C and O are multiples of V.
   The reference is torch's own convolution. */

#include <omp.h>
#include <stddef.h>
#include <string.h>

#ifdef __AVX512F__
enum { V = 16 }; /* floats of a vector */
#else
enum { V = 8 };
#endif
enum {
    ROWS = 4,    /* of a product that stay in registers, */
    COLUMNS = 4, /* and vectors of each: 16 sums hide the time that one takes */
    TILES = 60   /* of a block; with powers of two its numbers would meet in the same places of the cache */
};

typedef ptrdiff_t size;
typedef float vector __attribute__((vector_size(4 * V), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

/* Pictures, and how they are cut. */
typedef struct {
    size pictures, height, width; /* of what comes in */
    size in, out;                 /* channels */
    size doubled;                 /* 0, or 1: upsampled before */
} shape;

INLINE size numbers(size doubled) { return doubled ? 5 : 6; } /* of an axis */
INLINE size side(size doubled) { return doubled ? 4 : 6; }    /* of a tile, in pixels */
INLINE size step(size doubled) { return doubled ? 2 : 4; }    /* from one tile to the next */
INLINE size across(const shape *s) { return (s->width + step(s->doubled) - 1) / step(s->doubled); }
INLINE size down(const shape *s) { return (s->height + step(s->doubled) - 1) / step(s->doubled); }
INLINE size all_tiles(const shape *s) { return s->pictures * down(s) * across(s); }

INLINE vector load(const float *from) { return *(const vector *)from; }
INLINE void store(float *to, vector values) { *(vector *)to = values; }

/* A row of a tile as a polynomial, at 0, 1, -1, 2, -2 and infinity. */
INLINE void of_tile(size doubled, const vector *d, vector *t) {
    if (doubled) { /* the same of d0 d1 d1 d2 d2 d3 */
        t[0] = 4 * d[0] - 5 * d[1] + d[2];
        t[1] = 2 * d[2] - 8 * d[1];
        t[2] = 3 * (d[2] - d[1]);
        t[3] = d[1] - d[2];
        t[4] = 4 * d[1] - 5 * d[2] + d[3];
    } else {
        vector even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
        vector even2 = d[4] - d[2], odd2 = 2 * (d[3] - d[1]);
        t[0] = 4 * d[0] - 5 * d[2] + d[4];
        t[1] = even + odd;
        t[2] = even - odd;
        t[3] = even2 + odd2;
        t[4] = even2 - odd2;
        t[5] = 4 * d[1] - 5 * d[3] + d[5];
    }
}

/* The same of a row of a kernel, */
INLINE void of_kernel(size doubled, const vector *g, vector *t) {
    vector at1 = (g[0] + g[2]) / -6, at2 = (g[0] + 4 * g[2]) / 24;
    size n = 0;
    t[n++] = g[0] / 4;
    t[n++] = at1 - g[1] / 6;
    if (!doubled) t[n++] = at1 + g[1] / 6;
    t[n++] = at2 + g[1] / 12;
    t[n++] = at2 - g[1] / 12;
    t[n++] = g[2];
}

/* and from its gradient back to that of the row. */
INLINE void to_kernel(size doubled, const vector *t, vector *g) {
    vector none = {0}, minus1 = doubled ? none : t[2];
    const vector *at2 = t + (doubled ? 2 : 3);
    g[0] = t[0] / 4 - (t[1] + minus1) / 6 + (at2[0] + at2[1]) / 24;
    g[1] = (minus1 - t[1]) / 6 + (at2[0] - at2[1]) / 12;
    g[2] = (at2[0] + at2[1] - t[1] - minus1) / 6 + at2[2];
}

/* From the product of both to the pixels of a row, */
INLINE void to_pixels(size doubled, const vector *t, vector *p) {
    vector none = {0}, minus1 = doubled ? none : t[2];
    const vector *at2 = t + (doubled ? 2 : 3);
    vector sum = t[1] + minus1, difference = t[1] - minus1, sum2 = at2[0] + at2[1], difference2 = at2[0] - at2[1];
    p[0] = t[0] + sum + sum2;
    p[1] = difference + 2 * difference2;
    p[2] = sum + 4 * sum2;
    p[3] = difference + 8 * difference2 + at2[2];
}

/* and from their gradient back to that of the product. */
INLINE void of_pixels(size doubled, const vector *p, vector *t) {
    vector even = p[0] + p[2], odd = p[1] + p[3], even2 = p[0] + 4 * p[2], odd2 = 2 * p[1] + 8 * p[3];
    size n = 0;
    t[n++] = p[0];
    t[n++] = even + odd;
    if (!doubled) t[n++] = even - odd;
    t[n++] = even2 + odd2;
    t[n++] = even2 - odd2;
    t[n++] = p[3];
}

typedef void along_axis(size doubled, const vector *from, vector *to);

/* A linear map of one axis along both: rows x columns vectors to wide x wide. */
INLINE void along_both(along_axis *map, size doubled, vector from[6][6], size tall, vector to[6][6], size wide) {
    vector between[6][6], column[6], mapped[6];
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
    size place = tile % (down(s) * across(s)), apart = TILES * s->in;
    size top = place / across(s) * step(doubled) - 1, left = place % across(s) * step(doubled) - 1;
    const float *picture = features + tile / (down(s) * across(s)) * s->height * s->width * s->in;
    take(of_tile, doubled, picture, s->height, s->width, s->in, top, left, side(doubled), taken, apart);
}

/* What `give_tile` goes back to: the gradients of the pixels that come of a tile to those of the sums. */
INLINE void take_pixels(const shape *s, size doubled, const float *towards, size tile, float *reached) {
    size place = tile % (down(s) * across(s)), height = s->height << doubled, width = s->width << doubled;
    size top = place / across(s) * 4, left = place % across(s) * 4;
    const float *picture = towards + tile / (down(s) * across(s)) * height * width * s->out;
    take(of_pixels, doubled, picture, height, width, s->out, top, left, 4, reached, TILES * s->out);
}

/* The pixels of the result that come of a tile, from the sums. */
INLINE void give_tile(const shape *s, size doubled, const float *sums, const float *bias, size tile, float *result) {
    size n = numbers(doubled), place = tile % (down(s) * across(s)), apart = TILES * s->out;
    size height = s->height << doubled, width = s->width << doubled;
    size top = place / across(s) * 4, left = place % across(s) * 4;
    size tall = height - top < 4 ? height - top : 4, wide = width - left < 4 ? width - left : 4;
    float *corner = result + ((tile / (down(s) * across(s)) * height + top) * width + left) * s->out;
    for (size c = 0; c < s->out; c += V) {
        vector products[6][6], pixels[6][6], added = bias ? load(bias + c) : (vector){0};
        for (size y = 0; y < n; y++)
            for (size x = 0; x < n; x++) products[y][x] = load(sums + (y * n + x) * apart + c);
        along_both(to_pixels, doubled, products, n, pixels, 4);
        for (size y = 0; y < tall; y++)
            for (size x = 0; x < wide; x++) store(corner + (y * width + x) * s->out + c, pixels[y][x] + added);
    }
}

/* ROWS x (wide * V) sums of `depth` products of left and right into `sums`, or on top of what is there. Of the left
   matrix the steps along rows and depth are given, of the others those along rows, which lie without gaps. */
INLINE void multiply(const float *left, size row, size next, const float *right, size beyond, size depth, float *sums,
                     size apart, int on_top, size wide) {
    vector sum[ROWS][COLUMNS];
    for (size r = 0; r < ROWS; r++)
        for (size v = 0; v < wide; v++) sum[r][v] = on_top ? load(sums + r * apart + v * V) : (vector){0};
    for (size k = 0; k < depth; k++) {
        vector of[COLUMNS];
        for (size v = 0; v < wide; v++) of[v] = load(right + k * beyond + v * V);
        for (size r = 0; r < ROWS; r++)
            for (size v = 0; v < wide; v++) sum[r][v] += left[r * row + k * next] * of[v];
    }
    for (size r = 0; r < ROWS; r++)
        for (size v = 0; v < wide; v++) store(sums + r * apart + v * V, sum[r][v]);
}

/* The same for any number of rows, up to the next multiple of ROWS, and of columns, a multiple of V. Columns of the right
   matrix lie in panels of COLUMNS * V, one after another, where it is `packed`. */
INLINE void multiply_all(const float *left, size row, size next, const float *right, int packed, size depth, float *sums,
                         int on_top, size rows, size columns) {
    for (size c = 0; c < columns; c += COLUMNS * V) {
        size wide = columns - c < COLUMNS * V ? (columns - c) / V : COLUMNS;
        const float *panel = right + (packed ? c * depth : c);
        size beyond = packed ? wide * V : columns;
        for (size r = 0; r < rows; r += ROWS) {
            const float *from = left + r * row;
            float *to = sums + r * columns + c;
            switch (wide) { /* each with its own number of registers */
            case 1: multiply(from, row, next, panel, beyond, depth, to, columns, on_top, 1); break;
            case 2: multiply(from, row, next, panel, beyond, depth, to, columns, on_top, 2); break;
            case 3: multiply(from, row, next, panel, beyond, depth, to, columns, on_top, 3); break;
            default: multiply(from, row, next, panel, beyond, depth, to, columns, on_top, COLUMNS);
            }
        }
    }
}

/* Tiles first ... last - 1: their numbers, the sums, the pixels. */
INLINE void convolve_block(const shape *s, size doubled, const float *features, const float *kernel, const float *bias,
                           float *result, size first, size last, float *room) {
    size n = numbers(doubled) * numbers(doubled);
    float *taken = room, *sums = room + n * TILES * s->in;
    for (size tile = first; tile < last; tile++)
        take_tile(s, doubled, features, tile, taken + (tile - first) * s->in);
    for (size i = 0; i < n; i++)
        multiply_all(taken + i * TILES * s->in, s->in, 1, kernel + i * s->in * s->out, 1, s->in,
                     sums + i * TILES * s->out, 0, last - first, s->out);
    for (size tile = first; tile < last; tile++)
        give_tile(s, doubled, sums + (tile - first) * s->out, bias, tile, result);
}

/* Adds to the gradients of the kernel's numbers, n * n * (C, O), those of tiles first ... last - 1. */
INLINE void gradient_block(const shape *s, size doubled, const float *features, const float *towards, size first,
                           size last, float *gradients, float *room) {
    size n = numbers(doubled) * numbers(doubled);
    float *taken = room, *reached = room + n * TILES * s->in;
    for (size tile = first; tile < last; tile++) {
        take_tile(s, doubled, features, tile, taken + (tile - first) * s->in);
        take_pixels(s, doubled, towards, tile, reached + (tile - first) * s->out);
    }
    for (size i = 0; i < n; i++)
        multiply_all(taken + i * TILES * s->in, 1, s->in, reached + i * TILES * s->out, 0, last - first,
                     gradients + i * s->in * s->out, 1, s->in, s->out);
}

/* Floats that each thread needs for itself. */
size winograd_room(const shape *s) {
    size n = numbers(s->doubled) * numbers(s->doubled);
    return n * TILES * (s->in + s->out);
}

/* Floats that a kernel's numbers take. */
size winograd_numbers(const shape *s) { return numbers(s->doubled) * numbers(s->doubled) * s->in * s->out; }

/* A weight (3, 3, C, O) as `winograd_convolve` wants it: for each of the n * n numbers (C, O), packed. */
void winograd_pack(const shape *s, const float *weight, float *kernel) {
    size n = numbers(s->doubled), every = s->in * s->out;
    for (size c = 0; c < s->in; c++)
        for (size o = 0; o < s->out; o += V) {
            vector row[6][6], mapped[6][6];
            size panel = o / (COLUMNS * V) * (COLUMNS * V);
            size wide = s->out - panel < COLUMNS * V ? s->out - panel : COLUMNS * V;
            float *to = kernel + panel * s->in + c * wide + o - panel;
            for (size y = 0; y < 3; y++)
                for (size x = 0; x < 3; x++) row[y][x] = load(weight + (y * 3 + x) * every + c * s->out + o);
            along_both(of_kernel, s->doubled, row, 3, mapped, n);
            for (size y = 0; y < n; y++)
                for (size x = 0; x < n; x++) store(to + (y * n + x) * every, mapped[y][x]);
        }
}

/* Features to the result (B, H', W', O), each pixel the same whatever the other pictures and the threads. */
void winograd_convolve(const shape *s, const float *features, const float *kernel, const float *bias, float *result,
                       float *rooms, size threads) {
    size tiles = all_tiles(s), each = (tiles + threads - 1) / threads;
    size block = each < TILES ? (each + ROWS - 1) / ROWS * ROWS : TILES;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size first = 0; first < tiles; first += block) {
        size last = first + block < tiles ? first + block : tiles;
        float *room = rooms + omp_get_thread_num() * winograd_room(s);
        if (s->doubled)
            convolve_block(s, 1, features, kernel, bias, result, first, last, room);
        else
            convolve_block(s, 0, features, kernel, bias, result, first, last, room);
    }
}

/* The gradient (3, 3, C, O) of a weight from that of the result. `gradients` holds `winograd_numbers` for each thread;
   which tiles are whose is fixed, and so is the sum for a number of threads. */
void winograd_weight_gradient(const shape *s, const float *features, const float *towards, float *weight,
                              float *gradients, float *rooms, size threads) {
    size tiles = all_tiles(s), each = (tiles + threads - 1) / threads, n = numbers(s->doubled);
    size every = s->in * s->out, held = winograd_numbers(s);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size thread = 0; thread < threads; thread++) {
        float *sums = gradients + thread * held, *room = rooms + thread * winograd_room(s);
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
    for (size place = 0; place < every; place += V) {
        vector mapped[6][6], row[6][6];
        for (size y = 0; y < n; y++)
            for (size x = 0; x < n; x++) {
                const float *from = gradients + (y * n + x) * every + place;
                mapped[y][x] = load(from);
                for (size thread = 1; thread < threads; thread++) mapped[y][x] += load(from + thread * held);
            }
        along_both(to_kernel, s->doubled, mapped, n, row, 3);
        for (size y = 0; y < 3; y++)
            for (size x = 0; x < 3; x++) store(weight + (y * 3 + x) * every + place, row[y][x]);
    }
}
