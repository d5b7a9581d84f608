// What the kernels of native.cpp have in common: terms, memory that threads keep, tables of sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Entries of the table that one permutation looks up; 0: there is no such instruction.
#ifndef PERMUTE
#if defined(__AVX512F__)
#define PERMUTE 16
#elif defined(__AVX2__)
#define PERMUTE 8
#else
#define PERMUTE 0
#endif
#endif

#define INLINE __attribute__((always_inline))

namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t LANES = 8;        // batch rows that share a table
constexpr int64_t TILE = 64;        // blocks whose sums stay in cache while tables are replaced
constexpr int64_t FEW_DENSE = 2;    // rows up to which permuting beats a table for all of them; measured
constexpr int64_t FEW_SPARSE = 3;

typedef float Row8 __attribute__((vector_size(4 * LANES)));

// DENSE and OVERWRITES are merged only: values for every element, and new values for some.
enum Form : int32_t { PLANES = 0, SPARSE = 1, ABREAST = 2, DENSE = 3, OVERWRITES = 4, IN_BYTES = 5 };

// One term of one group. Mirrors `TERM` in cpu.py.
struct Term {
    int64_t start, stop;  // batch rows
    int32_t form;
    int32_t opens;        // 1: first term of its group
    float factor;         // weight of the mix * scale
    int32_t count;        // planes: of digits; lists and overwrites: of entries; in bytes: of vectors
    const uint32_t* words;    // planes; dense: float values; overwrites: int32 places, ascending; in bytes: pieces
    const int32_t* order;     // sparse, and the following; in bytes: uint8 places
    const int32_t* starts;
    const uint16_t* entries;  // overwrites: bfloat16 values; in bytes: uint8
    const uint8_t* levels;
};
static_assert(sizeof(Term) == 72, "cpu.py packs 72 bytes");

// What terms are added to. `coarse`: whether x may be rounded to 16 bits of its row's largest number.
struct Call {
    float* y;
    const float* x;
    int64_t out, in, words, blocks;
    bool coarse;
};

// Memory that a thread keeps from call to call. Never initialised, always aligned to a cache line.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
    // Or null, if there is no more.
    void* bytes(size_t count) {
        if (count > PTRDIFF_MAX) return nullptr;
        size_t whole = (count + 63) / 64 * 64;
        if (whole > size_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(64, whole);
            size_ = memory_ == nullptr ? 0 : whole;
        }
        return memory_;
    }
    float* floats(size_t count) {
        void* memory = bytes(count * sizeof(float));
        if (memory == nullptr && count) std::abort();
        return static_cast<float*>(memory);
    }
    uint16_t* halves(size_t count) { return reinterpret_cast<uint16_t*>(floats((count + 1) / 2)); }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

thread_local Scratch inputs, tables, sums;

// The rows of x that something was made of, or none: the products of a step that read the same ones share it.
struct Origin {
    const float* from = nullptr;
    int64_t rows = 0, columns = 0;

    bool operator==(const Origin& other) const {
        return from == other.from && rows == other.rows && columns == other.columns;
    }
};

inline int64_t blocks_of(int64_t size) { return (size + BLOCK - 1) / BLOCK; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// table[c] = sum of the values whose bits are set in c.
template <int BITS, typename V> inline void subset_sums(const V* values, V factor, V* table) {
    table[0] = V{};
    for (int i = 0; i < BITS; i++) {
        V value = values[i] * factor;
        for (int c = 0; c < 1 << i; c++) table[(1 << i) + c] = table[c] + value;
    }
}

}  // namespace
