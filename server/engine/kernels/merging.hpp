// Merged weights, a block of 32 rows at a time: out = pristine + factor * delta, each element rounded once, in one pass.
//
// A word of a plane is the mask of the vector instruction that adds or subtracts. The layouts are those of
// server/engine/kernels/types.py.
#pragma once

#include "native.hpp"
#include "products.hpp"
#include "sparse.hpp"
#include "vectors.hpp"

#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#define MASKS 1
#else
#define MASKS 0
#endif

namespace {

constexpr int64_t MOST_COLUMNS = 1 << 15;  // of a list of nonzeros: its entries are 16 bits, sign included

inline void narrow(float x, float* out) { *out = x; }
// To the nearest, ties to even; NaN becomes the one that PyTorch makes of it.
inline void narrow(float x, Brain* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    out->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#if MASKS
inline __m512 load_floats(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load_floats(const Brain* x) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_floats(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
inline void store_floats(Brain* out, __m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
}
#endif

#if PAIRS && MASKS
// 32 columns whose results are only multiplied with: those next to zero, which bfloat16 cannot hold, become zero.
inline void move_word(Brain* out, const Brain* pristine, uint32_t plus, uint32_t minus, float factor) {
    const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000));
    __m512i signs = _mm512_maskz_mov_epi16(__mmask32(plus), _mm512_set1_epi16(0x3f80));  // 1 and -1
    signs = _mm512_mask_mov_epi16(signs, __mmask32(minus), _mm512_set1_epi16(int16_t(0xbf80)));
    __m512i x = _mm512_loadu_si512(pristine);
    __m512 step = _mm512_set1_ps(factor);
    __m512 even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(signs, 16)), step,
                                  _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)));
    __m512 odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(signs, high)), step,
                                 _mm512_castsi512_ps(_mm512_and_si512(x, high)));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
}
#endif

// 32 columns of one row, or the `valid` first of them. What is not EXACT is only multiplied with.
template <bool EXACT, typename T>
inline void merge_word(T* out, const T* pristine, uint32_t plus, uint32_t minus, float factor, int64_t valid) {
#if PAIRS && MASKS
    if constexpr (!EXACT && std::is_same_v<T, Brain>)
        if (valid >= BLOCK) return move_word(out, pristine, plus, minus, factor);
#endif
#if MASKS
    if (valid >= BLOCK) {
        __m512 step = _mm512_set1_ps(factor);
        for (int half = 0; half < 2; half++) {
            __m512 x = load_floats(pristine + 16 * half);
            x = _mm512_mask_add_ps(x, __mmask16(plus >> (16 * half)), x, step);
            x = _mm512_mask_sub_ps(x, __mmask16(minus >> (16 * half)), x, step);
            store_floats(out + 16 * half, x);
        }
        return;
    }
#endif
    int count = valid < BLOCK ? int(valid) : int(BLOCK);
    for (int c = 0; c < count; c++) {
        float level = float(int32_t((plus >> c) & 1) - int32_t((minus >> c) & 1));
        narrow(widened(pristine[c]) + level * factor, out + c);  // exact products: a fused addition rounds alike
    }
}

// Some rows, [first, last), to `out`, which begins with the first of them.
template <bool EXACT, typename T>
void merge_planes(T* out, const T* pristine, int64_t first, int64_t last, int64_t columns, const uint32_t* planes,
                  float factor) {
    int64_t words = (columns + BLOCK - 1) / BLOCK;
    for (int64_t r = first; r < last; r++, out += columns) {
        const uint32_t* word = planes + r / BLOCK * words * 2 * BLOCK + r % BLOCK;
        const T* from = pristine + r * columns;
        for (int64_t j = 0; j < words; j++, word += 2 * BLOCK) {
            // Who calls multiplies with these before it comes back for the next: memory is to be read meanwhile.
            if (!EXACT) __builtin_prefetch(from + ROWS_AHEAD * columns + j * BLOCK, 0, 2);
            merge_word<EXACT>(out + j * BLOCK, from + j * BLOCK, word[0], word[BLOCK], factor, columns - j * BLOCK);
        }
    }
}

// The signs of 32 columns: those of +1, those of -1.
typedef uint32_t Bits[2];

// A list of signs, as masks: setting a bit takes a fraction of the time that changing a number does.
inline void list_bits(Bits* bits, const Term& term, int64_t list, int64_t lists, int64_t columns) {
    std::memset(bits, 0, blocks_of(columns) * sizeof *bits);
    each_nonzero(term, list, lists, columns, [&](uint32_t entry, int64_t) {
        bits[entry >> 6][entry & 1] |= 1u << ((entry >> 1) & 31);
    });
}

// One row of signs.
template <bool EXACT, typename T>
inline void merge_list(T* out, const T* pristine, int64_t columns, const Term& term, int64_t i, int64_t lists) {
    Bits bits[MOST_COLUMNS / BLOCK];
    list_bits(bits, term, i, lists, columns);
    for (int64_t j = 0; j < blocks_of(columns); j++)
        merge_word<EXACT>(out + j * BLOCK, pristine + j * BLOCK, bits[j][0], bits[j][1], term.factor,
                          columns - j * BLOCK);
}

// One row of several magnitudes, worth `values` each.
template <typename T>
inline void merge_levels(T* out, const T* pristine, int64_t columns, const Term& term, int64_t i, int64_t lists,
                         const float* values) {
    std::memcpy(out, pristine, columns * sizeof(T));
    each_nonzero(term, i, lists, columns, [&](uint32_t entry, int64_t place) {
        float value = values[term.levels[place]];
        int64_t column = entry >> 1;
        narrow(widened(pristine[column]) + (entry & 1 ? -value : value), out + column);
    });
}

// The same for the lists of a delta, one per row of so many; all rows lie in one block of 32.
template <bool EXACT, typename T>
void merge_sparse(T* out, const T* pristine, int64_t first, int64_t last, int64_t rows, int64_t columns,
                  const Term& term) {
    // Rounded here, so that no product is fused with its addition.
    float values[256];
    for (int level = 0; term.levels != nullptr && level < 256; level++) values[level] = float(level) * term.factor;
    // Lists are sorted by length within a block. Weights are walked through as they lie: memory is read ahead.
    int64_t block = first / BLOCK * BLOCK, own[BLOCK];
    lists_of_block(term, block, rows, own);
    for (int64_t r = first; r < last; r++, out += columns) {
        const T* from = pristine + r * columns;
        if (!EXACT)
            for (int64_t j = 0; j < columns; j += BLOCK) __builtin_prefetch(from + ROWS_AHEAD * columns + j, 0, 2);
        if (term.levels == nullptr)
            merge_list<EXACT>(out, from, columns, term, own[r - block], rows);
        else
            merge_levels(out, from, columns, term, own[r - block], rows, values);
    }
}

}  // namespace
