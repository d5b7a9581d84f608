// What experts add to a product, cut into shares: y[rows] += weight * (x[rows] @ delta^T), deltas read in packed form.
//
// No delta is ever decoded to numbers. What the nonzeros select is summed by table: all sums of a few neighbouring
// activations are computed once per row, and the bits of a plane look up which of them a weight row takes.
//
//   bytes       where x may be rounded and there are instructions for it: planes become bytes, see planes_bytes.hpp, or
//               with AMX tiles of them, see planes_amx.hpp
//   few rows    a vector permutation is a table of 8 (AVX2: 3 activations) or 16 (AVX-512: 4) entries, looked up for
//               as many weight rows at once
//   more rows   the lanes of a vector are 8 batch rows, and one byte of a plane looks up a sum of 8 activations
//   sparse      entries name (column, sign); those of sixteen weight rows lie abreast, see sparse.hpp; where x may be
//               rounded, several rows share them, see sparse_shared.hpp, or 64 entries in bytes are looked up at once, see
//               sparse_bytes.hpp
//
// Work is cut into blocks of 32 weight rows, or into chunks of batch rows where there are many; no two threads ever
// write to the same element. The layouts are those of server/engine/kernels/types.py.
#pragma once

#include "amx.hpp"
#include "planes.hpp"
#include "planes_amx.hpp"
#include "sparse.hpp"
#include "sparse_bytes.hpp"
#include "sparse_shared.hpp"

namespace {

inline bool any_planes(const Term* term, const Term* end) {
    while (term < end && term->form != PLANES) term++;
    return term < end;
}

inline bool any_byte_lists(const Term* term, const Term* end) {
    while (term < end && term->form != IN_BYTES) term++;
    return term < end;
}

// Whether there are lists that nobody reads as bytes.
inline bool any_lists(const Term* term, const Term* end) {
    while (term < end && (term->form == PLANES || term->form == IN_BYTES)) term++;
    return term < end;
}
// Whether all lists lie abreast; `done`: but those in bytes.
inline bool all_abreast(const Term* term, const Term* end, bool done) {
    while (term < end && term->form != SPARSE && (done || term->form != IN_BYTES)) term++;
    return term == end;
}

// Whether planes, and lists in bytes, are computed with as bytes, and these planes as tiles.
inline bool by_bytes(const Call& call) { return PLANE_BYTES && call.coarse; }
inline bool by_tiles(const Call& call) { return by_bytes(call) && tiles_allowed(); }

// Rows [start, stop), few, of one group: one after the other; `done`: without what is added by bytes.
void few_rows(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
              int64_t last, bool done) {
    bool planes = !done && any_planes(terms, end);
    int64_t size = (call.words + 1) * BLOCK, rows = smaller(last * BLOCK, call.out);
    for (int64_t row = start; row < stop; row++) {
        const float* x = call.x + row * call.in;
        float* y = call.y + row * call.out;
        float* padded = nullptr;
        [[maybe_unused]] float* table = nullptr;
        if (planes) {
            padded = inputs.floats(size);
            std::memcpy(padded, x, call.in * sizeof(float));
            std::memset(padded + call.in, 0, (size - call.in) * sizeof(float));
#if PERMUTE
            table = tables.floats(call.words * STEPS * PERMUTE);
            permute_tables(padded, call.words, table);
#endif
        }
        for (const Term* term = terms; term < end; term++) {
            if (done && (term->form == PLANES || term->form == IN_BYTES)) continue;
            if (term->form != PLANES) {
                auto add = term->levels ? add_sparse_row<true> : add_sparse_row<false>;
                add(*term, first * BLOCK, rows, call.out, x, call.in, y);
                continue;
            }
#if PERMUTE
            float power = 1;
            for (int32_t k = 0; k < term->count; k++, power *= 3)
                for (int64_t b = first; b < last; b++)
                    permute_block(term->words + (b * term->count + k) * call.words * 2 * BLOCK, call.words, table,
                                  term->factor * power, y + b * BLOCK, smaller(BLOCK, call.out - b * BLOCK));
#else
            float* sum = sums.floats((last - first) * BLOCK);
            std::memset(sum, 0, (last - first) * BLOCK * sizeof(float));
            add_planes<float>(*term, call.words, first, last, padded, sum);
            for (int64_t r = first * BLOCK; r < rows; r++) y[r] += sum[r - first * BLOCK];
#endif
        }
    }
}

// The same for at most LANES rows: one per lane.
void row_per_lane(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
                  int64_t last, bool done) {
    int64_t padded = call.words * BLOCK, rows = stop - start;
    Row8* x = reinterpret_cast<Row8*>(inputs.floats(padded * LANES));
    std::memset(x, 0, padded * sizeof(Row8));
    for (int64_t r = 0; r < rows; r++) {
        const float* from = call.x + (start + r) * call.in;
        float* to = reinterpret_cast<float*>(x) + r;
        for (int64_t c = 0; c < call.in; c++) to[c * LANES] = from[c];
    }
    for (int64_t tile = first; tile < last; tile += TILE) {
        int64_t until = smaller(tile + TILE, last), top = smaller(until * BLOCK, call.out);
        Row8* sum = reinterpret_cast<Row8*>(sums.floats((until - tile) * BLOCK * LANES));
        std::memset(sum, 0, (until - tile) * BLOCK * sizeof(Row8));
        for (const Term* term = terms; term < end; term++) {
            if (done && (term->form == PLANES || term->form == IN_BYTES)) continue;
            if (term->form != PLANES)
                (term->levels ? add_sparse_lanes<true> : add_sparse_lanes<false>)(*term, tile * BLOCK, top, call.out, x,
                                                                                  call.in, sum);
            else
                add_planes<Row8>(*term, call.words, tile, until, x, sum);
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
    const bool done = by_bytes(call);
#if PLANE_BYTES
    if (done) {
#if AMX
        auto add_planes = by_tiles(call) ? planes_by_tiles : planes_by_bytes;
#else
        auto add_planes = planes_by_bytes;
#endif
        if (any_planes(terms, end)) add_planes(call, terms, end, start, stop, first, last);
        if (any_byte_lists(terms, end)) lists_by_bytes(call, terms, end, start, stop, first, last);
        if (!any_lists(terms, end)) return;
    }
#endif
    const bool planes = !done && any_planes(terms, end);
#if VECTOR_LISTS
    if (call.coarse && stop - start > 1 && !planes && all_abreast(terms, end, done)) {
        for (int64_t row = start; row < stop; row += LANES)
            add_lists_shared(call, terms, end, row, smaller(row + LANES, stop), first, last);
        return;
    }
#endif
    int64_t few = planes ? FEW_DENSE : FEW_SPARSE;
    for (int64_t row = start; row < stop; row += LANES) {
        int64_t until = smaller(row + LANES, stop);
        (until - row <= few ? few_rows : row_per_lane)(call, terms, end, row, until, first, last, done);
    }
}

// To be called when the rows of x may have changed.
inline void forget_rows() {
    forget_split();
    forget_tables();
    forget_pairs();
}

inline int64_t list_cost(const Call& call, int64_t rows) {
    if (VECTOR_LISTS && call.coarse && rows > 1) return 6 * ((rows + 1) / 2);
    return rows <= FEW_SPARSE ? 8 * rows : 40;
}

inline int64_t plane_cost(const Call& call, int64_t rows) {
    if (by_tiles(call)) return 200;
    if (by_bytes(call)) return 300 + 130 * rows;
    return rows <= FEW_DENSE ? 720 * rows : 2000;
}

// About how long one block of 32 weight rows takes for a chunk of batch rows, in 1/16 ns. Only ratios matter.
int64_t cost_of(const Call& call, const Term* terms, const Term* end, int64_t rows) {
    int64_t cost = 64;
    for (const Term* term = terms; term < end; term++) {
        if (term->form == PLANES)
            cost += plane_cost(call, rows) * call.words * term->count;
        else if (term->form == IN_BYTES)
            cost += (30 + 24 * rows) * (term->count / call.blocks + 4);
        else
            cost += list_cost(call, rows) * (term->count / call.blocks + BLOCK);
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

// A part of a group that one thread does: of its units, [low, high).
struct Part {
    Cut group;
    int64_t low, high;
};

// Calls take(part) for the share of one thread: units whose place on the line lies in [from, to).
template <typename F>
void each_part(const Call& call, const Term* terms, const Term* end, int threads, int64_t from, int64_t to, F take) {
    int64_t place = 0;
    for (const Term *term = terms, *next; term < end && place < to; term = next) {
        next = group_end(term, end);
        Cut group = cut(call, term, next, threads);
        auto unit_at = [&](int64_t at) {
            int64_t unit = (at - place + group.cost - 1) / group.cost;
            return at <= place ? 0 : smaller(unit, group.units);
        };
        int64_t low = unit_at(from), high = unit_at(to);
        place += group.units * group.cost;
        if (low < high) take(Part{group, low, high});
    }
}

// Asks for what a part reads of lists: they are short, and lie where nobody would guess.
void fetch(const Call& call, const Part& part) {
    int64_t first = part.group.by_rows ? 0 : part.low, last = part.group.by_rows ? call.blocks : part.high;
    auto ask = [](const void* from, int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
    };
    for (const Term* term = part.group.terms; term < part.group.end; term++) {
        if (term->form == PLANES) continue;
        if (term->form == IN_BYTES) {
            const ByteLists own(*term);
            int64_t from = first * term->count / call.blocks, until = last * term->count / call.blocks;
            ask(own.places, first * BLOCK, last * BLOCK);
            ask(own.starts, 8 * first, 8 * last);
            ask(own.pieces, from, until);
            ask(own.entries, from * VECTOR, until * VECTOR);
            continue;
        }
        int64_t rows = sizeof(int32_t) * BLOCK, entries = sizeof(uint16_t) * term->count;
        ask(term->starts, first * rows, last * rows);
        ask(term->order, first * rows, last * rows);
        ask(term->entries, entries * first / call.blocks, entries * last / call.blocks);
    }
}

void run_part(const Call& call, const Part& part) {
    const Cut& group = part.group;
    int64_t start = group.terms->start, stop = group.terms->stop;
    if (group.by_rows)
        some_rows(call, group.terms, group.end, start + part.low * LANES, smaller(start + part.high * LANES, stop), 0,
                  call.blocks);
    else
        some_rows(call, group.terms, group.end, start, stop, part.low, part.high);
}

// The share of one thread.
void share(const Call& call, const Term* terms, const Term* end, int threads, int64_t from, int64_t to) {
    Part before{};
    each_part(call, terms, end, threads, from, to, [&](const Part& part) {
        fetch(call, part);
        if (before.high) run_part(call, before);
        before = part;
    });
    if (before.high) run_part(call, before);
}

}  // namespace
