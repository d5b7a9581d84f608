// Attention of a step's rows over the paged cache: of prompts in tiles where there are any, else of one row after the other.
#pragma once

#include "attention_amx.hpp"
#include "layers.hpp"
#include "operations.hpp"

namespace {

template <typename T, typename... More>
void attend_heads(int64_t count, const float* query, const Cached<T>& cached, More... more) {
    switch (count) {
        case 1: return attend<1>(query, cached, more...);
        case 2: return attend<2>(query, cached, more...);
        case 3: return attend<3>(query, cached, more...);
        default: return attend<4>(query, cached, more...);
    }
}

// Rows of one sequence, side by side, from the row `r` on.
int64_t prompt_rows(const Rows& rows, int64_t r) {
    int64_t next = r + 1;
    while (next < rows.count && rows.sequences[next] == rows.sequences[r]) next++;
    return next - r;
}

// Attention of a step's rows. All that there is to do lies on a line that threads divide among themselves.
template <typename T> class Attention {
  public:
    Attention(const Operation& op, const Rows& rows, const Thread& thread)
        : op_(op), rows_(rows), group_(op.heads / op.kv_heads),
          cached_{static_cast<const T*>(op.keys), static_cast<const T*>(op.values), op.kv_heads, op.head_size, 0} {
        // Heads that share keys go side by side, unless that leaves threads without work.
        together_ = op.rows * op.kv_heads < 4 * thread.count ? 1 : group_;
    }

    // Does what lies in [from, to) of the line, and tells how long it is.
    int64_t walk(int64_t from, int64_t to) {
        place_ = 0, from_ = from, to_ = to;
        for (int64_t r = 0, count; r < op_.rows; r += count) {
            count = prompt_rows(rows_, r);
#if AMX
            if constexpr (std::is_same_v<T, Brain>)
                if (attends_tiled(count, op_.head_size)) {
                    walk_tiles(r, count);
                    continue;
                }
#endif
            for (int64_t row = r; row < r + count; row++) walk_row(row);
        }
        return place_;
    }

  private:
    const int32_t* table_of(int64_t r) const { return rows_.tables + rows_.sequences[r] * rows_.table_size; }
    int64_t begin(int64_t r) const { return first_seen(rows_.positions[r], op_.window); }
    int64_t seen(int64_t r) const { return rows_.positions[r] + 1 - begin(r); }
    bool is_due() const { return place_ >= from_ && place_ < to_; }

    void walk_row(int64_t r) {
        for (int64_t head = 0; head < op_.heads; head += together_) {
            if (is_due()) attend_row(r, head);
            place_ += seen(r) * together_;
        }
    }

    void attend_row(int64_t r, int64_t head) {
        cached_.head = head / group_;
        for (int64_t done = 0, count; done < together_; done += count) {
            count = smaller(together_ - done, 4);
            int64_t at = (r * op_.heads + head + done) * op_.head_size;
            attend_heads(count, op_.in + at, cached_, table_of(r), begin(r), rows_.positions[r] + 1, float(op_.eps),
                         float(op_.plus), op_.out + at);
        }
    }

#if AMX
    void walk_tiles(int64_t r, int64_t count) {
        Prompt prompt = {r, count, rows_.positions[r], table_of(r)};
        int64_t tiles = (count * group_ + SIDE - 1) / SIDE;
        for (cached_.head = 0; cached_.head < op_.kv_heads; cached_.head++) {
            int64_t low = tiles, high = 0;
            for (int64_t tile = 0; tile < tiles; tile++) {
                if (is_due()) low = smaller(low, tile), high = tile + 1;
                place_ += 2 * seen(r + tile * SIDE / group_);  // about what two heads of a row take
            }
            if (low < high) attend_tiles(op_, prompt, cached_, low, high);
        }
    }
#endif

    const Operation& op_;
    const Rows& rows_;
    const int64_t group_;
    Cached<T> cached_;
    int64_t together_, place_ = 0, from_ = 0, to_ = 0;
};

template <typename T> void run_attend(const Operation& op, const Rows& rows, const Thread& thread) {
    Attention<T> attention(op, rows, thread);
    int64_t line = attention.walk(0, 0);
    attention.walk(thread.from(line), thread.to(line));
}

}  // namespace
