// Lists of nonzeros on NVIDIA GPUs, in CUDA C++: they want what Triton cannot give, reads and writes of single places of
// shared memory. Compiled at run time, by NVRTC, after `numbers.cuh`.
//
// An entry names a column of x, or of a weight row, far from the one before: where a cache brings a whole line for each,
// shared memory brings as many at a time as lie in different banks.

// The numbers of a column in the ROWS batch rows of a pass, which one instruction reads.
template <int ROWS>
struct alignas(ROWS * sizeof(Raw) < 16 ? ROWS * sizeof(Raw) : 16) Column {
    Raw of[ROWS];
};

// The same, read: numbers of 16 bits come two in a word, the first one in its lower half.
template <int ROWS>
__device__ void read_column(float (&values)[ROWS], Place place) {
    if constexpr (ROWS * sizeof(Raw) == 2) {
        values[0] = TYPE::read(read_half_word(place));
    } else {
        constexpr int WORDS = ROWS * sizeof(Raw) / 4;
        u32 words[WORDS];
        read_words<WORDS>(words, place);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) TYPE::unpack(values + i * (4 / sizeof(Raw)), words[i]);
    }
}

// How the threads of a warp walk along lists, for a pass of ROWS rows: SHARERS of them share a list, and each reads
// AHEAD times four entries at a time, of SHARERS times as many in a row.
template <int ROWS>
struct Shape {
    static constexpr int SHARERS = ROWS == 8 ? 8 : 4, AHEAD = ROWS == 8 ? 2 : 4;
    static constexpr int LISTS = WARP / SHARERS, STEP = SHARERS * AHEAD;
};

// x → `[width + 1]` columns of ROWS rows, zeros where there are fewer, and in the last one.
template <int ROWS>
__device__ void stage(Column<ROWS>* staged, const Raw* x, int rows, int width) {
    const int id = threadIdx.x, threads = blockDim.x;
    if (id < ROWS) staged[width].of[id] = Raw(0);
    const bool in_pieces = ((reinterpret_cast<size_t>(x) | (size_t(width) * sizeof(Raw))) & 15) == 0;
    if (ROWS == 1 && in_pieces) {
        const uint4* from = reinterpret_cast<const uint4*>(x);
        uint4* to = reinterpret_cast<uint4*>(staged);
        for (int i = id; i < int(width * sizeof(Raw) / 16); i += threads) to[i] = __ldg(from + i);
    } else if (ROWS > 1 && sizeof(Raw) == 2 && in_pieces) {
        // Of each two columns, some threads write the left one first: else half of the banks would wait.
        const bool swapped = ((id ^ (id >> 2)) & 1) != 0;
        for (int i = id; i < width / 2; i += threads) {
            Column<ROWS> left, right;
            for (int r = 0; r < ROWS; ++r) {
                const u32 pair = r < rows ? __ldg(reinterpret_cast<const u32*>(x + size_t(r) * width) + i) : 0;
                left.of[r] = Raw(pair & 0xFFFF);
                right.of[r] = Raw(pair >> 16);
            }
            staged[2 * i + swapped] = swapped ? right : left;
            staged[2 * i + !swapped] = swapped ? left : right;
        }
    } else {
        for (int i = id; i < width; i += threads) {
            Column<ROWS> column;
            for (int r = 0; r < ROWS; ++r) column.of[r] = r < rows ? __ldg(x + size_t(r) * width + i) : Raw(0);
            staged[i] = column;
        }
    }
}

// A term's entries in fours, from addresses that eight divides.
struct Entries {
    const uint2* fours;
    const unsigned char* levels;
    // How many places there are in the first four before the first entry.
    int before;

    __device__ Entries(const u16* entries, const unsigned char* given) {
        before = int(reinterpret_cast<size_t>(entries) >> 1) & 3;
        fours = reinterpret_cast<const uint2*>(entries - before);
        levels = given;
    }

    // AHEAD fours from `four` on, `apart` from each other; what lies beyond the place `stop` is not read.
    template <int AHEAD>
    __device__ void read(uint2 (&found)[AHEAD], int four, int apart, int stop) const {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            found[i] = 4 * (four + i * apart) < stop ? __ldg(fours + four + i * apart) : uint2{0, 0};
    }
};

// Adds what the fours say; entries outside of start to stop meet the column of zeros. No branches: reads of shared memory
// must not wait for each other.
template <int ROWS, int AHEAD, bool LEVELS>
__device__ void add_fours(
    float (&sums)[ROWS], const uint2 (&found)[AHEAD], const Entries& entries, Place staged, u32 zeros, int four, int start,
    int stop
) {
    constexpr u32 SIZE = ROWS * sizeof(Raw);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        const int place = 4 * (four + i * Shape<ROWS>::SHARERS), first = start - place, end = stop - place;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 word = j < 2 ? found[i].x : found[i].y, entry = j % 2 ? word >> 16 : word;
            // Only the very first four may have places before the start.
            const bool there = j < end && (i > 0 || j >= first);
            const u32 offset = there ? (entry & 0xFFFE) * (SIZE / 2) : zeros;
            float factor = __uint_as_float(0x3F800000u | (entry << 31));
            if (LEVELS && entries.levels && there) factor *= float(__ldg(entries.levels + (place + j - entries.before)));
            float values[ROWS];
            read_column<ROWS>(values, staged + offset);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[r] = fmaf(values[r], factor, sums[r]);
        }
    }
}

// The sum over the threads that share a list: sharer s gets that of row s / (SHARERS / ROWS). Each exchange halves the
// rows that a thread still adds up.
template <int ROWS>
__device__ float shared_sum(float (&sums)[ROWS]) {
    int rows = ROWS;
#pragma unroll
    for (int apart = Shape<ROWS>::SHARERS / 2; apart; apart /= 2) {
        if (rows > 1) {
            rows /= 2;
            const bool upper = (threadIdx.x & apart) != 0;
#pragma unroll
            for (int r = 0; r < ROWS / 2; ++r) {
                if (r >= rows) break;
                const float kept = upper ? sums[r + rows] : sums[r];
                const float given = upper ? sums[r] : sums[r + rows];
                sums[r] = kept + __shfl_xor_sync(ALL, given, apart);
            }
        } else {
            sums[0] += __shfl_xor_sync(ALL, sums[0], apart);
        }
    }
    return sums[0];
}

// One term for all lists of a block: totals += weight · x Δᵀ. While a thread adds, what it adds next is on its way.
template <int ROWS, bool LEVELS>
__device__ void add_term(
    float* totals, const Entries& entries, float factor, Place staged, int width, const int* starts, const int* order,
    int count, int tile
) {
    constexpr int SHARERS = Shape<ROWS>::SHARERS, AHEAD = Shape<ROWS>::AHEAD, STEP = Shape<ROWS>::STEP;
    constexpr int EACH = SHARERS / ROWS;
    const u32 zeros = u32(width) * ROWS * sizeof(Raw);
    const int sharer = threadIdx.x % SHARERS, own = threadIdx.x % WARP / SHARERS;
    const int stride = blockDim.x / WARP * Shape<ROWS>::LISTS;
    int list = threadIdx.x / WARP * Shape<ROWS>::LISTS + own;
    int start = list < count ? starts[list] + entries.before : 0;
    int stop = list < count ? starts[list + 1] + entries.before : 0;
    uint2 found[AHEAD];
    entries.read<AHEAD>(found, start / 4 + sharer, SHARERS, stop);
    for (; list - own < count; list += stride) {
        const int next = list + stride;
        const int next_start = next < count ? starts[next] + entries.before : 0;
        const int next_stop = next < count ? starts[next + 1] + entries.before : 0;
        float sums[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[r] = 0;
        int four = start / 4 + sharer;
        for (bool is_last = false; !is_last; four += STEP) {
            is_last = !__any_sync(ALL, 4 * (four - sharer + STEP) < stop);
            uint2 coming[AHEAD];
            entries.read<AHEAD>(
                coming, is_last ? next_start / 4 + sharer : four + STEP, SHARERS, is_last ? next_stop : stop
            );
            add_fours<ROWS, AHEAD, LEVELS>(sums, found, entries, staged, zeros, four, start, stop);
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) found[i] = coming[i];
        }
        const float sum = shared_sum<ROWS>(sums);
        if (list < count && sharer % EACH == 0) totals[sharer / EACH * tile + order[list]] += sum * factor;
        start = next_start;
        stop = next_stop;
    }
}

// y += Σ weight · x Δᵀ for up to ROWS rows of one chunk × `tile` weight rows, a multiple of 32; tables as `gpu_tables` has
// them. Grid: tiles of weight rows, chunks, passes of ROWS rows. Shared memory: see `Lists` in gpu_cuda.py.
template <int ROWS, bool LEVELS>
__device__ void add(Raw* y, const Raw* x, const i64* chunks, const i64* terms, int out, int width, int tile) {
    const i64* chunk = chunks + 4 * blockIdx.y;
    const i64 first_row = chunk[0] + i64(blockIdx.z) * ROWS;
    const int rows = int(chunk[1] - first_row < ROWS ? chunk[1] - first_row : ROWS);
    if (rows <= 0 || chunk[2] >= chunk[3]) return;
    const int id = threadIdx.x, threads = blockDim.x;
    const int base = blockIdx.x * tile, count = out - base < tile ? out - base : tile;
    Column<ROWS>* staged = reinterpret_cast<Column<ROWS>*>(room);
    float* totals = reinterpret_cast<float*>(room + (size_t(width + 1) * sizeof(Column<ROWS>) + 15) / 16);
    int* starts = reinterpret_cast<int*>(totals + ROWS * tile);
    int* order = starts + tile + 1;

    for (i64 t = chunk[2]; t < chunk[3]; ++t) {
        const i64* term = terms + 8 * t;
        if (t > chunk[2]) __syncthreads();
        const float factor = __uint_as_float(u32(term[1]));
        const Entries entries(reinterpret_cast<const u16*>(term[6]), reinterpret_cast<const unsigned char*>(term[7]));
        const int* all_order = reinterpret_cast<const int*>(term[4]) + base;
        const int* all_starts = reinterpret_cast<const int*>(term[5]) + base;
        for (int i = id; i <= count; i += threads) {
            starts[i] = __ldg(all_starts + i);
            if (i < count) order[i] = __ldg(all_order + i) - base;
        }
        if (t == chunk[2]) {
            for (int i = id; i < ROWS * tile; i += threads) totals[i] = 0;
            stage<ROWS>(staged, x + first_row * width, rows, width);
        }
        __syncthreads();
        add_term<ROWS, LEVELS>(totals, entries, factor, place_of(staged), width, starts, order, count, tile);
    }
    __syncthreads();
    for (int i = id; i < rows * tile; i += threads) {
        const int row = i / tile, column = i % tile;
        if (column >= count) continue;
        Raw* target = y + (first_row + row) * out + base + column;
        *target = TYPE::rounded(TYPE::read(*target) + totals[i]);
    }
}

// Of a block, at most.
constexpr int THREADS = 512;

#define ADD(ROWS)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
    add_lists_##ROWS(Raw* y, const Raw* x, const i64* chunks, const i64* terms, int out, int width, int tile) {        \
        add<ROWS, false>(y, x, chunks, terms, out, width, tile);                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
    add_levels_##ROWS(Raw* y, const Raw* x, const i64* chunks, const i64* terms, int out, int width, int tile) {       \
        add<ROWS, true>(y, x, chunks, terms, out, width, tile);                                                        \
    }

ADD(1)
ADD(2)
ADD(4)
ADD(8)
