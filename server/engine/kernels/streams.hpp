// Streams of bits that a stranger wrote, and the positions they tell; see store/bits.py and store/positions.py.
//
// A stream is never read beyond its end but for SLACK, and what returns false has found something that
// `store.positions.decode_positions` refuses.
#pragma once

#include "sparse.hpp"

#if defined(__BMI2__)
#include <immintrin.h>
#endif

// The first two generations of Zen have the instruction, but take a hundred times as long for it.
#if defined(__BMI2__) && defined(__x86_64__) && !defined(__znver1__) && !defined(__znver2__) && !defined(PORTABLE)
#define DEPOSITS 1
#else
#define DEPOSITS 0
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "streams are read as little-endian words");

namespace {

constexpr int64_t WINDOW = 4096;  // elements that are marked before their marks become bits
constexpr int64_t SLACK = 16;     // zeros after a stream, so that whole words can be read

enum Layout : int { BITMAP = 0, RICE = 1, RICE_ZEROS = 2 };

inline int64_t bytes_for(int64_t bits) { return (bits + 7) / 8; }

inline uint64_t word_at(const uint8_t* from) {
    uint64_t word;
    std::memcpy(&word, from, sizeof(word));
    return word;
}

// 57 bits or more of a stream, from any bit on.
inline uint64_t bits_at(const uint8_t* stream, int64_t bit) { return word_at(stream + (bit >> 3)) >> (bit & 7); }

// 64 bits of a stream.
inline uint64_t word_from(const uint8_t* stream, int64_t bit) {
    const uint8_t* from = stream + (bit >> 3);
    return word_at(from) >> (bit & 7) | uint64_t{from[8]} << 1 << (63 - (bit & 7));
}

inline uint64_t lowest(int64_t bits) { return bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

inline bool padded_with_zeros(const uint8_t* stream, int64_t bits) {
    return bits % 8 == 0 || stream[bits / 8] >> (bits % 8) == 0;
}

// The lowest bits of `bits`, one after the other, to where the mask has its ones.
inline uint32_t deposit(uint32_t bits, uint32_t mask) {
#if DEPOSITS
    return _pdep_u32(bits, mask);
#else
    uint32_t out = 0;
    for (; mask != 0; mask &= mask - 1, bits >>= 1) out |= (0u - (bits & 1)) & mask & (0u - mask);
    return out;
#endif
}

// The same of 64 bits, for one mask and several of what goes there.
class Deposit {
  public:
#if DEPOSITS
    explicit Deposit(uint64_t mask) : mask_(mask) {}
    uint64_t operator()(uint64_t bits) const { return _pdep_u64(bits, mask_); }
#else
    // Warren, Hacker's Delight: by how much each bit has to move up, a binary digit of it at a time.
    explicit Deposit(uint64_t mask) : mask_(mask) {
        uint64_t holes = ~mask << 1;
        for (int i = 0; i < 6; i++) {
            uint64_t odd = holes ^ holes << 1;
            for (int step = 2; step < 64; step *= 2) odd ^= odd << step;
            moved_[i] = odd & mask;
            mask = (mask ^ moved_[i]) | moved_[i] >> (1 << i);
            holes &= ~odd;
        }
    }
    uint64_t operator()(uint64_t bits) const {
        for (int i = 5; i >= 0; i--) bits = (bits & ~moved_[i]) | (bits << (1 << i) & moved_[i]);
        return bits & mask_;
    }
#endif

  private:
    uint64_t mask_;
#if !DEPOSITS
    uint64_t moved_[6];
#endif
};

// Bit i says whether byte i is 0xFF; the others are 0.
inline uint64_t marked(const uint8_t* marks) {
#if defined(__AVX2__) && !defined(PORTABLE)
    auto half = [](const uint8_t* from) {
        auto bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
    };
    return half(marks) | static_cast<uint64_t>(half(marks + 32)) << 32;
#else
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++)
        bits |= ((word_at(marks + 8 * i) & 0x0101010101010101) * 0x0102040810204080 >> 56) << (8 * i);
    return bits;
#endif
}

// Where `nnz` of so many elements are.
struct Positions {
    const uint8_t* stream;
    int64_t bytes;
    int64_t nnz, numel;
    int layout, k;
};

// Calls take(index) for every position of a Rice code, ascending. The parts are those of store/positions.py.
template <typename F> bool each_gap(const Positions& from, int64_t count, F take) {
    const int k = from.k;
    const int64_t unary_bytes = from.bytes - bytes_for(count * k);
    const int64_t most = count == 0 ? 0 : bytes_for(count + (from.numel >> k));
    if (unary_bytes < bytes_for(count) || unary_bytes > most) return false;
    const uint8_t* remainders = from.stream + unary_bytes;
    if (!padded_with_zeros(remainders, count * k)) return false;
    if (unary_bytes > 0 && from.stream[unary_bytes - 1] == 0) return false;
    const uint64_t low = lowest(k);
    int64_t i = 0, sum = 0;
    for (int64_t place = 0; place < unary_bytes; place += 8) {
        uint64_t word = word_at(from.stream + place) & lowest(8 * (unary_bytes - place));
        if (__builtin_popcountll(word) > count - i) return false;
        for (; word != 0; word &= word - 1, i++) {
            sum += static_cast<int64_t>(bits_at(remainders, i * k) & low);
            int64_t index = ((8 * place + __builtin_ctzll(word) - i) << k) + sum + i;
            if (index >= from.numel) return false;
            take(index);
        }
    }
    return i == count;
}

// Ascending positions -> a bitmap, by way of a byte per element: no store waits for the one before.
class Marks {
  public:
    explicit Marks(uint64_t* mask) : mask_(mask) { std::memset(marks_, 0, WINDOW); }
    void operator()(int64_t index) {
        while (index - first_ >= WINDOW) flush();
        marks_[index - first_] = 0xFF;
    }
    void flush() {
        for (int64_t i = 0; i < WINDOW; i += 64) *mask_++ = marked(marks_ + i);
        std::memset(marks_, 0, WINDOW);
        first_ += WINDOW;
    }
    int64_t done() const { return first_; }

  private:
    alignas(64) uint8_t marks_[WINDOW];
    uint64_t* mask_;
    int64_t first_ = 0;
};

// The bitmap of all nonzeros, zeros after it; null where the streams are wrong. `memory` is `mask_bytes` long.
inline int64_t mask_bytes(int64_t numel) { return (numel + WINDOW - 1) / WINDOW * WINDOW / 8 + SLACK; }

bool find_mask(const Positions& from, uint8_t* memory) {
    const int64_t bytes = bytes_for(from.numel), all = mask_bytes(from.numel);
    if (from.layout == BITMAP) {
        if (from.bytes != bytes || !padded_with_zeros(from.stream, from.numel)) return false;
        std::memcpy(memory, from.stream, static_cast<size_t>(bytes));
        std::memset(memory + bytes, 0, static_cast<size_t>(all - bytes));
    } else {
        const bool zeros = from.layout == RICE_ZEROS;
        Marks marks(reinterpret_cast<uint64_t*>(memory));
        if (!each_gap(from, zeros ? from.numel - from.nnz : from.nnz, [&](int64_t index) { marks(index); }))
            return false;
        while (marks.done() < from.numel) marks.flush();
        std::memset(memory + all - SLACK, 0, SLACK);
        if (zeros) {
            for (int64_t i = 0; i < bytes; i++) memory[i] = static_cast<uint8_t>(~memory[i]);
            if (from.numel % 8) memory[bytes - 1] &= static_cast<uint8_t>(lowest(from.numel % 8));
        }
        return true;  // the gaps have been counted
    }
    int64_t ones = 0;
    for (int64_t i = 0; i < bytes; i += 8) ones += __builtin_popcountll(word_at(memory + i));
    return ones == from.nnz;
}

}  // namespace
