// Thirty-two numbers of a row at once, in registers: what merging adds up, and rounds once.
//
// A word of a plane is the mask of the vector instruction that adds or subtracts. Products are rounded before they are
// added: none is fused with its addition.
#pragma once

#include "native.hpp"
#include "products.hpp"
#include "vectors.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(PORTABLE)
#define MASKS 1
#else
#define MASKS 0
#endif

namespace {

inline void narrow(float x, float* out) { *out = x; }
// To the nearest, ties to even; NaN becomes the one that PyTorch makes of it.
inline void narrow(float x, Brain* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    out->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#if MASKS

struct Numbers {
    __m512 part[2] = {};
};
struct Bytes {
    __m256i all;
};

INLINE inline __m512 some(const float* from, int64_t valid) { return _mm512_maskz_loadu_ps(first_lanes(valid), from); }
INLINE inline __m512 some(const Brain* from, int64_t valid) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(valid), from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// The `valid` first of them; zeros follow.
template <typename T> INLINE inline Numbers numbers_at(const T* from, int64_t valid) {
    return {{some(from, valid), some(from + 16, valid - 16)}};
}

INLINE inline void add_numbers(Numbers& total, const Numbers& other) {
    for (int i = 0; i < 2; i++) total.part[i] = _mm512_add_ps(total.part[i], other.part[i]);
}

// += factor where plus has a bit, -= factor where minus has one.
INLINE inline void add_signs(Numbers& total, uint32_t plus, uint32_t minus, float factor) {
    const __m512 step = _mm512_set1_ps(factor);
    for (int i = 0; i < 2; i++) {
        __m512 sum = _mm512_mask_add_ps(total.part[i], __mmask16(plus >> 16 * i), total.part[i], step);
        total.part[i] = _mm512_mask_sub_ps(sum, __mmask16(minus >> 16 * i), sum, step);
    }
}

INLINE inline void add_products(Numbers& total, const Numbers& values, float factor) {
    const int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;  // an instruction that is not fused
    for (int i = 0; i < 2; i++) {
        __m512 product = _mm512_mul_round_ps(values.part[i], _mm512_set1_ps(factor), rounding);
        total.part[i] = _mm512_add_ps(total.part[i], product);
    }
}

INLINE inline Bytes all_bytes(int value) { return {_mm256_set1_epi8(char(value))}; }
INLINE inline Bytes bytes_at(const int8_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
// += power where plus has a bit, -= power where minus has one; what exceeds a byte on the way cancels out.
INLINE inline void add_digit(Bytes& bytes, uint32_t plus, uint32_t minus, int power) {
    const __m256i worth = _mm256_set1_epi8(char(power));
    __m256i sum = _mm256_mask_add_epi8(bytes.all, plus, bytes.all, worth);
    bytes.all = _mm256_mask_sub_epi8(sum, minus, sum, worth);
}
INLINE inline __m512i sixteen(const Bytes& bytes, int half) {
    return _mm512_cvtepi8_epi32(half ? _mm256_extracti128_si256(bytes.all, 1) : _mm256_castsi256_si128(bytes.all));
}
INLINE inline Numbers numbers_of(const Bytes& bytes) {
    return {{_mm512_cvtepi32_ps(sixteen(bytes, 0)), _mm512_cvtepi32_ps(sixteen(bytes, 1))}};
}
// table[which], of 32.
INLINE inline Numbers looked_up(const Numbers& table, const Bytes& which) {
    return {{_mm512_permutex2var_ps(table.part[0], sixteen(which, 0), table.part[1]),
             _mm512_permutex2var_ps(table.part[0], sixteen(which, 1), table.part[1])}};
}

INLINE inline void put(float* out, const Numbers& x, int64_t valid) {
    _mm512_mask_storeu_ps(out, first_lanes(valid), x.part[0]);
    _mm512_mask_storeu_ps(out + 16, first_lanes(valid - 16), x.part[1]);
}
INLINE inline __m256i rounded16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
INLINE inline void put(Brain* out, const Numbers& x, int64_t valid) {
#if PAIRS
    const int strange = 0x01 | 0x20 | 0x80;  // NaN, and next to zero: the instruction treats them in its own way
    __mmask16 any = _mm512_fpclass_ps_mask(x.part[0], strange) | _mm512_fpclass_ps_mask(x.part[1], strange);
    if (valid >= BLOCK && __builtin_expect(any == 0, 1))
        return _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(x.part[1], x.part[0]));
#endif
    _mm256_mask_storeu_epi16(out, first_lanes(valid), rounded16(x.part[0]));
    _mm256_mask_storeu_epi16(out + 16, first_lanes(valid - 16), rounded16(x.part[1]));
}

#else

struct Numbers {
    float at[BLOCK] = {};
};
struct Bytes {
    int8_t all[BLOCK];
};

template <typename T> inline Numbers numbers_at(const T* from, int64_t valid) {
    Numbers numbers;
    for (int64_t c = 0; c < smaller(valid, BLOCK); c++) numbers.at[c] = widened(from[c]);
    return numbers;
}

inline void add_numbers(Numbers& total, const Numbers& other) {
    for (int c = 0; c < BLOCK; c++) total.at[c] += other.at[c];
}

inline void add_signs(Numbers& total, uint32_t plus, uint32_t minus, float factor) {
    for (int c = 0; c < BLOCK; c++)  // exact products: a fused addition rounds alike
        total.at[c] += float(int32_t((plus >> c) & 1) - int32_t((minus >> c) & 1)) * factor;
}

inline void add_products(Numbers& total, const Numbers& values, float factor) {
    Numbers products;
    for (int c = 0; c < BLOCK; c++) products.at[c] = values.at[c] * factor;
    asm volatile("" : : "r"(products.at) : "memory");
    add_numbers(total, products);
}

inline Bytes bytes_at(const int8_t* from) {
    Bytes bytes;
    std::memcpy(bytes.all, from, sizeof bytes.all);
    return bytes;
}
inline Bytes all_bytes(int value) {
    Bytes bytes;
    std::memset(bytes.all, value, sizeof bytes.all);
    return bytes;
}
inline void add_digit(Bytes& bytes, uint32_t plus, uint32_t minus, int power) {
    for (int c = 0; c < BLOCK; c++)
        bytes.all[c] = int8_t(bytes.all[c] + power * (int((plus >> c) & 1) - int((minus >> c) & 1)));
}
inline Numbers numbers_of(const Bytes& bytes) {
    Numbers numbers;
    for (int c = 0; c < BLOCK; c++) numbers.at[c] = float(bytes.all[c]);
    return numbers;
}
inline Numbers looked_up(const Numbers& table, const Bytes& which) {
    Numbers numbers;
    for (int c = 0; c < BLOCK; c++) numbers.at[c] = table.at[which.all[c]];
    return numbers;
}

template <typename T> inline void put(T* out, const Numbers& x, int64_t valid) {
    for (int64_t c = 0; c < smaller(valid, BLOCK); c++) narrow(x.at[c], out + c);
}

#endif

// The levels whose words of all digits begin at `word`, `apart` from each other.
INLINE inline Bytes levels_of(const uint32_t* word, int64_t apart, int32_t digits) {
    Bytes levels = all_bytes(0);
    int power = 1;
    for (int32_t k = 0; k < digits; k++, power *= 3) add_digit(levels, word[k * apart], word[k * apart + BLOCK], power);
    return levels;
}

}  // namespace
