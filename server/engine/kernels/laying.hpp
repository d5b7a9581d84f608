// Nonzeros as a stream tells them -> lists as the engine reads them: abreast, or in bytes. See types.py.
#pragma once

#include "streams.hpp"

namespace {

inline int level_of(int symbol) { return (symbol >> 1) + 1; }

// What is found of lists, in the order of the rows.
struct Found {
    const uint16_t* entries;
    const uint8_t* levels;  // symbols
    const int32_t* counts;
};

// The lists of a block of rows by length, longest first, rows of one length as they were.
struct SortedBlock {
    int here;
    int32_t row[BLOCK], count[BLOCK];
    int64_t from[BLOCK];  // where they begin among what was found

    // `at`: where the first row's begins; the next block's afterwards.
    SortedBlock(const int32_t* counts, int64_t first, int64_t rows, int64_t* at)
        : here(static_cast<int>(smaller(rows - first, BLOCK))) {
        for (int32_t r = 0; r < here; r++) {
            const int32_t own = counts[first + r];
            int place = r;
            for (; place > 0 && count[place - 1] < own; place--)
                row[place] = row[place - 1], count[place] = count[place - 1], from[place] = from[place - 1];
            row[place] = r, count[place] = own, from[place] = *at;
            *at += own;
        }
    }
};

// What becomes of lists abreast, see `SparseRows` in types.py; `levels` or null.
struct Abreast {
    int32_t *order, *starts;
    uint16_t* entries;
    uint8_t* levels;
};

void abreast(const Found& found, int64_t rows, Abreast out) {
    int32_t end = 0;
    *out.starts++ = 0;
    for (int64_t first = 0, at = 0; first < rows; first += BLOCK) {
        const SortedBlock block(found.counts, first, rows, &at);
        const auto& [here, row, count, from] = block;
        for (int i = 0; i < here; i++) {
            *out.order++ = static_cast<int32_t>(first) + row[i];
            *out.starts = out.starts[-1] + count[i];
            out.starts++;
        }
        for (int group = 0; group < here; group += ABREAST_LISTS) {
            int left = static_cast<int>(smaller(here - group, ABREAST_LISTS));
            for (int32_t k = 0; k < count[group]; k++, end += left) {
                while (count[group + left - 1] <= k) left--;
                for (int l = 0; l < left; l++) out.entries[end + l] = found.entries[from[group + l] + k];
                if (out.levels == nullptr) continue;
                for (int l = 0; l < left; l++)
                    out.levels[end + l] = static_cast<uint8_t>(level_of(found.levels[from[group + l] + k]));
            }
        }
    }
}

// What becomes of lists in bytes, see `ByteLists` in types.py; `levels` or null.
struct Bytes {
    uint8_t *places, *pieces, *entries, *levels;
    int32_t* starts;
    int64_t most;  // vectors there is room for
};

// The entries of sixteen lists, or fewer, from `list` on; how many vectors there are then, or -1 if there is no room.
int64_t group_in_bytes(const Found& found, const SortedBlock& block, int list, int64_t columns, int64_t vectors,
                       const Bytes& out) {
    const int lanes = static_cast<int>(smaller(block.here - list, ABREAST_LISTS));
    const int64_t width = piece_width(columns);
    int32_t done[ABREAST_LISTS] = {};
    for (int64_t piece = 0, stop = width; piece * width < columns; piece++, stop += width) {
        int64_t longest = 0;
        int32_t until[ABREAST_LISTS];
        for (int l = 0; l < lanes; l++) {
            const uint16_t* own = found.entries + block.from[list + l];
            until[l] = done[l];
            while (until[l] < block.count[list + l] && own[until[l]] < 2 * stop) until[l]++;
            longest = larger(longest, until[l] - done[l]);
        }
        const int64_t needed = (longest + TOGETHER_BYTES - 1) / TOGETHER_BYTES;
        if (vectors + needed > out.most) return -1;
        uint8_t* entries = out.entries + vectors * VECTOR;
        std::memset(entries, PIECE, static_cast<size_t>(needed * VECTOR));
        if (out.levels != nullptr) std::memset(out.levels + vectors * VECTOR, 0, static_cast<size_t>(needed * VECTOR));
        std::memset(out.pieces + vectors, static_cast<int>(piece), static_cast<size_t>(needed));
        for (int l = 0; l < lanes; l++) {
            const int64_t from = block.from[list + l];
            for (int32_t k = done[l]; k < until[l]; k++) {
                const int64_t rank = k - done[l];
                const int64_t at = rank / TOGETHER_BYTES * VECTOR + l * TOGETHER_BYTES + rank % TOGETHER_BYTES;
                const uint16_t entry = found.entries[from + k];
                entries[at] = static_cast<uint8_t>(((entry >> 1) - piece * width) | (entry & 1) << 7);
                if (out.levels != nullptr)
                    out.levels[vectors * VECTOR + at] = static_cast<uint8_t>(level_of(found.levels[from + k]));
            }
            done[l] = until[l];
        }
        vectors += needed;
    }
    return vectors;
}

// How many vectors they take, or -1 if there is no room.
int64_t in_bytes(const Found& found, int64_t rows, int64_t columns, Bytes out) {
    int64_t vectors = 0;
    *out.starts++ = 0;
    for (int64_t first = 0, at = 0; first < rows; first += BLOCK, out.places += BLOCK) {
        const SortedBlock block(found.counts, first, rows, &at);
        for (int i = 0; i < BLOCK; i++) out.places[i < block.here ? block.row[i] : i] = static_cast<uint8_t>(i);
        for (int list = 0; list < BLOCK; list += ABREAST_LISTS) {
            if (list < block.here) vectors = group_in_bytes(found, block, list, columns, vectors, out);
            if (vectors < 0) return -1;
            *out.starts++ = static_cast<int32_t>(vectors);
        }
    }
    return vectors;
}

}  // namespace
