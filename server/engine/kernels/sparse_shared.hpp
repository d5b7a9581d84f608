// Lists that several batch rows share, with AVX-512: one word holds what an entry takes of two rows.
//
// Rows of x are rounded to 16 bits of their largest numbers, and two of them lie in a word, as they are at even places
// and negated at odd ones: an entry, column and sign, is the place that it takes.
#pragma once

#include "products.hpp"
#include "sparse.hpp"

namespace {

#if VECTOR_LISTS

constexpr int64_t PAIRS_SHARED = LANES / 2;
constexpr int64_t SIDE_UNITS = 16;  // floats before the words, which are aligned so
constexpr float MOST_SHARED = 32767;

thread_local Scratch paired;
thread_local Origin pairs_of;  // what `paired` was made of

// Two rows as words, [2 * in]; the second may be none.
inline void pair_rows(const float* first, const float* second, const float* units, int64_t in, uint32_t* to) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8)), half = _mm512_set1_epi32(0xffff);
    for (int64_t c = 0; c < in; c += 16) {
        const __mmask16 there = first_lanes(in - c);
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
    __m512i totals[2 * P] = {};
    __m512 scaled[2 * P] = {};
    each_mask(term, first, lists, [&](int32_t place, __mmask16 mask) INLINE {
        __m512 level = LEVELS ? levels_at(term, place, mask) : _mm512_setzero_ps();
        each<P>([&](auto p) INLINE {
            __m512i both = taken(term, place, mask, words + p * apart);
            __m512i one = _mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16), other = _mm512_srai_epi32(both, 16);
            if (LEVELS) {
                scaled[2 * p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(one), level, scaled[2 * p]);
                scaled[2 * p + 1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(other), level, scaled[2 * p + 1]);
            } else {
                totals[2 * p] = _mm512_add_epi32(totals[2 * p], one);
                totals[2 * p + 1] = _mm512_add_epi32(totals[2 * p + 1], other);
            }
        });
    });
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
            const __mmask16 there = first_lanes(here - i);
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
    if (Origin own = {from, rows, call.in}; !(pairs_of == own)) {
        for (int64_t r = 0; r < rows; r++) units[r] = largest_of(from + r * call.in, call.in) / MOST_SHARED;
        for (int64_t p = 0; p < pairs; p++) {
            bool whole = 2 * p + 1 < rows;
            pair_rows(from + 2 * p * call.in, whole ? from + (2 * p + 1) * call.in : nullptr, units + 2 * p, call.in,
                      words + p * apart);
        }
        pairs_of = own;
    }
    auto add = pairs == 1   ? add_shared_term<1>
               : pairs == 2 ? add_shared_term<2>
               : pairs == 3 ? add_shared_term<3>
                            : add_shared_term<4>;
    for (const Term* term = terms; term < end; term++)
        if (term->form == ABREAST)
            add(*term, first * BLOCK, smaller(last * BLOCK, call.out), call.out, words, apart, units, rows,
                call.y + start * call.out, call.out);
}

// To be called when what is read may have changed.
inline void forget_pairs() { pairs_of = {}; }

#else

inline void forget_pairs() {}

#endif

}  // namespace
