// Bit planes as bytes, where x may be rounded: each row of x becomes two rows of bytes, which the instructions for
// integers multiply, four or sixteen bytes at a time.
//
// A row is rounded to 16 bits of its largest number. With AMX planes become tiles, see planes_amx.hpp; here sixteen weight
// rows lie in the lanes of a vector, and four columns of x go to all of them at once.
#pragma once

#include "amx.hpp"
#include "products.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && !defined(PORTABLE)
#define PLANE_BYTES 1
#else
#define PLANE_BYTES 0
#endif

namespace {

#if PLANE_BYTES

constexpr int64_t WIDTH = 64;           // columns of a piece of x
constexpr int64_t ROWS_BYTES = 8;       // of x in a part, which is multiplied at once
constexpr int64_t AHEAD_BYTES = 4096;   // numbers after those that are read, to be in the second cache by then
constexpr float MOST_SPLIT = 127 * 256 + 127;

thread_local Scratch bytes;

// Rows of x as bytes, in parts of `most`: [parts][pieces][most][high, low][64], columns as `columns_split` has them.
struct Split {
    Origin of;
    int64_t parts, most, size;  // bytes of a part
    float* units;               // [parts * most]: what a low byte's unit is worth
    int32_t* sums;              // [parts * most][high, low] of all bytes
    uint8_t* x;
};
thread_local Split split;

// To be called when what is read may have changed.
inline void forget_split() { split.of = {}; }

// Byte q of a word of sixteen: the columns of 64 that those bits of two words stand for, by word, oddness and shift.
inline __m512i columns_split() {
    alignas(64) uint8_t from[WIDTH];
    for (int word = 0; word < 2; word++)
        for (int odd = 0; odd < 2; odd++)
            for (int i = 0; i < 4; i++)
                for (int q = 0; q < 4; q++) from[32 * word + 16 * odd + 4 * i + q] = uint8_t(32 * word + 8 * q + 2 * i + odd);
    return _mm512_load_si512(from);
}

// Sixteen numbers, or those that there are and zeros, in units of a low byte's, as high bytes and low ones.
INLINE inline void split_some(const float* x, int64_t count, __m512 inverse, uint8_t* high, uint8_t* low) {
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(count), x), inverse));
    __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(upper));
    _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
}

// What numbers are multiplied with to be split, the largest of which is that; NaN makes that NaN.
inline __m512 units_of(float largest) { return _mm512_set1_ps(largest > 0 ? MOST_SPLIT / largest : 0.0f); }

// One row of x as two rows of bytes, `stride` apart from piece to piece, and their sums. Returns the low byte's unit; what
// is not finite makes that NaN.
inline float split_row(const float* x, int64_t in, int64_t stride, uint8_t* high, uint8_t* low, int32_t* sums) {
    float largest = largest_of(x, in);
    const __m512 inverse = units_of(largest);
    const __m512i places = columns_split(), ones = _mm512_set1_epi8(1);
    __m512i totals[2] = {};
    for (int64_t c = 0; c < in; c += WIDTH, high += stride, low += stride) {
        alignas(64) uint8_t parts[2][WIDTH];
        for (int64_t k = 0; k < WIDTH; k += 16) split_some(x + c + k, in - c - k, inverse, parts[0] + k, parts[1] + k);
        for (int k = 0; k < 2; k++) {
            __m512i part = _mm512_permutexvar_epi8(places, _mm512_load_si512(parts[k]));
            _mm512_store_si512(k ? low : high, part);
            totals[k] = _mm512_dpbusd_epi32(totals[k], ones, part);
        }
    }
    for (int k = 0; k < 2; k++) sums[k] = _mm512_reduce_add_epi32(totals[k]);
    return largest / MOST_SPLIT;
}

// The rows from `start` on in parts of `together` at most, made unless they are there.
inline const Split& split_rows(const Call& call, int64_t start, int64_t rows, int64_t together) {
    const float* from = call.x + start * call.in;
    if (Origin own = {from, rows, call.in}; !(split.of == own)) {
        int64_t parts = (rows + together - 1) / together, most = (rows + parts - 1) / parts;
        int64_t size = (call.words + 1) / 2 * 2 * most * WIDTH, before = (3 * parts * most + 15) / 16 * 16;
        float* units = bytes.floats(before + parts * size / int64_t(sizeof(float)));
        auto* sums = reinterpret_cast<int32_t*>(units + parts * most);
        auto* x = reinterpret_cast<uint8_t*>(units + before);
        std::memset(units, 0, before * sizeof(float) + parts * size);  // rows that only fill a part
        for (int64_t r = 0; r < rows; r++) {
            uint8_t* high = x + r / most * size + r % most * 2 * WIDTH;
            units[r] = split_row(from + r * call.in, call.in, 2 * most * WIDTH, high, high + WIDTH, sums + 2 * r);
        }
        split = {own, parts, most, size, units, sums, x};
    }
    return split;
}

// y[0:rows][0:32] (of these the first `valid`) += factor * units[row] * sums, [2][2 * most][16], of high and low bytes.
inline void add_block(const int32_t* sums, int64_t rows, int64_t most, const float* units, float factor, float* y,
                      int64_t stride, int64_t valid) {
    for (int64_t half = 0; half < 2; half++) {
        const __mmask16 there = first_lanes(valid - half * SIDE);
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

// Calls take(row, rows) for as many of the rows [start, stop) at a time as stay in the second cache.
template <typename F> inline void each_chunk(const Call& call, int64_t start, int64_t stop, F take) {
    int64_t some = larger(NEAR_TILED / (2 * call.in) / SIDE * SIDE, SIDE);
    for (int64_t row = start; row < stop; row += some) take(row, smaller(some, stop - row));
}

// Calls take(block of planes, factor, its number) for every digit of the planes among the terms.
template <typename F>
INLINE inline void each_block(const Call& call, const Term* terms, const Term* end, int64_t first, int64_t last, F take) {
    for (const Term* term = terms; term < end; term++) {
        if (term->form != PLANES) continue;
        for (int64_t b = first; b < last; b++) {
            float power = term->factor;
            for (int32_t k = 0; k < term->count; k++, power *= 3)
                take(term->words + (b * term->count + k) * call.words * 2 * BLOCK, power, b);
        }
    }
}

// sums [2][2R][16] = R rows of a part times the two halves of a block.
//
// The bits of both planes become 1 + what they say, two bits each, which are multiplied where they stand in their byte as
// long as there are registers for sums of all four places.
template <int R>
void multiply_bytes(const uint32_t* block, int64_t words, const uint8_t* x, const int32_t* offsets, int32_t* sums) {
    constexpr int PLACES = R <= 2 ? 4 : 1;
    const __m512i fives = _mm512_set1_epi32(0x55555555), lowest = _mm512_set1_epi32(0x03030303);
    for (int64_t half = 0; half < 2; half++, sums += 2 * R * SIDE) {
        __m512i totals[PLACES][2 * R] = {};
        for (int64_t j = 0; j < words; j++) {
            const uint32_t* word = block + j * 2 * BLOCK + half * SIDE;
            const uint8_t* piece = x + j / 2 * 2 * R * WIDTH + j % 2 * WIDTH / 2;
            __builtin_prefetch(word + AHEAD_BYTES, 0, 2), __builtin_prefetch(word + AHEAD_BYTES + BLOCK, 0, 2);
            __m512i plus = _mm512_loadu_si512(word), minus = _mm512_loadu_si512(word + BLOCK);
            __m512i none = _mm512_ternarylogic_epi32(plus, minus, minus, 0x03);
            // fives ? first : second, bit by bit
            __m512i even = _mm512_ternarylogic_epi32(fives, none, _mm512_slli_epi32(plus, 1), 0xca);
            __m512i odd = _mm512_ternarylogic_epi32(fives, _mm512_srli_epi32(none, 1), plus, 0xca);
            auto add = [&](auto place, __m512i bits, const uint8_t* columns) INLINE {
                constexpr int i = decltype(place)::value;
                __m512i level = PLACES == 1 ? _mm512_and_si512(_mm512_srli_epi32(bits, 2 * i), lowest)
                                            : _mm512_and_si512(bits, _mm512_set1_epi32(0x03030303 << (2 * i)));
                each<2 * R>([&](auto r) INLINE {
                    int32_t four;
                    std::memcpy(&four, columns + r * WIDTH + 4 * i, sizeof four);
                    __m512i& total = totals[i % PLACES][r];
                    total = _mm512_dpbusd_epi32(total, level, _mm512_set1_epi32(four));
                });
            };
            each<4>([&](auto place) INLINE { add(place, even, piece), add(place, odd, piece + 16); });
        }
        each<2 * R>([&](auto r) INLINE {
            __m512i total = _mm512_sub_epi32(totals[0][r], _mm512_set1_epi32(offsets[r]));
            if constexpr (PLACES > 1)
                each<PLACES>([&](auto i) INLINE {
                    if constexpr (i > 0) total = _mm512_add_epi32(total, _mm512_srai_epi32(totals[i][r], 2 * i));
                });
            _mm512_storeu_si512(sums + r * SIDE, total);
        });
    }
}

typedef void (*MultiplyBytes)(const uint32_t*, int64_t, const uint8_t*, const int32_t*, int32_t*);
constexpr MultiplyBytes MULTIPLY_BYTES[ROWS_BYTES] = {multiply_bytes<1>, multiply_bytes<2>, multiply_bytes<3>,
                                                      multiply_bytes<4>, multiply_bytes<5>, multiply_bytes<6>,
                                                      multiply_bytes<7>, multiply_bytes<8>};

// What the planes among the terms add to the rows [start, stop), for the weight rows of the blocks [first, last).
inline void planes_by_bytes(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop,
                            int64_t first, int64_t last) {
    alignas(64) int32_t sums[2 * 2 * ROWS_BYTES * SIDE];
    each_chunk(call, start, stop, [&](int64_t row, int64_t rows) {
        const Split& x = split_rows(call, row, rows, ROWS_BYTES);
        each_block(call, terms, end, first, last, [&](const uint32_t* block, float factor, int64_t b) INLINE {
            for (int64_t r = 0, part = 0; r < rows; r += x.most, part++) {
                MULTIPLY_BYTES[x.most - 1](block, call.words, x.x + part * x.size, x.sums + 2 * r, sums);
                add_block(sums, smaller(x.most, rows - r), x.most, x.units + r, factor,
                          call.y + (row + r) * call.out + b * BLOCK, call.out, call.out - b * BLOCK);
            }
        });
    });
}

#else

inline void forget_split() {}

#endif

}  // namespace
