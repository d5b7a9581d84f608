// A step's operations as Python lists them, and the threads that go through them side by side.
#pragma once

#include "native.hpp"

#include <atomic>
#include <chrono>
#ifdef __linux__
#include <sched.h>
#endif

namespace {

enum Kind : int64_t { NORM = 0, PRODUCT = 1, ROTATE = 2, ATTEND = 3, GATE = 4, EMBED = 5 };
enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, EIGHT_BITS = 2, FOUR_BITS = 3 };

// One operation. Mirrors `RECORD` in programs.py: every field has eight bytes.
struct Operation {
    int64_t kind;
    int64_t waits;      // whether all threads wait for each other after it
    int64_t rows;
    const float* in;    // NORM, PRODUCT: [rows, in_size]; ATTEND: queries; ROTATE: values
    float* out;
    float* other;       // NORM: what is added to `in` first, or none; ROTATE: queries; GATE: up
    int64_t in_size;    // NORM: of a head; PRODUCT: of a row; EMBED: of a row of the table
    int64_t out_size;   // PRODUCT: of a row; GATE: of a row; NORM: heads per row; EMBED: rows of the table
    const void* weight; // NORM, PRODUCT, EMBED
    int64_t dtype;      // of the weight; ROTATE, ATTEND: of the cache
    const uint16_t* scales;  // PRODUCT, of weights in eight or four bits
    const void* bias;   // PRODUCT, in the model's dtype, or none
    int64_t bias_dtype;
    const Term* terms;  // PRODUCT, EMBED
    int64_t term_count;
    const char* choices;  // vectors of the step's mixes: NORM its weights, PRODUCT what moves the bias; or none
    int64_t choice_bytes;
    const int64_t* which; // of each row, its mix; EMBED: its token
    const int64_t* picked;  // NORM: rows of `in` to read, or none: all, and their sums with `other` are kept
    double eps;         // NORM; ATTEND, EMBED: scale
    double plus;        // NORM: added to its weights; ATTEND: softcap, or 0
    int64_t gate;
    void* keys;         // ROTATE, ATTEND: the layer's
    void* values;
    int64_t heads, kv_heads, head_size;
    int64_t window;     // ATTEND: or 0
    const float* cos;   // ROTATE: [positions, head_size]
    const float* sin;
};

// The rows of a step.
struct Rows {
    int64_t count;
    const int64_t* positions;
    const int64_t* slots;
    const int64_t* sequences;  // of each row, its place in `tables`
    const int32_t* tables;
    int64_t table_size;
};

struct Thread {
    int index, count;
    int64_t from(int64_t units) const { return units * index / count; }
    int64_t to(int64_t units) const { return units * (index + 1) / count; }
};

// Where the threads of one step wait for each other.
class Barrier {
  public:
    void wait(const Thread& thread) {
        if (thread.count == 1) return;
        int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == thread.count) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        // Who has no core of its own must not keep the others from theirs.
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
#if defined(__AVX2__) || defined(__AVX512F__)
            _mm_pause();
#endif
#ifdef __linux__
            if (spins > PATIENCE) sched_yield();
#endif
        }
    }

  private:
    static constexpr int PATIENCE = 4000;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> phase_{0};
};

// Seconds that pass while it lives, added up.
class Watch {
  public:
    explicit Watch(double& total) : total_(total), began_(std::chrono::steady_clock::now()) {}
    ~Watch() { total_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count(); }

  private:
    double& total_;
    std::chrono::steady_clock::time_point began_;
};

}  // namespace
