// Merged mode's arithmetic for CPUs, a whole tensor at a time; see merging.hpp.
//
// What limits it is memory: the pristine weights are read once and the merged ones written once, row by row; the packed
// delta is a sixteenth of that or less.

#include "merging.hpp"

namespace {

// Merges a tensor: `merge(out, pristine, first, last)` does one block of rows.
template <typename T, typename F>
void in_blocks(void* out, const void* pristine, int64_t rows, int64_t columns, int threads, F merge) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#else
    (void)threads;
#endif
    for (int64_t first = 0; first < rows; first += BLOCK)
        merge(static_cast<T*>(out) + first * columns, static_cast<const T*>(pristine), first,
              smaller(first + BLOCK, rows));
}

template <typename F>
void merge_all(void* out, const void* pristine, int64_t rows, int64_t columns, int form, int threads, F merge) {
    if (form == 0)
        in_blocks<float>(out, pristine, rows, columns, threads, merge);
    else
        in_blocks<Brain>(out, pristine, rows, columns, threads, merge);
}

}  // namespace

extern "C" {

// `form`: 0 float32, 1 bfloat16.
void switchyard_merge_planes(void* out, const void* pristine, int64_t rows, int64_t columns, int form,
                             const uint32_t* planes, float factor, int threads) {
    merge_all(out, pristine, rows, columns, form, threads, [=](auto* to, auto* from, int64_t first, int64_t last) {
        merge_planes<true>(to, from, first, last, columns, planes, factor);
    });
}

// `abreast`: whether the lists of sixteen rows lie side by side.
void switchyard_merge_sparse(void* out, const void* pristine, int64_t rows, int64_t columns, int form, int abreast,
                             const int32_t* order, const int32_t* starts, const uint16_t* entries,
                             const uint8_t* levels, float factor, int threads) {
    Lists lists = {rows, abreast != 0, order, starts, entries, levels};
    merge_all(out, pristine, rows, columns, form, threads, [=](auto* to, auto* from, int64_t first, int64_t last) {
        merge_sparse<true>(to, from, first, last, columns, lists, factor);
    });
}

// 1 where a word of a plane is the mask of an instruction.
int switchyard_merge_masks(void) { return MASKS; }
}
