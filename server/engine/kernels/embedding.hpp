// Rows of a table, and what experts add to each.
#pragma once

#include "operations.hpp"
#include "sparse.hpp"
#include "vectors.hpp"

namespace {

// out [width] += factor * row `row` of a delta that has `rows`.
inline void add_delta_row(const Term& term, int64_t row, int64_t rows, int64_t width, float* out) {
    int64_t block = row / BLOCK * BLOCK;
    if (term.form != PLANES) {
        each_nonzero(term, list_of(term, row), rows, width, [&](uint32_t entry, int64_t place) {
            float value = term.levels ? term.factor * term.levels[place] : term.factor;
            out[entry >> 1] += entry & 1 ? -value : value;
        });
        return;
    }
    int64_t words = blocks_of(width);
    float power = term.factor;
    for (int32_t k = 0; k < term.count; k++, power *= 3) {
        const uint32_t* word = term.words + (block / BLOCK * term.count + k) * words * 2 * BLOCK + row % BLOCK;
        for (int64_t c = 0; c < width; c += BLOCK, word += 2 * BLOCK)
            for (uint32_t set = word[0] | word[BLOCK]; set; set &= set - 1) {
                int bit = __builtin_ctz(set);
                out[c + bit] += word[0] >> bit & 1 ? power : -power;
            }
    }
}

// The rows of op.out that are the thread's: those of the table that op.which names.
template <typename T> void run_embed(const Operation& op, const Thread& thread) {
    const T* table = static_cast<const T*>(op.weight);
    int64_t size = op.in_size;
    for (int64_t r = thread.from(op.rows); r < thread.to(op.rows); r++) {
        const T* from = table + op.which[r] * size;
        float *out = op.out + r * size, scale = float(op.eps);
        for (int64_t c = 0; c < size; c++) out[c] = widened(from[c]);
        for (const Term* term = op.terms; term < op.terms + op.term_count; term++)
            if (term->start <= r && r < term->stop) add_delta_row(*term, op.which[r], op.out_size, size, out);
        if (scale != 1)
            for (int64_t c = 0; c < size; c++) out[c] *= scale;
    }
}

}  // namespace
