// Lists that several batch rows share, with AVX-512: one gather fetches what an entry takes of two rows.
//
// Rows of x are rounded to 16 bits of their largest numbers, and two of them lie in a word, as they are at even places
// and negated at odd ones: an entry, column and sign, is the place that it takes.
#pragma once

#include "products.hpp"
#include "sparse.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#define LISTS_SHARED 1
#else
#define LISTS_SHARED 0
#endif

namespace {

#if LISTS_SHARED

constexpr int64_t PAIRS_SHARED = LANES / 2;
constexpr int64_t SIDE_UNITS = 16;  // floats before the words, which are aligned so
constexpr float MOST_SHARED = 32767;

thread_local Scratch paired;
// What `paired` was made of, if that is still there: the products of a step that read the same rows share it.
thread_local const float* paired_from;
thread_local int64_t paired_rows, paired_columns;

// What the largest of a row's numbers makes one of its 16-bit numbers worth; NaN if one of them is not finite.
inline float unit_of(const float* x, int64_t in) {
    __m512 most = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int64_t c = 0; c < in; c += 16) {
        __mmask16 there = in - c >= 16 ? __mmask16(0xffff) : __mmask16((1u << (in - c)) - 1);
        __m512 value = _mm512_maskz_loadu_ps(there, x + c);
        most = _mm512_max_ps(most, _mm512_abs_ps(value));
        odd = _mm512_fmadd_ps(value, _mm512_setzero_ps(), odd);  // zero, or NaN
    }
    return _mm512_reduce_max_ps(most) / MOST_SHARED + _mm512_reduce_add_ps(odd);
}

// Two rows as words, [2 * in]; the second may be none.
inline void pair_rows(const float* first, const float* second, const float* units, int64_t in, uint32_t* to) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8)), half = _mm512_set1_epi32(0xffff);
    for (int64_t c = 0; c < in; c += 16) {
        __mmask16 there = in - c >= 16 ? __mmask16(0xffff) : __mmask16((1u << (in - c)) - 1);
        auto whole = [&](const float* x, float unit) INLINE {
            if (!x || !(unit > 0)) return _mm512_setzero_si512();
            return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, x + c), _mm512_set1_ps(1 / unit)));
        };
        __m512i a = whole(first, units[0]), b = whole(second, units[1]), zero = _mm512_setzero_si512();
        auto joined = [&](__m512i a, __m512i b) INLINE {
            return _mm512_or_si512(_mm512_and_si512(a, half), _mm512_slli_epi32(b, 16));
        };
        __m512i plus = joined(a, b), minus = joined(_mm512_sub_epi32(zero, a), _mm512_sub_epi32(zero, b));
        _mm512_storeu_si512(to + 2 * c, _mm512_permutex2var_epi32(plus, low, minus));
        _mm512_storeu_si512(to + 2 * c + 16, _mm512_permutex2var_epi32(plus, high, minus));
    }
}

// Sums of the lists from `first` on that lie abreast, of `lists` in all, over P pairs of rows, `apart` words from each
// other: [2 * P][16], in the order of the lists.
template <int P, bool LEVELS>
inline void sum_lists(const Term& term, int64_t first, int64_t lists, const uint32_t* words, int64_t apart, float* to) {
    const uint16_t* entries = term.entries;
    const int32_t* starts = term.starts + first;
    int64_t here = smaller(ABREAST_LISTS, lists - first);
    const __mmask16 all = __mmask16((1u << here) - 1);
    __m512i counts = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(all, starts + 1), _mm512_maskz_loadu_epi32(all, starts));
    __m512i totals[2 * P] = {};
    __m512 scaled[2 * P] = {};
    int32_t place = starts[0], most = starts[1] - starts[0];
    int32_t least = here == ABREAST_LISTS ? starts[ABREAST_LISTS] - starts[ABREAST_LISTS - 1] : 0;
    for (int32_t k = place; k < starts[here]; k += 32) __builtin_prefetch(entries + k + FETCHED, 0, 2);
    auto add = [&](__mmask16 mask) INLINE {
        __m512i chosen = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, entries + place));
        __m512 level = _mm512_setzero_ps();
        if (LEVELS) level = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, term.levels + place)));
        each<P>([&](auto p) INLINE {
            __m512i both = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, chosen, words + p * apart, 4);
            __m512i one = _mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16), other = _mm512_srai_epi32(both, 16);
            if (LEVELS) {
                scaled[2 * p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(one), level, scaled[2 * p]);
                scaled[2 * p + 1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(other), level, scaled[2 * p + 1]);
            } else {
                totals[2 * p] = _mm512_add_epi32(totals[2 * p], one);
                totals[2 * p + 1] = _mm512_add_epi32(totals[2 * p + 1], other);
            }
        });
    };
    for (int32_t k = 0; k < least; k++, place += ABREAST_LISTS) add(0xffff);
    for (int32_t k = least; k < most; k++) {
        __mmask16 left = _mm512_cmpgt_epi32_mask(counts, _mm512_set1_epi32(k));
        add(left);
        place += __builtin_popcount(left);
    }
    each<2 * P>([&](auto r) INLINE {
        _mm512_storeu_ps(to + r * ABREAST_LISTS, LEVELS ? scaled[r] : _mm512_cvtepi32_ps(totals[r]));
    });
}

// y[0:rows][order] += factor * units[row] * sums, for the block of lists from `first` on.
template <int P, bool LEVELS>
void add_shared_block(const Term& term, int64_t first, int64_t lists, const uint32_t* words, int64_t apart,
                      const float* units, int64_t rows, float* y, int64_t stride) {
    alignas(64) float sums[BLOCK / ABREAST_LISTS][2 * P][ABREAST_LISTS];
    alignas(64) int32_t lists_of[BLOCK];
    int64_t here = smaller(BLOCK, lists - first);
    for (int64_t i = 0; i < here; i += ABREAST_LISTS)
        sum_lists<P, LEVELS>(term, first + i, lists, words, apart, sums[i / ABREAST_LISTS][0]);
    for (int64_t i = 0; i < here; i++) lists_of[term.order[first + i] - first] = int32_t(i);
    static_assert(BLOCK == 2 * ABREAST_LISTS, "two vectors hold a block");
    for (int64_t r = 0; r < rows; r++) {
        __m512 low = _mm512_load_ps(sums[0][r]), high = _mm512_load_ps(sums[1][r]);
        const __m512 worth = _mm512_set1_ps(term.factor * units[r]);
        for (int64_t i = 0; i < here; i += ABREAST_LISTS) {
            int64_t left = here - i;
            __mmask16 there = left >= ABREAST_LISTS ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
            __m512 sum = _mm512_permutex2var_ps(low, _mm512_load_si512(lists_of + i), high);
            float* to = y + r * stride + first + i;
            _mm512_mask_storeu_ps(to, there, _mm512_fmadd_ps(sum, worth, _mm512_maskz_loadu_ps(there, to)));
        }
    }
}

template <int P>
void add_shared_term(const Term& term, int64_t first, int64_t last, int64_t lists, const uint32_t* words, int64_t apart,
                     const float* units, int64_t rows, float* y, int64_t stride) {
    for (int64_t i = first; i < last; i += BLOCK)
        (term.levels ? add_shared_block<P, true> : add_shared_block<P, false>)(term, i, lists, words, apart, units, rows, y,
                                                                                stride);
}

// What the lists among the terms, all of them abreast, add to the rows [start, stop), LANES at most, for the weight rows of
// the blocks [first, last).
inline void add_lists_shared(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop,
                             int64_t first, int64_t last) {
    int64_t rows = stop - start, pairs = (rows + 1) / 2, apart = 2 * ((call.in + 15) / 16 * 16);
    float* units = paired.floats(SIDE_UNITS + PAIRS_SHARED * apart);
    uint32_t* words = reinterpret_cast<uint32_t*>(units + SIDE_UNITS);
    const float* from = call.x + start * call.in;
    if (paired_from != from || paired_rows != rows || paired_columns != call.in) {
        for (int64_t r = 0; r < rows; r++) units[r] = unit_of(from + r * call.in, call.in);
        for (int64_t p = 0; p < pairs; p++) {
            bool whole = 2 * p + 1 < rows;
            pair_rows(from + 2 * p * call.in, whole ? from + (2 * p + 1) * call.in : nullptr, units + 2 * p, call.in,
                      words + p * apart);
        }
        paired_from = from, paired_rows = rows, paired_columns = call.in;
    }
    auto add = pairs == 1   ? add_shared_term<1>
               : pairs == 2 ? add_shared_term<2>
               : pairs == 3 ? add_shared_term<3>
                            : add_shared_term<4>;
    for (const Term* term = terms; term < end; term++)
        if (term->form != PLANES)
            add(*term, first * BLOCK, smaller(last * BLOCK, call.out), call.out, words, apart, units, rows,
                call.y + start * call.out, call.out);
}

// To be called when what is read may have changed.
inline void forget_pairs() { paired_from = nullptr; }

#else

inline void forget_pairs() {}

#endif

}  // namespace
