// Products with a base in four or eight bits, for one thread: y = x @ weight^T, rows of bfloat16 against integers.
#pragma once

#include "integers_amx.hpp"
#include "integers_vectors.hpp"

namespace {
namespace integers {

// The weight rows [row, row + V * WIDTH), as far as they are wanted, times R batch rows, which start at y.
template <bool FOUR, int V, int R> void tile(const Product& product, const Batch& batch, int64_t row, float* y) {
    Place places[V];
    for (int v = 0; v < V; v++) {
        int64_t start = row + v * WIDTH, within = start % ABREAST, block = start - within;
        places[v].integers = product.integers + (FOUR ? block * batch.in / 2 : block * batch.in) + within * 4;
        places[v].scales = product.scales + (FOUR ? block * (batch.in / GROUP) * 2 + within * 2 : start);
    }
    Lanes total[V][R] = {};
    if (FOUR) {
        add_four<V, R>(batch, places, total);
    } else {
        add_eight<V, R>(batch, places, total);
        for (int v = 0; v < V; v++) {
            Lanes scale = (Lanes)(__builtin_convertvector(load<Halves>(places[v].scales), Bits) << 16);
            for (int r = 0; r < R; r++) total[v][r] *= scale;
        }
    }
    for (int v = 0; v < V; v++) {
        int64_t start = row + v * WIDTH, skip = start < product.first ? product.first - start : 0;
        int64_t stop = smaller(WIDTH, product.last - start);
        for (int r = 0; r < R; r++) {
            float* to = y + r * product.y_stride + start;
            const float* from = reinterpret_cast<const float*>(&total[v][r]);
            if (skip == 0 && stop == WIDTH)
                std::memcpy(to, from, sizeof(Lanes));
            else
                for (int64_t o = skip; o < stop; o++) to[o] = from[o];
        }
    }
}

template <bool FOUR, int V, int R = MOST_ROWS>
void tile_of(const Product& product, const Batch& batch, int64_t row, float* y, int64_t rows) {
    if constexpr (R > 1)
        if (rows < R) return tile_of<FOUR, V, R - 1>(product, batch, row, y, rows);
    tile<FOUR, V, R>(product, batch, row, y);
}

thread_local Scratch sums_of_groups, widened;

// Of each group's activations, [rows, in / GROUP].
const float* sum_groups(const Batch& batch, int64_t rows) {
    int64_t groups = batch.in / GROUP;
    float* sums = sums_of_groups.floats(rows * groups);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) sums[r * groups + g] = sum(batch.x + r * batch.stride + g * GROUP);
    return sums;
}

template <bool FOUR>
void multiply(const Product& product, int64_t in, const uint16_t* x, int64_t x_stride, int64_t rows) {
#ifdef INTEGERS_BY_PAIRS
    Batch batch = {in, x, x_stride, nullptr};
#else
    float* wide = widened.floats(rows * in);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < in; c++) wide[r * in + c] = widen(x[r * x_stride + c]);
    Batch batch = {in, wide, in, nullptr};
#endif
    const float* sums = FOUR ? sum_groups(batch, rows) : nullptr;
#if AMX
    if (tiled(rows, FEW_TILED, in))
        return multiply_tiled<FOUR>(product, {in, x, x_stride, sums}, rows);
#endif
    int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t row = product.first / WIDTH * WIDTH; row < product.last; row += VECTORS * WIDTH)
        for (int64_t t = 0; t < tiles; t++) {
            int64_t start = rows * t / tiles, count = rows * (t + 1) / tiles - start;
            Batch part = {in, batch.x + start * batch.stride, batch.stride, sums + (FOUR ? start * (in / GROUP) : 0)};
            float* y = product.y + start * product.y_stride;
            if (row + WIDTH < product.last)
                tile_of<FOUR, VECTORS>(product, part, row, y, count);
            else
                tile_of<FOUR, 1>(product, part, row, y, count);
        }
}

}  // namespace integers

// y[r * y_stride + o] = (x @ weight^T)[r, o] for all rows r and the weight rows o in [first, last). `in` is a multiple
// of 32; strides count elements. Threads that divide weight rows among themselves do so best at multiples of 32.
inline void multiply_four(const uint8_t* nibbles, const uint16_t* scales, int64_t in, const uint16_t* x,
                          int64_t x_stride, int64_t rows, float* y, int64_t y_stride, int64_t first, int64_t last) {
    integers::multiply<true>({nibbles, scales, y, y_stride, first, last}, in, x, x_stride, rows);
}

// The same for eight bits; `in` is a multiple of 8.
inline void multiply_eight(const int8_t* levels, const uint16_t* scales, int64_t in, const uint16_t* x,
                           int64_t x_stride, int64_t rows, float* y, int64_t y_stride, int64_t first, int64_t last) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(levels);
    integers::multiply<false>({bytes, scales, y, y_stride, first, last}, in, x, x_stride, rows);
}

}  // namespace
