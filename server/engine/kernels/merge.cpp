// Merged mode's arithmetic for CPUs, a whole tensor at a time; see merging.hpp.
//
// What limits it is memory: the pristine weights are read once and the merged ones written once, row by row; a packed
// delta is a sixteenth of that or less.

#include "merging.hpp"

namespace {

// One term that sets and adds nothing: the bits of a fine-tune come out.
template <typename T>
void overwrite(T* out, const T* pristine, int64_t first, int64_t last, int64_t columns, const Term& term) {
    std::memcpy(out, pristine + first * columns, (last - first) * columns * sizeof(T));
    each_new(term, first * columns, last * columns,
             [&](int64_t place, Brain value) { narrow(widened(value), out + (place - first * columns)); });
}

template <typename T>
void merge_all(T* out, const T* pristine, int64_t rows, int64_t columns, const Term* terms, int64_t count,
               int threads) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#else
    (void)threads;
#endif
    for (int64_t first = 0; first < rows; first += BLOCK) {
        int64_t last = smaller(first + BLOCK, rows);
        T* to = out + first * columns;
        if (count == 1 && terms->form == OVERWRITES && terms->factor == 1)
            overwrite(to, pristine, first, last, columns, *terms);
        else
            merge_block<true>(to, pristine, first, last, columns,
                              lay_out_all(terms, count, pristine, {first, rows, columns}), count);
    }
}

}  // namespace

extern "C" {

// out = pristine + the sum of factor * delta over the terms, at least one, whose batch rows say nothing. `form`: 0 float32,
// 1 bfloat16.
void switchyard_merge(void* out, const void* pristine, int64_t rows, int64_t columns, int form, const void* records,
                      int64_t count, int threads) {
    const Term* terms = static_cast<const Term*>(records);
    if (form == 0)
        merge_all(static_cast<float*>(out), static_cast<const float*>(pristine), rows, columns, terms, count, threads);
    else
        merge_all(static_cast<Brain*>(out), static_cast<const Brain*>(pristine), rows, columns, terms, count, threads);
}

// 1 where a word of a plane is the mask of an instruction.
int switchyard_merge_masks(void) { return MASKS; }
}
