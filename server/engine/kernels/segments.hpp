// Products of a step with weights in float32 or bfloat16: rows on the base, and rows of experts for whom the weights are
// moved on the way.
#pragma once

#include "inputs.hpp"
#include "merging.hpp"
#include "operations.hpp"
#include "products.hpp"
#include "products_amx.hpp"
#include "terms.hpp"

#include <type_traits>
#include <vector>

namespace {

thread_local Scratch merged;

thread_local double spent;  // on what experts add

// Rows of one expert from which weights are moved for them, block by block, in place of adding to their products: what
// that takes does not depend on how many they are. Measured.
constexpr int64_t MANY_DENSE = 3, MANY_TILED = 48, MANY_SPARSE = 40;
constexpr int64_t TOGETHER_MOVED = 4;

// Whether that is so for the group of terms [term, end).
bool moves(const Operation& op, const Term* term, const Term* end) {
    if (op.dtype > BFLOAT16 || end - term > 1 || (term->form == PLANES && term->count > 1)) return false;
    int64_t many = op.dtype != FLOAT32 && tiles_allowed() ? MANY_TILED : MANY_DENSE;
    return term->stop - term->start >= (term->form == PLANES ? many : MANY_SPARSE);
}

struct Range {
    int64_t first, last;
};

thread_local std::vector<Segment> segments;

// Cuts the rows of a product; whether any of its weights are moved.
bool cut_rows(const Operation& op) {
    const Term* end = op.terms + op.term_count;
    int64_t row = 0;
    segments.clear();
    for (const Term *term = op.terms, *next; term < end; term = next) {
        next = group_end(term, end);
        if (!moves(op, term, next)) continue;
        if (row < term->start) segments.push_back({row, term->start, nullptr, nullptr});
        segments.push_back({term->start, term->stop, term, nullptr});
        row = term->stop;
    }
    if (row < op.rows) segments.push_back({row, op.rows, nullptr, nullptr});
    return segments.size() > 1 || (op.rows && segments[0].term);
}

bool any_packed() {
    for (const Segment& segment : segments)
        if (segment.packed) return true;
    return false;
}

// op.out of the segment's rows = x * `weights`, which are those of the columns [first, last).
template <typename T, typename U>
void multiply_segment(const Operation& op, const Segment& segment, const T* weights, const U* x, int64_t stride,
                      int64_t first, int64_t last) {
    int64_t rows = segment.until - segment.row, done = 0;
    float* y = op.out + segment.row * op.out_size + first;
#if AMX
    if constexpr (std::is_same_v<T, Brain>)
        if (segment.packed)
            done = multiply_packed(weights, op.in_size, segment.packed, rows, y, op.out_size, last - first);
#endif
    multiply(weights, op.in_size, x + segment.row * stride, stride, rows, y, op.out_size, done, last - first);
}

// Products with weights that can be moved, and are for some segment; `x` is what they read of op.in. Which columns of
// op.out the thread has made.
template <typename T, typename U>
Range run_full(const Operation& op, const Thread& thread, bool moved, const U* x, int64_t stride) {
    const T* weights = static_cast<const T*>(op.weight);
    Tiles tiles(any_packed(), SIDE);
    int64_t unit = moved || tiles.used ? BLOCK : 4, units = (op.out_size + unit - 1) / unit;
    int64_t from = thread.from(units) * unit, to = smaller(thread.to(units) * unit, op.out_size);
    if (!moved) {
        for (const Segment& segment : segments)
            multiply_segment(op, segment, weights + from * op.in_size, x, stride, from, to);
        return {from, to};
    }
    T* block = reinterpret_cast<T*>(merged.floats(SIDE * op.in_size));
    for (int64_t first = from; first < to; first += BLOCK) {
        int64_t last = smaller(first + BLOCK, to);
        for (const Segment& segment : segments) {
            if (!segment.term) {
                multiply_segment(op, segment, weights + first * op.in_size, x, stride, first, last);
                continue;
            }
            const BlockTerm* term;
            {
                Watch watch(spent);
                term = lay_out_all(segment.term, 1, weights, {first, op.out_size, op.in_size});
            }
            // As few rows as possible, so that they are still in the first cache when they are multiplied.
            int64_t together = segment.packed ? SIDE : TOGETHER_MOVED;
            for (int64_t o = first; o < last; o += together) {
                int64_t until = smaller(o + together, last);
                {
                    Watch watch(spent);
                    merge_block<false>(block, weights, o, until, op.in_size, term, 1);
                }
                multiply_segment(op, segment, block, x, stride, o, until);
            }
        }
    }
    return {from, to};
}

}  // namespace
