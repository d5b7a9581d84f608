// Lists of nonzeros in bytes, where x may be rounded: 64 entries are one lookup, and no sum waits for another's address.
//
// A piece of x has 127 columns at most, which are two vectors of high bytes and two of low ones: an entry's seven bits
// name one of them, and what names none finds zero. Four entries of each of sixteen lists are added at once, by their
// levels; what is negative is added a second time apart, and taken off twice.
#pragma once

#include "planes_bytes.hpp"
#include "sparse.hpp"

namespace {

#if PLANE_BYTES

constexpr int64_t TABLE = 4 * VECTOR;          // bytes of a piece of x
constexpr int64_t ROWS_LOOKED = 4;             // of x that are looked up at once
constexpr int64_t AHEAD_LISTS = 64 * VECTOR;   // bytes after those that are read, to be in the second cache by then

thread_local Scratch looked;

// Rows of x as tables: [rows][pieces][high, low][128], zeros beyond their columns.
struct Tables {
    Origin of;
    int64_t pieces;
    float* units;  // [rows]: what a low byte's unit is worth
    uint8_t* x;
};
thread_local Tables tables_of;

// To be called when what is read may have changed.
inline void forget_tables() { tables_of.of = {}; }

// One row as tables, `pieces` of `width` columns each.
inline float make_tables(const float* x, int64_t in, int64_t width, uint8_t* to) {
    float largest = largest_of(x, in);
    const __m512 inverse = units_of(largest);
    for (int64_t first = 0; first < in; first += width, to += TABLE) {
        int64_t columns = smaller(width, in - first);
        for (int64_t c = 0; c < 2 * VECTOR; c += 16)
            split_some(x + first + c, columns - c, inverse, to + c, to + 2 * VECTOR + c);
    }
    return largest / MOST_SPLIT;
}

// The rows from `start` on as tables, made unless they are there.
inline const Tables& tables_for(const Call& call, int64_t start, int64_t rows) {
    const float* from = call.x + start * call.in;
    if (Origin own = {from, rows, call.in}; !(tables_of.of == own)) {
        int64_t width = piece_width(call.in), pieces = (call.in + width - 1) / width, before = (rows + 15) / 16 * 16;
        float* units = looked.floats(before + rows * pieces * TABLE / int64_t(sizeof(float)));
        auto* x = reinterpret_cast<uint8_t*>(units + before);
        for (int64_t r = 0; r < rows; r++)
            units[r] = make_tables(from + r * call.in, call.in, width, x + r * pieces * TABLE);
        tables_of = {own, pieces, units, x};
    }
    return tables_of;
}

// Of sixteen lists, the vectors [first, last), times R rows, whose tables are `apart`.
template <int R, bool LEVELS>
INLINE inline void sum_vectors(const ByteLists& lists, int64_t first, int64_t last, const uint8_t* x, int64_t apart,
                               __m512 (&sums)[R]) {
    const __m512i ones = _mm512_set1_epi8(1), signs = _mm512_set1_epi8(-128);
    __m512i all[2 * R] = {}, negative[2 * R] = {};
    for (int64_t v = first; v < last; v++) {
        const uint8_t* from = lists.entries + v * VECTOR;
        const uint8_t* table = x + lists.pieces[v] * TABLE;
        __builtin_prefetch(from + AHEAD_LISTS, 0, 2);
        __m512i entries = _mm512_loadu_si512(from), worth = ones, below = _mm512_and_si512(entries, signs);
        if (LEVELS) {
            worth = _mm512_loadu_si512(lists.levels + v * VECTOR);
            below = _mm512_maskz_mov_epi8(_mm512_movepi8_mask(entries), worth);
        }
        each<2 * R>([&](auto k) INLINE {
            const uint8_t* own = table + k / 2 * apart + k % 2 * 2 * VECTOR;
            __m512i found = _mm512_permutex2var_epi8(_mm512_load_si512(own), entries, _mm512_load_si512(own + VECTOR));
            all[k] = _mm512_dpbusd_epi32(all[k], worth, found);
            negative[k] = _mm512_dpbusd_epi32(negative[k], below, found);
        });
    }
    each<R>([&](auto r) INLINE {
        auto total = [&](int k) INLINE {
            // Without levels what is negative has been added 128 times.
            __m512i twice = LEVELS ? _mm512_slli_epi32(negative[k], 1) : _mm512_srai_epi32(negative[k], 6);
            return _mm512_cvtepi32_ps(_mm512_sub_epi32(all[k], twice));
        };
        sums[r] = _mm512_fmadd_ps(total(2 * r), _mm512_set1_ps(256), total(2 * r + 1));
    });
}

// y[0:R] += factor * (x @ rows^T) for the rows of the blocks [first, last), of which there are `out`.
template <int R, bool LEVELS>
void add_byte_lists(const Term& term, int64_t first, int64_t last, int64_t out, const uint8_t* x, int64_t apart,
                    const float* units, float* y) {
    const ByteLists lists(term);
    for (int64_t b = first; b < last; b++) {
        static_assert(BLOCK == 2 * ABREAST_LISTS, "two vectors hold a block");
        __m512 low[R], high[R];
        const int32_t* starts = lists.starts + 2 * b;
        if (starts[0] == starts[2]) continue;
        sum_vectors<R, LEVELS>(lists, starts[0], starts[1], x, apart, low);
        sum_vectors<R, LEVELS>(lists, starts[1], starts[2], x, apart, high);
        for (int64_t i = 0; i < BLOCK; i += 16) {
            const __mmask16 there = first_lanes(out - b * BLOCK - i);
            auto* from = reinterpret_cast<const __m128i*>(lists.places + b * BLOCK + i);
            __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
            each<R>([&](auto r) INLINE {
                float* to = y + r * out + b * BLOCK + i;
                __m512 sum = _mm512_permutex2var_ps(low[r], places, high[r]);
                __m512 before = _mm512_maskz_loadu_ps(there, to);
                _mm512_mask_storeu_ps(to, there, _mm512_fmadd_ps(sum, _mm512_set1_ps(term.factor * units[r]), before));
            });
        }
    }
}

typedef void (*AddByteLists)(const Term&, int64_t, int64_t, int64_t, const uint8_t*, int64_t, const float*, float*);
constexpr AddByteLists ADD_BYTE_LISTS[ROWS_LOOKED][2] = {{add_byte_lists<1, false>, add_byte_lists<1, true>},
                                                         {add_byte_lists<2, false>, add_byte_lists<2, true>},
                                                         {add_byte_lists<3, false>, add_byte_lists<3, true>},
                                                         {add_byte_lists<4, false>, add_byte_lists<4, true>}};

// What the lists in bytes among the terms add to the rows [start, stop), for the weight rows of the blocks [first, last).
inline void lists_by_bytes(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop,
                           int64_t first, int64_t last) {
    each_chunk(call, start, stop, [&](int64_t row, int64_t rows) {
        const Tables& x = tables_for(call, row, rows);
        const int64_t apart = x.pieces * TABLE, parts = (rows + ROWS_LOOKED - 1) / ROWS_LOOKED;
        for (int64_t part = 0; part < parts; part++) {
            int64_t r = rows * part / parts, count = rows * (part + 1) / parts - r;
            for (const Term* term = terms; term < end; term++)
                if (term->form == IN_BYTES)
                    ADD_BYTE_LISTS[count - 1][term->levels != nullptr](*term, first, last, call.out, x.x + r * apart, apart,
                                                                       x.units + r, call.y + (row + r) * call.out);
        }
    });
}

#else

inline void forget_tables() {}

#endif

}  // namespace
