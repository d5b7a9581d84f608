// What a decoder layer does between its products: norms, rotary embeddings, attention over the paged cache, gates.
//
// Everything is float32 but weights, keys and values. Each function does a range of rows, or of a row's heads.
#pragma once

#include "native.hpp"
#include "vectors.hpp"

namespace {

constexpr int64_t BLOCK_TOKENS = 16;  // server/engine/kv_cache.py

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

// Where a token's keys or values of one head lie.
template <typename T> struct Cached {
    const T* keys;
    const T* values;
    int64_t kv_heads, size, head;

    int64_t at(const int32_t* table, int64_t token) const {
        int64_t slot = int64_t(table[token / BLOCK_TOKENS]) * BLOCK_TOKENS + token % BLOCK_TOKENS;
        return (slot * kv_heads + head) * size;
    }
};

template <typename T> inline Floats16 products(const float* query, const T* key, int64_t size) {
    Floats16 sum = {};
    int64_t c = 0;
    for (; c + 16 <= size; c += 16) sum += load16(query + c) * load16(key + c);
    if (c < size) sum += load_some(query + c, size - c) * load_some(key + c, size - c);
    return sum;
}

// One query head over the tokens [start, stop) of its sequence.
template <typename T>
void attend(const float* query, const Cached<T>& cached, const int32_t* table, int64_t start, int64_t stop, float scale,
            float softcap, float* out) {
    int64_t count = stop - start, size = cached.size, i = 0;
    float* weights = scores.floats(count + 32);
    for (; i + 4 <= count; i += 4) {
        const T* at[4];
        for (int k = 0; k < 4; k++) at[k] = cached.keys + cached.at(table, start + i + k);
        sums4(products(query, at[0], size), products(query, at[1], size), products(query, at[2], size),
              products(query, at[3], size), weights + i);
    }
    for (; i < count; i++) weights[i] = sum16(products(query, cached.keys + cached.at(table, start + i), size));
    for (int64_t c = count; c < count + 16; c++) weights[c] = 0;
    float most = -INFINITY;
    for (int64_t c = 0; c < count; c += 16) {
        Floats16 value = load16(weights + c) * scale;
        if (softcap > 0) value = softcap * tanh16(value / softcap);
        store16(weights + c, value);
    }
    for (int64_t c = 0; c < count; c++) most = weights[c] > most ? weights[c] : most;
    Floats16 totals = {};
    for (int64_t c = count; c < count + 16; c++) weights[c] = -INFINITY;
    for (int64_t c = 0; c < count; c += 16) {
        Floats16 value = exp16(load16(weights + c) - most);
        store16(weights + c, value);
        totals += value;
    }
    // What is beyond the last token counts e^-87 at most: nothing.
    float share = 1.0f / sum16(totals);
    std::memset(out, 0, size * sizeof(float));
    for (int64_t c = 0; c < size; c += 64) {
        int64_t left = size - c < 64 ? size - c : 64, whole = left / 16;
        Floats16 sum[4] = {}, tail = {};
        for (i = 0; i < count; i++) {
            const T* value = cached.values + cached.at(table, start + i) + c;
#pragma GCC unroll 4
            for (int64_t k = 0; k < 4; k++)
                if (k < whole) sum[k] += weights[i] * load16(value + k * 16);
            if (left % 16) tail += weights[i] * load_some(value + whole * 16, left % 16);
        }
        for (int64_t k = 0; k < whole; k++) store16(out + c + k * 16, sum[k] * share);
        for (int64_t k = 0; k < left % 16; k++) out[c + whole * 16 + k] = tail[k] * share;
    }
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
