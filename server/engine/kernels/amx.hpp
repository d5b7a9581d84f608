// Tiles, the registers of AMX: who may use them, and how they are set up. products_amx.hpp and integers_amx.hpp multiply
// with them.
#pragma once

#include "native.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__linux__) &&             \
    !defined(PORTABLE)
#define AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define AMX 0
#endif

namespace {

constexpr int64_t SIDE = 16;             // rows of a tile
constexpr int64_t NEAR_TILED = 1 << 20;  // bytes of x that stay in the second cache while all weights go by

#if AMX

constexpr int64_t ACROSS = 32;  // columns of a tile, in bfloat16

// Whether the kernel lets this process use tiles: it must be asked once.
inline bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return allowed;
}

// Whether so many rows of x, at least `few`, are multiplied as tiles.
inline bool tiled(int64_t rows, int64_t few, int64_t in) { return rows >= few && in % ACROSS == 0 && tiles_allowed(); }

// The compiler does not know what tiles are loaded from: what was written so far is in memory from here on.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// While it lives, if it is used, tiles 0 to 5 of this thread are `rows` by 64 bytes, 6 and 7 are 16 by 64.
class Tiles {
  public:
    Tiles(bool use, int64_t rows) : used(use) {
        if (!used) return;
        alignas(64) uint8_t config[64] = {1};
        for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = i < 6 ? uint8_t(rows) : SIDE;
        // The compiler may take the instruction for one that reads eight bytes.
        __asm__ volatile("" ::"r"(config) : "memory");
        _tile_loadconfig(config);
    }
    ~Tiles() {
        if (used) _tile_release();
    }
    Tiles(const Tiles&) = delete;
    const bool used;
};

#else

inline bool tiles_allowed() { return false; }

struct Tiles {
    Tiles(bool, int64_t) {}
    static constexpr bool used = false;
};

#endif

}  // namespace
