// Attention of a prompt's tokens with AMX: sixteen queries, of neighbouring tokens and the heads that share a key head, by
// sixteen keys are one tile.
//
// All scores of a tile of queries are there before the largest of each is subtracted, queries side by side in a vector.
// Keys are read as they lie in the cache; values are turned once, since their tokens are summed over. Queries, and the
// weights that scores become, are rounded to bfloat16.
#pragma once

#include "layers.hpp"
#include "operations.hpp"
#include "products_amx.hpp"

#if AMX

namespace {

constexpr int64_t MANY_ATTENDING = 2;  // tokens of a sequence from which tiles are faster; measured
constexpr int64_t PAIR_TOKENS = 2 * BLOCK_TOKENS;

static_assert(BLOCK_TOKENS == SIDE && PAIR_TOKENS == ACROSS, "a block of the cache is a tile of keys");

thread_local Scratch turned, scored, asked;

// The tokens of one sequence in a step, `count` from the row `first` on, the first of them at `position`.
struct Prompt {
    int64_t first, count, position;
    const int32_t* table;
};

// Whether rows are attended to in tiles.
inline bool attends_tiled(int64_t count, int64_t size) {
    return count >= MANY_ATTENDING && size % ACROSS == 0 && tiles_allowed();
}

// Values of the blocks [from, until), an even number of them, as [pairs of blocks][size / 16][16][32 tokens]; those of
// tokens from `stop` on are zeros, whatever the cache holds there.
inline void turn_values(const Cached<Brain>& cached, const int32_t* table, int64_t from, int64_t until, int64_t stop,
                        uint16_t* out) {
    for (int64_t token = from * BLOCK_TOKENS; token < until * BLOCK_TOKENS; token += PAIR_TOKENS)
        for (int64_t c = 0; c < cached.size; c += SIDE, out += SIDE * PAIR_TOKENS) {
            __m512i v[SIDE];
            auto value = [&](int64_t at) INLINE {
                if (at >= stop) return _mm512_setzero_si512();
                const void* from = cached.values + cached.at(table, at) + c;
                return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
            };
            for (int64_t i = 0; i < SIDE; i++)
                v[i] = _mm512_or_si512(value(token + 2 * i), _mm512_slli_epi32(value(token + 2 * i + 1), 16));
            turn(v);
            for (int64_t i = 0; i < SIDE; i++) _mm512_store_si512(out + i * PAIR_TOKENS, v[i]);
        }
}

// Scores, [tokens][16] floats, become weights in their place: [tokens / 2][16] words, of two tokens each. Returns what
// those of each query are to be divided by.
inline __m512 weigh(float* scores, int64_t first, int64_t tokens, __m512i begins, __m512i positions, float scale,
                    float softcap) {
    Floats16 most = Floats16{} - 1e30f;
    for (int64_t t = 0; t < tokens; t++) {
        Floats16 score = load16(scores + t * SIDE) * scale;
        if (softcap > 0) score = softcap * tanh16(score / softcap);
        __m512i token = _mm512_set1_epi32(int32_t(first + t));
        __mmask16 seen = _mm512_cmple_epi32_mask(token, positions) & _mm512_cmpge_epi32_mask(token, begins);
        score = (Floats16)_mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), (__m512)score);
        most = (Floats16)_mm512_max_ps((__m512)most, (__m512)score);
        store16(scores + t * SIDE, score);
    }
    Floats16 total = {};
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int32_t(0xffff0000));
    for (int64_t t = 0; t < tokens; t += 2) {
        Floats16 even = exp16(load16(scores + t * SIDE) - most), odd = exp16(load16(scores + (t + 1) * SIDE) - most);
        total += even + odd;
        __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)even, half), 16);
        __m512i high = _mm512_and_si512(_mm512_add_epi32((__m512i)odd, half), upper);
        _mm512_storeu_si512(scores + t / 2 * SIDE, _mm512_or_si512(low, high));
    }
    return (__m512)total;
}

// One tile of queries, [query, query + 16) of the prompt's rows by heads `group` of a key head, which see blocks from
// `from` on; `values` are turned from the block `begun` on.
inline void attend_tile(const Operation& op, const Prompt& prompt, const Cached<Brain>& cached, int64_t query,
                        int64_t from, int64_t begun, const uint16_t* values) {
    int64_t size = cached.size, group = op.heads / op.kv_heads, queries = prompt.count * group;
    int64_t count = smaller(queries - query, SIDE), last = (query + count - 1) / group;
    int64_t blocks = (prompt.position + last) / BLOCK_TOKENS + 1 - from, pairs = (blocks + 1) / 2;
    auto place = [&](int64_t q) { return ((prompt.first + q / group) * op.heads + cached.head * group + q % group) * size; };

    uint16_t* rows = reinterpret_cast<uint16_t*>(asked.floats(SIDE * size));  // as they are, and as tiles
    uint16_t* packed = rows + SIDE * size;
    alignas(64) int32_t begins[SIDE] = {}, positions[SIDE];
    for (int64_t q = 0; q < SIDE; q++) {
        positions[q] = -1;
        if (q >= count) continue;
        int64_t position = prompt.position + (query + q) / group;
        begins[q] = int32_t(first_seen(position, op.window)), positions[q] = int32_t(position);
        round_rows(op.in + place(query + q), size, 1, rows + q * size);
    }
    pack_rows(rows, size, count, size, packed);

    float* scores = scored.floats(pairs * PAIR_TOKENS * SIDE);
    int64_t apart = cached.kv_heads * size * int64_t(sizeof(Brain));
    settle();
    for (int64_t b = 0; b < blocks; b++) {
        const Brain* keys = cached.keys + cached.at(prompt.table, (from + b) * BLOCK_TOKENS);
        _tile_zero(0);
        for (int64_t c = 0; c < size; c += ACROSS) {
            _tile_loadd(4, keys + c, apart);
            _tile_loadd(6, packed + c * SIDE, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, scores + b * SIDE * SIDE, 64);
    }
    settle();
    if (blocks % 2) std::memset(scores + blocks * SIDE * SIDE, 0, SIDE * SIDE * sizeof(float));  // seen by nobody
    __m512 totals = weigh(scores, from * BLOCK_TOKENS, pairs * PAIR_TOKENS, _mm512_load_si512(begins),
                          _mm512_load_si512(positions), float(op.eps), float(op.plus));
    __m512 shares = _mm512_div_ps(_mm512_set1_ps(1), totals);
    settle();
    constexpr int64_t TOGETHER = 4;
    const uint16_t* own = values + (from - begun) / 2 * size * PAIR_TOKENS;
    for (int64_t c = 0; c < size; c += TOGETHER * SIDE) {
        int64_t tiles = smaller((size - c) / SIDE, TOGETHER);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t p = 0; p < pairs; p++) {
            const uint16_t* value = own + (p * size + c) * PAIR_TOKENS;
            _tile_loadd(6, scores + p * SIDE * SIDE, 64);
            _tile_loadd(4, value, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, value + SIDE * PAIR_TOKENS, 64);
            _tile_dpbf16ps(1, 5, 6);
            if (tiles < TOGETHER) continue;
            _tile_loadd(4, value + 2 * SIDE * PAIR_TOKENS, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, value + 3 * SIDE * PAIR_TOKENS, 64);
            _tile_dpbf16ps(3, 5, 6);
        }
        alignas(64) float sums[TOGETHER][SIDE * SIDE];
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        settle();
        for (int64_t t = 0; t < tiles; t++) {
            __m512i v[SIDE];
            each<SIDE>([&](auto k) INLINE {
                v[k] = (__m512i)_mm512_mul_ps(_mm512_load_ps(sums[t] + k * SIDE), shares);
            });
            turn(v);
            for (int64_t q = 0; q < count; q++) _mm512_storeu_si512(op.out + place(query + q) + c + t * SIDE, v[q]);
        }
    }
}

// The tiles of queries [low, high) of one key head.
inline void attend_tiles(const Operation& op, const Prompt& prompt, const Cached<Brain>& cached, int64_t low, int64_t high) {
    int64_t group = op.heads / op.kv_heads;
    // The pair of blocks that the first token of a tile sees begins with.
    auto from = [&](int64_t tile) {
        return first_seen(prompt.position + tile * SIDE / group, op.window) / PAIR_TOKENS * 2;
    };
    int64_t last = smaller(high * SIDE, prompt.count * group) - 1, stop = prompt.position + last / group + 1;
    int64_t begun = from(low), until = begun + (stop - begun * BLOCK_TOKENS + PAIR_TOKENS - 1) / PAIR_TOKENS * 2;
    uint16_t* values = reinterpret_cast<uint16_t*>(turned.floats((until - begun) * BLOCK_TOKENS * op.head_size / 2));
    turn_values(cached, prompt.table, begun, until, stop, values);
    Tiles tiles(true, SIDE);
    for (int64_t tile = low; tile < high; tile++) attend_tile(op, prompt, cached, tile * SIDE, from(tile), begun, values);
}

}  // namespace

#endif
