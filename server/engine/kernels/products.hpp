// y = x W^T for few rows of x: every weight is read once from memory, in the order in which it lies there.
//
// Four weight rows and up to six rows of x at a time keep their sums in registers. In bfloat16, with AVX-512's products
// of pairs, x is rounded to bfloat16 first; all sums are float32.
#pragma once

#include "native.hpp"
#include "vectors.hpp"

#include <utility>

namespace {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS 1
#else
#define PAIRS 0
#endif
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 6;
#else
constexpr int MOST_ROWS = 2;
#endif
constexpr int64_t NEAR = 384 << 10;
constexpr int64_t ROWS_AHEAD = 16;  // of weights, to be in the second cache by then: asking the first one waits for room in it
constexpr int64_t PADDING = 64;  // rows of x are padded to a multiple of so many

inline int64_t padded(int64_t width) { return (width + PADDING - 1) / PADDING * PADDING; }

// f(0), f(1), ...: spelt out, so that arrays that are indexed so can stay in registers.
template <typename F, int... I> INLINE inline void spelt(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F> INLINE inline void each(F f) { spelt(f, std::make_integer_sequence<int, N>{}); }

// In a register from here on: loading a number again for each of its products takes twice as long as these.
#if defined(__AVX512F__)
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x)
#endif

// Sums of products of W rows of weights and X rows of x.
template <int W, int X> struct Tile {
    Floats16 sums[X * W];

    template <typename T> INLINE void add(const T* w, int64_t in, const float* x, int64_t stride) {
        int64_t c = 0;
        for (; c + 16 <= in; c += 16) {
            Floats16 weights[W];
            each<W>([&](auto i) INLINE {
                weights[i] = load16(w + i * in + c);
                KEEP(weights[i]);
                __builtin_prefetch(w + (i + ROWS_AHEAD) * in + c, 0, 2);
            });
            each<X>([&](auto j) INLINE {
                Floats16 values = load16(x + j * stride + c);
                KEEP(values);
                each<W>([&](auto i) INLINE { sums[j * W + i] += weights[i] * values; });
            });
        }
        if (c == in) return;
        each<W>([&](auto i) INLINE {
            Floats16 weights = load_some(w + i * in + c, in - c);
            each<X>([&](auto j) INLINE { sums[j * W + i] += weights * load_some(x + j * stride + c, in - c); });
        });
    }

#if PAIRS
    INLINE void add(const Brain* w, int64_t in, const uint16_t* x, int64_t stride) {
        for (int64_t c = 0; c < in; c += 32) {
            __m512bh weights[W];
            // The last ones may be cut short: x is padded with zeros, but weights are not.
            __mmask32 there = c + 32 <= in ? ~__mmask32(0) : (__mmask32(1) << (in - c)) - 1;
            each<W>([&](auto i) INLINE {
                weights[i] = (__m512bh)_mm512_maskz_loadu_epi16(there, w + i * in + c);
                __builtin_prefetch(w + (i + ROWS_AHEAD) * in + c, 0, 2);
            });
            each<X>([&](auto j) INLINE {
                __m512bh values = (__m512bh)_mm512_loadu_si512(x + j * stride + c);
                each<W>([&](auto i) INLINE {
                    sums[j * W + i] = (Floats16)_mm512_dpbf16_ps((__m512)sums[j * W + i], weights[i], values);
                });
            });
        }
    }
#endif

    INLINE void write(float* y, int64_t stride) const {
        each<X>([&](auto j) INLINE {
            if constexpr (W == 4)
                sums4(sums[j * W], sums[j * W + 1], sums[j * W + 2], sums[j * W + 3], y + j * stride);
            else
                each<W>([&](auto i) INLINE { y[j * stride + i] = sum16(sums[j * W + i]); });
        });
    }
};

template <int W, int X, typename T, typename U>
void tile(const T* w, int64_t in, const U* x, int64_t x_stride, float* y, int64_t y_stride) {
    Tile<W, X> sums = {};
    sums.add(w, in, x, x_stride);
    sums.write(y, y_stride);
}

template <int W, typename T, typename U>
void tiles(const T* w, int64_t in, const U* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride) {
    int64_t chunks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t i = 0; i < chunks; i++) {
        int64_t start = rows * i / chunks, count = rows * (i + 1) / chunks - start;
        const U* from = x + start * x_stride;
        float* to = y + start * y_stride;
        switch (count) {
            case 1: tile<W, 1>(w, in, from, x_stride, to, y_stride); break;
            case 2: tile<W, 2>(w, in, from, x_stride, to, y_stride); break;
#if defined(__AVX512F__)
            case 3: tile<W, 3>(w, in, from, x_stride, to, y_stride); break;
            case 4: tile<W, 4>(w, in, from, x_stride, to, y_stride); break;
            case 5: tile<W, 5>(w, in, from, x_stride, to, y_stride); break;
            default: tile<W, 6>(w, in, from, x_stride, to, y_stride); break;
#endif
        }
    }
}

// y[r][o] = sum of x[r] * w[o] for the weight rows o of [first, last) and all rows r. Rows of x are `padded(in)` apart
// if they are bfloat16, and zero beyond `in`; else `in` apart.
template <typename T, typename U>
void multiply(const T* weights, int64_t in, const U* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride,
              int64_t first, int64_t last) {
    // Rows of x that stay in the second cache while all weights go by.
    int64_t some = NEAR / (x_stride * int64_t(sizeof(U)));
    some = some < 8 * MOST_ROWS ? 8 * MOST_ROWS : some;
    for (int64_t start = 0; start < rows; start += some) {
        int64_t count = smaller(rows - start, some);
        const U* from = x + start * x_stride;
        float* to = y + start * y_stride;
        int64_t o = first;
        for (; o + 4 <= last; o += 4) tiles<4>(weights + o * in, in, from, x_stride, count, to + o, y_stride);
        for (; o < last; o++) tiles<1>(weights + o * in, in, from, x_stride, count, to + o, y_stride);
    }
}

// Rows of x as bfloat16, padded.
inline void round_rows(const float* x, int64_t in, int64_t rows, uint16_t* out) {
    int64_t stride = padded(in);
    for (int64_t r = 0; r < rows; r++, x += in, out += stride) {
        int64_t c = 0;
#if PAIRS
        for (; c + 16 <= in; c += 16)
            _mm256_storeu_si256((__m256i*)(out + c), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + c)));
#endif
        for (; c < in; c++) out[c] = rounded(x[c]);
        for (; c < stride; c++) out[c] = 0;
    }
}

}  // namespace
