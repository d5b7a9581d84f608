// Products with a base in four or eight bits, a few rows of bfloat16 at a time: y = x @ weight^T, summed in float32.
//
// The lanes of a vector are ABREAST neighbouring weight rows, and an activation goes to all of them at once, so that no
// sum ever crosses lanes. Layouts, least significant bits first; rows beyond the last are zeros:
//
//   nibbles   [out/16, in/32, 4, 16] words of eight levels, four-bit: columns 0, 2, 4, 6 and then 1, 3, 5, 7 of eight
//   scales    [out/16, in/32, 16, 2] bfloat16, scale and offset: weight = (level - 8) * scale + offset
//   levels    [out/16, in/4, 16, 4] int8: columns 0, 2, 1, 3 of four; one bfloat16 scale per row beside them
//
// With AVX-512 and bfloat16 a table turns 32 levels into bfloat16 at once, two neighbours of each row, for a product of
// pairs. Elsewhere levels become float32 one column at a time.
#pragma once

#include "native.hpp"

namespace {
namespace integers {

constexpr int64_t ABREAST = 16;
constexpr int64_t GROUP = 32;  // neighbours in a row that share scale and offset

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && !defined(PORTABLE)
#define INTEGERS_BY_PAIRS
typedef uint16_t Activation;
#else
typedef float Activation;
#endif

// Weight rows in a vector, vectors of them at a time, and batch rows at a time: as many sums as registers hold.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, VECTORS = 2, MOST_ROWS = 8;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, VECTORS = 2, MOST_ROWS = 4;
#else
constexpr int WIDTH = 4, VECTORS = 2, MOST_ROWS = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int32_t Whole __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));

template <typename V> inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline float widen(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    return load<float>(&wide);
}

// Batch rows as the loops below read them.
struct Batch {
    int64_t in;
    const Activation* x;
    int64_t stride;
    const float* sums;  // [rows, in / GROUP]: of each group's activations; four bits only
};

// One vector of weight rows: where it starts in the packed tensors.
struct Place {
    const uint8_t* integers;
    const uint16_t* scales;
};

// The next weight rows' numbers are asked for while these are computed with: they would come too late otherwise.
inline void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// A packed matrix, and the part of its product that is wanted.
struct Product {
    const uint8_t* integers;
    const uint16_t* scales;
    float* y;
    int64_t y_stride, first, last;
};

#ifdef INTEGERS_BY_PAIRS

inline float sum(const uint16_t* x) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    return _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)_mm512_loadu_si512(x), ones));
}

// Keeps the compiler from computing ahead, and then having to store, the many addresses near a pointer.
inline void forget(const uint16_t*& x) { asm("" : "+r"(x)); }

inline __m512bh pair(const uint16_t* x) { return (__m512bh)_mm512_set1_epi32(load<int32_t>(x)); }

inline __m512i level_table() {
    // -8 to 7, twice: of a lane's bits the permutation reads five.
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) {
        float level = static_cast<float>(i % 16 - 8);
        values[i] = static_cast<uint16_t>(load<uint32_t>(&level) >> 16);
    }
    return _mm512_load_si512(values);
}

// Four columns of eight bits as two pairs of bfloat16.
class EightBits {
  public:
    EightBits() {
        // The two bytes of 0 to 127 as bfloat16.
        alignas(64) uint8_t high[128], low[128];
        for (int i = 0; i < 128; i++) {
            float level = static_cast<float>(i);
            uint32_t bits = load<uint32_t>(&level);
            high[i] = static_cast<uint8_t>(bits >> 24), low[i] = static_cast<uint8_t>(bits >> 16);
        }
        for (int i = 0; i < 2; i++)
            highs_[i] = _mm512_load_si512(high + 64 * i), lows_[i] = _mm512_load_si512(low + 64 * i);
    }
    inline void widen(__m512i bytes, __m512i (&pairs)[2]) const {
        const __m512i sign = _mm512_set1_epi8(-128), lower = _mm512_set1_epi16(0xff);
        __m512i magnitude = _mm512_abs_epi8(bytes);
        __m512i upper = _mm512_permutex2var_epi8(highs_[0], magnitude, highs_[1]);
        __m512i under = _mm512_permutex2var_epi8(lows_[0], magnitude, lows_[1]);
        upper = _mm512_ternarylogic_epi32(upper, bytes, sign, 0xf8);  // upper | bytes & sign
        __m512i even = _mm512_slli_epi16(upper, 8), odd = _mm512_srli_epi16(under, 8);
        // lower ? under : even, and lower ? odd : upper
        pairs[0] = _mm512_ternarylogic_epi32(lower, under, even, 0xca);
        pairs[1] = _mm512_ternarylogic_epi32(lower, odd, upper, 0xca);
    }

  private:
    __m512i highs_[2], lows_[2];
};

// Sums that a batch row's product is cut into, so that as many wait for their last addend as hide its latency.
constexpr int cuts(int sums) { return sums <= 4 ? 4 : sums <= 8 ? 2 : 1; }

// total[v][r] += the product of a vector of weight rows and a batch row.
template <int V, int R> inline void add_four(const Batch& batch, const Place* places, Lanes (&total)[V][R]) {
    constexpr int CUTS = cuts(V * R);
    const __m512i table = level_table();
    const int64_t groups = batch.in / GROUP, next = V * ABREAST * groups * GROUP / 2;
    const uint16_t* x[R];
    for (int r = 0; r < R; r++) x[r] = batch.x + r * batch.stride;
    for (int64_t g = 0; g < groups; g++) {
        __m512 sum[CUTS][V][R] = {};
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) forget(x[r]);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            __m512i bits[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) {
                const uint8_t* from = places[v].integers + (g * 4 + q) * 64;
                bits[v] = _mm512_loadu_si512(from);
                fetch(from + next);
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                __m512bh weights[V];
#pragma GCC unroll 2
                for (int v = 0; v < V; v++) {
                    __m512i index = k ? _mm512_srli_epi16(bits[v], 4 * k) : bits[v];
                    weights[v] = (__m512bh)_mm512_permutexvar_epi16(index, table);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    __m512bh activations = pair(x[r] + g * GROUP + 8 * q + 2 * k);
#pragma GCC unroll 2
                    for (int v = 0; v < V; v++) {
                        __m512& part = sum[k % CUTS][v][r];
                        part = _mm512_dpbf16_ps(part, weights[v], activations);
                    }
                }
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            const uint16_t* from = places[v].scales + g * 2 * ABREAST;
            fetch(from + next / 8);
            Bits both = load<Bits>(from);
            Lanes scale = (Lanes)(both << 16), offset = (Lanes)(both & 0xffff0000u);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                Lanes whole = {};
#pragma GCC unroll 4
                for (int s = 0; s < CUTS; s++) whole += (Lanes)sum[s][v][r];
                total[v][r] += whole * scale + offset * batch.sums[r * groups + g];
            }
        }
    }
}

template <int V, int R> inline void add_eight(const Batch& batch, const Place* places, Lanes (&total)[V][R]) {
    constexpr int CUTS = cuts(V * R);
    const EightBits bits;
    const int64_t next = V * ABREAST * batch.in;
    const uint16_t* x[R];
    for (int r = 0; r < R; r++) x[r] = batch.x + r * batch.stride;
    __m512 sum[CUTS][V][R] = {};
    for (int64_t c = 0; c < batch.in; c += 8) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) forget(x[r]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512bh weights[2][V];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) {
                const uint8_t* from = places[v].integers + (c + 4 * half) * ABREAST;
                __m512i pairs[2];
                bits.widen(_mm512_loadu_si512(from), pairs);
                fetch(from + next);
                weights[0][v] = (__m512bh)pairs[0], weights[1][v] = (__m512bh)pairs[1];
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    __m512bh activations = pair(x[r] + c + 4 * half + 2 * h);
#pragma GCC unroll 2
                    for (int v = 0; v < V; v++) {
                        __m512& part = sum[(2 * half + h) % CUTS][v][r];
                        part = _mm512_dpbf16_ps(part, weights[h][v], activations);
                    }
                }
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; v++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int s = 0; s < CUTS; s++) total[v][r] += (Lanes)sum[s][v][r];
}

#else

inline float sum(const float* x) {
    float parts[8] = {};
    for (int64_t c = 0; c < GROUP; c++) parts[c % 8] += x[c];
    return ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

template <int V, int R> inline void add_four(const Batch& batch, const Place* places, Lanes (&total)[V][R]) {
    const int64_t groups = batch.in / GROUP, next = V * WIDTH * groups * GROUP / 2;
    for (int64_t g = 0; g < groups; g++) {
        Lanes sum[V][R] = {};
        for (int q = 0; q < 4; q++) {
            const float* x = batch.x + g * GROUP + 8 * q;
            Bits bits[V];
            for (int v = 0; v < V; v++) {
                const uint8_t* from = places[v].integers + (g * 4 + q) * 64;
                bits[v] = load<Bits>(from);
                fetch(from + next);
            }
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) {
                int column = k < 4 ? 2 * k : 2 * k - 7;
#pragma GCC unroll 2
                for (int v = 0; v < V; v++) {
                    Lanes level = __builtin_convertvector((Whole)(bits[v] & 15), Lanes);
                    bits[v] >>= 4;
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sum[v][r] += level * x[r * batch.stride + column];
                }
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            Bits both = load<Bits>(places[v].scales + g * 2 * ABREAST);
            Lanes scale = (Lanes)(both << 16), offset = (Lanes)(both & 0xffff0000u) - 8 * scale;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) total[v][r] += sum[v][r] * scale + offset * batch.sums[r * groups + g];
        }
    }
}

template <int V, int R> inline void add_eight(const Batch& batch, const Place* places, Lanes (&total)[V][R]) {
    const int64_t next = V * WIDTH * batch.in;
    for (int64_t c = 0; c < batch.in; c += 4) {
        const float* x = batch.x + c;
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            const uint8_t* from = places[v].integers + c * ABREAST;
            Bits bits = load<Bits>(from);
            fetch(from + next);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                int column = k % 2 * 2 + k / 2;
                Lanes level = __builtin_convertvector((Whole)(bits << (24 - 8 * k)) >> 24, Lanes);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) total[v][r] += level * x[r * batch.stride + column];
            }
        }
    }
}

#endif

}  // namespace integers
}  // namespace
