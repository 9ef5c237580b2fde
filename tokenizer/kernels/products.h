/* Products of matrices in float32, for small ones that another step of a kernel has just written. decoding.c has its own,
   which has words of two bfloat16 and prefetches. */

#include "vectors.h"

enum { ROWS = 4 }; /* of a product that stay in registers, */

/* and vectors of each: the sums hide the time that one takes, and leave registers for what is multiplied. */
#ifdef __AVX512F__
enum { COLUMNS = 4 };
#else
enum { COLUMNS = 3 };
#endif

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

/* The same, of a width that is not known before. */
INLINE void multiply_wide(const float *left, size row, size next, const float *right, size beyond, size depth,
                          float *sums, size apart, int on_top, size wide) {
    switch (wide) { /* each with its own number of registers */
    case 1: multiply(left, row, next, right, beyond, depth, sums, apart, on_top, 1); break;
    case 2: multiply(left, row, next, right, beyond, depth, sums, apart, on_top, 2); break;
    case 3: multiply(left, row, next, right, beyond, depth, sums, apart, on_top, 3); break;
    default: multiply(left, row, next, right, beyond, depth, sums, apart, on_top, COLUMNS);
    }
}

/* The same for any number of rows, up to the next multiple of ROWS, and of columns, a multiple of V. Columns of the right
   matrix lie in panels of COLUMNS * V, one after another, where it is `packed`. */
INLINE void multiply_all(const float *left, size row, size next, const float *right, int packed, size depth, float *sums,
                         int on_top, size rows, size columns) {
    for (size c = 0; c < columns; c += COLUMNS * V) {
        size wide = least((columns - c) / V, COLUMNS);
        const float *panel = right + (packed ? c * depth : c);
        size beyond = packed ? wide * V : columns;
        for (size r = 0; r < rows; r += ROWS)
            multiply_wide(left + r * row, row, next, panel, beyond, depth, sums + r * columns + c, columns, on_top,
                          wide);
    }
}

/* A matrix (out, in) turned over to (in, out) in panels, for `filled` columns: those beyond `out` are 0. */
INLINE void turn_into_panels(const float *matrix, size in, size out, size filled, float *packed) {
    for (size o = 0; o < filled; o += V) {
        size panel = o / (COLUMNS * V) * (COLUMNS * V), wide = least(COLUMNS * V, filled - panel);
        float *to = packed + panel * in + o - panel;
        size blocks = o + V <= out ? in / V * V : 0;
        for (size c = 0; c < blocks; c += V) turn_block(matrix + o * in + c, in, to + c * wide, wide);
        for (size c = blocks; c < in; c++)
            for (size lane = 0; lane < V; lane++) to[c * wide + lane] = o + lane < out ? matrix[(o + lane) * in + c] : 0;
    }
}
