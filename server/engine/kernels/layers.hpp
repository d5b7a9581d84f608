// What a decoder layer does between its products: norms, rotary embeddings, attention over the paged cache, gates.
//
// Everything is float32 but weights, keys and values. Each function does a range of rows, or of a row's heads.
#pragma once

#include "native.hpp"
#include "products.hpp"
#include "vectors.hpp"

namespace {

constexpr int64_t BLOCK_TOKENS = 16;  // server/engine/kv_cache.py
constexpr int64_t TOKENS_AHEAD = 32;  // after those that are read, to be in the first cache by then

thread_local Scratch scores;

// out = x / rms(x) * weight, or * (1 + weight); `width` numbers of one row or head. out may be x.
template <typename T>
void norm(const float* x, const T* weight, int64_t width, float eps, float plus, float* out) {
    Floats16 squares = {};
    int64_t c = 0;
    for (; c + 16 <= width; c += 16) {
        Floats16 value = load16(x + c);
        squares += value * value;
    }
    float total = sum16(squares);
    for (; c < width; c++) total += x[c] * x[c];
    float scale = 1.0f / std::sqrt(total / width + eps);
    for (c = 0; c + 16 <= width; c += 16) store16(out + c, load16(x + c) * scale * (load16(weight + c) + plus));
    for (; c < width; c++) out[c] = x[c] * scale * (widened(weight[c]) + plus);
}

// Turns one head in place; cos and sin are of its position.
inline void rotate(float* head, const float* cos, const float* sin, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// The first token that one at this position sees; `window`: how many it sees, itself included, or 0: all.
inline int64_t first_seen(int64_t position, int64_t window) {
    return window && position >= window ? position + 1 - window : 0;
}

// Where a token's keys or values of one head lie.
template <typename T> struct Cached {
    const T* keys;
    const T* values;
    int64_t kv_heads, size, head;

    int64_t at(const int32_t* table, int64_t token) const {
        int64_t slot = int64_t(table[token / BLOCK_TOKENS]) * BLOCK_TOKENS + token % BLOCK_TOKENS;
        return (slot * kv_heads + head) * size;
    }

    // Asks for a token's keys or values.
    INLINE void fetch(const T* all, const int32_t* table, int64_t token) const {
        const char* from = reinterpret_cast<const char*>(all + at(table, token));
        for (int64_t k = 0; k < size * int64_t(sizeof(T)); k += 64) __builtin_prefetch(from + k, 0, 3);
    }
};

// Scores of H query heads, `size` apart, with four keys: [H][4], heads `stride` apart.
template <int H, typename T>
INLINE inline void score(const float* query, const T* const* keys, int64_t size, float* out, int64_t stride) {
    Floats16 sums[H * 4] = {};
    auto add = [&](int64_t c, auto load) INLINE {
        Floats16 own[H];
        each<H>([&](auto h) INLINE { own[h] = load(query + h * size + c); });
        each<4>([&](auto k) INLINE {
            Floats16 key = load(keys[k] + c);
            each<H>([&](auto h) INLINE { sums[h * 4 + k] += own[h] * key; });
        });
    };
    int64_t c = 0;
    for (; c + 16 <= size; c += 16) add(c, [](auto from) INLINE { return load16(from); });
    if (c < size) add(c, [&](auto from) INLINE { return load_some(from, size - c); });
    each<H>([&](auto h) INLINE { sums4(sums[h * 4], sums[h * 4 + 1], sums[h * 4 + 2], sums[h * 4 + 3], out + h * stride); });
}

// What H heads take of N vectors of every value, from `c` on: out [H][size], weights `stride` apart.
template <int H, int N, typename T>
INLINE inline void gather(const Cached<T>& cached, const int32_t* table, int64_t start, int64_t count, int64_t c,
                          int64_t left, const float* weights, int64_t stride, const float* shares, float* out) {
    Floats16 sums[H * N] = {};
    for (int64_t i = 0; i < count; i++) {
        if (c == 0 && i + TOKENS_AHEAD < count) cached.fetch(cached.values, table, start + i + TOKENS_AHEAD);
        const T* value = cached.values + cached.at(table, start + i) + c;
        each<N>([&](auto n) INLINE {
            Floats16 own = left >= 16 ? load16(value + n * 16) : load_some(value, left);
            each<H>([&](auto h) INLINE { sums[h * N + n] += weights[h * stride + i] * own; });
        });
    }
    each<H>([&](auto h) INLINE {
        each<N>([&](auto n) INLINE {
            Floats16 sum = sums[h * N + n] * shares[h];
            int64_t some = left < 16 ? left : 16;
            std::memcpy(out + h * cached.size + c + n * 16, &sum, some * sizeof(float));
        });
    });
}

// H query heads of one key head, side by side, over the tokens [start, stop) of their sequence.
template <int H, typename T>
void attend(const float* query, const Cached<T>& cached, const int32_t* table, int64_t start, int64_t stop, float scale,
            float softcap, float* out) {
    int64_t count = stop - start, size = cached.size, stride = (count + 31) / 16 * 16;
    float* weights = scores.floats(H * stride);
    for (int64_t i = 0; i < count; i += 4) {
        const T* keys[4];  // the last one stands for those beyond it, whose scores are not read
        for (int64_t k = i + TOKENS_AHEAD; k < smaller(i + TOKENS_AHEAD + 4, count); k++)
            cached.fetch(cached.keys, table, start + k);
        for (int64_t k = 0; k < 4; k++) keys[k] = cached.keys + cached.at(table, smaller(start + i + k, stop - 1));
        score<H>(query, keys, size, weights + i, stride);
    }
    float shares[H];
    for (int h = 0; h < H; h++) {
        float* own = weights + h * stride;
        for (int64_t c = 0; c < count; c += 16) {
            Floats16 value = load16(own + c) * scale;
            store16(own + c, softcap > 0 ? softcap * tanh16(value / softcap) : value);
        }
        for (int64_t c = count; c < stride; c++) own[c] = -INFINITY;  // e^-87 each: nothing
        Floats16 most16 = load16(own);
        for (int64_t c = 16; c < count; c += 16) most16 = larger16(most16, load16(own + c));
        float most = most_of(most16);
        Floats16 totals = {};
        for (int64_t c = 0; c < count; c += 16) {
            Floats16 value = exp16(load16(own + c) - most);
            store16(own + c, value);
            totals += value;
        }
        shares[h] = 1.0f / sum16(totals);
    }
    int64_t c = 0;
    for (; c + 64 <= size; c += 64)
        gather<H, 4>(cached, table, start, count, c, 64, weights, stride, shares, out);
    for (; c < size; c += 16)
        gather<H, 1>(cached, table, start, count, c, size - c, weights, stride, shares, out);
}

enum Gate : int64_t { SILU = 0, GELU_TANH = 1 };

inline Floats16 activated(Floats16 x, int64_t gate) {
    if (gate == SILU) return x / (1.0f + exp16(-x));
    return 0.5f * x * (1.0f + tanh16(0.7978845608f * (x + 0.044715f * x * x * x)));
}

// gate = act(gate) * up, `count` numbers.
inline void gated(float* gate, const float* up, int64_t count, int64_t kind) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store16(gate + i, activated(load16(gate + i), kind) * load16(up + i));
    if (i == count) return;
    Floats16 last = activated(load_some(gate + i, count - i), kind) * load_some(up + i, count - i);
    for (int64_t k = 0; i < count; i++, k++) gate[i] = last[k];
}

}  // namespace
