/* A transformer's step for the newest position of each sequence of a batch, given keys and values of those before it.

   The reference, with the shapes, is `Decoder` in prior/decoding.py. A step of small operators waits for memory between
   them; here there are four products a block and little else. Sums, the stream between the blocks and the cache are
   float32. Where `halves` is 1, weights and what they are multiplied by are bfloat16, two in a word: the dot product of
   two words, which AVX-512 may have, then stands where the product of two floats stood, and all else is the same.

   A matrix of N columns and K words lies in panels (N / PANEL, K, PANEL), the last one filled up with zeros; keys and
   values of a block in groups of positions (T / GROUP, B, H, GROUP, d), each key and value filled up to a multiple of
   GROUP, so that a step reads them from end to end. A row is the same to the bit whatever the other rows and the
   threads: each sum has its order. */

#include <math.h>
#include <omp.h>
#include <string.h>

#include "vectors.h"

enum {
    ROWS = 4, /* of a product whose sums stay in registers */
    PANEL = 64,
    GROUP = 16,
    TASK = 16,  /* rows that a thread takes at once */
    MOST = 256, /* of the width of a head */
    SUMS = 4,   /* side by side, as one alone would wait for itself */
    AHEAD = 4   /* words */
};

typedef uint32_t words __attribute__((vector_size(4 * V), may_alias));
typedef uint16_t shorts __attribute__((vector_size(2 * V), aligned(2), may_alias));

typedef struct {
    size batch, layers, heads, head_width, inner, vocab; /* inner: of the feed-forward layers */
    size capacity;                                       /* positions of the cache */
    size halves;                                         /* 0, or 1: weights are bfloat16 */
} shape;

INLINE size filled(size count, size unit) { return (count + unit - 1) / unit * unit; }
INLINE size width_of(const shape *s) { return s->heads * s->head_width; }
INLINE size matrix(const shape *s, size in, size out) { return filled(out, PANEL) * (in >> s->halves); }

/* The first so many of the values, and of the others after them; GCC compares such vectors number by number. */
INLINE vector first_of(size count, vector values, vector others) {
    static const int32_t masks[2 * V] = {[0 ... V - 1] = -1};
    integers mask = *(const integers *)(masks + V - least(count, V));
    return (vector)(((integers)values & mask) | ((integers)others & ~mask));
}

static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE vector turned_by(vector values, int lanes) {
    return __builtin_shuffle(values, *(const integers *)numbers + lanes); /* which counts beyond the last from 0 on */
}

INLINE float sum_of(vector values) {
    for (int n = V / 2; n; n /= 2) values += turned_by(values, n);
    return values[0];
}

/* The sums of V vectors, in the order of the vectors, which are overwritten. */
INLINE vector sums_of(vector *values) {
    integers lane = *(const integers *)numbers;
#pragma GCC unroll 4
    for (int n = V / 2; n; n /= 2) { /* lanes whose number has n are those of the latter half */
        integers latter = (lane & n) * (V / n), same = lane + latter, other = (lane ^ n) + latter;
#pragma GCC unroll 8
        for (int i = 0; i < n; i++)
            values[i] = __builtin_shuffle(values[i], values[i + n], same) +
                        __builtin_shuffle(values[i], values[i + n], other);
    }
    return values[0];
}

INLINE float largest_of(vector values) {
    for (int n = V / 2; n; n /= 2) values = LARGER(values, turned_by(values, n));
    return values[0];
}

/* Values as the left side of a product, the first of them number `at` of its row: rounded to even where in halves. */
INLINE void give(size halves, float *row, size at, vector values) {
    if (halves) {
        words bits = (words)values;
        bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        *(shorts *)((uint16_t *)row + at) = __builtin_convertvector(bits, shorts);
    } else
        store(row + at, values);
}

/* Adds the product of a left word with each of a vector. */
INLINE void add_products(size halves, const float *left, vector right, vector *sums) {
#ifdef __AVX512F__
    if (halves) {
        vector pairs = (vector)((integers){0} + *(const int32_t *)left);
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(*sums) : "v"(right), "v"(pairs));
        return;
    }
#endif
    (void)halves;
    *sums += *left * right;
}

/* Vectors of each of so many rows: their sums hide the time that one takes, and leave registers for what is multiplied. A
   single row reads a panel from end to end. */
INLINE size columns_of(size tall) { return V == 16 ? 4 : tall == 1 ? 8 : tall == 2 ? 4 : 2; }

/* Sums of `depth` words of each left row, a multiple of AHEAD, by the words of a panel: tall x PANEL of them. Meanwhile
   memory is fetched that is wanted soon, a word for a word of the row. */
INLINE void multiply(size halves, const float *left, const float *panel, const float *soon, size depth, float *sums,
                     size apart, size tall) {
    size wide = columns_of(tall);
    for (size c = 0; c < PANEL; c += wide * V) {
        vector sum[ROWS][PANEL / V] = {0};
        for (size block = 0; block < depth; block += AHEAD) {
            if (!c) __builtin_prefetch(soon + block * ROWS, 0, 2);
            for (size k = block; k < block + AHEAD; k++) {
                vector of[PANEL / V];
                for (size v = 0; v < wide; v++) of[v] = load(panel + k * PANEL + c + v * V);
                for (size r = 0; r < tall; r++)
                    for (size v = 0; v < wide; v++) add_products(halves, left + r * depth + k, of[v], &sum[r][v]);
            }
        }
        for (size r = 0; r < tall; r++)
            for (size v = 0; v < wide; v++) store(sums + r * apart + c + v * V, sum[r][v]);
    }
}

/* Rows (rows, in) by a matrix to (rows, out), the rows of which lie filled up to whole panels. */
INLINE void product(const shape *s, size halves, const float *left, const float *right, float *sums, size in,
                    size out) {
    size depth = in >> halves, apart = filled(out, PANEL);
#pragma omp for collapse(2)
    for (size c = 0; c < apart; c += PANEL)
        for (size first = 0; first < s->batch; first += TASK) {
            size last = least(first + TASK, s->batch);
            const float *panel = right + c * depth;
            for (size r = first; r < last; r += ROWS) {
                const float *from = left + r * depth;
                const float *soon = panel + (PANEL + r) * depth; /* of 64 rows each fetches a part of the next panel */
                float *to = sums + r * apart + c;
                switch (last - r) { /* each with its own number of registers */
                case 1: multiply(halves, from, panel, soon, depth, to, apart, 1); break;
                case 2: multiply(halves, from, panel, soon, depth, to, apart, 2); break;
                case 3: multiply(halves, from, panel, soon, depth, to, apart, 3); break;
                default: multiply(halves, from, panel, soon, depth, to, apart, ROWS);
                }
            }
        }
}

/* Adds to the stream what a branch gave, if any, and gives it on by RMSNorm without a weight. */
INLINE void add_and_normalise(const shape *s, size halves, float *stream, const float *added, float eps,
                              float *normal) {
    size width = width_of(s), apart = filled(width, PANEL);
#pragma omp for
    for (size r = 0; r < s->batch; r++) {
        float *row = stream + r * width;
        vector squares = {0};
        for (size i = 0; i < width; i += V) {
            vector x = load(row + i);
            if (added) store(row + i, x += load(added + r * apart + i));
            squares += x * x;
        }
        float scale = 1 / sqrtf(sum_of(squares) / width + eps);
        for (size i = 0; i < width; i += V) give(halves, normal + r * (width >> halves), i, load(row + i) * scale);
    }
}

/* A query or a key, normalised and rotated, by (2, d) factors: of each component, and of the other of its pair. */
INLINE void turn(const float *part, const float *factors, float eps, size d, float *to) {
    size half = d / 2;
    vector squares = {0};
    for (size i = 0; i < d; i += V) {
        vector x = first_of(d - i, load(part + i), all(0));
        squares += x * x;
    }
    float scale = 1 / sqrtf(sum_of(squares) / d + eps);
    for (size begin = 0; begin < d; begin += half) /* what is stored beyond the first half, the second overwrites */
        for (size i = begin; i < begin + half; i += V) {
            vector x = load(part + i) * scale, other = load(part + (begin ? i - half : i + half)) * scale;
            store(to + i, x * load(factors + i) + other * load(factors + d + i));
        }
}

/* What the query of one head takes of the values of all positions held, whose groups are `next` floats apart; `scores`
   has room for them. Meanwhile what the next head needs is fetched, which lies behind. */
INLINE void attend(const float *query, const float *keys, const float *values, size next, size held, size apart,
                   float *scores, float *taken) {
    vector most = all(-INFINITY), total = {0};
    for (size t = 0; t < held; t += V) {
        const float *group = keys + t / GROUP * next + t % GROUP * apart;
        vector sums[V];
#pragma GCC unroll 16
        for (size j = 0; j < V; j++) {
            const float *key = group + (t + j < held ? j : held - 1 - t) * apart;
            sums[j] = all(0);
            for (size i = 0; i < apart; i += V) {
                __builtin_prefetch(key + GROUP * apart + i);
                sums[j] += load(query + i) * load(key + i);
            }
        }
        vector score = first_of(held - t, sums_of(sums), all(-INFINITY));
        store(scores + t, score);
        most = LARGER(most, score);
    }
    float largest = largest_of(most);
    for (size t = 0; t < held; t += V) {
        vector share = first_of(held - t, exponential(load(scores + t) - largest), all(0));
        store(scores + t, share);
        total += share;
    }
    float scale = 1 / sum_of(total);
    for (size i = 0; i < apart; i += V) {
        vector sums[SUMS] = {0};
        for (size t = 0; t < held; t += SUMS) {
            const float *group = values + t / GROUP * next + t % GROUP * apart + i;
            for (size j = 0; j < SUMS; j++) {
                const float *value = group + (t + j < held ? j : 0) * apart; /* the share of the others is 0 */
                __builtin_prefetch(value + GROUP * apart);
                sums[j] += scores[t + j] * load(value);
            }
        }
        store(taken + i, ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale);
    }
}

/* Queries, keys and values (B, 3, W): the latter two join the cache of a block, the former become what they take. */
INLINE void attention(const shape *s, size halves, const float *parts, const float *turns, float *keys, float *values,
                      size position, float eps, float *rooms, float *attended) {
    size d = s->head_width, width = width_of(s), apart = filled(d, GROUP), room = filled(s->capacity, GROUP);
#pragma omp for collapse(2)
    for (size r = 0; r < s->batch; r++)
        for (size head = 0; head < s->heads; head++) {
            float query[MOST + V], key[MOST + V], taken[MOST], *scores = rooms + omp_get_thread_num() * room;
            const float *part = parts + r * filled(3 * width, PANEL) + head * d;
            size row = r * s->heads + head, next = s->batch * s->heads * GROUP * apart;
            size newest = position / GROUP * next + (row * GROUP + position % GROUP) * apart;
            turn(part, turns, eps, d, query);
            turn(part + width, turns + 2 * d, eps, d, key);
            for (size i = d; i < apart; i++) query[i] = key[i] = 0;
            memcpy(keys + newest, key, apart * sizeof(float));
            memcpy(values + newest, part + 2 * width, d * sizeof(float));
            size begin = row * GROUP * apart;
            attend(query, keys + begin, values + begin, next, position + 1, apart, scores, taken);
            for (size i = 0; halves && i < apart; i += V) give(1, taken, i, load(taken + i));
            size bytes = d * sizeof(float) >> halves;
            memcpy((char *)attended + row * bytes, taken, bytes);
        }
}

/* (B, 2, inner), gate and value, to SiLU(gate) * value. */
INLINE void gated(const shape *s, size halves, const float *parts, float *products) {
    size inner = s->inner;
#pragma omp for
    for (size r = 0; r < s->batch; r++)
        for (size i = 0; i < inner; i += V) {
            const float *gates = parts + r * filled(2 * inner, PANEL) + i;
            vector gate = load(gates);
            give(halves, products + r * (inner >> halves), i, gate / (1 + exponential(-gate)) * load(gates + inner));
        }
}

/* Whether `halves` may be 1. */
int decoding_multiplies_halves(void) {
#ifdef __AVX512F__
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* A weight (out, K words) as a matrix in panels. */
void decoding_pack(const float *weight, size out, size depth, float *matrix) {
    for (size c = 0; c < out; c += PANEL)
        for (size group = c; group < c + PANEL; group += GROUP) /* few rows at once share places of the cache */
            for (size k = 0; k < depth; k++)
                for (size o = group; o < group + GROUP; o++)
                    matrix[c * depth + k * PANEL + o - c] = o < out ? weight[o * depth + k] : 0;
}

INLINE size widest(const shape *s) { return filled(larger(3 * width_of(s), 2 * s->inner), PANEL); }

/* Floats that a step needs for itself. */
size decoding_room(const shape *s, size threads) {
    size each = larger(width_of(s), s->inner) + widest(s) + filled(width_of(s), PANEL);
    return s->batch * each + V + threads * filled(s->capacity, GROUP);
}

INLINE void step(const shape *s, size halves, const float *weights, const float *turns, float *keys, float *values,
                 float *stream, float *logits, size position, float eps, float *room) {
    size width = width_of(s), inner = s->inner, d = s->head_width;
    size cached = s->batch * s->heads * filled(s->capacity, GROUP) * filled(d, GROUP); /* floats of a block */
    float *added = room, *normal = added + s->batch * filled(width, PANEL);
    float *parts = normal + s->batch * larger(width, inner), *scores = parts + s->batch * widest(s) + V;
    for (size layer = 0; layer < s->layers; layer++) {
        add_and_normalise(s, halves, stream, layer ? added : NULL, eps, normal);
        product(s, halves, normal, weights, parts, width, 3 * width);
        weights += matrix(s, width, 3 * width);
        const float *turn = turns + (position * s->layers + layer) * 4 * d;
        attention(s, halves, parts, turn, keys, values, position, eps, scores, normal);
        keys += cached, values += cached;
        product(s, halves, normal, weights, added, width, width);
        weights += matrix(s, width, width);
        add_and_normalise(s, halves, stream, added, eps, normal);
        product(s, halves, normal, weights, parts, width, 2 * inner);
        weights += matrix(s, width, 2 * inner);
        gated(s, halves, parts, normal);
        product(s, halves, normal, weights, added, inner, width);
        weights += matrix(s, inner, width);
    }
    add_and_normalise(s, halves, stream, s->layers ? added : NULL, eps, normal);
    product(s, halves, normal, weights, logits, width, s->vocab);
}

/* Inputs (B, W), which are overwritten, at a position to logits, (B, vocab) filled up to whole panels. `weights` holds
   the four matrices of each block and the head; `turns` the factors of queries and keys, (T, layers, 2, 2, d), and V
   floats more. */
void decoding_step(const shape *s, const float *weights, const float *turns, float *keys, float *values, float *stream,
                   float *logits, size position, double eps, float *room, size threads) {
#pragma omp parallel num_threads(threads)
    if (s->halves)
        step(s, 1, weights, turns, keys, values, stream, logits, position, eps, room);
    else
        step(s, 0, weights, turns, keys, values, stream, logits, position, eps, room);
}
