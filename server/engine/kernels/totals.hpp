// Merged weights of any terms, one row at a time: out = pristine + (the sum of factor * delta over the terms), the sum in
// float32, in the terms' order, each product rounded before it is added, and the result rounded once.
//
// The sums of a row stay in the first cache; weights are read once and written once, however many terms there are. What
// is one ternary term takes no sums: see merging.hpp.
#pragma once

#include "merging.hpp"

#include <algorithm>

namespace {

thread_local Scratch totals;

// A product as it is rounded, which a compiler must not fuse with what is added to it.
inline float unfused(float x) {
    asm volatile("" : "+m"(x));
    return x;
}

// total[c] += factor or -= factor, of 32 columns.
inline void add_signs(float* total, uint32_t plus, uint32_t minus, float factor) {
#if MASKS
    const __m512 step = _mm512_set1_ps(factor);
    for (int half = 0; half < 32; half += 16, total += 16) {
        __m512 sum = _mm512_loadu_ps(total);
        sum = _mm512_mask_add_ps(sum, __mmask16(plus >> half), sum, step);
        _mm512_storeu_ps(total, _mm512_mask_sub_ps(sum, __mmask16(minus >> half), sum, step));
    }
#else
    for (int c = 0; c < BLOCK; c++)  // exact products: a fused addition rounds alike
        total[c] += float(int32_t((plus >> c) & 1) - int32_t((minus >> c) & 1)) * factor;
#endif
}

// total[c] += factor * level of 32 columns, whose words of all digits begin at `word`, `apart` from each other.
inline void add_levels(float* total, const uint32_t* word, int64_t apart, int32_t digits, float factor) {
#if MASKS
    __m256i levels = _mm256_setzero_si256();
    int32_t power = 1;
    for (int32_t k = 0; k < digits; k++, power *= 3) {
        __m256i worth = _mm256_set1_epi8(char(power));  // a level fits 8 bits: what exceeds them on the way cancels out
        levels = _mm256_mask_add_epi8(levels, word[k * apart], levels, worth);
        levels = _mm256_mask_sub_epi8(levels, word[k * apart + BLOCK], levels, worth);
    }
    const int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;  // an instruction that is not fused
    for (int half = 0; half < 2; half++, total += 16) {
        __m128i part = half ? _mm256_extracti128_si256(levels, 1) : _mm256_castsi256_si128(levels);
        __m512 product = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part));
        product = _mm512_mul_round_ps(product, _mm512_set1_ps(factor), rounding);
        _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), product));
    }
#else
    int32_t levels[BLOCK] = {};
    int32_t power = 1;
    for (int32_t k = 0; k < digits; k++, power *= 3) {
        uint32_t plus = word[k * apart], minus = word[k * apart + BLOCK];
        for (int c = 0; c < BLOCK; c++) levels[c] += power * (int32_t((plus >> c) & 1) - int32_t((minus >> c) & 1));
    }
    float products[BLOCK];
    for (int c = 0; c < BLOCK; c++) products[c] = float(levels[c]) * factor;
    asm volatile("" : : "r"(products) : "memory");
    for (int c = 0; c < BLOCK; c++) total[c] += products[c];
#endif
}

// total += one list.
inline void add_list(float* total, int64_t list, int64_t rows, int64_t columns, const Term& term) {
    if (term.levels != nullptr) {
        each_nonzero(term, list, rows, columns, [&](uint32_t entry, int64_t place) {
            float value = unfused(float(term.levels[place]) * term.factor);
            total[entry >> 1] += entry & 1 ? -value : value;
        });
        return;
    }
    Bits bits[MOST_COLUMNS / BLOCK];
    list_bits(bits, term, list, rows, columns);
    for (int64_t j = 0; j < blocks_of(columns); j++) add_signs(total + j * BLOCK, bits[j][0], bits[j][1], term.factor);
}

// Adds one row of a term to its sums.
template <typename T>
void add_row(float* total, const T* pristine, int64_t row, int64_t rows, int64_t columns, const Term& term) {
    switch (term.form) {
        case PLANES: {
            int64_t words = blocks_of(columns), apart = words * 2 * BLOCK;
            const uint32_t* word = term.words + row / BLOCK * apart * term.count + row % BLOCK;
            for (int64_t j = 0; j < words; j++, word += 2 * BLOCK, total += BLOCK)
                if (term.count == 1)
                    add_signs(total, word[0], word[BLOCK], term.factor);
                else
                    add_levels(total, word, apart, term.count, term.factor);
            return;
        }
        case SPARSE:
        case ABREAST:
        case IN_BYTES:
            add_list(total, list_of(term, row), rows, columns, term);
            return;
        case DENSE: {
            const float* values = reinterpret_cast<const float*>(term.words) + row * columns;
            for (int64_t c = 0; c < columns; c++) total[c] += unfused(values[c] * term.factor);
            return;
        }
        case OVERWRITES: {
            const int32_t* places = reinterpret_cast<const int32_t*>(term.words);
            const Brain* values = reinterpret_cast<const Brain*>(term.entries);
            int64_t first = row * columns;
            const int32_t* place = std::lower_bound(places, places + term.count, first);
            for (; place < places + term.count && *place < first + columns; place++) {
                float moved = widened(values[place - places]) - widened(pristine[*place - first]);
                total[*place - first] += unfused(moved * term.factor);
            }
        }
    }
}

template <typename T> void round_row(T* out, const T* pristine, const float* total, int64_t columns) {
    int64_t c = 0;
#if MASKS
    for (; c + 16 <= columns; c += 16)
        store_floats(out + c, _mm512_add_ps(load_floats(pristine + c), _mm512_loadu_ps(total + c)));
#endif
    for (; c < columns; c++) narrow(widened(pristine[c]) + total[c], out + c);
}

// Rows [first, last) to `out`, which begins with the first of them, as `pristine` does with row 0.
template <typename T>
void merge_terms(T* out, const T* pristine, int64_t first, int64_t last, int64_t rows, int64_t columns,
                 const Term* terms, int64_t count) {
    int64_t padded = blocks_of(columns) * BLOCK;
    float* total = totals.floats(padded);
    for (int64_t r = first; r < last; r++, out += columns) {
        const T* from = pristine + r * columns;
        std::memset(total, 0, padded * sizeof(float));
        for (int64_t t = 0; t < count; t++) add_row(total, from, r, rows, columns, terms[t]);
        round_row(out, from, total, columns);
    }
}

// The same of one term that sets and adds nothing: the bits of a fine-tune come out.
template <typename T>
void overwrite(T* out, const T* pristine, int64_t first, int64_t last, int64_t columns, const Term& term) {
    const int32_t* places = reinterpret_cast<const int32_t*>(term.words);
    const Brain* values = reinterpret_cast<const Brain*>(term.entries);
    std::memcpy(out, pristine + first * columns, (last - first) * columns * sizeof(T));
    const int32_t* place = std::lower_bound(places, places + term.count, first * columns);
    for (; place < places + term.count && *place < last * columns; place++)
        narrow(widened(values[place - places]), out + (*place - first * columns));
}

}  // namespace
