// Merged mode's arithmetic for CPUs, a whole tensor at a time; see merging.hpp and totals.hpp.
//
// What limits it is memory: the pristine weights are read once and the merged ones written once, row by row; a packed
// delta is a sixteenth of that or less.

#include "totals.hpp"

namespace {

template <typename T>
void merge_rows(T* out, const T* pristine, int64_t first, int64_t last, int64_t rows, int64_t columns,
                const Term* terms, int64_t count) {
    const Term& term = *terms;
    if (count == 1 && term.form == PLANES && term.count == 1)
        merge_planes<true>(out, pristine, first, last, columns, term.words, term.factor);
    else if (count == 1 && (term.form == SPARSE || term.form == ABREAST || term.form == IN_BYTES))
        merge_sparse<true>(out, pristine, first, last, rows, columns, term);
    else if (count == 1 && term.form == OVERWRITES && term.factor == 1)
        overwrite(out, pristine, first, last, columns, term);
    else
        merge_terms(out, pristine, first, last, rows, columns, terms, count);
}

template <typename T>
void merge_all(T* out, const T* pristine, int64_t rows, int64_t columns, const Term* terms, int64_t count,
               int threads) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#else
    (void)threads;
#endif
    for (int64_t first = 0; first < rows; first += BLOCK)
        merge_rows(out + first * columns, pristine, first, smaller(first + BLOCK, rows), rows, columns, terms, count);
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
