// The rows that products read, as bfloat16 and as tiles. Of many rows each thread makes a share, for all of them.
#pragma once

#include "amx.hpp"
#include "operations.hpp"
#include "products.hpp"
#include "products_amx.hpp"

#include <vector>

namespace {

constexpr int64_t MANY_SHARED = 64;  // rows from which making them takes longer than waiting for each other; measured

// Rows of a product that read the same weights: the base's, or what one term moves them to.
struct Segment {
    int64_t row, until;
    const Term* term;        // or none
    const uint16_t* packed;  // the rows as tiles, or none
};

#if AMX
inline bool packs(const Operation& op, const Segment& segment) {
    return op.dtype == BFLOAT16 && tiled(segment.until - segment.row, FEW_TILED, op.in_size);
}
inline int64_t elements_packed(const Operation& op, const Segment& segment) {
    return packs(op, segment) ? packed_size(segment.until - segment.row, op.in_size) : 0;
}
#else
inline int64_t elements_packed(const Operation&, const Segment&) { return 0; }
#endif

// Whether a product reads its rows rounded.
inline bool reads_rounded(const Operation& op) { return op.dtype >= EIGHT_BITS || (PAIRS && op.dtype == BFLOAT16); }

thread_local Scratch own_rows, own_tiles;

// What one thread knows of them.
class Inputs {
  public:
    // Memory in which the rows lie that all threads make together.
    struct Shared {
        uint16_t *rows, *tiles;
    };

    explicit Inputs(Shared shared) : shared_(shared) {}

    // Memory for those of operations up to `end`, where so many threads take part.
    static Shared room_for(const Operation* op, const Operation* end, int threads) {
        static thread_local Scratch rows, tiles;
        int64_t most_rows = 0, most_tiles = 0;
        for (; op < end; op++) {
            if (!shares(*op, threads)) continue;
            most_rows = larger(most_rows, op->rows * padded(op->in_size));
            most_tiles = larger(most_tiles, (op->rows + SIDE * (2 * op->term_count + 1)) * op->in_size);
        }
        return {rows.halves(most_rows), tiles.halves(most_tiles)};
    }

    // The product's rows, `padded(in_size)` apart; its segments learn where theirs lie as tiles.
    const uint16_t* make(const Operation& op, std::vector<Segment>& segments, const Thread& thread, Barrier& barrier) {
        const bool together = shares(op, thread.count);
        const Origin own = {op.in, op.rows, op.in_size};
        int64_t size = 0;
        for (const Segment& segment : segments) size += elements_packed(op, segment);
        uint16_t* rows = together ? shared_.rows : own_rows.halves(op.rows * padded(op.in_size));
        uint16_t* tiles = together ? shared_.tiles : own_tiles.halves(size);
        bool round = !(rounded_ == own), pack = size && !(packed_ == own && segments.size() == 1);
        if (round || pack) {
            if (together && used_) barrier.wait(thread);  // others may still read what lies there
            make_share(op, segments, together ? thread : Thread{0, 1}, round, rows, pack, tiles);
            if (together) barrier.wait(thread);
            rounded_ = own;
            packed_ = pack && segments.size() == 1 ? own : Origin{};
            used_ = true;
        }
        for (Segment& segment : segments) {
            int64_t own_size = elements_packed(op, segment);
            segment.packed = own_size ? tiles : nullptr;
            tiles += own_size;
        }
        return rows;
    }

    // To be called once all threads have waited for each other: what is read may change from here on.
    void forget() { rounded_ = packed_ = {}, used_ = false; }

    // Whether `threads` make the rows of a product together.
    static bool shares(const Operation& op, int threads) {
        return threads > 1 && op.kind == PRODUCT && op.rows >= MANY_SHARED && reads_rounded(op);
    }

  private:
    // What one thread does of it: sixteen rows of a segment after the other, rounded, and packed if they are to be.
    static void make_share(const Operation& op, const std::vector<Segment>& segments, const Thread& thread, bool round,
                           uint16_t* rows, bool pack, uint16_t* tiles) {
        int64_t stride = padded(op.in_size), units = 0, unit = 0;
        for (const Segment& segment : segments) units += (segment.until - segment.row + SIDE - 1) / SIDE;
        const int64_t from = thread.from(units), to = thread.to(units);
        for (const Segment& segment : segments) {
            int64_t size = pack ? elements_packed(op, segment) : 0;
            for (int64_t r = segment.row; r < segment.until; r += SIDE, unit++) {
                if (unit < from || unit >= to) continue;
                int64_t count = smaller(SIDE, segment.until - r);
                if (round) round_rows(op.in + r * op.in_size, op.in_size, count, rows + r * stride);
#if AMX
                if (size) pack_rows(rows + r * stride, stride, count, op.in_size, tiles + (r - segment.row) * op.in_size);
#endif
            }
            tiles += size;
        }
    }

    Shared shared_;
    Origin rounded_, packed_;
    bool used_ = false;
};

}  // namespace
