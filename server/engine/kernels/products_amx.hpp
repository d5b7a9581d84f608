// y = x W^T for many rows of bfloat16, with AMX: 16 weight rows by 32 columns are one tile, as they lie in memory.
//
// A tile of x holds 16 of its rows in pairs of columns, the order in which the instruction wants its second factor. It
// is packed once per product. Sums are float32; the result of a pair of tiles is 16 weight rows by 16 rows of x, and
// is turned as it is written.
#pragma once

#include "amx.hpp"
#include "products.hpp"

#if AMX

namespace {

constexpr int64_t FEW_TILED = 5;  // rows of x from which tiles are faster than vectors; measured

// Elements that `rows` packed rows of x take.
inline int64_t packed_size(int64_t rows, int64_t in) { return (rows + SIDE - 1) / SIDE * SIDE * in; }

// Sixteen vectors of as many 32-bit numbers: rows become columns.
INLINE inline void turn(__m512i* v) {
    __m512i t[16];
    each<8>([&](auto i) INLINE {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    });
    each<4>([&](auto i) INLINE {
        v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    });
    each<4>([&](auto i) INLINE {
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    });
    each<4>([&](auto i) INLINE {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    });
}

// Rows of x as tiles: [rows / 16][in / 32] of them, zero beyond the last row.
inline void pack_rows(const uint16_t* x, int64_t stride, int64_t rows, int64_t in, uint16_t* out) {
    for (int64_t r = 0; r < rows; r += SIDE)
        for (int64_t c = 0; c < in; c += ACROSS, out += SIDE * ACROSS) {
            __m512i v[SIDE];
            for (int64_t i = 0; i < SIDE; i++)
                v[i] = r + i < rows ? _mm512_loadu_si512(x + (r + i) * stride + c) : _mm512_setzero_si512();
            turn(v);
            for (int64_t i = 0; i < SIDE; i++) _mm512_store_si512(out + i * ACROSS, v[i]);
        }
}

// W tiles of weights by X of x: y [X * 16 rows, of which `rows` are there][W * 16].
template <int W, int X>
INLINE inline void multiply_tile(const Brain* w, int64_t in, const uint16_t* x, float* y, int64_t y_stride, int64_t rows) {
    settle();
    _tile_zero(0);
    if constexpr (X > 1) _tile_zero(1);
    if constexpr (W > 1) _tile_zero(2);
    if constexpr (W > 1 && X > 1) _tile_zero(3);
    const uint16_t* second = x + SIDE * in;
    for (int64_t c = 0; c < in; c += ACROSS, x += SIDE * ACROSS, second += SIDE * ACROSS) {
        _tile_loadd(4, w + c, in * 2);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (X > 1) {
            _tile_loadd(7, second, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (W > 1) {
            _tile_loadd(5, w + SIDE * in + c, in * 2);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (W > 1 && X > 1) _tile_dpbf16ps(3, 5, 7);
        for (int64_t i = 0; i < W * SIDE; i++) __builtin_prefetch(w + (W * SIDE + i) * in + c, 0, 2);  // the next rows'
    }
    alignas(64) float sums[W][X][SIDE * SIDE];
    _tile_stored(0, sums[0][0], 64);
    if constexpr (X > 1) _tile_stored(1, sums[0][1], 64);
    if constexpr (W > 1) _tile_stored(2, sums[1][0], 64);
    if constexpr (W > 1 && X > 1) _tile_stored(3, sums[1][1], 64);
    for (int j = 0; j < X; j++)
        for (int i = 0; i < W; i++) {
            __m512i v[SIDE];
            each<SIDE>([&](auto k) INLINE { v[k] = _mm512_load_si512(sums[i][j] + k * SIDE); });
            turn(v);
            for (int64_t r = 0; r < smaller(SIDE, rows - j * SIDE); r++)
                _mm512_storeu_si512(y + (j * SIDE + r) * y_stride + i * SIDE, v[r]);
        }
}

// y[r][o] = sum of x[r] * w[o] for as many of the `count` weight rows o as fill tiles, and all packed rows r of x.
// Returns how many weight rows that were.
inline int64_t multiply_packed(const Brain* weights, int64_t in, const uint16_t* x, int64_t rows, float* y,
                               int64_t y_stride, int64_t count) {
    int64_t full = count / SIDE * SIDE;
    int64_t some = NEAR_TILED / (in * int64_t(sizeof(uint16_t))) / (2 * SIDE) * 2 * SIDE;
    some = some < 2 * SIDE ? 2 * SIDE : some;
    for (int64_t start = 0; start < rows; start += some) {
        int64_t until = smaller(start + some, rows);
        for (int64_t o = 0; o < full; o += 2 * SIDE)
            for (int64_t r = start; r < until; r += 2 * SIDE) {
                const Brain* w = weights + o * in;
                float* to = y + r * y_stride + o;
                bool wide = o + SIDE < full, deep = r + SIDE < until;
                (wide ? deep ? multiply_tile<2, 2> : multiply_tile<2, 1> : deep ? multiply_tile<1, 2> : multiply_tile<1, 1>)(
                    w, in, x + r * in, to, y_stride, until - r);
            }
    }
    return full;
}

}  // namespace

#endif
