// Forward: what a CTA shares, the recurrence, and the warps that advance it.

struct Scratch {
    Stages stages;
    alignas(16) float2 warps[2][WARPS * WIDTH];
    float2 table[CHUNK][COLUMNS];  // moments of the samples to advance over
    float rzeta[STAGES][SEGMENTS][NORMS];
};

constexpr int TENSORS = 1 + RESIDUAL;
__device__ __forceinline__ int halo_rows(const Params& p) { return POOL ? p.width : 0; }  // above a tile
// A stage, in 16 bytes: tiles of x and the residual, and mean and scale of its samples, [segment][column] each.
__device__ __forceinline__ int tiles_size(const Params& p) { return TENSORS * stage_rows(p) * LANES; }
__device__ __forceinline__ int stage_size(const Params& p) { return tiles_size(p) + p.segments * COLUMNS / 2; }
constexpr int SCALE_THREADS = SCALED ? COLUMNS : 0;  // threads of the scale warps

// Where a product meets a sum, fmaf says which are rounded together: this is inlined at several places, of which the compiler
// would choose at each, and another process may take the same sample at another.
__device__ __forceinline__ void step_over(const Params& p, float2 moment, float& mean, float& var) {
    const float d = moment.x - mean;
    var = fmaf(p.alpha_fwd, var, p.one_minus_alpha_fwd * fmaf(p.alpha_fwd * d, d, moment.y));
    mean = fmaf(p.one_minus_alpha_fwd, d, mean);
}

// To all CTAs: the moments of own sample n, of the thread's channel.
__device__ __forceinline__ void announce(const Params& p, const Norm& norm, const Place& at, int n, float mu, float q) {
    n = in_stream(p, n);
    if (PEERS > 1) q = __uint_as_float(__float_as_uint(q) & ~1u);  // as it is sent
    publish_sums(p, norm, at, n, mu, q);
    norm.moments[(long long)n * p.channels + at.channel] = make_float2(mu, q);  // for backward
}

// 1 / zeta of sample n; whole warps call these.
__device__ __forceinline__ float rzeta_of(const Params& p, const Norm& norm, const Place& at, int n) {
    return rsqrtf(fmaf(wait_for_channel_sums(p, norm, at, n), 1.f / p.channels, p.zeta_eps));
}

__device__ __forceinline__ void record_rzeta(const Params& p, const Norm& norm, const Place& at, int n) {
    const float rzeta = rzeta_of(p, norm, at, n);
    if (at.warp_lane == 0) norm.rzeta[n] = rzeta;
}

// A thread a channel of each layer; mean and var are the state before this launch.
__device__ __forceinline__ void state_warps(const Params& p, const Place& at, Scratch& s, uint4* memory, float mean, float var) {
    const Norm& norm = p.norms[at.norm];
    const float weight = norm.weight ? norm.weight[at.channel] : 1.f;
    int position = 0;  // mean and var are those before this sample
    bool closing = false;
    auto step = [&](float2 moment) { step_over(p, moment, mean, var); };

    // Ask for the moments of the next samples up to `last`; some may not be there yet.
    u64 words[CHUNK];
    auto ask = [&](int last) {
#pragma unroll
        for (int j = 0; j < CHUNK; j++) words[j] = position + j < last ? peek_sums(p, norm, at, position + j) : present(at);
    };
    auto collect = [&]() {
        bool missing = true;
        Patience patience;
        while (missing) {
            missing = false;
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                if (is_missing(words[j], at)) words[j] = peek_sums(p, norm, at, position + j);
            int sample = 0;
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                if (is_missing(words[j], at)) missing = true, sample = position + j;
            if (missing) patience.look(p, sample);
        }
    };

    // Bring the recurrence to `last`, leaving the normalisation of own samples first..last in `means`, and `scales` behind.
    // Other processes' samples between these and the own one before are recorded with them.
    auto advance = [&](int first, int last, float* means, bool record) {
        const int from = first - (record ? PEERS - 1 : 0);
        while (true) {
            const int batch = min(CHUNK, last - position);
            collect();
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                if (j < batch) s.table[j][at.thread] = sums_in(words[j]);
            if (position + batch < last) {
                position += batch;
                ask(last);
                position -= batch;
            }
            // Samples this tile does not hold go by in eights, so that only the recurrence itself is waited for.
            const int passing = min(batch, from - position);
            int j = 0;
            for (; j + 8 <= passing; j += 8) {
                float2 moments[8];
#pragma unroll
                for (int i = 0; i < 8; i++) moments[i] = s.table[j + i][at.thread];
#pragma unroll
                for (int i = 0; i < 8; i++) step(moments[i]);
            }
            for (; j <= batch; j++) {
                const int n = position + j;
                if (n >= from && (j < batch || n == last)) {
                    const long long index = (long long)n * p.channels + at.channel;
                    if (is_own(p, n)) {
                        float* to = means + (n - first) / PEERS * COLUMNS + at.thread;
                        to[0] = mean, to[p.segments * COLUMNS] = weight * rsqrtf(var + p.eps);
                    } else if (record) {
                        norm.moments[index] = s.table[j][at.thread];
                    }
                    if (record) norm.tables[index] = make_float2(mean, var);
                }
                if (j < batch) step(s.table[j][at.thread]);
            }
            position += batch;
            if (position >= last) break;
        }
    };

    visit_tiles(p, s.stages, [&](const Item& item, int stage, int) {
        const int first = in_stream(p, item.sample), last = in_stream(p, item.sample + item.count - 1);
        if (p.tiles > 1 && item.tile == p.tiles - 1) {
            float centre;
            const float2 total = merge_tile_sums(p, at, tile_sums_of(p, norm, at, item.sample), centre, [&](float2& sum, float2 part, int t) {
                const float count = min(p.tile_rows, p.pixels - t * p.tile_rows), d = part.x - centre;
                sum.x += count * d;
                sum.y += part.y + count * d * d;
            });
            announce(p, norm, at, item.sample, centre + total.x / p.pixels, max_nan(total.y - total.x * (total.x / p.pixels), 0.f) / p.pixels);
        }
        ask(last);
        advance(first, last, reinterpret_cast<float*>(memory + stage * stage_size(p) + tiles_size(p)), item.tile == 0);
        release(s.stages.ready + stage, at);
        closing |= last == in_stream(p, p.samples - 1) && item.tile == 0;
    });
    if (!closing) return;
    // The last own sample, and others' behind it: all are asked for before one is waited for.
    const int begin = in_stream(p, p.samples - 1), count = stream_size(p) - begin;
    u64 last[PEERS];
#pragma unroll
    for (int j = 0; j < PEERS; j++) last[j] = j < count ? peek_sums(p, norm, at, begin + j) : present(at);
#pragma unroll
    for (int j = 0; j < PEERS; j++) {
        if (j >= count) break;
        const int n = begin + j;
        const float2 moment = wait_for_sums(p, norm, at, n, last[j]);
        if (!is_own(p, n)) {
            const long long index = (long long)n * p.channels + at.channel;
            norm.tables[index] = make_float2(mean, var), norm.moments[index] = moment;
            if (SCALED && at.slab == 0 && at.thread % WIDTH < 32) record_rzeta(p, norm, at, n);
        }
        step(moment);
    }
    if (SCALED) wait_for_channel_sums(p, norm, at, stream_size(p) - 1);  // so the scale warps have read the state
    norm.state_a[at.channel] = mean, norm.state_b[at.channel] = var;
    if (PEERS > 1 && at.thread == 0) p.launches[at.slab] = at.launch;
}
