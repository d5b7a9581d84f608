// Sparse rows: entries that name a column and a sign.
#pragma once

#include "native.hpp"

namespace {

constexpr int64_t FETCHED = 2048;  // entries after those that are read, to be in the cache by then

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
        for (int32_t k = s[0]; k < s[4]; k += 32) __builtin_prefetch(term.entries + k + FETCHED);
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

}  // namespace
