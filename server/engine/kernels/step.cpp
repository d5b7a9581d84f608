// A whole step of a decoder-only model, prompt tokens and decodes alike, in one call.
//
// Python lists once what is computed in which order, as records; see server/engine/programs.py. All threads go through
// the list side by side, each does its share of every operation, and they wait for each other where one reads what
// others have written. Between one product and the next nothing leaves the caches.

#include "attention.hpp"
#include "embedding.hpp"
#include "inputs.hpp"
#include "integers.hpp"
#include "layers.hpp"
#include "operations.hpp"
#include "segments.hpp"
#include "terms.hpp"

namespace {

thread_local Scratch chosen;

void run_norm(const Operation& op, const Thread& thread) {
    int64_t size = op.in_size, row_size = size * op.out_size;
    for (int64_t r = thread.from(op.rows); r < thread.to(op.rows); r++) {
        int64_t source = op.picked ? op.picked[r] : r;
        const float* x = op.in + source * row_size;
        float* out = op.out + r * row_size;
        if (op.other) {
            float* sum = op.picked ? out : const_cast<float*>(x);
            const float* added = op.other + source * row_size;
            for (int64_t c = 0; c < row_size; c++) sum[c] = x[c] + added[c];
            x = sum;
        }
        const void* weight = op.choices ? op.choices + op.which[source] * op.choice_bytes : op.weight;
        for (int64_t head = 0; head < op.out_size; head++, x += size, out += size) {
            if (op.dtype == FLOAT32)
                norm(x, static_cast<const float*>(weight), size, float(op.eps), float(op.plus), out);
            else
                norm(x, static_cast<const Brain*>(weight), size, float(op.eps), float(op.plus), out);
        }
    }
}

template <typename T> void add_vector(const T* vector, float* y, int64_t first, int64_t last) {
    for (int64_t o = first; o < last; o++) y[o] += widened(vector[o]);
}

void add_vector(const void* vector, int64_t dtype, float* y, int64_t first, int64_t last) {
    if (dtype == FLOAT32)
        add_vector(static_cast<const float*>(vector), y, first, last);
    else
        add_vector(static_cast<const Brain*>(vector), y, first, last);
}

// Products with weights in eight or four bits.
Range run_integers(const Operation& op, const Thread& thread, const uint16_t* x, int64_t stride) {
    int64_t unit = 2 * integers::ABREAST, units = (op.out_size + unit - 1) / unit;
    int64_t first = thread.from(units) * unit, last = smaller(thread.to(units) * unit, op.out_size);
    if (first >= last) return {0, 0};
    if (op.dtype == EIGHT_BITS)
        multiply_eight(static_cast<const int8_t*>(op.weight), op.scales, op.in_size, x, stride, op.rows, op.out,
                       op.out_size, first, last);
    else
        multiply_four(static_cast<const uint8_t*>(op.weight), op.scales, op.in_size, x, stride, op.rows, op.out,
                      op.out_size, first, last);
    return {first, last};
}

// Whether what is added to a product is cut as the product is, so that nobody waits for others in between: to one group of
// rows, in blocks of weight rows that are the product's own.
bool adds_alone(const Operation& op, const Thread& thread) {
    const Term* end = op.terms + op.term_count;
    if (!op.term_count || group_end(op.terms, end) < end || moves(op, op.terms, end)) return false;
    if (op.terms->stop - op.terms->start > LANES * thread.count) return false;  // tables are made for all rows
#if AMX
    if (op.dtype == BFLOAT16 && tiled(op.rows, FEW_TILED, op.in_size)) return true;
#endif
    return op.dtype >= EIGHT_BITS && 2 * integers::ABREAST % BLOCK == 0;
}

Call call_of(const Operation& op) {
    return {op.out, op.in, op.out_size, op.in_size, blocks_of(op.in_size), blocks_of(op.out_size), op.dtype != FLOAT32};
}

void run_product(const Operation& op, const Thread& thread, Inputs& inputs, Barrier& barrier) {
    const int64_t stride = padded(op.in_size);
    const bool moved = cut_rows(op);
    const uint16_t* x = reads_rounded(op) ? inputs.make(op, segments, thread, barrier) : nullptr;
    Range made;
    if (op.dtype == FLOAT32)
        made = run_full<float>(op, thread, moved, op.in, op.in_size);
    else if (op.dtype >= EIGHT_BITS)
        made = run_integers(op, thread, x, stride);
    else
#if PAIRS
        made = run_full<Brain>(op, thread, moved, x, stride);
#else
        made = run_full<Brain>(op, thread, moved, op.in, op.in_size);
#endif
    for (int64_t r = 0; r < op.rows; r++) {
        float* y = op.out + r * op.out_size;
        if (op.bias) add_vector(op.bias, op.bias_dtype, y, made.first, made.last);
        if (op.choices)
            add_vector(op.choices + op.which[r] * op.choice_bytes, op.bias_dtype, y, made.first, made.last);
    }
    if (adds_alone(op, thread) && made.first < made.last) {
        Watch watch(spent);
        some_rows(call_of(op), op.terms, op.terms + op.term_count, op.terms->start, op.terms->stop, made.first / BLOCK,
                  blocks_of(made.last));
    }
}

// What is added beside the products; those of moved weights have it.
void run_terms(const Operation& op, const Thread& thread) {
    Call call = call_of(op);
    Watch watch(spent);
    const Term* end = op.terms + op.term_count;
    Term* left = reinterpret_cast<Term*>(chosen.floats(op.term_count * sizeof(Term) / sizeof(float)));
    int64_t count = 0;
    for (const Term *term = op.terms, *next; term < end; term = next) {
        next = group_end(term, end);
        if (moves(op, term, next)) continue;
        std::memcpy(left + count, term, (next - term) * sizeof(Term));
        count += next - term;
    }
    int64_t line = line_of(call, left, left + count, thread.count);
    share(call, left, left + count, thread.count, thread.from(line), thread.to(line));
}

template <typename T> void run_rotate(const Operation& op, const Rows& rows, const Thread& thread) {
    int64_t size = op.head_size, per_row = op.heads + op.kv_heads, units = op.rows * per_row;
    T* keys = static_cast<T*>(op.keys);
    T* values = static_cast<T*>(op.values);
    for (int64_t unit = thread.from(units); unit < thread.to(units); unit++) {
        int64_t r = unit / per_row, head = unit % per_row;
        const float *cos = op.cos + rows.positions[r] * size, *sin = op.sin + rows.positions[r] * size;
        if (head < op.heads) {
            rotate(op.other + (r * op.heads + head) * size, cos, sin, size);
            continue;
        }
        head -= op.heads;
        float* key = op.out + (r * op.kv_heads + head) * size;
        const float* value = op.in + (r * op.kv_heads + head) * size;
        rotate(key, cos, sin, size);
        int64_t at = (rows.slots[r] * op.kv_heads + head) * size;
        for (int64_t c = 0; c < size; c++) store(keys + at + c, key[c]), store(values + at + c, value[c]);
    }
}

void run_gate(const Operation& op, const Thread& thread) {
    int64_t units = (op.rows * op.out_size + 15) / 16, first = thread.from(units) * 16;
    int64_t last = smaller(thread.to(units) * 16, op.rows * op.out_size);
    if (first < last) gated(op.out + first, op.other + first, last - first, op.gate);
}

void run(const Operation* op, const Operation* end, const Rows& rows, const Thread& thread, Inputs inputs,
         Barrier& barrier) {
    const Operation* pending = nullptr;  // products since the last wait, some with terms
    forget_rows();
    for (; op < end; op++) {
        if (op->kind == EMBED) {
            op->dtype == FLOAT32 ? run_embed<float>(*op, thread) : run_embed<Brain>(*op, thread);
        } else if (op->kind == NORM) {
            run_norm(*op, thread);
        } else if (op->kind == PRODUCT) {
            run_product(*op, thread, inputs, barrier);
            if (!pending) pending = op;
        } else if (op->kind == ROTATE) {
            op->dtype == FLOAT32 ? run_rotate<float>(*op, rows, thread) : run_rotate<Brain>(*op, rows, thread);
        } else if (op->kind == ATTEND) {
            op->dtype == FLOAT32 ? run_attend<float>(*op, rows, thread) : run_attend<Brain>(*op, rows, thread);
        } else {
            run_gate(*op, thread);
        }
        if (!op->waits) continue;
        bool added = false;
        for (; pending && pending <= op; pending++) {
            if (pending->kind != PRODUCT || !pending->term_count || adds_alone(*pending, thread)) continue;
            if (!added) barrier.wait(thread);  // terms are cut in another way than products
            added = true;
            run_terms(*pending, thread);
        }
        pending = nullptr;
        barrier.wait(thread);
        inputs.forget();
        forget_rows();
    }
}

}  // namespace

extern "C" {

int64_t switchyard_operation_bytes(void) { return sizeof(Operation); }

// Goes through the operations once, and says how many seconds the first thread has spent on what experts add. Every
// pointer in them must be valid, every size right: nothing is checked here.
double switchyard_step(const void* operations, int64_t count, int64_t rows, const int64_t* positions,
                       const int64_t* slots, const int64_t* sequences, const int32_t* tables, int64_t table_size,
                       int threads) {
    const Operation* first = static_cast<const Operation*>(operations);
    Rows batch = {rows, positions, slots, sequences, tables, table_size};
    Barrier barrier;
    spent = 0;
    const Inputs inputs(Inputs::room_for(first, first + count, threads));
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    run(first, first + count, batch, {omp_get_thread_num(), omp_get_num_threads()}, inputs, barrier);
#else
    run(first, first + count, batch, {0, 1}, inputs, barrier);
#endif
    return spent;
}
}
