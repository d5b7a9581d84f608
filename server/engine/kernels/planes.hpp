// Bit planes: one row after the other by permutation, or several at once by table.
#pragma once

#include "native.hpp"

namespace {

// ---------------------------------------------------------------------------------------------- planes, few rows

#if PERMUTE
constexpr int INDEX_BITS = PERMUTE == 16 ? 4 : 3;
constexpr int STEPS = (BLOCK + INDEX_BITS - 1) / INDEX_BITS;  // tables per word; the last may be of fewer bits
constexpr int PARTS = BLOCK / PERMUTE;                       // vectors per block
constexpr int TOGETHER = PARTS < 4 ? PARTS : 4;
constexpr int64_t AHEAD = 1024;  // numbers after those that are read, to be in the cache by then

typedef float Floats __attribute__((vector_size(4 * PERMUTE)));
typedef uint32_t Words __attribute__((vector_size(4 * PERMUTE)));

// table[index mod PERMUTE], lane by lane.
inline Floats lookup(Floats table, Words index) {
#if PERMUTE == 16 && defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif PERMUTE == 8 && defined(__AVX2__)
    return (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#else
    Floats found;
    for (int i = 0; i < PERMUTE; i++) found[i] = table[index[i] % PERMUTE];
    return found;
#endif
}

// table[c] = sum of the values whose bits are set in c.
inline void permute_table(const float* values, float* table) {
#if PERMUTE == 16 && defined(__AVX512F__)
    __m512 sums = _mm512_maskz_mov_ps(0xAAAA, _mm512_set1_ps(values[0]));
    sums = _mm512_mask_add_ps(sums, 0xCCCC, sums, _mm512_set1_ps(values[1]));
    sums = _mm512_mask_add_ps(sums, 0xF0F0, sums, _mm512_set1_ps(values[2]));
    sums = _mm512_mask_add_ps(sums, 0xFF00, sums, _mm512_set1_ps(values[3]));
    _mm512_storeu_ps(table, sums);
#else
    subset_sums<INDEX_BITS>(values, 1.0f, table);
#endif
}

// Tables of one row of x, [columns/32, STEPS, PERMUTE]. x is padded to whole words, and by two more.
void permute_tables(const float* x, int64_t words, float* out) {
    for (int64_t j = 0; j < words; j++, x += BLOCK)
        for (int t = 0; t < STEPS; t++, out += PERMUTE) permute_table(x + t * INDEX_BITS, out);
}

// What the bits of as many weight rows as `sums` has lanes select of one word's tables, added to `sums`. Vectors are
// loaded one by one: copied together, they go through memory in halves, which takes as long as all lookups.
inline void select(const uint32_t* word, const float* table, Floats (&sums)[TOGETHER]) {
    Words bits[TOGETHER];
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++) std::memcpy(&bits[i], word + i * PERMUTE, sizeof bits[i]);
#pragma GCC unroll 11
    for (int t = 0; t < STEPS; t++) {
        Floats entries;
        std::memcpy(&entries, table + t * PERMUTE, sizeof entries);
#pragma GCC unroll 4
        for (int i = 0; i < TOGETHER; i++) sums[i] += lookup(entries, bits[i]), bits[i] >>= INDEX_BITS;
    }
}

// y[0:32] (the first `valid` of them) += factor * (x @ block^T); `block` is [words, 2, 32].
void permute_block(const uint32_t* block, int64_t words, const float* tables, float factor, float* y, int64_t valid) {
    float out[BLOCK];
    for (int part = 0; part < PARTS; part += TOGETHER) {
        Floats plus[TOGETHER] = {}, minus[TOGETHER] = {};
        const float* table = tables;
        for (int64_t j = 0; j < words; j++, table += STEPS * PERMUTE) {
            const uint32_t* word = block + j * 2 * BLOCK + part * PERMUTE;
            __builtin_prefetch(word + AHEAD), __builtin_prefetch(word + AHEAD + BLOCK);
            select(word, table, plus);
            select(word + BLOCK, table, minus);
        }
        for (int i = 0; i < TOGETHER; i++) {
            Floats difference = plus[i] - minus[i];
            std::memcpy(out + (part + i) * PERMUTE, &difference, sizeof difference);
        }
    }
    for (int64_t r = 0; r < valid; r++) y[r] += factor * out[r];
}
#endif

// ------------------------------------------------------------------------------- planes, one row or LANES at once

// sums[(b - first) * 32 + r] += factor * (x @ rows^T) for the blocks [first, last) of one digit, with tables of
// 2^BITS entries. V is float (one batch row) or Row8. x is [words * 32].
template <int BITS, typename V>
void add_by_table(const uint32_t* planes, int64_t stride, int64_t words, int64_t first, int64_t last, const V* x,
                  V factor, V* table, V* sums) {
    constexpr int PER_PASS = 16 / BITS;  // half a word at a time: its tables fit into the first cache
    constexpr uint32_t MASK = (1u << BITS) - 1;
    for (int64_t j = 0; j < words; j++)
        for (int half = 0; half < 2; half++) {
            for (int t = 0; t < PER_PASS; t++)
                subset_sums<BITS>(x + j * BLOCK + half * 16 + t * BITS, factor, table + (t << BITS));
            for (int64_t b = first; b < last; b++) {
                const uint32_t* word = planes + b * stride + j * 2 * BLOCK;
                V* sum = sums + (b - first) * BLOCK;
                for (int r = 0; r < BLOCK; r++) {
                    uint32_t plus = word[r] >> (16 * half), minus = word[BLOCK + r] >> (16 * half);
                    V total = sum[r];
#pragma GCC unroll 4
                    for (int t = 0; t < PER_PASS; t++)
                        total += table[(t << BITS) + (plus >> (t * BITS) & MASK)] -
                                 table[(t << BITS) + (minus >> (t * BITS) & MASK)];
                    sum[r] = total;
                }
            }
        }
}

template <typename V>
void add_planes(const Term& term, int64_t words, int64_t first, int64_t last, const V* x, V* sums) {
    V* table = reinterpret_cast<V*>(tables.floats(2 * 256 * sizeof(V) / sizeof(float)));
    int64_t digit_size = words * 2 * BLOCK, stride = term.count * digit_size;
    float power = 1;
    for (int32_t k = 0; k < term.count; k++, power *= 3) {
        V factor = V{} + term.factor * power;
        const uint32_t* planes = term.words + k * digit_size;
        // Building a table of 256 pays from about a hundred weight rows on.
        if ((last - first) * BLOCK >= 112)
            add_by_table<8>(planes, stride, words, first, last, x, factor, table, sums);
        else
            add_by_table<4>(planes, stride, words, first, last, x, factor, table, sums);
    }
}

}  // namespace
