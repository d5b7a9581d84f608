// What experts add to a product, cut into shares: y[rows] += weight * (x[rows] @ delta^T), deltas read in packed form.
//
// No delta is ever decoded to numbers. What the nonzeros select is summed by table: all sums of a few neighbouring
// activations are computed once per row, and the bits of a plane look up which of them a weight row takes.
//
//   tiles       with AMX, where x may be rounded: planes become bytes, see planes_amx.hpp
//   few rows    a vector permutation is a table of 8 (AVX2: 3 activations) or 16 (AVX-512: 4) entries, looked up for
//               as many weight rows at once
//   more rows   the lanes of a vector are 8 batch rows, and one byte of a plane looks up a sum of 8 activations
//   sparse      entries name (column, sign); x is spread to x, -x, so that an entry is a plain index
//
// Work is cut into blocks of 32 weight rows, or into chunks of batch rows where there are many; no two threads ever
// write to the same element. The layouts are those of server/engine/kernels/types.py.
#pragma once

#include "amx.hpp"
#include "planes.hpp"
#include "planes_amx.hpp"
#include "sparse.hpp"

namespace {

inline bool any(Form form, const Term* term, const Term* end) {
    while (term < end && term->form != form) term++;
    return term < end;
}

// Whether planes are multiplied as tiles.
inline bool by_tiles(const Call& call) { return call.coarse && tiles_allowed(); }

// Rows [start, stop), few, of one group: one after the other; `tiled`: without what their planes add.
void few_rows(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
              int64_t last, bool tiled) {
    [[maybe_unused]] bool planes = !tiled && any(PLANES, terms, end);
    bool sparse = any(SPARSE, terms, end);
    int64_t padded = (call.words + 1) * BLOCK;
    for (int64_t row = start; row < stop; row++) {
        float* x = inputs.floats(padded + 2 * call.in);
        float* spread = x + padded;
        float* y = call.y + row * call.out;
        std::memcpy(x, call.x + row * call.in, call.in * sizeof(float));
        std::memset(x + call.in, 0, (padded - call.in) * sizeof(float));
        if (sparse)
            for (int64_t c = 0; c < call.in; c++) spread[2 * c] = x[c], spread[2 * c + 1] = -x[c];
#if PERMUTE
        float* table = nullptr;
        if (planes) {
            table = tables.floats(call.words * STEPS * PERMUTE);
            permute_tables(x, call.words, table);
        }
#endif
        for (const Term* term = terms; term < end; term++) {
            if (term->form == SPARSE) {
                int64_t rows = smaller(last * BLOCK, call.out);
                if (term->levels)
                    add_sparse_row<true>(*term, first * BLOCK, rows, spread, y);
                else
                    add_sparse_row<false>(*term, first * BLOCK, rows, spread, y);
                continue;
            }
            if (tiled) continue;
#if PERMUTE
            float power = 1;
            for (int32_t k = 0; k < term->digits; k++, power *= 3)
                for (int64_t b = first; b < last; b++)
                    permute_block(term->words + (b * term->digits + k) * call.words * 2 * BLOCK, call.words, table,
                                  term->factor * power, y + b * BLOCK, smaller(BLOCK, call.out - b * BLOCK));
#else
            float* sum = sums.floats((last - first) * BLOCK);
            std::memset(sum, 0, (last - first) * BLOCK * sizeof(float));
            add_planes<float>(*term, call.words, first, last, x, sum);
            int64_t count = smaller(last * BLOCK, call.out) - first * BLOCK;
            for (int64_t r = 0; r < count; r++) y[first * BLOCK + r] += sum[r];
#endif
        }
    }
}

// The same for at most LANES rows: one per lane.
void row_per_lane(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
                  int64_t last, bool tiled) {
    bool sparse = any(SPARSE, terms, end);
    int64_t padded = call.words * BLOCK, rows = stop - start;
    Row8* x = reinterpret_cast<Row8*>(inputs.floats((padded + 2 * call.in) * LANES));
    Row8* spread = x + padded;
    std::memset(x, 0, padded * sizeof(Row8));
    for (int64_t r = 0; r < rows; r++) {
        const float* from = call.x + (start + r) * call.in;
        float* to = reinterpret_cast<float*>(x) + r;
        for (int64_t c = 0; c < call.in; c++) to[c * LANES] = from[c];
    }
    if (sparse)
        for (int64_t c = 0; c < call.in; c++) spread[2 * c] = x[c], spread[2 * c + 1] = -x[c];
    for (int64_t tile = first; tile < last; tile += TILE) {
        int64_t until = smaller(tile + TILE, last), top = smaller(until * BLOCK, call.out);
        Row8* sum = reinterpret_cast<Row8*>(sums.floats((until - tile) * BLOCK * LANES));
        std::memset(sum, 0, (until - tile) * BLOCK * sizeof(Row8));
        for (const Term* term = terms; term < end; term++) {
            if (term->form == PLANES) {
                if (!tiled) add_planes<Row8>(*term, call.words, tile, until, x, sum);
            } else if (term->levels)
                add_sparse_lanes<true>(*term, tile * BLOCK, top, spread, sum);
            else
                add_sparse_lanes<false>(*term, tile * BLOCK, top, spread, sum);
        }
        for (int64_t r = 0; r < rows; r++) {
            float* y = call.y + (start + r) * call.out + tile * BLOCK;
            const float* from = reinterpret_cast<const float*>(sum) + r;
            for (int64_t i = 0; i < top - tile * BLOCK; i++) y[i] += from[i * LANES];
        }
    }
}

void some_rows(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
               int64_t last) {
    bool tiled = by_tiles(call);
#if AMX
    if (tiled && any(PLANES, terms, end)) planes_by_tiles(call, terms, end, start, stop, first, last);
    if (tiled && !any(SPARSE, terms, end)) return;
#endif
    int64_t few = !tiled && any(PLANES, terms, end) ? FEW_DENSE : FEW_SPARSE;
    for (int64_t row = start; row < stop; row += LANES) {
        int64_t until = smaller(row + LANES, stop);
        (until - row <= few ? few_rows : row_per_lane)(call, terms, end, row, until, first, last, tiled);
    }
}

// About how long one block of 32 weight rows takes for a chunk of batch rows, in 1/16 ns. Only ratios matter.
int64_t cost_of(const Call& call, const Term* terms, const Term* end, int64_t rows) {
    int64_t cost = 64;
    for (const Term* term = terms; term < end; term++) {
        if (term->form == PLANES)
            cost += (by_tiles(call) ? 200 : rows <= FEW_DENSE ? 720 * rows : 2000) * call.words * term->digits;
        else
            cost += (rows <= FEW_SPARSE ? 8 * rows : 40) * (term->starts[call.out] / call.blocks + BLOCK);
    }
    return cost;
}

// How a group is cut: its units lie one after the other on the line that threads divide among themselves.
struct Cut {
    const Term *terms, *end;
    bool by_rows;
    int64_t units, cost;
};

Cut cut(const Call& call, const Term* terms, const Term* end, int threads) {
    int64_t rows = terms->stop - terms->start, chunks = (rows + LANES - 1) / LANES;
    // Chunks of batch rows share nothing; blocks of weight rows build the same tables once per thread.
    bool by_rows = chunks >= 2 * threads;
    int64_t chunk = cost_of(call, terms, end, smaller(rows, LANES));
    return {terms, end, by_rows, by_rows ? chunks : call.blocks, by_rows ? chunk * call.blocks : chunk * chunks};
}

const Term* group_end(const Term* term, const Term* end) {
    do term++;
    while (term < end && !term->opens);
    return term;
}

// How long the line is that threads divide among themselves.
int64_t line_of(const Call& call, const Term* terms, const Term* end, int threads) {
    int64_t line = 0;
    for (const Term *term = terms, *next; term < end; term = next) {
        next = group_end(term, end);
        Cut group = cut(call, term, next, threads);
        line += group.units * group.cost;
    }
    return line;
}

// The share of one thread: units whose place on the line lies in [from, to).
void share(const Call& call, const Term* terms, const Term* end, int threads, int64_t from, int64_t to) {
    int64_t place = 0;
    for (const Term *term = terms, *next; term < end; term = next) {
        next = group_end(term, end);
        Cut group = cut(call, term, next, threads);
        auto unit_at = [&](int64_t at) {
            int64_t unit = (at - place + group.cost - 1) / group.cost;
            return at <= place ? 0 : smaller(unit, group.units);
        };
        int64_t low = unit_at(from), high = unit_at(to);
        place += group.units * group.cost;
        if (low >= high) continue;
        if (group.by_rows)
            some_rows(call, term, next, term->start + low * LANES, smaller(term->start + high * LANES, term->stop), 0,
                      call.blocks);
        else
            some_rows(call, term, next, term->start, term->stop, low, high);
    }
}

}  // namespace
