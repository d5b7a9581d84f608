// Bit planes with AMX: 16 weight rows by 64 columns become a tile of bytes, -1, 0 and 1.
//
// What they are multiplied with is rounded to 16 bits of its row's largest number, and goes in as two bytes, which are
// two rows of the first factor: eight rows of x fill a tile, and one costs no more.
#pragma once

#include "amx.hpp"
#include "vectors.hpp"

#if AMX

namespace {

constexpr int64_t WIDTH = 64;                // columns of a tile, in bytes
constexpr int64_t TILE_BYTES = SIDE * WIDTH;
constexpr int64_t ROWS_TILED = SIDE / 2;     // of x in a part, which is multiplied at once
constexpr int64_t AHEAD_TILED = 2048;        // numbers after those that are read, to be in the second cache by then
constexpr float MOST_TILED = 127 * 256 + 127;

thread_local Scratch bytes;
thread_local Origin split;  // what `bytes` was made of

// Where the columns of 64 come to lie: byte q of a tile's row has those of the bytes q of words, see `widen_words`.
inline __m512i columns_tiled() {
    alignas(64) uint8_t from[WIDTH];
    for (int word = 0; word < 2; word++)
        for (int odd = 0; odd < 2; odd++)
            for (int i = 0; i < 4; i++)
                for (int q = 0; q < 4; q++) from[32 * word + 16 * odd + 4 * i + q] = uint8_t(32 * word + 8 * q + 2 * i + odd);
    return _mm512_load_si512(from);
}

// One row of x as two rows of tiles: to [tiles][high, low], `stride` bytes from tile to tile. Returns what the low
// byte's unit is worth; what is not finite makes that NaN.
inline float split_row(const float* x, int64_t in, int64_t stride, uint8_t* high, uint8_t* low) {
    auto some = [&](int64_t c) {
        __mmask16 there = in - c >= 16 ? __mmask16(0xffff) : in > c ? __mmask16((1u << (in - c)) - 1) : __mmask16(0);
        return _mm512_maskz_loadu_ps(there, x + c);
    };
    float largest = largest_of(x, in);
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? MOST_TILED / largest : 0.0f);
    const __m512i places = columns_tiled();
    for (int64_t c = 0; c < in; c += WIDTH, high += stride, low += stride) {
        alignas(64) uint8_t parts[2][WIDTH];
        for (int k = 0; k < 4; k++) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(some(c + 16 * k), inverse));
            __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            _mm_store_si128(reinterpret_cast<__m128i*>(parts[0] + 16 * k), _mm512_cvtepi32_epi8(upper));
            _mm_store_si128(reinterpret_cast<__m128i*>(parts[1] + 16 * k), _mm512_cvtepi32_epi8(whole));
        }
        _mm512_store_si512(high, _mm512_permutexvar_epi8(places, _mm512_load_si512(parts[0])));
        _mm512_store_si512(low, _mm512_permutexvar_epi8(places, _mm512_load_si512(parts[1])));
    }
    return largest / MOST_TILED;
}

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

// y[0:rows][0:32] (of these the first `valid`) += factor * units[row] * sums, [2][2 * most][16], of high and low bytes.
inline void add_block(const int32_t* sums, int64_t rows, int64_t most, const float* units, float factor, float* y,
                      int64_t stride, int64_t valid) {
    for (int64_t half = 0; half < 2; half++) {
        int64_t left = valid - half * SIDE;
        __mmask16 there = left >= SIDE ? __mmask16(0xffff) : left > 0 ? __mmask16((1u << left) - 1) : __mmask16(0);
        for (int64_t r = 0; r < rows; r++) {
            const int32_t* own = sums + (half * most + r) * 2 * SIDE;
            __m512 high = _mm512_cvtepi32_ps(_mm512_loadu_si512(own));
            __m512 total = _mm512_fmadd_ps(high, _mm512_set1_ps(256), _mm512_cvtepi32_ps(_mm512_loadu_si512(own + SIDE)));
            float* to = y + r * stride + half * SIDE;
            __m512 before = _mm512_maskz_loadu_ps(there, to);
            _mm512_mask_storeu_ps(to, there, _mm512_fmadd_ps(total, _mm512_set1_ps(factor * units[r]), before));
        }
    }
}

// To be called when what is read may have changed.
inline void forget_split() { split = {}; }

// What the planes among the terms add to the rows [start, stop), for the weight rows of the blocks [first, last).
void add_planes_tiled(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
                      int64_t last) {
    int64_t rows = stop - start, tiles = (call.words + 1) / 2;
    int64_t parts = (rows + ROWS_TILED - 1) / ROWS_TILED, most = (rows + parts - 1) / parts;
    int64_t size = tiles * 2 * most * WIDTH;
    float* units = bytes.floats(parts * (SIDE + size / int64_t(sizeof(float))));
    uint8_t* x = reinterpret_cast<uint8_t*>(units + parts * SIDE);
    const float* from = call.x + start * call.in;
    if (Origin own = {from, rows, call.in}; !(split == own)) {
        std::memset(x, 0, parts * size);  // rows that only fill a part
        for (int64_t r = 0; r < rows; r++) {
            uint8_t* high = x + r / most * size + r % most * 2 * WIDTH;
            units[r] = split_row(from + r * call.in, call.in, 2 * most * WIDTH, high, high + WIDTH);
        }
        split = own;
    }
    alignas(64) int32_t sums[2 * 2 * SIDE * SIDE];
    Tiles used(true, 2 * most);
    for (const Term* term = terms; term < end; term++) {
        if (term->form != PLANES) continue;
        for (int64_t b = first; b < last; b++) {
            float power = term->factor;
            for (int32_t k = 0; k < term->count; k++, power *= 3) {
                const uint32_t* block = term->words + (b * term->count + k) * call.words * 2 * BLOCK;
                for (int64_t part = 0; part < parts; part += 2) {
                    const uint8_t* own = x + part * size;
                    if (part + 1 < parts)
                        multiply_block<2>(block, call.words, own, size, 2 * most, sums);
                    else
                        multiply_block<1>(block, call.words, own, size, 2 * most, sums);
                    for (int64_t p = part; p < smaller(part + 2, parts); p++)
                        add_block(sums + (p - part) * 4 * most * SIDE, smaller(most, rows - p * most), most,
                                  units + p * most, power, call.y + (start + p * most) * call.out + b * BLOCK, call.out,
                                  call.out - b * BLOCK);
                }
            }
        }
    }
}

// The same for any number of rows.
void planes_by_tiles(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
                     int64_t last) {
    int64_t some = NEAR_TILED / (2 * call.in) / SIDE * SIDE;
    some = some < SIDE ? SIDE : some;
    for (int64_t row = start; row < stop; row += some)
        add_planes_tiled(call, terms, end, row, smaller(row + some, stop), first, last);
}

}  // namespace

#else

namespace {

inline void forget_split() {}

}  // namespace

#endif
