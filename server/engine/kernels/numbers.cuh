// What kernels in CUDA C++ compute with: numbers of one TYPE (Bfloat, Half or Float), and where they lie in shared memory.
// It goes before them into what NVRTC compiles.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#ifndef EMULATED
// Where something lies in shared memory. Kept as a number: the compiler would work it out anew for every read.
typedef u32 Place;

__device__ inline Place place_of(const void* address) {
    Place place;
    asm volatile("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(place) : "l"(address));
    return place;
}

__device__ inline u32 read_half_word(Place place) {
    u16 bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(place));
    return bits;
}

template <int WORDS>
__device__ inline void read_words(u32 (&words)[WORDS], Place place) {
    if constexpr (WORDS == 1) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(place));
    if constexpr (WORDS == 2)
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(place));
    if constexpr (WORDS >= 4) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4)
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                         : "r"(place + 4 * i));
    }
}

__device__ inline float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

struct Bfloat {
    typedef u16 Raw;
    static __device__ float read(u32 raw) { return __uint_as_float(raw << 16); }
    static __device__ void unpack(float* values, u32 word) {
        values[0] = read(word);
        values[1] = __uint_as_float(word & 0xFFFF0000u);
    }
    static __device__ u16 rounded(float value) {
        const u32 bits = __float_as_uint(value);
        if (value != value) return 0x7FC0;
        return u16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
};

struct Half {
    typedef u16 Raw;
    static __device__ float read(u32 raw) { return half_to_float(u16(raw)); }
    static __device__ void unpack(float* values, u32 word) {
        values[0] = half_to_float(u16(word));
        values[1] = half_to_float(u16(word >> 16));
    }
    static __device__ u16 rounded(float value) { return float_to_half(value); }
};

struct Float {
    typedef float Raw;
    static __device__ float read(float raw) { return raw; }
    static __device__ void unpack(float* values, u32 word) { values[0] = __uint_as_float(word); }
    static __device__ float rounded(float value) { return value; }
};

typedef TYPE::Raw Raw;

constexpr int WARP = 32;
constexpr u32 ALL = 0xFFFFFFFFu;

extern __shared__ uint4 room[];
