// Products with a base in four or eight bits, for many rows, with AMX.
//
// Sixteen weight rows abreast, two neighbours of each, are a row of the instruction's second factor: 32 columns that
// have become bfloat16 are a tile. The first is 32 columns of up to 16 batch rows, as they lie in memory.
#pragma once

#include "amx.hpp"
#include "integers_vectors.hpp"

#if AMX

namespace {
namespace integers {

constexpr int64_t FEW_TILED = 3;  // batch rows from which tiles are faster than vectors; measured

// Sixteen vectors of one group of 32 columns, to `to` [16][32].
inline void widen_four(const uint8_t* from, const __m512i& table, uint16_t* to) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
        __m512i bits = _mm512_loadu_si512(from + q * 64);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++, to += ACROSS)
            _mm512_store_si512(to, _mm512_permutexvar_epi16(k ? _mm512_srli_epi16(bits, 4 * k) : bits, table));
    }
}

inline void widen_eight(const uint8_t* from, const EightBits& bits, uint16_t* to) {
    for (int q = 0; q < 8; q++, to += 2 * ACROSS) {
        __m512i pairs[2];
        bits.widen(_mm512_loadu_si512(from + q * 64), pairs);
        _mm512_store_si512(to, pairs[0]);
        _mm512_store_si512(to + ACROSS, pairs[1]);
    }
}

// What is multiplied: the batch rows [start, start + rows), and 16 weight rows as tiles, one per group.
struct Factors {
    const uint16_t* x;
    int64_t stride, rows, groups;
    const uint16_t* weights;
};

// total[r] += the product of the groups g to g + G, each by its scales, and offsets by the sums of activations.
template <int G>
inline void add_groups(const Factors& factors, int64_t g, const uint16_t* scales, const float* sums, float* total) {
    alignas(64) float parts[G][SIDE * SIDE];
    _tile_zero(0);
    _tile_loadd(4, factors.x + g * GROUP, factors.stride * 2);
    _tile_loadd(6, factors.weights + g * SIDE * ACROSS, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (G > 1) {
        _tile_zero(1);
        _tile_loadd(5, factors.x + (g + 1) * GROUP, factors.stride * 2);
        _tile_loadd(7, factors.weights + (g + 1) * SIDE * ACROSS, 64);
        _tile_dpbf16ps(1, 5, 7);
        _tile_stored(1, parts[G - 1], 64);
    }
    _tile_stored(0, parts[0], 64);
    Lanes scale[G], offset[G];
    for (int i = 0; i < G; i++) {
        Bits both = load<Bits>(scales + (g + i) * 2 * ABREAST);
        scale[i] = (Lanes)(both << 16), offset[i] = (Lanes)(both & 0xffff0000u);
    }
    for (int64_t r = 0; r < factors.rows; r++) {
        Lanes sum = load<Lanes>(total + r * SIDE);
        for (int i = 0; i < G; i++)
            sum += load<Lanes>(parts[i] + r * SIDE) * scale[i] + offset[i] * sums[r * factors.groups + g + i];
        std::memcpy(total + r * SIDE, &sum, sizeof sum);
    }
}

inline void multiply_groups(const Factors& factors, const uint16_t* scales, const float* sums, float* total) {
    int64_t g = 0;
    for (; g + 2 <= factors.groups; g += 2) add_groups<2>(factors, g, scales, sums, total);
    if (g < factors.groups) add_groups<1>(factors, g, scales, sums, total);
}

// The same with one scale per weight row.
inline void multiply_rows(const Factors& factors, const uint16_t* scales, float* total) {
    alignas(64) float part[SIDE * SIDE];
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t g = 0; g < factors.groups; g += 2) {
        _tile_loadd(4, factors.x + g * GROUP, factors.stride * 2);
        _tile_loadd(6, factors.weights + g * SIDE * ACROSS, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (g + 1 == factors.groups) break;
        _tile_loadd(5, factors.x + (g + 1) * GROUP, factors.stride * 2);
        _tile_loadd(7, factors.weights + (g + 1) * SIDE * ACROSS, 64);
        _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, total, 64);
    _tile_stored(1, part, 64);
    Lanes scale = (Lanes)(__builtin_convertvector(load<Halves>(scales), Bits) << 16);
    for (int64_t r = 0; r < factors.rows; r++) {
        Lanes sum = (load<Lanes>(total + r * SIDE) + load<Lanes>(part + r * SIDE)) * scale;
        std::memcpy(total + r * SIDE, &sum, sizeof sum);
    }
}

thread_local Scratch wide;

// All batch rows, cut into equal parts; the last begins early enough to be as large. `sums`: of each group's
// activations, [rows, in / GROUP]; four bits only.
template <bool FOUR>
void multiply_tiled(const Product& product, const Batch& batch, int64_t rows) {
    int64_t groups = batch.in / GROUP, parts = (rows + SIDE - 1) / SIDE, most = (rows + parts - 1) / parts;
    uint16_t* weights = reinterpret_cast<uint16_t*>(wide.floats(groups * SIDE * ACROSS / 2));
    const __m512i table = level_table();
    const EightBits eight;
    alignas(64) float total[SIDE * SIDE];
    Tiles tiles(true, most);
    for (int64_t row = product.first / SIDE * SIDE; row < product.last; row += SIDE) {
        const uint8_t* from = product.integers + (FOUR ? row * batch.in / 2 : row * batch.in);
        const uint16_t* scales = product.scales + (FOUR ? row * groups * 2 : row);
        for (int64_t g = 0; g < groups; g++) {
            if (FOUR)
                widen_four(from + g * 256, table, weights + g * SIDE * ACROSS);
            else
                widen_eight(from + g * 512, eight, weights + g * SIDE * ACROSS);
        }
        settle();
        int64_t skip = row < product.first ? product.first - row : 0, stop = smaller(SIDE, product.last - row);
        for (int64_t part = 0; part < parts; part++) {
            int64_t start = smaller(part * most, rows - most);
            Factors factors = {batch.x + start * batch.stride, batch.stride, most, groups, weights};
            if (FOUR) {
                std::memset(total, 0, most * SIDE * sizeof(float));
                multiply_groups(factors, scales, batch.sums + start * groups, total);
            } else {
                multiply_rows(factors, scales, total);
            }
            for (int64_t r = 0; r < most; r++)
                std::memcpy(product.y + (start + r) * product.y_stride + row + skip, total + r * SIDE + skip,
                            (stop - skip) * sizeof(float));
        }
    }
}

}  // namespace integers
}  // namespace

#endif
