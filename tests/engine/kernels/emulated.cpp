// Kernels in CUDA C++ for the CPU: what a launch would run, in `emulation.hpp`'s threads. TYPE is the builder's.
#include "emulation.hpp"
#include "numbers.cuh"

#include "lists.cu"
#include "merging.cu"

alignas(16) uint4 room[emulation::SHARED / 16];

using Add = void (*)(Raw*, const Raw*, const i64*, const i64*, int, int, int);
using Merge = void (*)(Raw*, const Raw*, const i64*, int, int, int);

extern "C" void emulate_add(
    Add kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, Raw* into, const Raw* rows,
    const i64* chunks, const i64* terms, int out, int width, int tile
) {
    emulation::run(reinterpret_cast<unsigned char*>(room), {x, y, z}, threads, shared, [&] {
        kernel(into, rows, chunks, terms, out, width, tile);
    });
}

extern "C" void emulate_merge(
    Merge kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, Raw* out, const Raw* pristine,
    const i64* term, int first_row, int rows, int width
) {
    emulation::run(reinterpret_cast<unsigned char*>(room), {x, y, z}, threads, shared, [&] {
        kernel(out, pristine, term, first_row, rows, width);
    });
}
