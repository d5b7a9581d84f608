// Mixed mode's arithmetic for CPUs: y[rows] += weight * (x[rows] @ delta^T), deltas read in packed form.
//
// No delta is ever decoded to numbers. What the nonzeros select is summed by table: all sums of a few neighbouring
// activations are computed once per row, and the bits of a plane look up which of them a weight row takes.
//
//   few rows    a vector permutation is a table of 8 (AVX2: 3 activations) or 16 (AVX-512: 4) entries, looked up for
//               as many weight rows at once
//   more rows   the lanes of a vector are 8 batch rows, and one byte of a plane looks up a sum of 8 activations
//   sparse      entries name (column, sign); x is spread to x, -x, so that an entry is a plain index
//
// Work is cut into blocks of 32 weight rows, or into chunks of batch rows where there are many; no two threads ever
// write to the same element. The layouts are those of server/engine/kernels/types.py.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Entries of the table that one permutation looks up; 0: there is no such instruction.
#ifndef PERMUTE
#if defined(__AVX512F__)
#define PERMUTE 16
#elif defined(__AVX2__)
#define PERMUTE 8
#else
#define PERMUTE 0
#endif
#endif

namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t LANES = 8;        // batch rows that share a table
constexpr int64_t TILE = 64;        // blocks whose sums stay in cache while tables are replaced
constexpr int64_t FEW_DENSE = 2;    // rows up to which permuting beats a table for all of them; measured
constexpr int64_t FEW_SPARSE = 3;

typedef float Row8 __attribute__((vector_size(4 * LANES)));

enum Form : int32_t { PLANES = 0, SPARSE = 1 };

// One term of one group. Mirrors `_RECORD` in cpu.py.
struct Term {
    int64_t start, stop;  // batch rows
    int32_t form;
    int32_t opens;        // 1: first term of its group
    float factor;         // weight of the mix * scale
    int32_t digits;
    const uint32_t* words;    // planes
    const int32_t* order;     // sparse, and the following
    const int32_t* starts;
    const uint16_t* entries;
    const uint8_t* levels;
};
static_assert(sizeof(Term) == 72, "cpu.py packs 72 bytes");

// Memory that a thread keeps from call to call. Never initialised, always aligned to a cache line.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
    float* floats(size_t count) {
        size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
        if (bytes > size_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(64, bytes);
            if (memory_ == nullptr) std::abort();
            size_ = bytes;
        }
        return static_cast<float*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

thread_local Scratch inputs, tables, sums;

inline int64_t blocks_of(int64_t size) { return (size + BLOCK - 1) / BLOCK; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// table[c] = sum of the values whose bits are set in c.
template <int BITS, typename V> inline void subset_sums(const V* values, V factor, V* table) {
    table[0] = V{};
    for (int i = 0; i < BITS; i++) {
        V value = values[i] * factor;
        for (int c = 0; c < 1 << i; c++) table[(1 << i) + c] = table[c] + value;
    }
}

// ---------------------------------------------------------------------------------------------- planes, few rows

#if PERMUTE
constexpr int INDEX_BITS = PERMUTE == 16 ? 4 : 3;
constexpr int STEPS = (BLOCK + INDEX_BITS - 1) / INDEX_BITS;  // tables per word; the last may be of fewer bits
constexpr int PARTS = BLOCK / PERMUTE;                       // vectors per block
constexpr int TOGETHER = PARTS < 4 ? PARTS : 4;

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

// Tables of one row of x, [columns/32, STEPS, PERMUTE]. x is padded to whole words, and by two more.
void permute_tables(const float* x, int64_t words, float* out) {
    for (int64_t j = 0; j < words; j++, x += BLOCK)
        for (int t = 0; t < STEPS; t++, out += PERMUTE) subset_sums<INDEX_BITS>(x + t * INDEX_BITS, 1.0f, out);
}

// y[0:32] (the first `valid` of them) += factor * (x @ block^T); `block` is [words, 2, 32].
void permute_block(const uint32_t* block, int64_t words, const float* tables, float factor, float* y, int64_t valid) {
    float out[BLOCK];
    for (int part = 0; part < PARTS; part += TOGETHER) {
        Floats plus[TOGETHER] = {}, minus[TOGETHER] = {};
        const float* table = tables;
        for (int64_t j = 0; j < words; j++, table += STEPS * PERMUTE) {
            const uint32_t* word = block + j * 2 * BLOCK + part * PERMUTE;
            Words bits[TOGETHER];
            std::memcpy(bits, word, sizeof bits);
#pragma GCC unroll 11
            for (int t = 0; t < STEPS; t++) {
                Floats entries;
                std::memcpy(&entries, table + t * PERMUTE, sizeof entries);
#pragma GCC unroll 4
                for (int i = 0; i < TOGETHER; i++) plus[i] += lookup(entries, bits[i]), bits[i] >>= INDEX_BITS;
            }
            std::memcpy(bits, word + BLOCK, sizeof bits);
#pragma GCC unroll 11
            for (int t = 0; t < STEPS; t++) {
                Floats entries;
                std::memcpy(&entries, table + t * PERMUTE, sizeof entries);
#pragma GCC unroll 4
                for (int i = 0; i < TOGETHER; i++) minus[i] += lookup(entries, bits[i]), bits[i] >>= INDEX_BITS;
            }
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
    int64_t digit_size = words * 2 * BLOCK, stride = term.digits * digit_size;
    float power = 1;
    for (int32_t k = 0; k < term.digits; k++, power *= 3) {
        V factor = V{} + term.factor * power;
        const uint32_t* planes = term.words + k * digit_size;
        // Building a table of 256 pays from about a hundred weight rows on.
        if ((last - first) * BLOCK >= 112)
            add_by_table<8>(planes, stride, words, first, last, x, factor, table, sums);
        else
            add_by_table<4>(planes, stride, words, first, last, x, factor, table, sums);
    }
}

// ------------------------------------------------------------------------------------------------------- sparse

inline float magnitude(const uint8_t* levels, int64_t i) { return levels[i]; }

// y[order] += factor * (x @ rows^T) for the rows of the blocks [first, last); `spread` is x, -x interleaved.
template <bool LEVELS>
void add_sparse_row(const Term& term, int64_t first, int64_t last, const float* spread, float* y) {
    auto value = [&](int64_t i) {
        return LEVELS ? spread[term.entries[i]] * magnitude(term.levels, i) : spread[term.entries[i]];
    };
    int64_t i = first;
    for (; i + 4 <= last; i += 4) {
        const int32_t* s = term.starts + i;
        float a = 0, b = 0, c = 0, d = 0;
        int32_t shared = s[4] - s[3];  // the shortest but at a block's border
        for (int k = 0; k < 3; k++) shared = s[k + 1] - s[k] < shared ? s[k + 1] - s[k] : shared;
        for (int32_t k = 0; k < shared; k++)
            a += value(s[0] + k), b += value(s[1] + k), c += value(s[2] + k), d += value(s[3] + k);
        for (int32_t k = s[0] + shared; k < s[1]; k++) a += value(k);
        for (int32_t k = s[1] + shared; k < s[2]; k++) b += value(k);
        for (int32_t k = s[2] + shared; k < s[3]; k++) c += value(k);
        for (int32_t k = s[3] + shared; k < s[4]; k++) d += value(k);
        y[term.order[i]] += term.factor * a;
        y[term.order[i + 1]] += term.factor * b;
        y[term.order[i + 2]] += term.factor * c;
        y[term.order[i + 3]] += term.factor * d;
    }
    for (; i < last; i++) {
        float a = 0;
        for (int32_t k = term.starts[i]; k < term.starts[i + 1]; k++) a += value(k);
        y[term.order[i]] += term.factor * a;
    }
}

// The same for LANES rows at once; sums start at the row `first`.
template <bool LEVELS>
void add_sparse_lanes(const Term& term, int64_t first, int64_t last, const Row8* spread, Row8* sums) {
    auto value = [&](int64_t i) {
        return LEVELS ? spread[term.entries[i]] * magnitude(term.levels, i) : spread[term.entries[i]];
    };
    for (int64_t i = first; i < last; i++) {
        Row8 a = {}, b = {};
        int32_t k = term.starts[i], stop = term.starts[i + 1];
        for (; k + 2 <= stop; k += 2) a += value(k), b += value(k + 1);
        if (k < stop) a += value(k);
        sums[term.order[i] - first] += (a + b) * term.factor;
    }
}

// ------------------------------------------------------------------------------------------------- putting together

struct Call {
    float* y;
    const float* x;
    int64_t out, in, words, blocks;
};

// Rows [start, stop), few, of one group: one after the other.
void few_rows(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
              int64_t last) {
    bool planes = false, sparse = false;
    for (const Term* term = terms; term < end; term++) (term->form == PLANES ? planes : sparse) = true;
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

// Rows [start, stop), at most LANES, of one group: one per lane.
void row_per_lane(const Call& call, const Term* terms, const Term* end, int64_t start, int64_t stop, int64_t first,
                  int64_t last) {
    bool sparse = false;
    for (const Term* term = terms; term < end; term++) sparse |= term->form == SPARSE;
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
            if (term->form == PLANES)
                add_planes<Row8>(*term, call.words, tile, until, x, sum);
            else if (term->levels)
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
    int64_t few = FEW_SPARSE;
    for (const Term* term = terms; term < end; term++)
        if (term->form == PLANES) few = FEW_DENSE;
    for (int64_t row = start; row < stop; row += LANES) {
        int64_t until = smaller(row + LANES, stop);
        (until - row <= few ? few_rows : row_per_lane)(call, terms, end, row, until, first, last);
    }
}

// About how long one block of 32 weight rows takes for a chunk of batch rows, in 1/16 ns. Only ratios matter.
int64_t cost_of(const Call& call, const Term* terms, const Term* end, int64_t rows) {
    int64_t cost = 64;
    for (const Term* term = terms; term < end; term++) {
        if (term->form == PLANES)
            cost += (rows <= FEW_DENSE ? 720 * rows : 2000) * call.words * term->digits;
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

extern "C" {

// In place: y[start:stop] += sum over the terms of each group. Terms of a group follow each other; groups are disjoint.
void switchyard_add_linear(float* y, const float* x, int64_t out, int64_t in, const void* records, int64_t count,
                           int threads) {
    Call call = {y, x, out, in, blocks_of(in), blocks_of(out)};
    const Term* terms = static_cast<const Term*>(records);
    const Term* end = terms + count;
    int64_t line = 0;
    for (const Term *term = terms, *next; term < end; term = next) {
        next = group_end(term, end);
        Cut group = cut(call, term, next, threads);
        line += group.units * group.cost;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int t = 0; t < threads; t++) share(call, terms, end, threads, line * t / threads, line * (t + 1) / threads);
}

// What the tables of the few-rows path hold: 16, 8, or 0 where it is not built.
int switchyard_permute(void) { return PERMUTE; }

int switchyard_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
}
