// Sixteen floats at a time, from float32 or bfloat16 memory; the compiler splits them where registers are narrower.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef float Floats16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));

struct Brain {  // bfloat16
    uint16_t bits;
};

inline float widened(float x) { return x; }
inline float widened(Brain x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline Floats16 load16(const float* from) {
    Floats16 values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
inline Floats16 load16(const Brain* from) {
    Halves16 halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats16)(__builtin_convertvector(halves, Words16) << 16);
}

// The first `count` of sixteen, then zeros.
template <typename T> inline Floats16 load_some(const T* from, int64_t count) {
    float values[16] = {};
    for (int64_t i = 0; i < count; i++) values[i] = widened(from[i]);
    return load16(values);
}

// To the nearest, halves to even; what is not a number stays none.
inline uint16_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 64;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store(float* to, float x) { *to = x; }
inline void store(Brain* to, float x) { to->bits = rounded(x); }

inline void store16(float* to, Floats16 x) { std::memcpy(to, &x, sizeof x); }

inline float sum16(Floats16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float parts[16], total = 0;
    std::memcpy(parts, &x, sizeof x);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) parts[i] += parts[i + width];
    total = parts[0];
    return total;
#endif
}

#if defined(__AVX512F__)
// The first `count` of sixteen lanes; none where it is negative.
inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : count > 0 ? __mmask16((1u << count) - 1) : __mmask16(0);
}

// The largest magnitude of `count` numbers; NaN if one of them is not finite.
inline float largest_of(const float* x, int64_t count) {
    __m512 most = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int64_t c = 0; c < count; c += 16) {
        __m512 value = _mm512_maskz_loadu_ps(first_lanes(count - c), x + c);
        most = _mm512_max_ps(most, _mm512_abs_ps(value));
        odd = _mm512_fmadd_ps(value, _mm512_setzero_ps(), odd);  // zero, or NaN
    }
    return _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(odd);
}
#endif

inline Floats16 larger16(Floats16 a, Floats16 b) { return a > b ? a : b; }

inline float most_of(Floats16 x) {
    float most = x[0];
    for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// The sums of four vectors, side by side.
inline void sums4(Floats16 a, Floats16 b, Floats16 c, Floats16 d, float* out) {
#if defined(__AVX512F__)
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512 all = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    out[0] = sum16(a), out[1] = sum16(b), out[2] = sum16(c), out[3] = sum16(d);
#endif
}

// e^x: a power of two by the exponent's bits, the rest by a polynomial; to about one unit in the last place.
inline Floats16 exp16(Floats16 x) {
    const Floats16 low = Floats16{} - 87.3f, high = Floats16{} + 88.3f;
    Floats16 bounded = x < low ? low : x;
    bounded = bounded > high ? high : bounded;
    Floats16 shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to an integer in the low bits
    Ints16 power = (Ints16)shifted - 0x4b400000;
    Floats16 whole = shifted - 12582912.0f;
    Floats16 rest = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats16 value = Floats16{} + 1.9875691500e-4f;
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    return value * (Floats16)((power + 127) << 23);
}

inline Floats16 tanh16(Floats16 x) { return 1.0f - 2.0f / (exp16(2.0f * x) + 1.0f); }

}  // namespace
