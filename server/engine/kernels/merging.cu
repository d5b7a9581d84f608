// Weights moved by deltas on NVIDIA GPUs, in CUDA C++, at the speed of memory: out = pristine + weight * delta, rounded once,
// without fused multiply-adds, which round differently from the reference. Compiled after `numbers.cuh`.

// Bytes of a row that a warp changes at a time, in shared memory.
constexpr int PIECE_BYTES = 2048;
constexpr int PIECE = PIECE_BYTES / sizeof(Raw);
constexpr u32 NONE = 0xFFFFFFFFu;

// Of lists: one warp per list, whose row it copies. Shared memory: PIECE_BYTES for each warp.
//
// first_row: what `order` calls the first of the rows.
extern "C" __global__ void __launch_bounds__(256)
merge_lists(Raw* out, const Raw* pristine, const i64* term, int first_row, int rows, int width) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int list = blockIdx.x * (blockDim.x / WARP) + warp;
    if (list >= rows) return;
    const float factor = __uint_as_float(u32(term[1]));
    const i64 row = __ldg(reinterpret_cast<const int*>(term[4]) + list) - first_row;
    const int* starts = reinterpret_cast<const int*>(term[5]) + list;
    const u16* entries = reinterpret_cast<const u16*>(term[6]);
    const unsigned char* levels = reinterpret_cast<const unsigned char*>(term[7]);
    uint4* vectors = room + warp * (PIECE_BYTES / 16);
    Raw* piece = reinterpret_cast<Raw*>(vectors);
    const Raw* from = pristine + row * width;
    Raw* to = out + row * width;
    const size_t places = reinterpret_cast<size_t>(from) | reinterpret_cast<size_t>(to) | size_t(width) * sizeof(Raw);
    const bool in_vectors = (places & 15) == 0;
    int at = __ldg(starts);
    const int stop = __ldg(starts + 1);
    u32 entry = at + lane < stop ? __ldg(entries + at + lane) : NONE;
    for (int begin = 0; begin < width; begin += PIECE) {
        const int size = width - begin < PIECE ? width - begin : PIECE;
        if (in_vectors) {
            const uint4* source = reinterpret_cast<const uint4*>(from + begin);
            const int count = int(size * sizeof(Raw) / 16);
            uint4 read[PIECE_BYTES / 16 / WARP];
#pragma unroll
            for (int i = 0; i < PIECE_BYTES / 16 / WARP; ++i)
                if (i * WARP + lane < count) read[i] = __ldg(source + i * WARP + lane);
#pragma unroll
            for (int i = 0; i < PIECE_BYTES / 16 / WARP; ++i)
                if (i * WARP + lane < count) vectors[i * WARP + lane] = read[i];
        } else {
            for (int i = lane; i < size; i += WARP) piece[i] = from[begin + i];
        }
        __syncwarp();
        for (;;) {
            const bool here = entry != NONE && int(entry >> 1) < begin + size;
            if (here) {
                float value = entry & 1 ? -factor : factor;
                if (levels) value = __fmul_rn(value, float(__ldg(levels + at + lane)));
                Raw& place = piece[int(entry >> 1) - begin];
                place = TYPE::rounded(__fadd_rn(TYPE::read(place), value));
            }
            const int done = __popc(__ballot_sync(ALL, here));
            if (done == 0) break;
            at += done;
            entry = at + lane < stop ? __ldg(entries + at + lane) : NONE;
            if (done < WARP) break;
        }
        __syncwarp();
        if (in_vectors) {
            uint4* target = reinterpret_cast<uint4*>(to + begin);
            for (int i = lane; i < int(size * sizeof(Raw) / 16); i += WARP) target[i] = vectors[i];
        } else {
            for (int i = lane; i < size; i += WARP) to[begin + i] = piece[i];
        }
        __syncwarp();
    }
}

// Weight rows and columns of a block's tile, and the threads that move it.
constexpr int TILE_ROWS = 32, TILE_COLUMNS = 256, TILE_THREADS = 256;
// Words of 32 columns of a tile's planes, and how far apart they lie in shared memory: the banks of neighbours differ.
constexpr int TILE_WORDS = 2 * TILE_ROWS, APART = TILE_WORDS + 1;

// What the bits of both planes make of a number.
__device__ inline Raw moved(Raw before, u32 plus, u32 minus, u32 factor) {
    const u32 change = ((plus | minus) & 1 ? factor : 0) ^ (minus << 31);
    return TYPE::rounded(__fadd_rn(TYPE::read(before), __uint_as_float(change)));
}

// Of planes of one digit. Grid: tiles of columns, tiles of rows. Shared memory: APART words for each 32 columns of a tile.
extern "C" __global__ void __launch_bounds__(TILE_THREADS)
merge_planes(Raw* out, const Raw* pristine, const i64* term, int, int rows, int width) {
    constexpr int EACH = 16 / sizeof(Raw), ACROSS = TILE_COLUMNS / EACH, COUNT = TILE_ROWS * ACROSS / TILE_THREADS;
    union Vector {
        uint4 whole;
        Raw of[EACH];
    };
    const int id = threadIdx.x, words = (width + 31) / 32, word = blockIdx.x * (TILE_COLUMNS / 32);
    const int here = words - word < TILE_COLUMNS / 32 ? words - word : TILE_COLUMNS / 32;
    const u32 factor = u32(term[1]);
    const u32* from = reinterpret_cast<const u32*>(term[3]) + (size_t(blockIdx.y) * words + word) * TILE_WORDS;
    u32* planes = reinterpret_cast<u32*>(room);
    const size_t places = reinterpret_cast<size_t>(out) | reinterpret_cast<size_t>(pristine) | size_t(width) * sizeof(Raw);
    const bool in_vectors = (places & 15) == 0;
    Vector vectors[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int vector = i * TILE_THREADS + id;
        const int row = blockIdx.y * TILE_ROWS + vector / ACROSS, column = 32 * word + vector % ACROSS * EACH;
        if (row >= rows) continue;
        const Raw* place = pristine + size_t(row) * width + column;
        if (in_vectors && column < width) vectors[i].whole = *reinterpret_cast<const uint4*>(place);
        if (!in_vectors)
            for (int e = 0; e < EACH; ++e)
                if (column + e < width) vectors[i].of[e] = place[e];
    }
    for (int i = id; i < here * TILE_WORDS; i += TILE_THREADS)
        planes[i / TILE_WORDS * APART + i % TILE_WORDS] = __ldg(from + i);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int vector = i * TILE_THREADS + id, across = vector % ACROSS * EACH;
        const int row = blockIdx.y * TILE_ROWS + vector / ACROSS, column = 32 * word + across;
        if (row >= rows || column >= width) continue;
        const u32* both = planes + across / 32 * APART + vector / ACROSS;
        const u32 plus = both[0] >> across % 32, minus = both[TILE_ROWS] >> across % 32;
#pragma unroll
        for (int e = 0; e < EACH; ++e) vectors[i].of[e] = moved(vectors[i].of[e], plus >> e, minus >> e, factor);
        Raw* place = out + size_t(row) * width + column;
        if (in_vectors) *reinterpret_cast<uint4*>(place) = vectors[i].whole;
        if (!in_vectors)
            for (int e = 0; e < EACH; ++e)
                if (column + e < width) place[e] = vectors[i].of[e];
    }
}
