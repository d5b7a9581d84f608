// Merged mode's arithmetic for CPUs: out = pristine + factor * delta, each element rounded once, in one pass.
//
// What limits it is memory: the pristine weights are read once and the merged ones written once, row by row; the packed
// delta is a sixteenth of that or less. A word of a plane is the mask of the vector instruction that adds or subtracts.
// The layouts are those of server/engine/kernels/types.py.

#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#include <immintrin.h>
#define MASKS 1
#else
#define MASKS 0
#endif

namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t MOST_COLUMNS = 1 << 15;  // of a list of nonzeros: its entries are 16 bits, sign included

struct Brain { uint16_t bits; };  // bfloat16

inline float widened(float x) { return x; }
inline float widened(Brain x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void narrow(float x, float* out) { *out = x; }
// To the nearest, ties to even; NaN becomes the one that PyTorch makes of it.
inline void narrow(float x, Brain* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    out->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#if MASKS
inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load(const Brain* x) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
inline void store(Brain* out, __m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
}
#endif

// 32 columns of one row, or the `valid` first of them.
template <typename T>
inline void merge_word(T* out, const T* pristine, uint32_t plus, uint32_t minus, float factor, int64_t valid) {
#if MASKS
    if (valid >= BLOCK) {
        __m512 step = _mm512_set1_ps(factor);
        for (int half = 0; half < 2; half++) {
            __m512 x = load(pristine + 16 * half);
            x = _mm512_mask_add_ps(x, __mmask16(plus >> (16 * half)), x, step);
            x = _mm512_mask_sub_ps(x, __mmask16(minus >> (16 * half)), x, step);
            store(out + 16 * half, x);
        }
        return;
    }
#endif
    int count = valid < BLOCK ? int(valid) : int(BLOCK);
    for (int c = 0; c < count; c++) {
        float level = float(int32_t((plus >> c) & 1) - int32_t((minus >> c) & 1));
        narrow(widened(pristine[c]) + level * factor, out + c);  // exact products: a fused addition rounds alike
    }
}

template <typename T>
void merge_planes(T* out, const T* pristine, int64_t rows, int64_t columns, const uint32_t* planes, float factor,
                  int threads) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK, words = (columns + BLOCK - 1) / BLOCK;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t r = 0; r < BLOCK && b * BLOCK + r < rows; r++) {
            const uint32_t* word = planes + b * words * 2 * BLOCK + r;
            int64_t place = (b * BLOCK + r) * columns;
            for (int64_t j = 0; j < words; j++, word += 2 * BLOCK)
                merge_word(out + place + j * BLOCK, pristine + place + j * BLOCK, word[0], word[BLOCK], factor,
                           columns - j * BLOCK);
        }
}

// One row, by masks: setting a bit takes a fraction of the time that changing a number does.
template <typename T>
inline void merge_list(T* out, const T* pristine, int64_t columns, const uint16_t* entry, const uint16_t* end,
                       float factor) {
    uint32_t bits[MOST_COLUMNS / BLOCK][2];
    int64_t words = (columns + BLOCK - 1) / BLOCK;
    std::memset(bits, 0, words * sizeof bits[0]);
    for (; entry < end; entry++) {
        uint32_t e = *entry;
        bits[e >> 6][e & 1] |= 1u << ((e >> 1) & 31);
    }
    for (int64_t j = 0; j < words; j++)
        merge_word(out + j * BLOCK, pristine + j * BLOCK, bits[j][0], bits[j][1], factor, columns - j * BLOCK);
}

// One row of several magnitudes, worth `values` each.
template <typename T>
inline void merge_levels(T* out, const T* pristine, int64_t columns, const uint16_t* entry, const uint16_t* end,
                         const uint8_t* level, const float* values) {
    std::memcpy(out, pristine, columns * sizeof(T));
    for (; entry < end; entry++, level++) {
        int64_t column = *entry >> 1;
        narrow(widened(pristine[column]) + (*entry & 1 ? -values[*level] : values[*level]), out + column);
    }
}

template <typename T>
void merge_sparse(T* out, const T* pristine, int64_t rows, int64_t columns, const int32_t* order,
                  const int32_t* starts, const uint16_t* entries, const uint8_t* levels, float factor, int threads) {
    // Rounded here, so that no product is fused with its addition.
    float values[256];
    for (int level = 0; level < 256; level++) values[level] = float(level) * factor;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
    for (int64_t first = 0; first < rows; first += BLOCK) {
        // Lists are sorted by length within a block. Weights are walked through as they lie: memory is read ahead.
        int64_t place[BLOCK], count = rows - first < BLOCK ? rows - first : BLOCK;
        for (int64_t i = first; i < first + count; i++) place[order[i] - first] = i;
        for (int64_t r = 0; r < count; r++) {
            T* to = out + (first + r) * columns;
            const T* from = pristine + (first + r) * columns;
            int32_t start = starts[place[r]], stop = starts[place[r] + 1];
            if (levels == nullptr)
                merge_list(to, from, columns, entries + start, entries + stop, factor);
            else
                merge_levels(to, from, columns, entries + start, entries + stop, levels + start, values);
        }
    }
}

}  // namespace

extern "C" {

// `form`: 0 float32, 1 bfloat16.
void switchyard_merge_planes(void* out, const void* pristine, int64_t rows, int64_t columns, int form,
                             const uint32_t* planes, float factor, int threads) {
    if (form == 0)
        merge_planes(static_cast<float*>(out), static_cast<const float*>(pristine), rows, columns, planes, factor,
                     threads);
    else
        merge_planes(static_cast<Brain*>(out), static_cast<const Brain*>(pristine), rows, columns, planes, factor,
                     threads);
}

void switchyard_merge_sparse(void* out, const void* pristine, int64_t rows, int64_t columns, int form,
                             const int32_t* order, const int32_t* starts, const uint16_t* entries,
                             const uint8_t* levels, float factor, int threads) {
    if (form == 0)
        merge_sparse(static_cast<float*>(out), static_cast<const float*>(pristine), rows, columns, order, starts,
                     entries, levels, factor, threads);
    else
        merge_sparse(static_cast<Brain*>(out), static_cast<const Brain*>(pristine), rows, columns, order, starts,
                     entries, levels, factor, threads);
}

// 1 where a word of a plane is the mask of an instruction.
int switchyard_merge_masks(void) { return MASKS; }
}
