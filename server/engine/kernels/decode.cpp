// Stored ternary tensors -> what mixed mode reads, in one pass over the bytes; see store/positions.py for the layouts.
//
// The bytes are anybody's: a stream is never read beyond its end, and a function that returns 0 has found something
// that `store.encodings.decode` refuses, which then says what. Positions become a bitmap whose ones meet their signs
// word by word, or, of few nonzeros, entries of lists as they are found.

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

thread_local Scratch copies, masks, lists;

inline int64_t bytes_for(int64_t bits) { return (bits + 7) / 8; }

inline uint64_t word_at(const uint8_t* from) {
    uint64_t word;
    std::memcpy(&word, from, sizeof(word));
    return word;
}

// 57 bits or more of a stream, from any bit on.
inline uint64_t bits_at(const uint8_t* stream, int64_t bit) { return word_at(stream + (bit >> 3)) >> (bit & 7); }

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

// A tensor's streams, copied to where zeros follow them.
struct Streams {
    const uint8_t* positions;
    const uint8_t* signs;
    int64_t position_bytes;
    int64_t nnz, numel;
    int layout, k;
};

// Calls take(index) for every position of a Rice code, ascending. The parts are those of store/positions.py.
template <typename F> bool each_gap(const Streams& from, int64_t count, F take) {
    const int k = from.k;
    const int64_t unary_bytes = from.position_bytes - bytes_for(count * k);
    const int64_t most = count == 0 ? 0 : bytes_for(count + (from.numel >> k));
    if (unary_bytes < bytes_for(count) || unary_bytes > most) return false;
    const uint8_t* remainders = from.positions + unary_bytes;
    if (!padded_with_zeros(remainders, count * k)) return false;
    if (unary_bytes > 0 && from.positions[unary_bytes - 1] == 0) return false;
    const uint64_t low = lowest(k);
    int64_t i = 0, sum = 0;
    for (int64_t place = 0; place < unary_bytes; place += 8) {
        uint64_t word = word_at(from.positions + place) & lowest(8 * (unary_bytes - place));
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

bool find_mask(const Streams& from, uint8_t* memory) {
    const int64_t bytes = bytes_for(from.numel), all = mask_bytes(from.numel);
    if (from.layout == BITMAP) {
        if (from.position_bytes != bytes || !padded_with_zeros(from.positions, from.numel)) return false;
        std::memcpy(memory, from.positions, static_cast<size_t>(bytes));
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

// The words of `BitPlanes` with one digit.
void to_planes(const uint8_t* mask, const uint8_t* signs, int64_t rows, int64_t columns, uint32_t* planes) {
    const int64_t words = (columns + BLOCK - 1) / BLOCK;
    int64_t rank = 0;
    for (int64_t first = 0; first < rows; first += BLOCK, planes += words * 2 * BLOCK) {
        const int64_t here = rows - first < BLOCK ? rows - first : BLOCK;
        if (here < BLOCK) std::memset(planes, 0, static_cast<size_t>(words * 2 * BLOCK) * sizeof(uint32_t));
        for (int64_t r = 0; r < here; r++) {
            const int64_t start = (first + r) * columns;
            for (int64_t j = 0; j < words; j++) {
                const int64_t left = columns - j * BLOCK;
                auto word = static_cast<uint32_t>(bits_at(mask, start + j * BLOCK) & lowest(left < BLOCK ? left : BLOCK));
                uint32_t plus = deposit(static_cast<uint32_t>(bits_at(signs, rank)), word);
                rank += __builtin_popcount(word);
                planes[j * 2 * BLOCK + r] = plus;
                planes[j * 2 * BLOCK + BLOCK + r] = word ^ plus;
            }
        }
    }
}

// Entries of `SparseRows` in the order of the rows, and how many each row has; indices come ascending.
class Lists {
  public:
    Lists(const uint8_t* signs, int64_t rows, int64_t columns, uint16_t* entries, int32_t* counts)
        : signs_(signs), columns_(columns), entries_(entries), counts_(counts) {
        std::memset(counts, 0, static_cast<size_t>(rows) * sizeof(int32_t));
    }
    void operator()(int64_t index) {
        while (index - start_ >= columns_) start_ += columns_, counts_++;
        const int64_t negative = 1 - (signs_[rank_ >> 3] >> (rank_ & 7) & 1);
        entries_[rank_++] = static_cast<uint16_t>(2 * (index - start_) + negative);
        ++*counts_;
    }

  private:
    const uint8_t* signs_;
    int64_t columns_;
    uint16_t* entries_;
    int32_t* counts_;
    int64_t start_ = 0, rank_ = 0;
};

// Lists within each block of rows by length, longest first, rows of one length as they were; those of sixteen rows
// abreast, as sparse.hpp reads them.
void in_order(const uint16_t* natural, const int32_t* counts, int64_t rows, int32_t* order, int32_t* starts,
              uint16_t* entries) {
    int32_t end = 0;
    *starts++ = 0;
    for (int64_t first = 0; first < rows; first += BLOCK) {
        const int here = static_cast<int>(rows - first < BLOCK ? rows - first : BLOCK);
        const uint16_t* from[BLOCK];
        int32_t row[BLOCK], count[BLOCK];
        for (int32_t r = 0, at = end; r < here; at += counts[first + r++]) {
            int place = r;
            for (; place > 0 && count[place - 1] < counts[first + r]; place--)
                row[place] = row[place - 1], count[place] = count[place - 1], from[place] = from[place - 1];
            row[place] = r, count[place] = counts[first + r], from[place] = natural + at;
        }
        for (int i = 0; i < here; i++) {
            *order++ = static_cast<int32_t>(first) + row[i];
            *starts = starts[-1] + count[i];
            starts++;
        }
        for (int group = 0; group < here; group += ABREAST_LISTS) {
            int left = static_cast<int>(smaller(here - group, ABREAST_LISTS));
            for (int32_t k = 0; k < count[group]; k++) {
                while (count[group + left - 1] <= k) left--;
                for (int l = 0; l < left; l++) entries[end++] = from[group + l][k];
            }
        }
    }
}

// False unless there is memory and the signs fit.
bool open_streams(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t numel, Streams* out) {
    const int64_t place = bytes - bytes_for(nnz);
    if (nnz <= 0 || nnz > numel || place < 0 || !padded_with_zeros(payload + place, nnz)) return false;
    auto* copy = static_cast<uint8_t*>(copies.bytes(bytes + SLACK));
    if (copy == nullptr) return false;
    std::memcpy(copy, payload, static_cast<size_t>(bytes));
    std::memset(copy + bytes, 0, SLACK);
    *out = {copy, copy + place, place, nnz, numel, layout, k};
    return true;
}

}  // namespace

extern "C" {

// `layout`: 0 bitmap, 1 Rice code, 2 Rice code of the zeros; 1 <= k <= 24; rows * columns < 2^31.

int switchyard_decode_planes(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t rows,
                             int64_t columns, uint32_t* planes) {
    Streams from;
    if (!open_streams(payload, bytes, layout, k, nnz, rows * columns, &from)) return 0;
    auto* mask = static_cast<uint8_t*>(masks.bytes(mask_bytes(from.numel)));
    if (mask == nullptr || !find_mask(from, mask)) return 0;
    to_planes(mask, from.signs, rows, columns, planes);
    return 1;
}

int switchyard_decode_sparse(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t rows,
                             int64_t columns, int32_t* order, int32_t* starts, uint16_t* entries) {
    Streams from;
    if (!open_streams(payload, bytes, layout, k, nnz, rows * columns, &from)) return 0;
    auto* counts = static_cast<int32_t*>(lists.bytes(rows * 4 + nnz * 2));
    if (counts == nullptr) return 0;
    auto* natural = reinterpret_cast<uint16_t*>(counts + rows);
    Lists found(from.signs, rows, columns, natural, counts);
    if (layout == RICE) {
        if (!each_gap(from, nnz, [&](int64_t index) { found(index); })) return 0;
    } else {
        auto* mask = static_cast<uint8_t*>(masks.bytes(mask_bytes(from.numel)));
        if (mask == nullptr || !find_mask(from, mask)) return 0;
        for (int64_t place = 0; place < from.numel; place += 64)
            for (uint64_t word = word_at(mask + place / 8); word != 0; word &= word - 1)
                found(place + __builtin_ctzll(word));
    }
    in_order(natural, counts, rows, order, starts, entries);
    return 1;
}
}
