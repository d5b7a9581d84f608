// Lists laid out, a block of 32 rows at a time, so that merging reads columns as they lie: signs as the words of planes,
// several magnitudes as levels.
#pragma once

#include "sparse.hpp"

namespace {

// Words of one block of planes of one digit: [words][+1, -1][32 rows], see `BitPlanes` in types.py.
inline int64_t block_size(int64_t columns) { return blocks_of(columns) * 2 * BLOCK; }

// Sets the bits of the lists of a block, whose first row is that, of so many in all. Any lists without levels.
inline void set_words(uint32_t* words, const Term& term, int64_t first, int64_t rows, int64_t columns) {
    each_row(term, first, smaller(first + BLOCK, rows), rows, [&](int64_t row, int64_t list) {
        uint32_t* own = words + (row - first);
        each_nonzero(term, list, rows, columns, [&](uint32_t entry, int64_t) {
            own[((entry >> 6) * 2 + (entry & 1)) * BLOCK] |= 1u << ((entry >> 1) & 31);
        });
    });
}

#if VECTOR_LISTS

constexpr int64_t PIECE_WORDS = (PIECE + 31) / 32;

// What sixteen lists have in a piece: a bit per column, those of +1, then those of -1.
struct PieceBits {
    __m512i bits[2 * PIECE_WORDS] = {};

    // An entry's highest bits name the word that its lowest five are a bit of.
    INLINE void add(__m512i entries) {
        for (int k = 0; k < TOGETHER_BYTES; k++, entries = _mm512_srli_epi32(entries, 8)) {
            __m512i bit = _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_and_si512(entries, _mm512_set1_epi32(31)));
            __m512i word = _mm512_and_si512(_mm512_srli_epi32(entries, 5), _mm512_set1_epi32(2 * PIECE_WORDS - 1));
#pragma GCC unroll 8
            for (int i = 0; i < 2 * PIECE_WORDS; i++) {
                __mmask16 own = _mm512_cmpeq_epi32_mask(word, _mm512_set1_epi32(i));
                bits[i] = _mm512_mask_or_epi32(bits[i], own, bits[i], bit);
            }
        }
    }

    // ORs them into the words of their lists, which begin at `words`, from a column on.
    void place(uint32_t* words, int64_t column, int64_t count) {
        const __m128i up = _mm_cvtsi32_si128(int(column % BLOCK)), down = _mm_cvtsi32_si128(int(BLOCK - column % BLOCK));
        for (int sign = 0; sign < 2; sign++) {
            __m512i* own = bits + sign * PIECE_WORDS;
            const __m512i none = _mm512_set1_epi32(INT32_MAX);  // the last bit is of what is no entry
            own[PIECE_WORDS - 1] = _mm512_and_si512(own[PIECE_WORDS - 1], none);
            __m512i before = _mm512_setzero_si512();
            for (int64_t i = 0, word = column / BLOCK; i <= PIECE_WORDS && word < count; i++, word++) {
                __m512i here = i < PIECE_WORDS ? own[i] : _mm512_setzero_si512();
                uint32_t* to = words + (2 * word + sign) * BLOCK;
                __m512i moved = _mm512_or_si512(_mm512_sll_epi32(here, up), _mm512_srl_epi32(before, down));
                _mm512_storeu_si512(to, _mm512_or_si512(_mm512_loadu_si512(to), moved));
                before = here;
            }
        }
    }
};

// The same of lists in bytes: 64 entries at a time, and no list after another.
inline void set_words_of_bytes(uint32_t* words, const Term& term, int64_t first, int64_t columns) {
    const ByteLists lists(term);
    const int64_t width = piece_width(columns), count = blocks_of(columns);
    for (int64_t group = first / ABREAST_LISTS, i = 0; i < BLOCK / ABREAST_LISTS; i++, group++)
        for (int64_t v = lists.starts[group], end = lists.starts[group + 1]; v < end;) {
            const uint8_t piece = lists.pieces[v];
            PieceBits found;
            for (; v < end && lists.pieces[v] == piece; v++)
                found.add(_mm512_loadu_si512(lists.entries + v * VECTOR));
            found.place(words + i * ABREAST_LISTS, piece * width, count);
        }
    __m512i places[2];
    for (int half = 0; half < 2; half++) {
        auto* from = reinterpret_cast<const __m128i*>(lists.places + first + 16 * half);
        places[half] = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
    }
    for (uint32_t* word = words; word < words + block_size(columns); word += BLOCK) {  // rows, no longer lists
        __m512i low = _mm512_loadu_si512(word), high = _mm512_loadu_si512(word + 16);
        for (int half = 0; half < 2; half++)
            _mm512_storeu_si512(word + 16 * half, _mm512_permutex2var_epi32(low, places[half], high));
    }
}

#endif

// The words of a block of lists without levels.
inline void list_words(uint32_t* words, const Term& term, int64_t first, int64_t rows, int64_t columns) {
    std::memset(words, 0, block_size(columns) * sizeof *words);
#if VECTOR_LISTS
    if (term.form == IN_BYTES) return set_words_of_bytes(words, term, first, columns);
#endif
    set_words(words, term, first, rows, columns);
}

// Numbers from one row of levels to the next.
inline int64_t level_row(int64_t columns) { return blocks_of(columns) * BLOCK; }

// The levels of the lists of a block, signed, 127 at most: [32 rows][level_row].
inline void list_levels(int8_t* levels, const Term& term, int64_t first, int64_t rows, int64_t columns) {
    const int64_t apart = level_row(columns), last = smaller(first + BLOCK, rows);
    std::memset(levels, 0, BLOCK * apart * sizeof *levels);
    if (term.form != IN_BYTES) {
        each_row(term, first, last, rows, [&](int64_t row, int64_t list) {
            each_nonzero(term, list, rows, columns, [&](uint32_t entry, int64_t place) {
                int8_t level = int8_t(term.levels[place]);
                levels[(row - first) * apart + (entry >> 1)] = entry & 1 ? -level : level;
            });
        });
        return;
    }
    // All entries of a vector, even those that are none: no branch could be foretold.
    const ByteLists lists(term);
    int8_t none, *own[BLOCK];
    for (int64_t row = 0; row < BLOCK; row++) own[lists.places[first + row]] = levels + row * apart;
    for (int64_t i = 0, group = first / ABREAST_LISTS; i < BLOCK; i += ABREAST_LISTS, group++)
        for (int64_t v = lists.starts[group]; v < lists.starts[group + 1]; v++) {
            const int64_t column = lists.pieces[v] * piece_width(columns);
            const uint8_t *entries = lists.entries + v * VECTOR, *worth = lists.levels + v * VECTOR;
            for (int64_t k = 0; k < VECTOR; k++) {
                int8_t level = int8_t(worth[k]), *to = own[i + k / TOGETHER_BYTES] + column + (entries[k] & PIECE);
                *((entries[k] & PIECE) == PIECE ? &none : to) = entries[k] >> 7 ? -level : level;
            }
        }
}

}  // namespace
