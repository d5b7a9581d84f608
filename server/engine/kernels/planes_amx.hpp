// Bit planes with AMX: 16 weight rows by 64 columns become a tile of bytes, -1, 0 and 1.
//
// The two bytes of a number of x are two rows of the first factor: eight rows of x fill a tile, and one costs no more.
#pragma once

#include "planes_bytes.hpp"

#if AMX

namespace {

constexpr int64_t TILE_BYTES = SIDE * WIDTH;
constexpr int64_t ROWS_TILED = SIDE / 2;     // of x in a part, which is multiplied at once
constexpr int64_t AHEAD_TILED = 2048;        // numbers after those that are read, to be in the second cache by then

// Sixteen words side by side as half a tile: the bits of the two planes look up a byte.
INLINE inline void widen_words(const uint32_t* words, uint8_t* to) {
    const __m512i values = _mm512_set1_epi32(0x00ff0100);  // by (plus, minus) in bits 0 and 1; both are never set
    const __m512i fives = _mm512_set1_epi32(0x55555555);
    __m512i plus = _mm512_loadu_si512(words), minus = _mm512_loadu_si512(words + BLOCK);
    // fives ? first : second, bit by bit
    __m512i even = _mm512_ternarylogic_epi32(fives, plus, _mm512_slli_epi32(minus, 1), 0xca);
    __m512i odd = _mm512_ternarylogic_epi32(fives, _mm512_srli_epi32(plus, 1), minus, 0xca);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_store_si512(to + i * WIDTH, _mm512_permutexvar_epi8(_mm512_srli_epi32(even, 2 * i), values));
        _mm512_store_si512(to + (4 + i) * WIDTH, _mm512_permutexvar_epi8(_mm512_srli_epi32(odd, 2 * i), values));
    }
}

// sums [P][2][rows][16] = P parts of x times the two halves of a block, for as many rows as tiles 0 to 5 have; a part
// is [tiles][rows][64], and `size` bytes.
template <int P>
void multiply_block(const uint32_t* block, int64_t words, const uint8_t* x, int64_t size, int64_t rows, int32_t* sums) {
    // Two tiles of each half: what was stored last is not read at once.
    alignas(64) uint8_t wide[2][2][TILE_BYTES];
    int64_t tiles = (words + 1) / 2;
    auto multiply = [&](int64_t t) INLINE {
        const uint8_t* from = x + t * rows * WIDTH;
        _tile_loadd(6, wide[t % 2][0], WIDTH);
        _tile_loadd(7, wide[t % 2][1], WIDTH);
        _tile_loadd(4, from, WIDTH);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if constexpr (P > 1) {
            _tile_loadd(5, from + size, WIDTH);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    };
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (P > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t t = 0; t < tiles; t++) {
        for (int64_t j = 2 * t; j < smaller(2 * t + 2, words); j++) {
            const uint32_t* word = block + j * 2 * BLOCK;
            for (int64_t k = 0; k < 2 * BLOCK; k += 16) __builtin_prefetch(word + AHEAD_TILED + k, 0, 2);
            for (int half = 0; half < 2; half++)
                widen_words(word + half * SIDE, wide[t % 2][half] + j % 2 * TILE_BYTES / 2);
        }
        settle();
        if (t) multiply(t - 1);
    }
    multiply(tiles - 1);
    _tile_stored(0, sums, WIDTH);
    _tile_stored(1, sums + rows * SIDE, WIDTH);
    if constexpr (P > 1) {
        _tile_stored(2, sums + 2 * rows * SIDE, WIDTH);
        _tile_stored(3, sums + 3 * rows * SIDE, WIDTH);
    }
    settle();
}

// What the planes among the terms add to the rows [start, stop), for the weight rows of the blocks [first, last).
void planes_by_tiles(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
                     int64_t last) {
    alignas(64) int32_t sums[2 * 2 * SIDE * SIDE];
    each_chunk(call, start, stop, [&](int64_t row, int64_t rows) {
        const Split& x = split_rows(call, row, rows, ROWS_TILED);
        const int64_t most = x.most;
        Tiles used(true, 2 * most);
        each_block(call, terms, end, first, last, [&](const uint32_t* block, float factor, int64_t b) INLINE {
            for (int64_t part = 0; part < x.parts; part += 2) {
                const uint8_t* own = x.x + part * x.size;
                if (part + 1 < x.parts)
                    multiply_block<2>(block, call.words, own, x.size, 2 * most, sums);
                else
                    multiply_block<1>(block, call.words, own, x.size, 2 * most, sums);
                for (int64_t p = part; p < smaller(part + 2, x.parts); p++)
                    add_block(sums + (p - part) * 4 * most * SIDE, smaller(most, rows - p * most), most,
                              x.units + p * most, factor, call.y + (row + p * most) * call.out + b * BLOCK, call.out,
                              call.out - b * BLOCK);
            }
        });
    });
}

}  // namespace

#endif
