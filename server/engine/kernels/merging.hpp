// Merged weights, a block of 32 rows at a time: out = pristine + (the sum of factor * delta over the terms), the sum in
// float32, in the terms' order, each product rounded before it is added, and the result rounded once.
//
// Weights are read once and written once, however many terms there are. Lists are first laid out as planes or levels of
// the block, which stay in the first caches. The layouts are those of server/engine/kernels/types.py.
#pragma once

#include "list_blocks.hpp"
#include "numbers.hpp"

#include <algorithm>
#include <type_traits>

namespace {

enum Laid { SIGNS, DIGITS, LEVELS, VALUES };

// What a term adds to a block.
struct BlockTerm {
    Laid kind;
    int32_t digits;
    float factor;
    int64_t apart;         // of rows, or of digits
    const uint32_t* words;  // SIGNS, DIGITS: of the block's planes
    const int8_t* levels;  // LEVELS: [32 rows][apart]
    const float* values;    // VALUES: [32 rows][apart]
};

struct Block {
    int64_t first, rows, columns;  // its first row, of how many
};

// Room that laying out a term takes, in bytes.
inline int64_t room_of(const Term& term, int64_t columns) {
    switch (term.form) {
        case PLANES:
        case DENSE: return 0;
        case OVERWRITES: return BLOCK * columns * sizeof(float);
        default: return term.levels ? BLOCK * level_row(columns) * sizeof(int8_t) : block_size(columns) * sizeof(uint32_t);
    }
}

// Calls take(place, new value) for what a term overwrites from one place of the tensor to another.
template <typename F> void each_new(const Term& term, int64_t first, int64_t end, F take) {
    const int32_t* places = reinterpret_cast<const int32_t*>(term.words);
    const Brain* values = reinterpret_cast<const Brain*>(term.entries);
    const int32_t* place = std::lower_bound(places, places + term.count, first);
    for (; place < places + term.count && *place < end; place++) take(*place, values[place - places]);
}

// new - pristine where a term overwrites, else zero: [32 rows][columns].
template <typename T>
void lay_overwrites(float* values, const T* pristine, const Term& term, const Block& block) {
    const int64_t first = block.first * block.columns;
    const int64_t end = smaller(block.first + BLOCK, block.rows) * block.columns;
    std::memset(values, 0, BLOCK * block.columns * sizeof *values);
    each_new(term, first, end,
             [&](int64_t place, Brain value) { values[place - first] = widened(value) - widened(pristine[place]); });
}

// A term as it adds to a block, laid out in `room` where it is not yet.
template <typename T> BlockTerm lay_out(const Term& term, const T* pristine, const Block& block, void* room) {
    const auto [first, rows, columns] = block;
    BlockTerm own{SIGNS, term.count, term.factor, block_size(columns), nullptr, nullptr, nullptr};
    if (term.form == PLANES) {
        own.kind = term.count == 1 ? SIGNS : DIGITS;
        own.words = term.words + first / BLOCK * own.apart * term.count;
    } else if (term.form == DENSE || term.form == OVERWRITES) {
        own.kind = VALUES, own.apart = columns;
        own.values = reinterpret_cast<const float*>(term.words) + first * columns;
        if (term.form == OVERWRITES) {
            own.values = static_cast<float*>(room);
            lay_overwrites(static_cast<float*>(room), pristine, term, block);
        }
    } else if (term.levels) {
        own.kind = LEVELS, own.apart = level_row(columns);
        own.levels = static_cast<int8_t*>(room);
        list_levels(static_cast<int8_t*>(room), term, first, rows, columns);
    } else {
        own.words = static_cast<uint32_t*>(room);
        list_words(static_cast<uint32_t*>(room), term, first, rows, columns);
    }
    return own;
}

thread_local Scratch laid, rooms;

// All terms of a block; the next call of the thread takes their room.
template <typename T>
const BlockTerm* lay_out_all(const Term* terms, int64_t count, const T* pristine, const Block& block) {
    size_t size = 0;
    for (int64_t t = 0; t < count; t++) size += (room_of(terms[t], block.columns) + 63) / 64 * 64;
    auto* room = reinterpret_cast<char*>(rooms.floats(size / sizeof(float)));
    auto* own = reinterpret_cast<BlockTerm*>(laid.floats((count * sizeof(BlockTerm) + 3) / 4));
    for (int64_t t = 0; t < count; t++) {
        own[t] = lay_out(terms[t], pristine, block, room);
        room += (room_of(terms[t], block.columns) + 63) / 64 * 64;
    }
    return own;
}

// The word of 32 columns from c on of row `row` of a block: of +1, and BLOCK words further of -1.
inline const uint32_t* word_at(const BlockTerm& term, int64_t row, int64_t c) { return term.words + 2 * c + row; }

// What a term adds to these.
INLINE inline void add_term(Numbers& total, const BlockTerm& term, int64_t row, int64_t c, int64_t valid) {
    switch (term.kind) {
        case SIGNS: {
            const uint32_t* word = word_at(term, row, c);
            return add_signs(total, word[0], word[BLOCK], term.factor);
        }
        case DIGITS:
            return add_products(total, numbers_of(levels_of(word_at(term, row, c), term.apart, term.digits)), term.factor);
        case LEVELS: return add_products(total, numbers_of(bytes_at(term.levels + row * term.apart + c)), term.factor);
        case VALUES:
            return add_products(total, numbers_at(term.values + row * term.apart + c, valid), term.factor);
    }
}

// Few terms of signs have few sums, which are looked up: the sum of digits 3^t, 0 for -1 and 2 for +1, names one.
constexpr int64_t FEW_SIGNS = 3;  // 27 of 32

inline Numbers sums_of_signs(const BlockTerm* terms, int64_t count) {
    alignas(64) float sums[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        sums[i] = 0;
        for (int64_t t = 0, rest = i; t < count; t++, rest /= 3) sums[i] += float(rest % 3 - 1) * terms[t].factor;
    }
    return numbers_at(sums, BLOCK);
}

// Of 32 columns, a byte each.
INLINE inline Bytes sums_named(const BlockTerm* terms, int64_t count, int64_t row, int64_t c) {
    Bytes names = all_bytes(count == 1 ? 1 : count == 2 ? 4 : 13);  // all digits 1
    int32_t power = 1;
    for (int64_t t = 0; t < count; t++, power *= 3) {
        const uint32_t* word = word_at(terms[t], row, c);
        add_digit(names, word[0], word[BLOCK], power);
    }
    return names;
}

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

// 32 columns of one term of signs, or the `valid` first of them. What is not EXACT is only multiplied with.
template <bool EXACT, typename T>
INLINE inline void merge_word(T* out, const T* pristine, uint32_t plus, uint32_t minus, float factor, int64_t valid) {
#if PAIRS && MASKS
    if constexpr (!EXACT && std::is_same_v<T, Brain>)
        if (valid >= BLOCK) return move_word(out, pristine, plus, minus, factor);
#endif
    Numbers sum = numbers_at(pristine, valid);
    add_signs(sum, plus, minus, factor);
    put(out, sum, valid);
}

// Rows [first, last) of a block to `out`, which begins with the first of them, as `pristine` does with row 0.
template <bool EXACT, typename T>
void merge_block(T* out, const T* pristine, int64_t first, int64_t last, int64_t columns, const BlockTerm* terms,
                 int64_t count) {
    const bool all_signs = std::all_of(terms, terms + count, [](const BlockTerm& term) { return term.kind == SIGNS; });
    const Numbers sums = all_signs && count <= FEW_SIGNS ? sums_of_signs(terms, count) : Numbers{};
    for (int64_t r = first; r < last; r++, out += columns) {
        const int64_t row = r % BLOCK;
        const T* from = pristine + r * columns;
        auto merge = [&](int64_t c, int64_t valid) INLINE {
            // Who calls multiplies with these before it comes back for the next: memory is to be read meanwhile.
            if (!EXACT) __builtin_prefetch(from + ROWS_AHEAD * columns + c, 0, 2);
            if (count == 1 && all_signs) {
                const uint32_t* word = word_at(*terms, row, c);
                return merge_word<EXACT>(out + c, from + c, word[0], word[BLOCK], terms->factor, valid);
            }
            Numbers total;
            if (all_signs && count <= FEW_SIGNS)
                total = looked_up(sums, sums_named(terms, count, row, c));
            else if (all_signs)
                for (const BlockTerm* term = terms; term < terms + count; term++) {
                    const uint32_t* word = word_at(*term, row, c);
                    add_signs(total, word[0], word[BLOCK], term->factor);
                }
            else
                for (int64_t t = 0; t < count; t++) add_term(total, terms[t], row, c, valid);
            add_numbers(total, numbers_at(from + c, valid));
            put(out + c, total, valid);
        };
        int64_t c = 0;
        for (; c + BLOCK <= columns; c += BLOCK) merge(c, BLOCK);
        if (c < columns) merge(c, columns - c);
    }
}

}  // namespace
