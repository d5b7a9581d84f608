// Mixed mode's arithmetic for CPUs, one product at a time; see terms.hpp.

#include "terms.hpp"

extern "C" {

// In place: y[start:stop] += sum over the terms of each group. Terms of a group follow each other; groups are disjoint.
void switchyard_add_linear(float* y, const float* x, int64_t out, int64_t in, const void* records, int64_t count,
                           int coarse, int threads) {
    Call call = {y, x, out, in, blocks_of(in), blocks_of(out), coarse != 0};
    const Term* terms = static_cast<const Term*>(records);
    const Term* end = terms + count;
    int64_t line = line_of(call, terms, end, threads);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int t = 0; t < threads; t++) {
        forget_rows();
        share(call, terms, end, threads, line * t / threads, line * (t + 1) / threads);
    }
}

// What the tables of the few-rows path hold: 16, 8, or 0 where it is not built.
int switchyard_permute(void) { return PERMUTE; }

// Whether planes are multiplied as bytes where x may be rounded.
int switchyard_plane_bytes(void) { return PLANE_BYTES; }

// Whether planes are multiplied as tiles there.
int switchyard_plane_tiles(void) { return PLANE_BYTES && tiles_allowed(); }

int switchyard_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
}
