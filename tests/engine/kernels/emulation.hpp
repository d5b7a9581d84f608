// Enough of CUDA C++ to run kernels on a CPU: the threads of a block take turns, each until it must wait for others.
// Blocks run one after the other, every other one with its threads in reversed order. Shared memory starts out as NaNs.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)

struct Index {
    unsigned x, y, z;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 128 << 10, SHARED = 256 << 10;
constexpr unsigned char POISON = 0xFF;

struct Barrier {
    unsigned arrived = 0, passed = 0;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool is_done = false;
};

inline std::vector<Thread> threads;
inline std::vector<Barrier> warps;
inline Barrier block;
inline unsigned slots[1024];
inline unsigned current, running;
inline ucontext_t scheduler;
inline const std::function<void()>* body;

inline void wait(Barrier& barrier, unsigned count) {
    const unsigned before = barrier.passed;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.passed;
        return;
    }
    while (barrier.passed == before) {
        swapcontext(&threads[current].context, &scheduler);
    }
}

inline void enter() {
    (*body)();
    threads[current].is_done = true;
    --running;
    swapcontext(&threads[current].context, &scheduler);
}

// What every thread of the warp has given, by lane.
inline unsigned* exchanged(unsigned mine) {
    Barrier& warp = warps[current / WARP];
    wait(warp, WARP);
    slots[current] = mine;
    wait(warp, WARP);
    return slots + current / WARP * WARP;
}

// Fails the process where a block writes beyond its shared memory, or threads wait for one that has ended.
inline void run(unsigned char* room, Index grid, unsigned count, unsigned shared, const std::function<void()>& kernel) {
    if (count % WARP || count > 1024 || shared > SHARED) std::abort();
    body = &kernel;
    gridDim = grid;
    blockDim = {count, 1, 1};
    if (threads.size() < count) threads.resize(count);
    bool reversed = false;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x, reversed = !reversed) {
                std::memset(room, POISON, SHARED);
                warps.assign(count / WARP, {});
                block = {};
                running = count;
                for (unsigned id = 0; id < count; ++id) {
                    Thread& one = threads[id];
                    one.is_done = false;
                    one.stack.resize(STACK);
                    getcontext(&one.context);
                    one.context.uc_stack.ss_sp = one.stack.data();
                    one.context.uc_stack.ss_size = STACK;
                    one.context.uc_link = nullptr;
                    makecontext(&one.context, enter, 0);
                }
                unsigned idle = 0;
                while (running) {
                    const unsigned before = running;
                    unsigned long long passed = block.passed;
                    for (const Barrier& warp : warps) passed += warp.passed;
                    for (unsigned i = 0; i < count; ++i) {
                        current = reversed ? count - 1 - i : i;
                        if (threads[current].is_done) continue;
                        threadIdx = {current, 0, 0};
                        blockIdx = {x, y, z};
                        swapcontext(&scheduler, &threads[current].context);
                    }
                    unsigned long long now = block.passed;
                    for (const Barrier& warp : warps) now += warp.passed;
                    // In a turn everybody goes on to the next wait: if nobody has passed one, nobody ever will.
                    if (running && running == before && now == passed && ++idle > 2) {
                        std::fputs("threads wait for one that never comes\n", stderr);
                        std::abort();
                    }
                    if (running != before || now != passed) idle = 0;
                }
                for (size_t i = shared; i < SHARED; ++i)
                    if (room[i] != POISON) {
                        std::fputs("a block has written beyond its shared memory\n", stderr);
                        std::abort();
                    }
            }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block, blockDim.x); }
inline void __syncwarp() { emulation::wait(emulation::warps[emulation::current / 32], 32); }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float __shfl_xor_sync(unsigned, float value, int apart) {
    const unsigned lane = threadIdx.x % 32;
    return __uint_as_float(emulation::exchanged(__float_as_uint(value))[lane ^ unsigned(apart)]);
}

inline unsigned __ballot_sync(unsigned, bool given) {
    const unsigned* all = emulation::exchanged(given);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= all[lane] << lane;
    return bits;
}

inline bool __any_sync(unsigned all, bool given) { return __ballot_sync(all, given) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

template <typename T>
inline T __ldg(const T* place) {
    return *place;
}

inline float half_to_float(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
}

inline unsigned short float_to_half(float value) {
    const _Float16 rounded = _Float16(value);
    unsigned short bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}

typedef const unsigned char* Place;

inline Place place_of(const void* address) { return static_cast<Place>(address); }

inline unsigned read_half_word(Place place) {
    unsigned short bits;
    std::memcpy(&bits, place, 2);
    return bits;
}

template <int WORDS>
inline void read_words(unsigned (&words)[WORDS], Place place) {
    std::memcpy(words, place, sizeof(words));
}
