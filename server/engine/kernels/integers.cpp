// Products with a base in four or eight bits, in parallel; see integers.hpp.

#include "integers.hpp"

namespace {

// Calls part(first, last) for the shares of so many weight rows.
template <typename F> void in_shares(int64_t out, int threads, F part) {
    constexpr int64_t UNIT = 2 * integers::ABREAST;
    int64_t units = (out + UNIT - 1) / UNIT;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int t = 0; t < threads; t++) part(units * t / threads * UNIT, smaller(units * (t + 1) / threads * UNIT, out));
}

}  // namespace

extern "C" {

// y = x @ weight^T; x is [rows, in], y [rows, out].
void switchyard_multiply_four(const uint8_t* nibbles, const uint16_t* scales, int64_t out, int64_t in,
                              const uint16_t* x, int64_t rows, float* y, int threads) {
    in_shares(out, threads, [=](int64_t first, int64_t last) {
        multiply_four(nibbles, scales, in, x, in, rows, y, out, first, last);
    });
}

void switchyard_multiply_eight(const int8_t* levels, const uint16_t* scales, int64_t out, int64_t in,
                               const uint16_t* x, int64_t rows, float* y, int threads) {
    in_shares(out, threads, [=](int64_t first, int64_t last) {
        multiply_eight(levels, scales, in, x, in, rows, y, out, first, last);
    });
}
}
