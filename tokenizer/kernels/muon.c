/* A step of Muon for many matrices in float32: momentum, direction, weight decay and the move, each by one thread.

   Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon. The reference is train/muon.py, `whole_factor` in
   particular. The gram matrix and all polynomials of it are symmetric: half of a product is computed and mirrored.

   A matrix lies in panels of PANEL columns, one after another, the rows of each filled up to a multiple of V. What lies
   beyond the last row or column is any number: it enters no sum but those beyond them. */

#include <math.h>
#include <omp.h>
#include <string.h>

#include "products.h"

enum { PANEL = COLUMNS * V, ITERATIONS = 5 };

static const float A = 3.4445f, B = -4.7750f, C = 2.0315f, TOWARDS = 0.05f; /* 1 - MOMENTUM */

typedef struct {
    float *weight;
    const float *gradient;
    float *momentum;
    size rows, columns;
    double kept, moved; /* of the weight what decay leaves, of the direction what is taken off it */
} move;

typedef struct {
    float *at;
    size rows, columns;
} matrix;

INLINE size filled(size count, size unit) { return (count + unit - 1) / unit * unit; }
INLINE size volume(size rows, size columns) { return filled(rows, V) * filled(columns, PANEL); }

INLINE float *place(matrix m, size row, size column) {
    return m.at + column / PANEL * PANEL * filled(m.rows, V) + row * PANEL + column % PANEL;
}

/* The first so many of V numbers, with zeros for the others, and back. */
INLINE vector load_first(const float *from, size count) {
    vector values = {0};
    if (count >= V) return load(from);
    memcpy(&values, from, count * sizeof(float));
    return values;
}

INLINE void store_first(float *to, vector values, size count) {
    if (count >= V)
        store(to, values);
    else
        memcpy(to, &values, count * sizeof(float));
}

/* The momentum takes in the gradient, and Nesterov's look ahead takes it in once more. */
INLINE void look_ahead(const move *m, matrix ahead) {
    for (size r = 0; r < m->rows; r++)
        for (size c = 0; c < m->columns; c += V) {
            size at = r * m->columns + c, count = m->columns - c;
            vector gradient = load_first(m->gradient + at, count), momentum = load_first(m->momentum + at, count);
            momentum += TOWARDS * (gradient - momentum);
            store_first(m->momentum + at, momentum, count);
            store(place(ahead, r, c), momentum + TOWARDS * (gradient - momentum));
        }
}

/* Weight decay and the move. */
INLINE void move_weight(const move *m, matrix direction, float moved) {
    for (size r = 0; r < m->rows; r++)
        for (size c = 0; c < m->columns; c += V) {
            float *weight = m->weight + r * m->columns + c;
            size count = m->columns - c;
            vector kept = load_first(weight, count) * (float)m->kept;
            store_first(weight, kept - moved * load(place(direction, r, c)), count);
        }
}

INLINE void turn(matrix from, matrix to) {
    for (size c = 0; c < from.columns; c += V)
        for (size r = 0; r < from.rows; r += V) turn_block(place(from, r, c), PANEL, place(to, c, r), PANEL);
}

/* Left, which may lie turned over, by right. Where the result is symmetric the lower half mirrors the upper one. */
static void product(matrix left, int turned, matrix right, matrix result, int symmetric) {
    for (size c = 0; c < result.columns; c += PANEL)
        for (size k = 0; k < right.rows; k += PANEL)
            for (size r = 0; r < (symmetric ? least(result.rows, c + PANEL) : result.rows); r += ROWS) {
                size skipped = symmetric && r > c ? (r - c) / V * V : 0;
                const float *from = turned ? place(left, k, r) : place(left, r, k);
                size end = least(c + PANEL, filled(result.columns, V));
                multiply_wide(from, turned ? 1 : PANEL, turned ? PANEL : 1, place(right, k, c + skipped), PANEL,
                              least(PANEL, right.rows - k), place(result, r, c + skipped), PANEL, k > 0,
                              (end - c - skipped) / V);
            }
    for (size c = V; symmetric && c < result.columns; c += V)
        for (size r = 0; r < c; r += V) turn_block(place(result, r, c), PANEL, place(result, c, r), PANEL);
}

/* What one iteration multiplies by, of a gram matrix, into `result`. */
INLINE void factor(matrix gram, matrix result) {
    product(gram, 0, gram, result, 1);
    for (size at = 0; at < volume(gram.rows, gram.columns); at += V)
        store(result.at + at, C * load(result.at + at) + B * load(gram.at + at));
    for (size r = 0; r < gram.rows; r++) *place(result, r, r) += A;
}

/* What all of them do, into `whole`; the gram matrix is overwritten, and the others are room. Rounding tells the sides
   apart here: where the gram matrix has next to nothing the factor is some 500, and to the right of it a step would
   have its errors made as much larger. So this product is not mirrored, and is for what stands on its right. */
INLINE void whole_factor(matrix gram, matrix whole, matrix step, matrix spare) {
    size bytes = volume(gram.rows, gram.columns) * sizeof(float);
    factor(gram, whole);
    memcpy(step.at, whole.at, bytes);
    for (int i = 1; i < ITERATIONS; i++) {
        product(step, 0, gram, spare, 1);
        product(spare, 0, step, gram, 1);
        factor(gram, step);
        product(step, 0, whole, spare, 0);
        memcpy(whole.at, spare.at, bytes);
    }
}

INLINE size room_of(const move *m) {
    size n = least(m->rows, m->columns);
    size as_it_is = volume(m->rows, m->columns), turned = volume(m->columns, m->rows);
    return 4 * volume(n, n) + as_it_is + larger(as_it_is, turned);
}

/* A matrix at the beginning of the room, which then begins behind it. */
INLINE matrix matrix_in(float **room, size rows, size columns) {
    matrix result = {*room, rows, columns};
    *room += volume(rows, columns);
    return result;
}

static void step(const move *m, float *room) {
    size n = least(m->rows, m->columns), wide = m->rows <= m->columns;
    matrix gram = matrix_in(&room, n, n), whole = matrix_in(&room, n, n);
    matrix one = matrix_in(&room, n, n), other = matrix_in(&room, n, n);
    matrix ahead = matrix_in(&room, m->rows, m->columns), direction = {room, m->rows, m->columns}, tall = ahead;
    look_ahead(m, ahead);
    if (wide) {
        tall = (matrix){room, m->columns, m->rows}; /* of no use once there is a direction */
        turn(ahead, tall);
    }
    product(tall, 1, tall, gram, 1);
    double square = 0; /* of the norm, which the gram matrix is divided by here, and the direction when it is taken */
    for (size r = 0; r < n; r++) square += *place(gram, r, r);
    float scale = isfinite(square) ? 1 / (sqrt(square) + 1e-7) : NAN; /* with it no singular value is above 1 */
    for (size at = 0; at < volume(n, n); at += V) store(gram.at + at, load(gram.at + at) * scale * scale);
    whole_factor(gram, whole, one, other);
    if (wide)
        product(whole, 0, ahead, direction, 0);
    else {
        turn(whole, one); /* for what stands on its left */
        product(ahead, 0, one, direction, 0);
    }
    move_weight(m, direction, m->moved * scale);
}

/* Floats that lie between the passes. */
size muon_room(const move *moves, size count, size threads) {
    size most = 0;
    for (size i = 0; i < count; i++) most = larger(most, room_of(moves + i));
    return threads * most;
}

void muon_step(const move *moves, size count, float *room, size threads) {
    size each = muon_room(moves, count, 1);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size i = 0; i < count; i++) step(moves + i, room + omp_get_thread_num() * each);
}
