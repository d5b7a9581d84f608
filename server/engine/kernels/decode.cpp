// Stored sparse tensors -> what the engine keeps; see store/encodings.py for the layouts.
//
// The bytes are anybody's: a function that returns 0 has found something that `store.encodings` refuses, which then
// says what; nobody may read what it has written. Positions become a bitmap whose ones meet their values word by word,
// or, of few nonzeros, entries of lists as they are found.

#include "laying.hpp"
#include "symbols.hpp"

namespace {

typedef uint64_t Words __attribute__((vector_size(64)));

thread_local Scratch copies, masks, lists, trees, symbols, lows;

// A tensor's streams, copied to where zeros follow them.
struct Streams {
    Positions positions;
    const uint8_t* values;
};

// False unless there is memory and the values, all bytes at the end, are not more than there are.
bool open_streams(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t numel,
                  int64_t value_bytes, Streams* out) {
    const int64_t place = bytes - value_bytes;
    if (nnz <= 0 || nnz > numel || value_bytes <= 0 || place < 0) return false;
    auto* copy = static_cast<uint8_t*>(copies.bytes(bytes + SLACK));
    if (copy == nullptr) return false;
    std::memcpy(copy, payload, static_cast<size_t>(bytes));
    std::memset(copy + bytes, 0, SLACK);
    *out = {{copy, place, nnz, numel, layout, k}, copy + place};
    return true;
}

// The same with `values` bytes of levels, or signs where that is negative.
bool open_values(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t numel, int64_t values,
                 Streams* out) {
    if (values >= 0) return open_streams(payload, bytes, layout, k, nnz, numel, values, out);
    return open_streams(payload, bytes, layout, k, nnz, numel, bytes_for(nnz), out) &&
           padded_with_zeros(out->values, nnz);
}

// The bitmap of a tensor, or null.
const uint8_t* mask_of(const Positions& from) {
    auto* mask = static_cast<uint8_t*>(masks.bytes(mask_bytes(from.numel)));
    return mask != nullptr && find_mask(from, mask) ? mask : nullptr;
}

// Calls take(index) for every nonzero, ascending.
template <typename F> bool each_index(const Positions& from, F take) {
    if (from.layout == RICE) return each_gap(from, from.nnz, take);
    const uint8_t* mask = mask_of(from);
    for (int64_t place = 0; mask != nullptr && place < from.numel; place += 64) {
        uint64_t word = word_at(mask + place / 8);
        if (word == ~uint64_t{0})
            for (int i = 0; i < 64; i++) take(place + i);
        else
            for (; word != 0; word &= word - 1) take(place + __builtin_ctzll(word));
    }
    return mask != nullptr;
}

// False unless there is memory, and the stream holds that many symbols.
bool open_symbols(const uint8_t* stream, int64_t bytes, int64_t count, Tree* tree) {
    auto* memory = static_cast<uint8_t*>(trees.bytes(Tree::memory_bytes(count)));
    return memory != nullptr && tree->open(stream, bytes, count, memory);
}

// The symbols as bytes, or null.
const uint8_t* read_symbols(const uint8_t* stream, int64_t bytes, int64_t count, Scratch* into) {
    Tree tree;
    auto* out = static_cast<uint8_t*>(into->bytes(count + SYMBOL_SLACK));
    if (out == nullptr || !open_symbols(stream, bytes, count, &tree)) return nullptr;
    tree.write(out);
    return out;
}

// The symbols of levels up to `top`, or null.
const uint8_t* read_levels(const uint8_t* stream, int64_t bytes, int64_t count, int top) {
    const uint8_t* found = read_symbols(stream, bytes, count, &symbols);
    uint8_t largest = 0;
    for (int64_t i = 0; found != nullptr && i < count; i++) largest = found[i] > largest ? found[i] : largest;
    return level_of(largest) == top ? found : nullptr;
}

// 512 symbols in planes -> their levels in balanced ternary: two planes a digit, its +1 and its -1.
inline void to_digits(const uint64_t* planes, int width, int digits, uint64_t* out, int64_t stride) {
    Words minus, value[MOST_BITS] = {}, carry = ~Words{};  // the magnitude is one more than the other bits say
    std::memcpy(&minus, planes, sizeof minus);
    for (int b = 1; b < width; b++) std::memcpy(&value[b - 1], planes + b * PLANE, sizeof *value);
    for (int digit = 0, bits = width > 0 ? width : 1; digit < digits; digit++, bits--, out += 2 * stride) {
        for (int b = 0; b < bits; b++) {
            const Words both = value[b] & carry;
            value[b] ^= carry;
            carry = both;
        }
        Words one = {}, two = {};  // what is left of the bits so far, divided by three
        for (int b = bits - 1; b >= 0; b--) {
            const Words bit = value[b], next = (two & ~bit) | (bit & ~one & ~two);
            value[b] = two | (one & bit);
            two = (one & ~bit) | (two & bit);
            one = next;
        }
        const Words above = (one & ~minus) | (two & minus), below = (two & ~minus) | (one & minus);
        std::memcpy(out, &above, sizeof above);
        std::memcpy(out + stride, &below, sizeof below);
        carry = two;  // two is three less one
    }
}

// Calls put(mask, rank, words) for 32 elements at a time: which are nonzeros, how many came before, and where the first
// digit's +1 go in the words of `BitPlanes`.
template <typename F>
inline void each_word(const uint8_t* mask, int64_t rows, int64_t columns, int digits, uint32_t* planes, F put) {
    const int64_t words = blocks_of(columns), size = digits * words * 2 * BLOCK;
    int64_t rank = 0;
    for (int64_t first = 0; first < rows; first += BLOCK, planes += size) {
        const int64_t here = smaller(rows - first, BLOCK);
        if (here < BLOCK) std::memset(planes, 0, static_cast<size_t>(size) * sizeof(uint32_t));
        for (int64_t r = 0; r < here; r++) {
            const int64_t start = (first + r) * columns;
            for (int64_t j = 0; j < words; j++) {
                const int64_t left = smaller(columns - j * BLOCK, BLOCK);
                auto word = static_cast<uint32_t>(bits_at(mask, start + j * BLOCK) & lowest(left));
                put(word, rank, planes + j * 2 * BLOCK + r);
                rank += __builtin_popcount(word);
            }
        }
    }
}

void signs_to_planes(const uint8_t* mask, const uint8_t* signs, int64_t rows, int64_t columns, uint32_t* planes) {
    each_word(mask, rows, columns, 1, planes, [&](uint32_t word, int64_t rank, uint32_t* out) INLINE {
        uint32_t plus = deposit(static_cast<uint32_t>(bits_at(signs, rank)), word);
        out[0] = plus;
        out[BLOCK] = word ^ plus;
    });
}

// False unless the stream holds levels up to `top`.
bool levels_to_planes(const Positions& at, const uint8_t* mask, const uint8_t* stream, int64_t bytes, int top,
                      int64_t rows, int64_t columns, int digits, uint32_t* planes) {
    Tree tree;
    const int64_t stride = (at.nnz + TAKEN) / 64 + SLACK / 8, next = blocks_of(columns) * 2 * BLOCK;
    auto* memory = static_cast<uint64_t*>(symbols.bytes(2 * digits * stride * sizeof(uint64_t)));
    if (memory == nullptr || !open_symbols(stream, bytes, at.nnz, &tree)) return false;
    int largest = 0;
    tree.each_part([&](const uint64_t* part, int64_t first, int64_t count) {
        const int here = tree.largest(part, count);
        largest = here > largest ? here : largest;
        for (int64_t i = 0; i < count; i += 512)
            to_digits(part + i / 64, tree.width(), digits, memory + (first + i) / 64, stride);
    });
    if (level_of(largest) != top) return false;
    each_word(mask, rows, columns, digits, planes, [&](uint32_t word, int64_t rank, uint32_t* out) INLINE {
        auto* from = reinterpret_cast<const uint8_t*>(memory);
        for (int digit = 0; digit < digits; digit++, out += next)
            for (int sign = 0; sign < 2; sign++, from += 8 * stride)
                out[sign * BLOCK] = deposit(static_cast<uint32_t>(bits_at(from, rank)), word);
    });
    return true;
}

// Entries of `SparseRows` in the order of the rows, and how many each row has; indices come ascending.
template <typename F>
bool find_entries(const Positions& from, int64_t rows, int64_t columns, uint16_t* entries, int32_t* counts,
                  F negative) {
    std::memset(counts, 0, static_cast<size_t>(rows) * sizeof(int32_t));
    int64_t start = 0, rank = 0;
    return each_index(from, [&](int64_t index) {
        while (index - start >= columns) start += columns, counts++;
        entries[rank] = static_cast<uint16_t>(2 * (index - start) + negative(rank));
        rank++;
        ++*counts;
    });
}

// What is found of lists, or nothing: `counts` is null.
Found found_lists(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t rows, int64_t columns,
                  int64_t values, int top) {
    Streams from;
    if (!open_values(payload, bytes, layout, k, nnz, rows * columns, values, &from)) return {};
    const uint8_t* own = values < 0 ? from.values : read_levels(from.values, values, nnz, top);
    auto* counts = static_cast<int32_t*>(lists.bytes(rows * 4 + nnz * 2));
    if (counts == nullptr || own == nullptr) return {};
    auto* entries = reinterpret_cast<uint16_t*>(counts + rows);
    auto minus = [own](int64_t i) { return ~(own[i >> 3] >> (i & 7)) & 1; };
    auto odd = [own](int64_t i) { return own[i] & 1; };
    if (values < 0 ? !find_entries(from.positions, rows, columns, entries, counts, minus)
                   : !find_entries(from.positions, rows, columns, entries, counts, odd))
        return {};
    return {entries, own, counts};
}

}  // namespace

extern "C" {

// `layout`: 0 bitmap, 1 Rice code, 2 Rice code of the zeros; 1 <= k <= 24; `numel` or rows * columns < 2^31.
// `values`: bytes that levels up to `top`, 1 to 127, take at the end of the payload; negative where there are signs.

int switchyard_decode_planes(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t rows,
                             int64_t columns, int64_t values, int top, int digits, uint32_t* planes) {
    Streams from;
    if (!open_values(payload, bytes, layout, k, nnz, rows * columns, values, &from)) return 0;
    const uint8_t* mask = mask_of(from.positions);
    if (mask == nullptr) return 0;
    if (values >= 0)
        return levels_to_planes(from.positions, mask, from.values, values, top, rows, columns, digits, planes);
    signs_to_planes(mask, from.values, rows, columns, planes);
    return 1;
}

// `levels` is null where `top` is 1.
int switchyard_decode_sparse(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t rows,
                             int64_t columns, int64_t values, int top, int32_t* order, int32_t* starts,
                             uint16_t* entries, uint8_t* levels) {
    const Found found = found_lists(payload, bytes, layout, k, nnz, rows, columns, values, top);
    if (found.counts == nullptr) return 0;
    abreast(found, rows, {order, starts, entries, levels});
    return 1;
}

// The same as lists in bytes; how many vectors they take, or -1 where that is more than `most`.
int64_t switchyard_decode_bytes(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t rows,
                                int64_t columns, int64_t values, int top, int64_t most, uint8_t* places,
                                int32_t* starts, uint8_t* pieces, uint8_t* entries, uint8_t* levels) {
    const Found found = found_lists(payload, bytes, layout, k, nnz, rows, columns, values, top);
    if (found.counts == nullptr) return 0;
    return in_bytes(found, rows, columns, {places, pieces, entries, levels, starts, most});
}

// `high` and `low`: bytes that the two streams of steps take.
int switchyard_decode_steps(const uint8_t* payload, int64_t bytes, int layout, int k, int64_t nnz, int64_t numel,
                            int64_t high, int64_t low, int32_t* indices, uint16_t* steps) {
    Streams from;
    if (high <= 0 || low <= 0 || !open_streams(payload, bytes, layout, k, nnz, numel, high + low, &from)) return 0;
    const uint8_t* upper = read_symbols(from.values, high, nnz, &symbols);
    const uint8_t* lower = upper == nullptr ? nullptr : read_symbols(from.values + high, low, nnz, &lows);
    if (lower == nullptr) return 0;
    int none = 0;
    for (int64_t i = 0; i < nnz; i++) {
        const auto folded = static_cast<uint16_t>((upper[i] << 8 | lower[i]) + 1);
        none |= folded == 0;
        steps[i] = static_cast<uint16_t>(folded >> 1 ^ -(folded & 1));
    }
    int64_t rank = 0;
    return !none && each_index(from.positions, [&](int64_t index) { indices[rank++] = static_cast<int32_t>(index); });
}
}
