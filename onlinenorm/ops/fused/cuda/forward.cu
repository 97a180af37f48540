// y = relu(compensate(weight (x - m) / s + bias) + residual), the tables of states and moments, and the state moved past the
// batch. Error compensation clamps, or divides by zeta (n), the root mean square over a sample. With a SHORTCUT the residual
// is compensate(weight (x - m) / s + bias) of the second layer.

struct Scratch {
    Stages stages;
    alignas(16) float2 warps[2][WARPS * WIDTH];
    float2 parts[SEGMENTS][WIDTH];
    float2 table[CHUNK][COLUMNS];  // moments of the samples to advance over
    float mean[SEGMENTS][COLUMNS], scale[SEGMENTS][COLUMNS], rzeta[SEGMENTS][NORMS];
};

constexpr int TENSORS = 1 + RESIDUAL;
__device__ __forceinline__ int halo_rows(const Params& p) { return POOL ? p.width : 0; }  // above a tile
constexpr int SCALE_THREADS = SCALED ? COLUMNS : 0;  // threads of the scale warps

// Where a product meets a sum, fmaf says which are rounded together: this is inlined at several places, of which the compiler
// would choose at each, and another process may take the same sample at another.
__device__ __forceinline__ void step_over(const Params& p, float2 moment, float& mean, float& var) {
    const float d = moment.x - mean;
    var = fmaf(p.alpha_fwd, var, p.one_minus_alpha_fwd * fmaf(p.alpha_fwd * d, d, moment.y));
    mean = fmaf(p.one_minus_alpha_fwd, d, mean);
}

__device__ __forceinline__ void reduce_warps(const Params& p, const Place& at, Scratch& s, const uint4* memory) {
    const int tile_size = stage_rows(p) * LANES, stage_size = TENSORS * tile_size;
    auto announce = [&](const Norm& norm, int n, float mu, float q) {
        n = in_stream(p, n);
        if (PEERS > 1) q = __uint_as_float(__float_as_uint(q) & ~1u);  // as it is sent
        publish_sums(p, norm, at, n, mu, q);
        norm.moments[(long long)n * p.channels + at.channel] = make_float2(mu, q);  // for backward
    };
    visit_tiles(p, s.stages, [&](const Item& item, int stage, int i) {
#pragma unroll
        for (int t = 0; t < NORMS; t++) {
            const Norm& norm = p.norms[t];
            const uint4* start = memory + stage * stage_size + t * tile_size + halo_rows(p) * LANES;
            const uint4* tile = start + at.segment * p.pixels * LANES + at.lane;
            const int rows = item.rows_of(at.segment), segment = at.thread / WIDTH;  // the latter in table work
            // Sums are shifted by the segment's first row: no cancellation, however large the mean.
            float shift[8], sum[8] = {}, square[8] = {};
            const float base = segment < item.count ? finite(value_of(start + segment * p.pixels * LANES, at.c)) : 0.f;
            unpack(tile[0], shift);
#pragma unroll
            for (int k = 0; k < 8; k++) shift[k] = finite(shift[k]);
#pragma unroll 4
            for (int row = at.row; row < rows; row += at.step) {
                float x[8];
                unpack(tile[row * LANES], x);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const float d = x[k] - shift[k];
                    sum[k] += d;
                    square[k] += d * d;
                }
            }
            if (t == NORMS - 1) release(s.stages.reduced + stage, at);
            float2* warps = s.warps[(NORMS * i + t) & 1];
            sum_within_warp(sum, square, warps, at);
            sync<1>();
            if (segment < item.count) {
                const float2 total = sum_of_warps(p, warps, at);
                const float mu = base + total.x / item.rows;
                const float scatter = max_nan(total.y - total.x * (total.x / item.rows), 0.f);
                if (p.tiles == 1) announce(norm, item.sample + segment, mu, scatter / p.pixels);
                else publish(tile_sums_of(p, norm, at, item.sample) + item.tile * WIDTH + at.c, mu, scatter);
            }
        }
        if (p.tiles == 1 || item.tile < p.tiles - 1) return;
        const Norm& norm = p.norms[at.norm];
        float centre;
        float2 total = merge_tile_sums(p, at, tile_sums_of(p, norm, at, item.sample), s.parts, centre, [&](float2& sum, float2 part, int t) {
            const float count = min(p.tile_rows, p.pixels - t * p.tile_rows), d = part.x - centre;
            sum.x += count * d;
            sum.y += part.y + count * d * d;
        });
        if (at.thread < COLUMNS)
            announce(norm, item.sample, centre + total.x / p.pixels, max_nan(total.y - total.x * (total.x / p.pixels), 0.f) / p.pixels);
    });
}

__device__ __forceinline__ void write_warps(const Params& p, const Place& at, Scratch& s, const uint4* memory, float mean, float var) {
    const int tile_size = stage_rows(p) * LANES, stage_size = TENSORS * tile_size, pitch = p.channels / 8;
    float bias[NORMS][8];
#pragma unroll
    for (int t = 0; t < NORMS; t++) parameters8(p.norms[t].bias, at, 0.f, bias[t]);
    const Norm& norm = p.norms[at.norm];  // of table work
    const float weight = norm.weight ? norm.weight[at.channel] : 1.f, per_channels = 1.f / p.channels;
    int position = 0;  // mean and var are those before this sample, one column a thread of the first COLUMNS
    bool closing = false;
    auto step = [&](float2 moment) { step_over(p, moment, mean, var); };
    // Whole warps call these.
    auto rzeta_of = [&](const Norm& norm, int n) { return rsqrtf(fmaf(wait_for_channel_sums(p, norm, at, n), per_channels, p.zeta_eps)); };
    auto record_rzeta = [&](const Norm& norm, int n) {
        const float rzeta = rzeta_of(norm, n);
        if (at.warp_lane == 0) norm.rzeta[n] = rzeta;
    };

    // Ask for the moments of the chunk of samples from `from` on, up to `last`; some may not be there yet.
    constexpr int AHEAD = chunks_ahead(2);
    u64 asked[AHEAD][WORDS];
    auto mine = [&](int j) { return at.reader + READERS * j; };
    auto ask = [&](u64 (&words)[WORDS], int from, int last) {
#pragma unroll
        for (int j = 0; j < WORDS; j++) words[j] = from + mine(j) < last ? peek_sums(p, norm, at, from + mine(j)) : present(at);
    };
    auto collect = [&](u64 (&words)[WORDS]) {
        auto sample_of = [&](int j) { return position + mine(j); };
        bool missing = true;
        Patience patience;
        while (missing) {
            missing = false;
#pragma unroll
            for (int j = 0; j < WORDS; j++)
                if (is_missing(words[j], at)) patience.look(p, sample_of(j)), words[j] = peek_sums(p, norm, at, sample_of(j));
#pragma unroll
            for (int j = 0; j < WORDS; j++) missing |= is_missing(words[j], at);
        }
    };

    // Bring the recurrence to `last`, leaving the normalisation of own samples first..last in s.mean and s.scale. Other
    // processes' samples between these and the own one before are recorded with them.
    auto advance = [&](int first, int last, bool record) {
        const int from = first - (record ? PEERS - 1 : 0);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) ask(asked[k], position + k * CHUNK, last);
        for (int chunk = 0;; chunk++) {
            const int batch = min(CHUNK, last - position);
            in_turn(chunk, asked, [&](u64 (&words)[WORDS]) {
                collect(words);
#pragma unroll
                for (int j = 0; j < WORDS; j++)
                    if (mine(j) < batch) s.table[mine(j)][at.column] = sums_in(words[j]);
            });
            sync<2>();
            if (position + (AHEAD - 1) * CHUNK + batch < last)
                in_turn(chunk, asked, [&](u64 (&words)[WORDS]) { ask(words, position + (AHEAD - 1) * CHUNK + batch, last); });
            if (at.thread < COLUMNS) {
                // Samples this tile does not hold go by in eights, so that only the recurrence itself is waited for.
                const int passing = min(batch, from - position);
                int j = 0;
                for (; j + 8 <= passing; j += 8) {
                    float2 moments[8];
#pragma unroll
                    for (int i = 0; i < 8; i++) moments[i] = s.table[j + i][at.column];
#pragma unroll
                    for (int i = 0; i < 8; i++) step(moments[i]);
                }
                for (; j <= batch; j++) {
                    const int n = position + j;
                    if (n >= from && (j < batch || n == last)) {
                        const long long index = (long long)n * p.channels + at.channel;
                        if (is_own(p, n)) {
                            s.mean[(n - first) / PEERS][at.column] = mean;
                            s.scale[(n - first) / PEERS][at.column] = weight * rsqrtf(var + p.eps);
                        } else if (record) {
                            norm.moments[index] = s.table[j][at.column];
                        }
                        if (record) norm.tables[index] = make_float2(mean, var);
                    }
                    if (j < batch) step(s.table[j][at.column]);
                }
            }
            position += batch;
            sync<2>();
            if (position >= last) break;
        }
    };

    visit_tiles(p, s.stages, [&](const Item& item, int stage, int i) {
        const uint4* tile = memory + stage * stage_size + (halo_rows(p) + at.segment * p.pixels) * LANES + at.lane;
        const int rows = item.rows_of(at.segment);
        const int first = in_stream(p, item.sample), last = in_stream(p, item.sample + item.count - 1);
        uint4* out = p.out + (item.first_row + at.segment * p.pixels) * pitch + at.slab * LANES + at.lane;
        unsigned char* mask = p.mask + mask_offset(p, at.slab, item.sample + at.segment, item.tile * p.tile_rows) + at.lane;
        advance(first, last, item.tile == 0);
        closing |= last == in_stream(p, p.samples - 1) && item.tile == 0;
        float m[NORMS][8], scale[NORMS][8], offset[NORMS][8];
#pragma unroll
        for (int t = 0; t < NORMS; t++) {
            load8(s.mean[at.segment] + t * WIDTH + at.lane * 8, m[t]);
            load8(s.scale[at.segment] + t * WIDTH + at.lane * 8, scale[t]);
#pragma unroll
            for (int k = 0; k < 8; k++) offset[t][k] = bias[t][k];
        }
#if SCALED
        if (at.row < 32 / LANES && at.segment < item.count) {  // the segment's first warp waits for all
            const int n = in_stream(p, item.sample + at.segment);
#pragma unroll
            for (int t = 0; t < NORMS; t++) {
                const float rzeta = rzeta_of(p.norms[t], n);
                if (at.warp_lane == 0) s.rzeta[at.segment][t] = rzeta;
                if (item.tile > 0 || at.slab > 0) continue;
                if (at.warp_lane == 0) p.norms[t].rzeta[n] = rzeta;
                for (int other = max(0, n - PEERS + 1); PEERS > 1 && other < n; other++) record_rzeta(p.norms[t], other);
            }
        }
        sync<2>();
#pragma unroll
        for (int t = 0; t < NORMS; t++) {
            const float rzeta = s.rzeta[at.segment][t];
#pragma unroll
            for (int k = 0; k < 8; k++) scale[t][k] *= rzeta, offset[t][k] *= rzeta;
        }
#endif
#if POOL
        u32 signs[4];
#pragma unroll
        for (int j = 0; j < 4; j++) signs[j] = sign_of(scale[0][2 * j]) | sign_of(scale[0][2 * j + 1]) << 16;
        const int pooled_width = p.width / 2, pooled_first = item.tile * p.tile_rows / 4;
        uint4* pooled = p.out + ((long long)item.sample * pooled_pixels(p) + pooled_first) * pitch + at.slab * LANES + at.lane;
        u32* indices = reinterpret_cast<u32*>(p.mask + index_offset(p, at.slab, item.sample, pooled_first)) + at.lane;
        for (int q = at.row; q < rows / 4; q += at.step) {
            const int line = q / pooled_width, column = q - line * pooled_width;
            const uint4* middle = tile + 2 * (line * p.width + column) * LANES;
            const bool top = item.tile == 0 && line == 0, left = column == 0;
            Window window(top, left);
#pragma unroll
            for (int k = 0; k < 9; k++) {
                const int down = k / 3 - 1, right = k % 3 - 1;
                if ((down < 0 && top) || (right < 0 && left)) continue;
                window.look(middle[(down * p.width + right) * LANES], k, signs);
            }
            float z[8];
#pragma unroll
            for (int j = 0; j < 4; j++) window.best[j] = times(window.best[j], signs[j]);
            unpack(make_uint4(window.best[0], window.best[1], window.best[2], window.best[3]), z);
            u32 taken = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int shift = k % 2 * 16;
                z[k] = (z[k] - m[0][k]) * scale[0][k] + offset[0][k];
                const bool passes = !(z[k] <= 0.f) && (!CLAMP || fabsf(z[k]) < p.clamp);
                taken |= (passes ? window.index[k / 2] >> shift & 15 : NOTHING) << 4 * k;
#if CLAMP
                z[k] = min_nan(z[k], p.clamp);
#endif
                z[k] = max_nan(z[k], 0.f);
            }
            pooled[(long long)q * pitch] = pack(z);
            indices[q * LANES] = taken;
        }
#else
#pragma unroll 4
        for (int row = at.row; row < rows; row += at.step) {
            float z[8];
            unpack(tile[row * LANES], z);
#if RESIDUAL
            float r[8];
            unpack(tile[tile_size + row * LANES], r);
            u32 bits = 0;
#endif
#pragma unroll
            for (int k = 0; k < 8; k++) {
                z[k] = (z[k] - m[0][k]) * scale[0][k] + offset[0][k];
#if CLAMP
                z[k] = max_nan(min_nan(z[k], p.clamp), -p.clamp);
#endif
#if SHORTCUT
                r[k] = (r[k] - m[1][k]) * scale[1][k] + offset[1][k];
                if (CLAMP) r[k] = max_nan(min_nan(r[k], p.clamp), -p.clamp);
#endif
#if RESIDUAL
                z[k] += r[k];
                bits |= u32(!(z[k] <= 0.f)) << k;
#endif
#if RELU
                z[k] = max_nan(z[k], 0.f);
#endif
            }
            out[(long long)row * pitch] = pack(z);
#if RESIDUAL && RELU
            mask[row * 8] = bits;
#endif
        }
#endif
        wait(s.stages.reduced + stage, i / STAGES & 1);
        release(s.stages.empty + stage, at);
    });
    if (closing && at.thread < COLUMNS) {
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
                if (SCALED && at.slab == 0 && at.thread % WIDTH < 32) record_rzeta(norm, n);
            }
            step(moment);
        }
        norm.state_a[at.channel] = mean, norm.state_b[at.channel] = var;
        if (PEERS > 1 && at.thread == 0) p.launches[at.slab] = at.launch;
    }
}

// Layer scaling: the scale warps of one CTA a slab follow the moments as they come, ahead of all write warps, and publish
// the sums over the slab's channels that the mean square of each sample is made of.
__device__ __forceinline__ void scale_warps(const Params& p, const Place& at) {
    constexpr int AHEAD = 8;  // samples asked for at once
    const Norm& norm = p.norms[at.norm];
    const float weight = norm.weight ? norm.weight[at.channel] : 1.f, bias = norm.bias ? norm.bias[at.channel] : 0.f;
    float mean = norm.state_a[at.channel], var = norm.state_b[at.channel];
    // Here a variable would cost registers that are short.
    auto ask = [&](int n) { return n < stream_size(p) ? peek_sums(p, norm, at, n) : absent(at); };
    auto square_of = [&](u64 word) {  // mean(w^2) of the next sample, which is then behind
        const float2 moment = sums_in(word);
        const float scale = weight * rsqrtf(var + p.eps), w = fmaf(scale, moment.x - mean, bias);
        step_over(p, moment, mean, var);
        // Of infinite pixels the variance is NaN.
        return fabsf(w) == INFINITE ? INFINITE : fmaf(w, w, scale * scale * moment.y);
    };
    u64 words[AHEAD], next[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) next[j] = ask(j);
    for (int first = 0; first < stream_size(p); first += AHEAD) {
        bool missing = false;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            words[j] = next[j], missing |= is_missing(words[j], at);
            next[j] = ask(first + AHEAD + j);
        }
        if (!__any_sync(~0u, missing)) {  // side by side
            float squares[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) squares[j] = square_of(words[j]);
#pragma unroll
            for (int j = 0; j < AHEAD; j++) squares[j] = sum_of_lanes(squares[j]);
#pragma unroll
            for (int j = 0; j < AHEAD; j++) publish_channel_sum<false>(p, norm, at, first + j, squares[j]);
        } else {  // as each comes: later ones may wait for what this one lets go
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                if (first + j >= stream_size(p)) break;
                Patience patience;
                while (is_missing(words[j], at)) {
                    patience.look(p, first + j);
#pragma unroll
                    for (int k = j; k < AHEAD; k++)
                        if (is_missing(words[k], at)) words[k] = ask(first + k);
                }
                publish_channel_sum<false>(p, norm, at, first + j, sum_of_lanes(square_of(words[j])));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(2 * GROUP + 32 + SCALE_THREADS, 1) online_norm_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) uint4 memory[];
    const int stage_size = TENSORS * stage_rows(p) * LANES;
    Scratch& s = *reinterpret_cast<Scratch*>(memory + STAGES * stage_size);
    const int role = min(int(threadIdx.x) / GROUP, 2), index = threadIdx.x - role * GROUP;
    const bool loads = role == 2 && index == 0;
    auto load = [&](int i) {
        return load_tile(p, s.stages, i, [&](const Item& item, int stage) {
            u64* barrier = s.stages.full + stage;
            uint4* to = memory + stage * stage_size;
            arrive_expecting(barrier, stage_size * 16);
#pragma unroll
            for (int t = 0; t < TENSORS; t++)
                tma_load_boxes(p, to + t * stage_rows(p) * LANES, p.maps[t], int(item.first_row) - halo_rows(p), p.box_rows, p.boxes, barrier);
        });
    };
    // What needs no memory comes before the wait.
    if (loads) prepare_stages<TENSORS>(p, s.stages);
    if (role == 2) wait_for_earlier_kernels();
    bool more = loads && load(0);
    Place at(p, index % GROUP);
    if (role < 2) wait_for_earlier_kernels();
    at.count_launch(p);
    // The state is overwritten once all sums are published, so it has to be here before this CTA publishes any.
    float mean = 0.f, var = 0.f;
    if (role == 1) {
        mean = p.norms[at.norm].state_a[at.channel], var = p.norms[at.norm].state_b[at.channel];
        s.mean[0][at.column] = mean, s.scale[0][at.column] = var;
    }
    __syncthreads();
    if (role == 0) {
        reduce_warps(p, at, s, memory);
    } else if (role == 1) {
        clear_messages(p, at.thread);
        write_warps(p, at, s, memory, mean, var);
    } else if (index >= 32) {
        if (blockIdx.x < at.slabs) scale_warps(p, Place(p, index - 32).count_launch(p));
    } else {
        for (int i = 1; more; i++) more = load(i);
    }
}
