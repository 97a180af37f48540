// Sums of tiles, samples and channels, within a CTA and through mailboxes.

// Add the sums of the threads of a warp that share a lane (8 channels); each thread keeps and stores two channels.
__device__ __forceinline__ void sum_within_warp(float (&a)[8], float (&b)[8], float2* warps, const Place& at) {
    const bool upper = at.warp_lane & 16, odd = at.warp_lane & 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float give_a = upper ? a[i] : a[i + 4], give_b = upper ? b[i] : b[i + 4];
        a[i] = (upper ? a[i + 4] : a[i]) + __shfl_xor_sync(~0u, give_a, 16);
        b[i] = (upper ? b[i + 4] : b[i]) + __shfl_xor_sync(~0u, give_b, 16);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float give_a = odd ? a[i] : a[i + 2], give_b = odd ? b[i] : b[i + 2];
        a[i] = (odd ? a[i + 2] : a[i]) + __shfl_xor_sync(~0u, give_a, 8);
        b[i] = (odd ? b[i + 2] : b[i]) + __shfl_xor_sync(~0u, give_b, 8);
    }
    float2* to = warps + at.thread / 32 * WIDTH + at.lane * 8 + (upper ? 4 : 0) + (odd ? 2 : 0);
    *reinterpret_cast<float4*>(to) = make_float4(a[0], b[0], a[1], b[1]);
}

// Sums of segment thread / 64, channel c, from those of its warps.
__device__ __forceinline__ float2 sum_of_warps(const Params& p, const float2* warps, const Place& at) {
    const int per_segment = WARPS / p.segments, first = at.thread / WIDTH * per_segment;
    float2 total = warps[first * WIDTH + at.c];
    for (int w = first + 1; w < first + per_segment; w++) {
        const float2 part = warps[w * WIDTH + at.c];
        total.x += part.x, total.y += part.y;
    }
    return total;
}

// The reduce warps of a sample's last tile add the sums of all its tiles in order, in parts side by side, each thread those
// of layer at.norm. combine(accumulator, sums of a tile, tile) folds one in; centre is the first sum of tile 0.
template <class Combine>
__device__ __forceinline__ float2 merge_tile_sums(const Params& p, const Place& at, const u64* tile_sums, float2 (*parts)[WIDTH], float& centre, Combine combine) {
    constexpr int PARTS = SEGMENTS / NORMS;
    const int per_part = (p.tiles + PARTS - 1) / PARTS, begin = at.thread / COLUMNS * per_part, end = min(p.tiles, begin + per_part);
    centre = finite(wait_for(tile_sums + at.c).x);
    float2 sum = make_float2(0.f, 0.f);
    for (int t = begin; t < end; t += 8) {
        u64 words[8];
        bool missing = true;
#pragma unroll
        for (int j = 0; j < 8; j++) words[j] = t + j < end ? EMPTY : 0;
        while (missing) {
            missing = false;
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (words[j] == EMPTY) words[j] = peek(tile_sums + (t + j) * WIDTH + at.c);
#pragma unroll
            for (int j = 0; j < 8; j++) missing |= words[j] == EMPTY;
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (t + j < end) combine(sum, as_pair(words[j]), t + j);
    }
    parts[at.thread / WIDTH][at.c] = sum;
    sync<1>();
    sum = parts[at.norm][at.c];
    for (int q = at.norm + NORMS; q < SEGMENTS; q += NORMS) sum.x += parts[q][at.c].x, sum.y += parts[q][at.c].y;
    sync<1>();
    return sum;
}

// Sums over the channels of a sample. All threads of a warp call these.
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// To this process alone, or to every one.
template <bool EVERYWHERE>
__device__ __forceinline__ void publish_channel_sum(const Params& p, const Norm& norm, const Place& at, int n, float value) {
    const long long index = 2 * ((long long)n * at.slabs + at.slab) + at.thread / 32 % 2;
    if (at.warp_lane) return;
#if PEERS > 1
    const long long from_first = norm.channel_sums - p.norms[0].sample_sums;
    const u32 half = __float_as_uint(value) & ~1u | at.flag;
#pragma unroll
    for (int q = 0; q < (EVERYWHERE ? PEERS : 1); q++) {
        u32* to = reinterpret_cast<u32*>(EVERYWHERE ? p.peers[q] + from_first : norm.channel_sums);
        asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(to + index), "r"(half) : "memory");
    }
#else
    publish_half(reinterpret_cast<u32*>(norm.channel_sums) + index, value);
#endif
}

// The sums that the thread adds up: those of one slab, of which there are 32 at most.
__device__ __forceinline__ u64 peek_channel_sums(const Params& p, const Norm& norm, const Place& at, int n) {
    return at.warp_lane < at.slabs ? peek_message(norm.channel_sums + (long long)n * at.slabs + at.warp_lane) : present(at);
}

__device__ __forceinline__ float total_of_channel_sums(u64 word) {
    const float2 halves = halves_in(word);
    return sum_of_lanes(halves.x + halves.y);
}

__device__ __forceinline__ float wait_for_channel_sums(const Params& p, const Norm& norm, const Place& at, int n) {
    Patience patience;
    u64 word = peek_channel_sums(p, norm, at, n);
    while (is_half_missing(word, at)) patience.look(p, n), word = peek_channel_sums(p, norm, at, n);
    return total_of_channel_sums(word);
}

// Messages are asked for a chunk of samples ahead, which takes an access to L2 however many they are. Across processes a tile
// passes over PEERS times as many samples: two chunks ahead, if the `registers` that a sample takes meanwhile can be spared,
// of which layer scaling has none.
// It changes when a message is looked for first, not what is waited for: a word is taken once its flag is there, and looked
// for anew until then.
__device__ constexpr int chunks_ahead(int registers) {
    return PEERS > 1 && !SCALED && 2 * WORDS * registers <= (GROUP > 128 ? 24 : 48) ? 2 : 1;
}

// visit(what was asked for of a chunk): chunks take turns. By constant indices, so that it stays in registers.
template <int AHEAD, class Asked, class Visit>
__device__ __forceinline__ void in_turn(int chunk, Asked (&asked)[AHEAD], Visit visit) {
    if (AHEAD == 1 || chunk % 2 == 0) visit(asked[0]);
    else visit(asked[AHEAD - 1]);
}

// The parameters of the thread's eight channels; null stands for `otherwise`.
__device__ __forceinline__ void parameters8(const float* from, const Place& at, float otherwise, float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) f[i] = from ? from[at.slab * WIDTH + at.lane * 8 + i] : otherwise;
}

// 16-bit value c of a row in shared memory.
__device__ __forceinline__ float value_of(const uint4* row, int c) {
    const u32 word = reinterpret_cast<const unsigned short*>(row)[c];
    float f[8];
    unpack(make_uint4(word, 0, 0, 0), f);
    return f[0];
}

// The mailboxes of a sample's tiles, 64 channels each.
__device__ __forceinline__ u64* tile_sums_of(const Params& p, const Norm& norm, const Place& at, int sample) {
    return norm.tile_sums + ((long long)sample * at.slabs + at.slab) * p.tiles * WIDTH;
}

// ReLU bits of a sample's row, 8 bytes; a sample has an even number of rows, so that every tile begins at 16 bytes.
__device__ __forceinline__ int even(int rows) { return rows + (rows & 1); }

__device__ __forceinline__ long long mask_offset(const Params& p, int slab, int sample, int row) {
    return (((long long)slab * p.samples + sample) * even(p.pixels) + row) * 8;
}
