// Sparse rows: lists of entries that name a column and a sign.
//
// The lists of sixteen rows lie abreast, the longest first: all their first entries, then the second ones of those that
// have any, and so on, so that sixteen rows are summed side by side.
#pragma once

#include "native.hpp"

namespace {

constexpr int64_t ABREAST_LISTS = 16;
constexpr int64_t FETCHED = 4096;  // entries after those that are read, to be in the second cache by then

static_assert(BLOCK % ABREAST_LISTS == 0, "whoever has a block has whole groups");

// Calls take(place) for the entries of list i, of `lists` in all.
template <typename F> inline void each_entry(const int32_t* starts, int64_t i, int64_t lists, bool abreast, F take) {
    int32_t count = starts[i + 1] - starts[i];
    if (!abreast) {
        for (int32_t k = 0; k < count; k++) take(starts[i] + k);
        return;
    }
    int64_t first = i / ABREAST_LISTS * ABREAST_LISTS, left = smaller(ABREAST_LISTS, lists - first);
    int32_t place = starts[first] + int32_t(i - first);
    for (int32_t k = 0; k < count; k++) {
        while (starts[first + left] - starts[first + left - 1] <= k) left--;  // to those that have an entry k
        take(place);
        place += int32_t(left);
    }
}

// What there is of lists in bytes; see `ByteLists` in types.py.
constexpr int64_t PIECE = 127, VECTOR = 64, TOGETHER_BYTES = VECTOR / ABREAST_LISTS;
inline int64_t piece_width(int64_t columns) {
    int64_t pieces = (columns + PIECE - 1) / PIECE;
    return (columns + pieces - 1) / pieces;
}
struct ByteLists {
    const uint8_t *places, *pieces, *entries, *levels;
    const int32_t* starts;

    explicit ByteLists(const Term& term)
        : places(reinterpret_cast<const uint8_t*>(term.order)), pieces(reinterpret_cast<const uint8_t*>(term.words)),
          entries(reinterpret_cast<const uint8_t*>(term.entries)), levels(term.levels), starts(term.starts) {}
};

// The list of a row, of a term that is lists.
inline int64_t list_of(const Term& term, int64_t row) {
    int64_t first = row / BLOCK * BLOCK;
    if (term.form == IN_BYTES) return first + ByteLists(term).places[row];
    while (term.order[first] != row) first++;
    return first;
}

// The lists of the rows of a block, of which there are so many in all.
inline void lists_of_block(const Term& term, int64_t block, int64_t rows, int64_t (&lists)[BLOCK]) {
    for (int64_t i = block; i < smaller(block + BLOCK, rows); i++)
        if (term.form == IN_BYTES)
            lists[i - block] = block + ByteLists(term).places[i];
        else
            lists[term.order[i] - block] = i;
}

// Calls take(row, its list) for the rows [first, last), which begin a block, of so many in all.
template <typename F> inline void each_row(const Term& term, int64_t first, int64_t last, int64_t rows, F take) {
    int64_t own[BLOCK];
    for (int64_t block = first; block < last; block += BLOCK) {
        lists_of_block(term, block, rows, own);
        for (int64_t row = block; row < smaller(block + BLOCK, last); row++) take(row, own[row - block]);
    }
}

// Calls take(2 * column + sign, where its level is) for the entries of list i of `lists` in all, of any form.
template <typename F>
inline void each_nonzero(const Term& term, int64_t i, int64_t lists, int64_t columns, F take) {
    if (term.form != IN_BYTES) {
        each_entry(term.starts, i, lists, term.form == ABREAST, [&](int64_t place) { take(term.entries[place], place); });
        return;
    }
    const ByteLists own(term);
    const int64_t width = piece_width(columns), group = i / ABREAST_LISTS;
    for (int64_t v = own.starts[group]; v < own.starts[group + 1]; v++) {
        int64_t place = v * VECTOR + i % ABREAST_LISTS * TOGETHER_BYTES;
        for (int64_t k = place; k < place + TOGETHER_BYTES && (own.entries[k] & PIECE) != PIECE; k++)
            take(uint32_t(2 * (own.pieces[v] * width + (own.entries[k] & PIECE)) + (own.entries[k] >> 7)), k);
    }
}

// Calls take(k-th entries of the first `left` lists, left) for every k, of lists that lie abreast from `first` on.
template <typename F> inline void each_rank(const Term& term, int64_t first, int64_t lists, F take) {
    const int32_t* starts = term.starts + first;
    int64_t left = smaller(ABREAST_LISTS, lists - first);
    int32_t place = starts[0], most = starts[1] - starts[0];
    for (int32_t k = 0; k < most; k++) {
        while (starts[left] - starts[left - 1] <= k) left--;
        take(place, left);
        place += int32_t(left);
    }
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#define VECTOR_LISTS 1

// Zen's gathers take longer than as many loads: alone on Zen 4, 0.48 against 0.28 ns per entry at density 0.08.
#ifndef GATHERS
#if defined(__znver3__) || defined(__znver4__) || defined(__znver5__)  // compilers older than it take Zen 4 for Zen 3
#define GATHERS 0
#else
#define GATHERS 1
#endif
#endif

// The same with a mask of those lists, for all of whose entries it asks ahead.
template <typename F> INLINE inline void each_mask(const Term& term, int64_t first, int64_t lists, F take) {
    const int32_t* starts = term.starts + first;
    int64_t here = smaller(ABREAST_LISTS, lists - first);
    const __mmask16 all = __mmask16((1u << here) - 1);
    __m512i counts = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(all, starts + 1), _mm512_maskz_loadu_epi32(all, starts));
    int32_t place = starts[0], most = starts[1] - starts[0];
    int32_t least = here == ABREAST_LISTS ? starts[ABREAST_LISTS] - starts[ABREAST_LISTS - 1] : 0;
    for (int32_t k = place; k < starts[here]; k += 32) __builtin_prefetch(term.entries + k + FETCHED, 0, 2);
    for (int32_t k = 0; k < least; k++, place += ABREAST_LISTS) take(place, __mmask16(0xffff));
    for (int32_t k = least; k < most; k++) {
        __mmask16 left = _mm512_cmpgt_epi32_mask(counts, _mm512_set1_epi32(k));
        take(place, left);
        place += __builtin_popcount(left);
    }
}

// The entries from a place on, and their magnitudes.
INLINE inline __m512i entries_at(const Term& term, int32_t place, __mmask16 mask) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, term.entries + place));
}
// from[entry] for the entries at a place; zeros beyond the mask.
INLINE inline __m512i taken(const Term& term, int32_t place, __mmask16 mask, const void* from) {
#if GATHERS
    return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, entries_at(term, place, mask), from, 4);
#else
    const float* words = static_cast<const float*>(from);  // bits: they are only moved
    const uint16_t* entries = term.entries + place;
    alignas(32) uint16_t last[ABREAST_LISTS];
    if (place + ABREAST_LISTS > term.count) {  // what lies beyond the mask are others' entries, or none
        _mm256_store_si256((__m256i*)last, _mm256_maskz_loadu_epi16(mask, entries));
        entries = last;
    }
    auto four = [&](int i) INLINE {
        auto word = [&](int k) INLINE { return _mm_load_ss(words + entries[i + k]); };
        return _mm_insert_ps(_mm_insert_ps(_mm_insert_ps(word(0), word(1), 0x10), word(2), 0x20), word(3), 0x30);
    };
    __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(four(0)), four(4), 1);
    __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(four(8)), four(12), 1);
    return _mm512_maskz_mov_epi32(mask, _mm512_castps_si512(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)));
#endif
}

#if !GATHERS
thread_local Scratch with_signs;

// Each number of x, then its negative: an entry is the place of what it takes.
inline const float* signed_twice(const float* x, int64_t in) {
    float* out = with_signs.floats(2 * in);
    for (int64_t c = 0; c < in; c++) out[2 * c] = x[c], out[2 * c + 1] = -x[c];
    return out;
}
#endif

INLINE inline __m512 levels_at(const Term& term, int32_t place, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, term.levels + place)));
}
#else
#define VECTOR_LISTS 0
#endif

inline float signed_value(const float* x, uint32_t entry) { return entry & 1 ? -x[entry >> 1] : x[entry >> 1]; }

// y[order] += factor * what the entries select of x, for the lists from `first` on that lie abreast, of `lists` in all.
// Where nothing is gathered, vectors read x `signed_twice`.
template <bool LEVELS>
inline void add_lists(const Term& term, int64_t first, int64_t lists, const float* x, float* y) {
    int64_t here = smaller(ABREAST_LISTS, lists - first);
#if VECTOR_LISTS
    __m512 total = _mm512_setzero_ps();
    each_mask(term, first, lists, [&](int32_t place, __mmask16 mask) INLINE {
#if GATHERS
        __m512i chosen = entries_at(term, place, mask);
        __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, _mm512_srli_epi32(chosen, 1), x, 4);
        values = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(values), _mm512_slli_epi32(chosen, 31)));
#else
        __m512 values = _mm512_castsi512_ps(taken(term, place, mask, x));
#endif
        if (LEVELS) values = _mm512_mul_ps(values, levels_at(term, place, mask));
        total = _mm512_add_ps(total, values);
    });
#if GATHERS
    const __mmask16 all = __mmask16((1u << here) - 1);
    __m512i order = _mm512_maskz_loadu_epi32(all, term.order + first);
    __m512 before = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), all, order, y, 4);
    _mm512_mask_i32scatter_ps(y, all, order, _mm512_fmadd_ps(total, _mm512_set1_ps(term.factor), before), 4);
#else
    alignas(64) float sums[ABREAST_LISTS];
    _mm512_store_ps(sums, total);
    for (int64_t l = 0; l < here; l++) y[term.order[first + l]] += term.factor * sums[l];
#endif
#else
    float sums[ABREAST_LISTS] = {};
    each_rank(term, first, lists, [&](int32_t place, int64_t left) {
        for (int64_t l = 0; l < left; l++) {
            float value = signed_value(x, term.entries[place + l]);
            sums[l] += LEVELS ? value * term.levels[place + l] : value;
        }
    });
    for (int64_t l = 0; l < here; l++) y[term.order[first + l]] += term.factor * sums[l];
#endif
}

// y[order] += factor * (x @ rows^T) for the rows of the blocks [first, last), of `lists` in all; x is [in].
template <bool LEVELS>
void add_sparse_row(const Term& term, int64_t first, int64_t last, int64_t lists, const float* x,
                    int64_t in, float* y) {
    if (term.form == ABREAST) {
#if VECTOR_LISTS && !GATHERS
        x = signed_twice(x, in);
#endif
        for (int64_t i = first; i < last; i += ABREAST_LISTS) add_lists<LEVELS>(term, i, lists, x, y);
        return;
    }
    each_row(term, first, last, lists, [&](int64_t row, int64_t list) {
        float sum = 0;
        each_nonzero(term, list, lists, in, [&](uint32_t entry, int64_t place) {
            float value = signed_value(x, entry);
            sum += LEVELS ? value * term.levels[place] : value;
        });
        y[row] += term.factor * sum;
    });
}

// The same for LANES rows at once; sums start at the row `first`.
template <bool LEVELS>
void add_sparse_lanes(const Term& term, int64_t first, int64_t last, int64_t lists, const Row8* x, int64_t in,
                      Row8* sums) {
    constexpr float SIGNS[] = {1.0f, -1.0f};
    auto value_of = [&](uint32_t entry, int64_t place) {
        float sign = SIGNS[entry & 1];
        return x[entry >> 1] * (LEVELS ? sign * term.levels[place] : sign);
    };
    auto value = [&](int64_t place) { return value_of(term.entries[place], place); };
    if (term.form != ABREAST) {
        each_row(term, first, last, lists, [&](int64_t row, int64_t list) {
            Row8 sum = {};
            each_nonzero(term, list, lists, in,
                         [&](uint32_t entry, int64_t place) { sum += value_of(entry, place); });
            sums[row - first] += sum * term.factor;
        });
        return;
    }
    for (int64_t i = first; i < last; i += ABREAST_LISTS) {
        Row8 own[ABREAST_LISTS] = {};
        each_rank(term, i, lists, [&](int32_t place, int64_t left) {
            for (int64_t l = 0; l < left; l++) own[l] += value(place + l);
        });
        for (int64_t l = 0; l < smaller(ABREAST_LISTS, last - i); l++)
            sums[term.order[i + l] - first] += own[l] * term.factor;
    }
}

}  // namespace
