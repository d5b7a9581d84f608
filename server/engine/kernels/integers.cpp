// Products with a base in four or eight bits, in parallel; see integers.hpp.

#include "integers.hpp"

namespace {

// Calls part(first, last) for the shares of so many weight rows. Threads that sleep take tens of microseconds to wake:
// as long as one of them needs for some ten million products, or to read a megabyte.
template <typename F> void in_shares(int64_t out, int threads, int64_t bytes, int64_t products, F part) {
    constexpr int64_t UNIT = 2 * integers::ABREAST, FEW_BYTES = 1 << 20, FEW_PRODUCTS = 10 << 20;
    // A parallel region of one thread would end the others, which then had to be made anew.
    if (threads == 1 || (bytes < FEW_BYTES && products < FEW_PRODUCTS)) return part(0, out);
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
    in_shares(out, threads, out * in / 2, out * in * rows, [=](int64_t first, int64_t last) {
        multiply_four(nibbles, scales, in, x, in, rows, y, out, first, last);
    });
}

void switchyard_multiply_eight(const int8_t* levels, const uint16_t* scales, int64_t out, int64_t in,
                               const uint16_t* x, int64_t rows, float* y, int threads) {
    in_shares(out, threads, out * in, out * in * rows, [=](int64_t first, int64_t last) {
        multiply_eight(levels, scales, in, x, in, rows, y, out, first, last);
    });
}
}
