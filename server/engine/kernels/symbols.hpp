// A stream of unevenly likely bytes: the wavelet tree of store/symbols.py.
//
// All of the stream is looked at before there is a symbol. Then they come a few thousand at a time, as planes: a bit of
// each. A node asks its children for as many as its mask has zeros and ones, and puts theirs where its mask has them.
#pragma once

#include "streams.hpp"

namespace {

constexpr int MOST_BITS = 8;                  // of a symbol
constexpr int64_t TAKEN = 4096;               // symbols that are made at a time
constexpr int64_t PLANE = TAKEN / 64 + 1;     // words of a plane; the last may be read, but says nothing
constexpr int MOST_NODES = 1 << MOST_BITS;    // one more than a tree has
constexpr int64_t SYMBOL_SLACK = 64;          // bytes after the symbols that may be written

// Bit c of byte r to bit r of byte c; Warren, Hacker's Delight.
inline uint64_t transposed(uint64_t bytes) {
    uint64_t moved = (bytes ^ bytes >> 7) & 0x00AA00AA00AA00AA;
    bytes ^= moved ^ moved << 7;
    moved = (bytes ^ bytes >> 14) & 0x0000CCCC0000CCCC;
    bytes ^= moved ^ moved << 14;
    moved = (bytes ^ bytes >> 28) & 0x00000000F0F0F0F0;
    return bytes ^ moved ^ moved << 28;
}

// Eight values of so many bits, to a byte each.
inline uint64_t spread(uint64_t bits, int width) {
#if DEPOSITS
    return _pdep_u64(bits, 0x0101010101010101 * lowest(width));
#else
    uint64_t bytes = 0;
    for (int i = 0; i < 8; i++) bytes |= (bits >> (i * width) & lowest(width)) << (8 * i);
    return bytes;
#endif
}

class Tree {
  public:
    // What `open` may need for so many symbols, whatever the stream says.
    static int64_t memory_bytes(int64_t count) {
        return MOST_BITS * bytes_for(count) + MOST_NODES * (mask_bytes(1) + 1);
    }

    // False unless the stream holds exactly `count` symbols.
    bool open(const uint8_t* stream, int64_t bytes, int64_t count, uint8_t* memory) {
        at_ = stream, end_ = stream + bytes, memory_ = memory, count_ = count;
        const uint8_t* width = read(1);
        if (width == nullptr || *width > MOST_BITS) return false;
        width_ = *width;
        return parse(count, width_, &root_) && at_ == end_;
    }

    // Calls use(planes, first, count) for one part of the symbols after the other.
    template <typename F> void each_part(F use) {
        uint64_t planes[MOST_BITS * PLANE] = {};
        uint64_t room[MOST_BITS * (MOST_BITS - 1) * PLANE] = {};
        for (int64_t first = 0; first < count_; first += TAKEN) {
            const int64_t here = smaller(count_ - first, TAKEN);
            take(root_, here, planes, room);
            use(planes, first, here);
        }
    }

    // All symbols, and up to SYMBOL_SLACK bytes that say nothing.
    void write(uint8_t* symbols) {
        each_part([&](const uint64_t* planes, int64_t first, int64_t count) {
            for (int64_t i = 0; i < count; i += 64) join(planes + i / 64, symbols + first + i);
        });
    }

    // The largest of `count` symbols in planes.
    int largest(const uint64_t* planes, int64_t count) const {
        int most = 0;
        for (int64_t i = 0; i < count; i += 64, planes++) {
            uint64_t still = lowest(count - i);
            int value = 0;
            for (int b = width_ - 1; b >= 0; b--) {
                const uint64_t set = still & planes[b * PLANE];
                value |= (set != 0) << b;
                still = set != 0 ? set : still;
            }
            most = value > most ? value : most;
        }
        return most;
    }

    int width() const { return width_; }

  private:
    enum Mark : uint8_t { NONE = 0, ALL = 1, MASK = 2, PLAIN = 3, RICE_OF_ONES = 0x20, RICE_OF_ZEROS = 0x40 };

    struct Node {
        const uint8_t* bits;  // of the mask or the plain symbols
        int64_t place;        // symbols that have been taken
        int mark, width;
        int zeros, ones;      // the children; NOTHING without symbols or bits
    };
    static constexpr int NOTHING = -1;

    // The next bytes of the stream, or null.
    const uint8_t* read(int64_t bytes) {
        if (bytes > end_ - at_) return nullptr;
        at_ += bytes;
        return at_ - bytes;
    }

    bool read_number(int64_t* out) {
        *out = 0;
        for (int shift = 0; shift < 42; shift += 7) {
            const uint8_t* byte = read(1);
            if (byte == nullptr) return false;
            *out |= int64_t{*byte & 0x7F} << shift;
            if (*byte < 0x80) return true;
        }
        return false;
    }

    bool parse(int64_t count, int width, int* which) {
        *which = NOTHING;
        if (count == 0 || width == 0) return true;
        const uint8_t* mark = read(1);
        if (mark == nullptr) return false;
        *which = used_++;
        Node& node = nodes_[*which];
        node = {nullptr, 0, *mark, width, NOTHING, NOTHING};
        if (*mark == NONE || *mark == ALL) return parse(count, width - 1, *mark == ALL ? &node.ones : &node.zeros);
        if (*mark == PLAIN) {
            node.bits = read(bytes_for(count * width));
            return node.bits != nullptr && padded_with_zeros(node.bits, count * width);
        }
        int64_t ones = 0;
        if (!read_mask(&node, count, &ones)) return false;
        return parse(count - ones, width - 1, &node.zeros) && parse(ones, width - 1, &node.ones);
    }

    bool read_mask(Node* node, int64_t count, int64_t* ones) {
        if (node->mark == MASK) {
            node->bits = read(bytes_for(count));
            if (node->bits == nullptr || !padded_with_zeros(node->bits, count)) return false;
            for (int64_t i = 0; i < count; i += 64)
                *ones += __builtin_popcountll(word_at(node->bits + i / 8) & lowest(count - i));
            return true;
        }
        const bool zeros = node->mark & RICE_OF_ZEROS;
        const int k = node->mark - (zeros ? RICE_OF_ZEROS : RICE_OF_ONES);
        int64_t length = 0;
        if (k < 1 || k > 24 || !read_number(&length) || !read_number(ones) || *ones > count) return false;
        const uint8_t* stream = read(length);
        if (stream == nullptr) return false;
        if (!find_mask({stream, length, *ones, count, zeros ? RICE_ZEROS : RICE, k}, memory_)) return false;
        node->bits = memory_;
        node->mark = MASK;
        memory_ += mask_bytes(count);
        return true;
    }

    // The next n symbols of a node, as `width` planes.
    void take(int which, int64_t n, uint64_t* planes, uint64_t* room) {
        if (n == 0 || which == NOTHING) return;
        Node& node = nodes_[which];
        const int below = node.width - 1;
        const int64_t words = (n + 63) / 64, first = node.place;
        uint64_t* own = planes + below * PLANE;
        node.place += n;
        if (node.mark == PLAIN) {
            for (int64_t i = 0; i < n; i += 8) {
                uint64_t bits = transposed(spread(word_from(node.bits, (first + i) * node.width), node.width));
                for (int b = 0; b <= below; b++, bits >>= 8)
                    reinterpret_cast<uint8_t*>(planes + b * PLANE)[i / 8] = static_cast<uint8_t>(bits);
            }
            return;
        }
        if (node.mark != MASK) {
            std::memset(own, node.mark == ALL ? 0xFF : 0, static_cast<size_t>(words) * sizeof(uint64_t));
            take(node.mark == ALL ? node.ones : node.zeros, n, planes, room);
            return;
        }
        int64_t ones = 0;
        for (int64_t i = 0; i < words; i++) {
            own[i] = word_from(node.bits, first + 64 * i) & lowest(n - 64 * i);
            ones += __builtin_popcountll(own[i]);
        }
        if (below == 0) return;
        uint64_t *unset = room, *set = room + below * PLANE;
        take(node.zeros, n - ones, unset, set + below * PLANE);
        take(node.ones, ones, set, set + below * PLANE);
        for (int64_t i = 0, rank = 0; i < words; i++) {
            const Deposit to_ones(own[i]), to_zeros(~own[i]);
            for (int b = 0; b < below; b++)
                planes[b * PLANE + i] =
                    to_ones(slice(set + b * PLANE, rank)) | to_zeros(slice(unset + b * PLANE, 64 * i - rank));
            rank += __builtin_popcountll(own[i]);
        }
    }

    static uint64_t slice(const uint64_t* plane, int64_t bit) {
        const uint64_t* from = plane + bit / 64;
        return from[0] >> (bit & 63) | from[1] << 1 << (63 - (bit & 63));
    }

    // 64 symbols as bytes.
    void join(const uint64_t* planes, uint8_t* symbols) const {
#if defined(__AVX512BW__) && !defined(PORTABLE)
        __m512i bytes = _mm512_setzero_si512();
        for (int b = 0; b < width_; b++)
            bytes = _mm512_or_si512(bytes, _mm512_maskz_set1_epi8(planes[b * PLANE], static_cast<char>(1 << b)));
        _mm512_storeu_si512(symbols, bytes);
#else
        for (int group = 0; group < 64; group += 8) {
            uint64_t bits = 0;
            for (int b = 0; b < width_; b++) bits |= (planes[b * PLANE] >> group & 0xFF) << (8 * b);
            bits = transposed(bits);
            std::memcpy(symbols + group, &bits, sizeof(bits));
        }
#endif
    }

    const uint8_t *at_ = nullptr, *end_ = nullptr;
    uint8_t* memory_ = nullptr;
    int64_t count_ = 0;
    int width_ = 0, root_ = NOTHING, used_ = 0;
    Node nodes_[MOST_NODES];
};

}  // namespace
