// Single-read kernels for Hopper: x (and the gradient) pass through shared memory once, because sample n needs statistics of
// earlier samples only. Compiled at run time by NVRTC with -D HALF, RELU, RESIDUAL, SKIP_GRAD, CLAMP, SCALED, POOL, SHORTCUT
// (0 or 1), GROUP, STAGES, CHUNK, and PEERS, the processes that a batch was dealt out to.
//
// Tile scheduler. Tensors are channels_last 16-bit matrices (N * pixels rows, channels). A CTA serves one slab of 64
// channels; an item is a tile of rows: a part of one sample, or several whole samples (segments) where they are small. An
// atomic counter for each slab hands items out in sample order, so an item waits only for items that running CTAs already
// hold: no deadlock, whatever else occupies the GPU.
// Warp specialisation. The load warp takes items from the tile scheduler and has TMA bring tiles into a ring of STAGES
// shared-memory stages, each with mbarriers for full, reduced and empty. Reduce warps (GROUP threads) sum a tile and publish
// the sums. Write warps (GROUP threads) advance the recurrence to the tile's sample and write the tile. The three run side
// by side, so that reads, sums and writes of different tiles overlap within a CTA. Reduce warps wait for loads (and, at a
// sample's last tile, for its other tiles), write warps for sums of earlier samples, loads for a stage that write warps have
// released: each only for earlier items.
// Flag-in-value mailboxes. A published pair of floats is one 8-byte relaxed store over memory filled with EMPTY, so the value
// is its own flag. Launches of a stream take turns in two regions of memory: each makes EMPTY what the last one left in the
// other, while its write warps have no tile yet. The reduce warps of a sample's last tile add the sums of its tiles in order; every CTA advances its own
// copy of the recurrence over all samples. Fixed orders throughout: equal input gives equal bits.
// Layer scaling (SCALED). A sample's tiles are written once sums over all of its channels are known: a tile waits for later
// items too. So the launch is cooperative, which has all CTAs run at once, and their stages together hold a sample at least.
// Such a sum is added up from one of each warp of 32 channels, in a mailbox of 4 bytes. Forward, one CTA of each slab has
// scale warps, which follow the moments ahead of all write warps.
// Max-pool (POOL). A 3x3 max-pool of stride 2 and padding 1 follows the ReLU. Tiles are pairs of image rows, and a box is
// a row. Forward brings the row above a tile too, and writes pooled pixels and, in 4 bits each, which of the window's
// nine pixels was taken, or NOTHING where ReLU or clamp let no gradient through. Backward brings the pooled gradients of
// the windows that a tile's pixels are in, and gathers.
// Shortcut (SHORTCUT). The residual is normalised too, by a layer of its own, the second of `norms`: an item is a tile of both
// inputs, whose sums are published side by side. In table work half of the threads serve the one layer, half the other. An
// item still waits for earlier items only (of layer scaling: for those that the chip holds at once).
// Across processes (PEERS > 1), each with a GPU of one machine. Sample i of rank r is number i PEERS + r of the stream: a
// tile is of own samples, what runs over samples (the recurrence, tables, mailboxes of samples and of their channel sums)
// is of the stream. A message is stored into every process's mailboxes over NVLink and read from one's own. There it stays
// from launch to launch: the flag is the lowest bit of a float (of q, of the sum of g (x - m), of each channel sum), which
// changes with each launch, counted in `launches`. A launch has read all messages when it ends, so the next finds all bits
// alike. It does not begin to send before every process has read: between two launches with one mailbox every stream has one
// with another, or a barrier, which ends after messages that each process sends once it has read.
// Items wait for earlier items of the stream, which every GPU holds or will: no deadlock as long as each comes to this
// launch and has room for a CTA of each slab. A process that does not come within `patience` is told of in `late`.

typedef unsigned long long u64;
typedef unsigned int u32;

constexpr int WARPS = GROUP / 32, WIDTH = 64, LANES = WIDTH / 8, SEGMENTS = GROUP / WIDTH;
constexpr int NORMS = 1 + SHORTCUT, COLUMNS = NORMS * WIDTH;  // layers, and their channels in a slab
constexpr int READERS = GROUP / COLUMNS;                      // threads of the write warps that serve the same column
constexpr int WORDS = CHUNK / READERS;                        // mailboxes each of them reads of a chunk of samples
constexpr u64 EMPTY = ~0ull;
#define INFINITE __int_as_float(0x7f800000)

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// What belongs to one layer.
struct Norm {
    const float *weight, *bias;        // null: 1 and 0
    float *state_a, *state_b;          // in place: mean and variance, or u and v
    float2 *tables, *moments;          // (N, C): mean and variance before each sample, and those of it
    float* rzeta;                      // 1 / zeta of each sample, of layer scaling
    float *grad_weight, *grad_bias;
    // mailboxes, EMPTY at launch, a pair each: (N, C), (N, C / 64, tiles, 64), and (N, C / 64) of two warps' channels
    u64 *sample_sums, *tile_sums, *channel_sums;
};

struct Params {
    TensorMap maps[4];                 // x and residual, or grad, x, the shortcut's x and skip_grad: boxes of box_rows by 64
    uint4 *out, *out_residual;         // y forward; grad_x and the gradient of the residual, or of the shortcut's x, backward
    unsigned char* mask;               // ReLU bits, (slab, sample, pixels made even, 8 bytes), or indices of a max-pool,
                                       // (slab, sample, pooled pixels, 32 bytes)
    int* tile_counter;                 // of the tile scheduler, -1 at launch, one a slab
    uint4* clear;                      // what an earlier launch left of its messages, to be made EMPTY for a later one
    u32 *launches, *late;              // of the mailboxes across processes, one a slab; 1 + the rank that was waited for
    u64* peers[8];                     // the first layer's sample_sums of every process, which the others' lie behind
    Norm norms[2];
    int samples, channels, pixels, tile_rows, tiles, segments, box_rows, boxes;
    int width;        // of an image that is pooled
    int clear_count;  // of 16 bytes
    int rank;
    float alpha_fwd, one_minus_alpha_fwd, alpha_bkw, one_minus_alpha_bkw;
    float eps, clamp, zeta_eps, scale;  // the last is the unit of u and v
    float patience;                     // seconds
};

// The stream of samples.
__device__ __forceinline__ int stream_size(const Params& p) { return p.samples * PEERS; }
__device__ __forceinline__ int in_stream(const Params& p, int sample) { return PEERS == 1 ? sample : sample * PEERS + p.rank; }
__device__ __forceinline__ bool is_own(const Params& p, int n) { return PEERS == 1 || n % PEERS == p.rank; }

__device__ __forceinline__ u64 peek(const u64* p) {
    u64 value;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
}

__device__ __forceinline__ u64 peek_message(const u64* p) {
#if PEERS > 1
    u64 value;
    asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
#else
    return peek(p);
#endif
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

__device__ __forceinline__ void publish_half(u32* p, float a) {
    const u32 word = __float_as_uint(a);
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(word == ~0u ? 0x7fffffffu : word) : "memory");
}

__device__ __forceinline__ float2 wait_for(const u64* p) {
    u64 word = peek(p);
    while (word == EMPTY) word = peek(p);
    return as_pair(word);
}

// mbarriers and TMA.
__device__ __forceinline__ u32 address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(u64* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
}

__device__ __forceinline__ void tma_load_box(void* to, const TensorMap& map, int channel, int row, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            address(to)),
        "l"(&map), "r"(channel), "r"(row), "r"(address(barrier))
        : "memory");
}

__device__ __forceinline__ void tma_load_bytes(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
                 "l"(from), "r"(bytes), "r"(address(barrier))
                 : "memory");
}

// Named barrier of one role's threads: 1 reduce warps, 2 write warps.
template <int ROLE>
__device__ __forceinline__ void sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(ROLE), "n"(GROUP) : "memory");
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

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITE; }

__device__ __forceinline__ float finite(float x) { return is_finite(x) ? x : 0.f; }

// What a thread of the reduce or write warps knows of its place: 16 bytes of every row it owns, one segment.
struct Place {
    int thread, warp_lane, slab, c, lane, segment, row, step, slabs, channel;
    u32 launch, flag;          // this launch's number among those of its mailboxes, and its lowest bit
    int norm, column, reader;  // layer and column that it serves in the write warps' table work, and as which of READERS

    __device__ Place(const Params& p, int index) : thread(index) {
        warp_lane = thread % 32;
        slabs = p.channels / WIDTH;
        slab = blockIdx.x % slabs;
        c = thread % WIDTH;  // the channel, within the slab, that the thread serves in table work
        channel = slab * WIDTH + c;
        lane = thread % LANES;
        step = GROUP / LANES / p.segments;
        segment = thread / LANES / step;
        row = thread / LANES % step;
        norm = thread / WIDTH % NORMS;
        column = thread % COLUMNS;
        reader = thread / COLUMNS;
        launch = flag = 0;
    }

    // Once earlier kernels have ended.
    __device__ Place& count_launch(const Params& p) {
        if (PEERS > 1) launch = *static_cast<volatile u32*>(p.launches + slab) + 1, flag = launch & 1;
        return *this;
    }
};

// Messages, of sums of a sample (a word) or of its channels (two halves): whether one is there, what stands for one that is
// or is not, and its content.
__device__ __forceinline__ bool is_missing(u64 word, const Place& at) {
    return PEERS > 1 ? (u32(word >> 32) & 1) != at.flag : word == EMPTY;
}
__device__ __forceinline__ bool is_half_missing(u64 word, const Place& at) {
    if (PEERS > 1) return (u32(word) & 1) != at.flag || is_missing(word, at);
    return u32(word) == ~0u || u32(word >> 32) == ~0u;
}
__device__ __forceinline__ u64 present(const Place& at) { return PEERS > 1 ? at.flag * 0x100000001ull : 0; }
__device__ __forceinline__ u64 absent(const Place& at) { return PEERS > 1 ? u64(at.flag ^ 1) << 32 : EMPTY; }
__device__ __forceinline__ float2 sums_in(u64 word) { return as_pair(PEERS > 1 ? word & ~(1ull << 32) : word); }
__device__ __forceinline__ float2 halves_in(u64 word) { return as_pair(PEERS > 1 ? word & ~0x100000001ull : word); }

// What waits for messages of other processes looks at the clock now and then.
struct Patience {
    u32 looks = 0;
    u64 start;

    // Before the message of sample n of the stream is looked for again.
    __device__ __forceinline__ void look(const Params& p, int n) {
        if (PEERS == 1 || ++looks % 4096) return;
        u64 now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (looks == 4096) start = now;
        if (float(now - start) * 1e-9f < p.patience) return;
        *static_cast<volatile u32*>(p.late) = n % PEERS + 1;
        __threadfence_system();
        while (float(now - start) * 1e-9f < p.patience + 1.f) asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));  // for the host to read it
        asm volatile("trap;");
    }
};

// Sample n's sums, to every process; n is its number in the stream.
__device__ __forceinline__ void publish_sums(const Params& p, const Norm& norm, const Place& at, int n, float a, float b) {
    const long long index = (long long)n * p.channels + at.channel;
#if PEERS > 1
    const u64 word = u64(__float_as_uint(a)) | u64(__float_as_uint(b) & ~1u | at.flag) << 32;
    const long long from_first = norm.sample_sums - p.norms[0].sample_sums;
#pragma unroll
    for (int q = 0; q < PEERS; q++)
        asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(p.peers[q] + from_first + index), "l"(word) : "memory");
#else
    publish(norm.sample_sums + index, a, b);
#endif
}

__device__ __forceinline__ u64 peek_sums(const Params& p, const Norm& norm, const Place& at, int n) {
    return peek_message(norm.sample_sums + (long long)n * p.channels + at.channel);
}

// Those of which `word` is what was seen last.
__device__ __forceinline__ float2 wait_for_sums(const Params& p, const Norm& norm, const Place& at, int n, u64 word) {
    Patience patience;
    while (is_missing(word, at)) patience.look(p, n), word = peek_sums(p, norm, at, n);
    return sums_in(word);
}

// One tile of work: first row, first sample, and rows of each of its segments.
struct Item {
    int sample, count, tile, rows;
    long long first_row;

    __device__ Item(const Params& p, int index) {
        const bool whole = p.tiles == 1;  // needs no division
        tile = whole ? 0 : index % p.tiles;
        sample = whole ? index * p.segments : index / p.tiles;
        count = min(p.segments, p.samples - sample);
        rows = min(p.tile_rows, p.pixels - tile * p.tile_rows);
        first_row = (long long)sample * p.pixels + tile * p.tile_rows;
    }
    __device__ int rows_of(int segment) const { return segment < count ? rows : 0; }
};

__device__ __forceinline__ int item_count(const Params& p) {
    return p.segments > 1 ? (p.samples + p.segments - 1) / p.segments : p.samples * p.tiles;
}

struct Stages {
    u64 full[STAGES], reduced[STAGES], empty[STAGES];
    int queue[STAGES];  // item of a stage, -1 after the last
};

// Before any role begins, by the thread that loads: what it needs to issue the first loads.
template <int MAPS>
__device__ __forceinline__ void prepare_stages(const Params& p, Stages& s) {
#pragma unroll
    for (int i = 0; i < MAPS; i++) asm volatile("prefetch.tensormap [%0];" ::"l"(p.maps + i) : "memory");
    for (int i = 0; i < STAGES; i++) {
        barrier_init(s.full + i, 1);
        barrier_init(s.reduced + i, WARPS);
        barrier_init(s.empty + i, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The kernel may have begun ahead of the end of the one in front of it in the stream, from which on memory may be read and
// written.
__device__ __forceinline__ void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The load warp's one thread takes the next item from the tile scheduler, for stage i of its CTA's; false: there is none.
// fetch(item, stage) issues TMA and arrives on the stage's mbarrier.
template <class Fetch>
__device__ __forceinline__ bool load_tile(const Params& p, Stages& s, int i, Fetch fetch) {
    const int items = item_count(p), stage = i % STAGES;
    if (i >= STAGES) wait(s.empty + stage, i / STAGES - 1 & 1);
    const int index = atomicAdd(p.tile_counter + blockIdx.x % (p.channels / WIDTH), 1) + 1;
    s.queue[stage] = index < items ? index : -1;
    if (index < items) fetch(Item(p, index), stage);
    else arrive(s.full + stage);
    return index < items;
}

// Write warps, while the first tile is on its way: make EMPTY what this launch was given for it. A launch reads nothing there.
__device__ __forceinline__ void clear_messages(const Params& p, int thread) {
    for (int i = blockIdx.x * GROUP + thread; i < p.clear_count; i += gridDim.x * GROUP) p.clear[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
}

// Reduce and write warps: visit(item, stage, number of the item within the CTA) for every item of the CTA.
template <class Visit>
__device__ __forceinline__ void visit_tiles(const Params& p, Stages& s, Visit visit) {
    for (int i = 0;; i++) {
        const int stage = i % STAGES;
        wait(s.full + stage, i / STAGES & 1);
        if (s.queue[stage] < 0) return;
        visit(Item(p, s.queue[stage]), stage, i);
    }
}

// A warp hands a stage on.
__device__ __forceinline__ void release(u64* barrier, const Place& at) {
    __syncwarp();
    if (at.warp_lane == 0) arrive(barrier);
}

__device__ __forceinline__ void tma_load_boxes(const Params& p, uint4* to, const TensorMap& map, int first_row, int rows, int boxes, u64* barrier) {
    const int channel = blockIdx.x % (p.channels / WIDTH) * WIDTH;
    for (int b = 0; b < boxes; b++) tma_load_box(to + b * rows * LANES, map, channel, first_row + b * rows, barrier);
}

__device__ __forceinline__ int stage_rows(const Params& p) { return p.boxes * p.box_rows; }
