/* Vectors of V floats, as the processor has them. */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __AVX512F__
enum { V = 16 }; /* floats of one */
#else
enum { V = 8 };
#endif

typedef ptrdiff_t size;
typedef float vector __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * V), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vector load(const float *from) { return *(const vector *)from; }
INLINE void store(float *to, vector values) { *(vector *)to = values; }

INLINE int is_much(size floats) { return floats >= 1 << 22; }

/* Past the cache, where what `is_much` would not stay there, and else be read before: `to` begins a vector then. */
INLINE void put(float *to, vector values, int much) {
    if (!much)
        store(to, values);
    else
#ifdef __AVX512F__
        _mm512_stream_ps(to, (__m512)values);
#else
        _mm256_stream_ps(to, (__m256)values);
#endif
}

INLINE size least(size a, size b) { return a < b ? a : b; }
INLINE size larger(size a, size b) { return a > b ? a : b; }

INLINE vector all(float value) { return (vector){0} + value; }

#ifdef __AVX512F__
#define LARGER _mm512_max_ps /* the second where one is no number */
#define SMALLER _mm512_min_ps
#else
#define LARGER _mm256_max_ps
#define SMALLER _mm256_min_ps
#endif

/* A block of V x V turned over, of which the steps from row to row are given: a row and a lane change places, one bit of
   their numbers after the other. */
INLINE void turn_block(const float *from, size row_of_from, float *to, size row_of_to) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    integers lane = *(const integers *)numbers;
    vector row[V];
#pragma GCC unroll 16
    for (int r = 0; r < V; r++) row[r] = load(from + r * row_of_from);
#pragma GCC unroll 4
    for (int bit = V / 2; bit; bit /= 2) {
        integers latter = (lane & bit) * (V / bit); /* V, of lanes that come from the latter of two rows */
#pragma GCC unroll 16
        for (int r = 0; r < V; r++)
            if (!(r & bit)) {
                vector one = row[r], other = row[r + bit];
                row[r] = __builtin_shuffle(one, other, (lane & ~bit) + latter);
                row[r + bit] = __builtin_shuffle(one, other, (lane | bit) + latter);
            }
    }
#pragma GCC unroll 16
    for (int r = 0; r < V; r++) store(to + r * row_of_to, row[r]);
}

/* e^x by a power of 2 and the polynomial of Cephes' expf, to some 1e-7 of it, and 0 from -88 on; what is not a number
   stays none. */
INLINE vector exponential(vector x) {
    const float round = 12582912; /* 1.5 * 2^23: what is added to it becomes whole */
    x = LARGER(all(-88), SMALLER(all(88), x));
    vector shifted = x * 1.44269504f + round, whole = shifted - round;
    vector rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vector y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1;
    integers power = ((integers)shifted - (integers)all(round) + 127) << 23;
    return y * (vector)power;
}
