/* Vectors of V floats, as the processor has them. */

#include <immintrin.h>
#include <stddef.h>

#ifdef __AVX512F__
enum { V = 16 };
#else
enum { V = 8 };
#endif

typedef ptrdiff_t size;
typedef float vector __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int integers __attribute__((vector_size(4 * V)));
#define INLINE static inline __attribute__((always_inline))

INLINE vector load(const float *from) { return *(const vector *)from; }
INLINE void store(float *to, vector values) { *(vector *)to = values; }

/* Past the cache, where what is written is too much to stay there: else it is read before. `to` begins a vector. */
INLINE void store_beyond(float *to, vector values) {
#ifdef __AVX512F__
    _mm512_stream_ps(to, (__m512)values);
#else
    _mm256_stream_ps(to, (__m256)values);
#endif
}

INLINE int is_much(size floats) { return floats >= 1 << 22; }

INLINE vector at_most(vector x, vector y) {
    integers larger = x > y;
    return (vector)(((integers)x & ~larger) | ((integers)y & larger));
}

/* e to the power of x, off by 2 units in the last place at most; of what is beyond -87 or 87 as there, of NaN NaN.
   2 to an integer power is made of the bits of an exponent, for the rest stands a polynomial of the sixth degree. */
INLINE vector exponential(vector x) {
    const vector most = x * 0 + 87, integer = x * 0 + 12582912; /* 1.5 * 2^23: from here on floats are integers */
    x = -at_most(-at_most(x, most), most);
    vector power = x * 1.44269504f + integer;
    integers exponent = (integers)power << 23; /* its lowest bits are the number */
    power -= integer;
    x = x - power * 0.693359375f + power * 2.12194440e-4f; /* log 2 in two parts */
    vector y = 1.9875691500e-4f * x + 1.3981999507e-3f; /* Cephes, expf.c */
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1;
    return (vector)((integers)y + exponent);
}
