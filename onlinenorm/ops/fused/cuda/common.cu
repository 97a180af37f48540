// Single-read kernels: x (and the gradient) pass through shared memory once, because sample n needs statistics of earlier
// samples only. Compiled at run time by NVRTC with -D HALF, RELU, RESIDUAL, CLAMP, EXTRA (0 or 1), STAGES and ROWS.
//
// Work. Tensors are channels_last 16-bit matrices (N * pixels rows, channels). A block serves one block of 64 channels;
// an item is a tile of rows: a part of one sample, or several whole samples (segments) where they are small. Items come
// in sample order from a ticket counter, so an item waits only for items that running blocks already hold: no deadlock,
// whatever else occupies the GPU.
// Pipeline. A block copies tiles into shared memory with cp.async, AHEAD (0 or 1) tiles early; it reduces tile i and
// publishes the sums, then advances the recurrence to tile i - LAG and writes that one: the sums of other blocks have LAG
// tiles' time to arrive. A block takes its tickets one a tile: several at once would make the others wait for it in turn.
// Messages. A published pair of floats is one 8-byte relaxed store over memory filled with EMPTY, so the value is its own
// flag. Sums of a sample's tiles sit in slots, which the holder of the sample's last tile adds in order; every block
// advances its own copy of the recurrence over all samples. Fixed orders throughout: equal input gives equal bits.

typedef unsigned long long u64;
typedef unsigned int u32;

constexpr int WARPS = THREADS / 32, WIDTH = 64, LANES = WIDTH / 8, SEGMENTS = THREADS / WIDTH, CHUNK = 16;
constexpr int STAGES = LAG + 1 + AHEAD;
constexpr int WORDS = CHUNK / SEGMENTS;  // messages a thread collects of a chunk of samples
constexpr u64 EMPTY = ~0ull;

struct Params {
    const uint4 *x, *residual, *grad, *extra;    // rows of `channels` 16-bit values
    uint4 *out, *out_residual;                   // y forward, grad_x and the residual's gradient backward
    unsigned char* mask;                         // ReLU bits, (channel block, row, 8 bytes)
    const float *weight, *bias;                  // null: 1 and 0
    float *first, *second;                       // state in place: mean and variance, or u and v
    float2 *moments, *state;                     // tables (N, C)
    float *grad_weight, *grad_bias;
    u64 *published, *slots;                      // EMPTY at launch: sample sums (N, C), tile sums (N, C / 64, tiles, 64)
    int* tickets;                                // -1 at launch, one a channel block
    int samples, channels, pixels, tile_rows, tiles, segments;
    float alpha, rest, eps, clamp, scale;        // decay and 1 - decay; unit of u and v
};

__device__ __forceinline__ u64 peek(const u64* p) {
    u64 value;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
}

__device__ __forceinline__ float2 as_pair(u64 word) {
    return make_float2(__uint_as_float(u32(word)), __uint_as_float(u32(word >> 32)));
}

__device__ __forceinline__ void publish(u64* p, float a, float b) {
    // Arithmetic makes no NaN with all bits set; a NaN that came from outside is made plain.
    u32 low = __float_as_uint(a), high = __float_as_uint(b);
    u64 word = u64(low) | u64(high == ~0u ? 0x7fffffffu : high) << 32;
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(word) : "memory");
}

__device__ __forceinline__ float2 wait_for(const u64* p, u64 word) {
    while (word == EMPTY) word = peek(p);
    return as_pair(word);
}

template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    u32 shared = u32(__cvta_generic_to_shared(to));
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from));
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(from));
}

__device__ __forceinline__ void unpack(uint4 v, float (&f)[8]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if HALF
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
            : "=f"(f[2 * i]), "=f"(f[2 * i + 1])
            : "r"(words[i]));
#else
        f[2 * i] = __uint_as_float(words[i] << 16);
        f[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
#endif
    }
}

__device__ __forceinline__ uint4 pack(const float (&f)[8]) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if HALF
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(f[2 * i + 1]), "f"(f[2 * i]));
#else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(f[2 * i + 1]), "f"(f[2 * i]));
#endif
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void load8(const float* from, float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float4 v = reinterpret_cast<const float4*>(from)[i];
        f[4 * i] = v.x, f[4 * i + 1] = v.y, f[4 * i + 2] = v.z, f[4 * i + 3] = v.w;
    }
}

__device__ __forceinline__ float min_nan(float a, float b) {  // torch's clamp and relu keep NaN
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ float finite(float x) { return fabsf(x) < __int_as_float(0x7f800000) ? x : 0.f; }

// What a thread knows of its place: 16 bytes of every row it owns, one segment.
struct Place {
    int channel_block, c, lane, segment, row, step, columns;

    __device__ explicit Place(const Params& p) {
        columns = p.channels / WIDTH;
        channel_block = blockIdx.x % columns;
        c = threadIdx.x % WIDTH;  // the channel, within the block, that the thread serves in table work
        lane = threadIdx.x % LANES;
        step = THREADS / LANES / p.segments;
        segment = threadIdx.x / LANES / step;
        row = threadIdx.x / LANES % step;
    }
};

// One tile of work: first row, first sample, and rows of each of its segments.
struct Item {
    int sample, count, tile, rows;
    long long first_row;

    __device__ Item(const Params& p, int index) {
        tile = p.segments > 1 ? 0 : index % p.tiles;
        sample = p.segments > 1 ? index * p.segments : index / p.tiles;
        count = min(p.segments, p.samples - sample);
        rows = min(p.tile_rows, p.pixels - tile * p.tile_rows);
        first_row = (long long)sample * p.pixels + tile * p.tile_rows;
    }
    __device__ int rows_of(int segment) const { return segment < count ? rows : 0; }
};

__device__ __forceinline__ int item_count(const Params& p) {
    return p.segments > 1 ? (p.samples + p.segments - 1) / p.segments : p.samples * p.tiles;
}

// Add the 16 sums of the threads that share a segment and lane; result for (segment, channel) in total[segment * 64 + c].
__device__ __forceinline__ void reduce(float (&a)[8], float (&b)[8], float2 (*warps)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int offset = 8; offset < 32; offset *= 2) {
            a[i] += __shfl_xor_sync(~0u, a[i], offset);
            b[i] += __shfl_xor_sync(~0u, b[i], offset);
        }
    }
    if (threadIdx.x % 32 < LANES) {
#pragma unroll
        for (int i = 0; i < 8; i++) warps[threadIdx.x / 32][threadIdx.x % 32 * 8 + i] = make_float2(a[i], b[i]);
    }
    __syncthreads();
}

// The holder of a sample's last tile adds the slots in order, in parts side by side, and publishes the total.
// combine(accumulator, slot value, tile) folds one slot in; centre is slot 0.
template <class Combine>
__device__ __forceinline__ float2 merge_slots(const Params& p, const u64* slots, float2 (*parts)[WIDTH], float& centre, Combine combine) {
    const int c = threadIdx.x % WIDTH, part = threadIdx.x / WIDTH;
    const int share = (p.tiles + SEGMENTS - 1) / SEGMENTS, begin = part * share, end = min(p.tiles, begin + share);
    centre = finite(wait_for(slots + c, peek(slots + c)).x);
    float2 sum = make_float2(0.f, 0.f);
    for (int t = begin; t < end; t += 8) {
        u64 words[8];
#pragma unroll
        for (int j = 0; j < 8; j++) words[j] = t + j < end ? peek(slots + (t + j) * WIDTH + c) : 0;
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (t + j < end) combine(sum, wait_for(slots + (t + j) * WIDTH + c, words[j]), t + j);
    }
    __syncthreads();
    parts[part][c] = sum;
    __syncthreads();
    sum = parts[0][c];
    for (int q = 1; q < SEGMENTS; q++) sum.x += parts[q][c].x, sum.y += parts[q][c].y;
    return sum;
}

// Run `reduce_tile(item, stage)` on every item of this block, and LAG items later `write_tile(item, stage)`. `prepare` and
// `glance` may ask global memory for what the two will need.
template <class Fetch, class Prepare, class Glance, class Reduce, class Write>
__device__ __forceinline__ void pipeline(
    const Params& p, const Place& at, int* queue, Fetch fetch, Prepare prepare, Glance glance, Reduce reduce_tile,
    Write write_tile) {
    const int items = item_count(p);
    int* tickets = p.tickets + at.channel_block;
    if (threadIdx.x == 0) queue[0] = atomicAdd(tickets, 1) + 1;
    __syncthreads();
    if (queue[0] < items) fetch(Item(p, queue[0]), 0);
    int count = 0x7fffffff;  // of this block's items, once known
    for (int i = 0; i - LAG < count; i++) {
        const int now = i % STAGES, next = (i + 1) % STAGES, old = (i + STAGES - LAG) % STAGES;
        if (i < count && queue[now] >= items) count = i;
        const bool read = i < count, write = i >= LAG && i - LAG < count;
        int ticket = 0;
        if (read && threadIdx.x == 0) ticket = atomicAdd(tickets, 1) + 1;
        if (write) glance(Item(p, queue[old]));
        if (read) {
            prepare(Item(p, queue[now]));
            if (AHEAD && threadIdx.x == 0) queue[next] = ticket;
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncthreads();
            if (AHEAD && queue[next] < items) fetch(Item(p, queue[next]), next);
            reduce_tile(Item(p, queue[now]), now);
        }
        if (write) write_tile(Item(p, queue[old]), old);
        if (read && !AHEAD && threadIdx.x == 0) queue[next] = ticket;
        __syncthreads();
        if (read && !AHEAD && queue[next] < items) fetch(Item(p, queue[next]), next);
    }
}

// Copy the thread's share of a tile into shared memory.
__device__ __forceinline__ void fetch_tile(const Params& p, const Place& at, const Item& item, uint4* stage, const uint4* tensor) {
    const int rows = item.rows_of(at.segment), pitch = p.channels / 8;
    const uint4* from = tensor + (item.first_row + at.segment * p.pixels) * pitch + at.channel_block * LANES + at.lane;
    uint4* to = stage + at.segment * p.pixels * LANES + at.lane;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int row = at.row + i * at.step;
        if (row < rows) copy_async<16>(to + row * LANES, from + (long long)row * pitch);
    }
}

__device__ __forceinline__ int stage_rows(const Params& p) { return p.segments > 1 ? p.segments * p.pixels : p.tile_rows; }

// The parameters of the thread's eight channels; null stands for `otherwise`.
__device__ __forceinline__ void parameters8(const float* from, const Place& at, float otherwise, float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) f[i] = from ? from[at.channel_block * WIDTH + at.lane * 8 + i] : otherwise;
}

// 16-bit value c of a row in shared memory.
__device__ __forceinline__ float value_of(const uint4* row, int c) {
    const u32 word = reinterpret_cast<const unsigned short*>(row)[c];
    float f[8];
    unpack(make_uint4(word, 0, 0, 0), f);
    return f[0];
}

// The sums of a sample's tiles, 64 channels each.
__device__ __forceinline__ u64* slots_of(const Params& p, const Place& at, int sample) {
    return p.slots + ((long long)sample * at.columns + at.channel_block) * p.tiles * WIDTH;
}

__device__ __forceinline__ long long mask_offset(const Params& p, const Place& at, long long row) {
    return ((long long)at.channel_block * p.samples * p.pixels + row) * 8 + at.lane;
}
