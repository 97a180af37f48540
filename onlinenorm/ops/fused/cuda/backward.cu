// grad_x = A g + B (x - m) + D behind the masks of ReLU and clamp, the residual's gradient, those of the parameters, and
// the controls moved past the batch. g replaces the gradient in shared memory once it is masked; with a SHORTCUT as far as
// both layers share it, which is before the clamps.

__device__ __forceinline__ void reduce_warps(const Params& p, const Place& at, Scratch& s, uint4* memory) {
    const int tile_size = stage_rows(p) * LANES, pitch = p.channels / 8;
    float bias[NORMS][8];
#pragma unroll
    for (int t = 0; t < NORMS; t++) parameters8(p.norms[t].bias, at, 0.f, bias[t]);
    visit_tiles(p, s.stages, [&](const Item& item, int stage, int i) {
        uint4* start = memory + stage * stage_size(p);
        uint4* tile = start + at.segment * p.pixels * LANES + at.lane;
        const unsigned char* bits = reinterpret_cast<const unsigned char*>(start + mask_at(p)) + at.segment * even(p.pixels) * 8 + at.lane;
        uint4* out_residual = p.out_residual + (item.first_row + at.segment * p.pixels) * pitch + at.slab * LANES + at.lane;
        const int rows = item.rows_of(at.segment), segment = at.thread / WIDTH;  // the latter in table work
        float m[NORMS][8], scale[NORMS][8], rstd[NORMS], sum[NORMS][8] = {}, product[NORMS][8] = {};  // w = (x - m) scale + bias
#pragma unroll
        for (int t = 0; t < NORMS; t++) {
            const uint4* own = start + states_at(p) + t * p.segments * WIDTH / 2;
            float weight[8];
            parameters8(p.norms[t].weight, at, 1.f, weight);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float4 two = reinterpret_cast<const float4*>(own + (at.segment * WIDTH + at.lane * 8) / 2)[k];
                m[t][2 * k] = two.x, scale[t][2 * k] = weight[2 * k] * rsqrtf(two.y + p.eps);
                m[t][2 * k + 1] = two.z, scale[t][2 * k + 1] = weight[2 * k + 1] * rsqrtf(two.w + p.eps);
            }
            const float2* states = reinterpret_cast<const float2*>(own) + (segment < item.count ? segment : 0) * WIDTH;
            rstd[t] = SCALED ? rsqrtf(states[at.c].y + p.eps) : 0.f;
        }
#if POOL
        if (SKIP_GRAD) add_skip_grad(p, at, start);
        visit_pixels(p, at, item, start, start + grad_size(p), indices_of(p, start), [&](int, const float (&g)[8], const float (&x)[8]) {
#pragma unroll
            for (int k = 0; k < 8; k++) {
                sum[0][k] += g[k];
                product[0][k] += g[k] * (x[k] - m[0][k]);
            }
        });
#else
#pragma unroll 2
        for (int row = at.row; row < rows; row += at.step) {
            float g[8];
            unpack(tile[row * LANES], g);
#if SKIP_GRAD
            float other[8];
            unpack(tile[(1 + NORMS) * tile_size + row * LANES], other);
#pragma unroll
            for (int k = 0; k < 8; k++) g[k] += other[k];
#endif
#if RELU && RESIDUAL
            const u32 mask = bits[row * 8];
#pragma unroll
            for (int k = 0; k < 8; k++) g[k] = mask >> k & 1 ? g[k] : 0.f;
            if (!SHORTCUT) out_residual[(long long)row * pitch] = pack(g);
#endif
            if (REWRITES && SHORTCUT) tile[row * LANES] = pack(g);
#pragma unroll
            for (int t = 0; t < NORMS; t++) {
                float x[8];
                unpack(tile[(1 + t) * tile_size + row * LANES], x);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    x[k] -= m[t][k];
                    float own = g[k];
                    if (RELU && !MASK) own = x[k] * scale[t][k] + bias[t][k] <= 0.f ? 0.f : own;
                    if (CLAMP) own = fabsf(fmaf(x[k], scale[t][k], bias[t][k])) < p.clamp ? own : 0.f;
                    sum[t][k] += own;
                    product[t][k] += own * x[k];
                    if (!SHORTCUT) g[k] = own;
                }
            }
            if (REWRITES && !SHORTCUT) tile[row * LANES] = pack(g);
        }
#endif
        if (REWRITES) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // TMA writes here next
        release(s.stages.reduced + stage, at);
#pragma unroll
        for (int t = 0; t < NORMS; t++) sum_within_warp(sum[t], product[t], s.warps[i & 1][t], at);
        sync<1>();
        if (segment < item.count) {
#pragma unroll
            for (int t = 0; t < NORMS; t++) {
                const float2 total = sum_of_warps(p, s.warps[i & 1][t], at);
                if (p.tiles == 1) announce(p, p.norms[t], at, item.sample + segment, total, rstd[t]);
                else publish(tile_sums_of(p, p.norms[t], at, item.sample) + item.tile * WIDTH + at.c, total.x, total.y);
            }
        }
    });
}

__device__ __forceinline__ void write_warps(const Params& p, const Place& at, Scratch& s, const uint4* memory) {
    const int tile_size = stage_rows(p) * LANES, pitch = p.channels / 8;
    float bias[NORMS][8];
#pragma unroll
    for (int t = 0; t < NORMS; t++)
        if (SCALED || CLAMP && SHORTCUT) parameters8(p.norms[t].bias, at, 0.f, bias[t]);
    visit_tiles(p, s.stages, [&](const Item& item, int stage, int i) {
        const uint4* start = memory + stage * stage_size(p);
        const uint4* tile = start + at.segment * p.pixels * LANES + at.lane;
        const float2* own = reinterpret_cast<const float2*>(start + states_at(p));
        const float* gains = reinterpret_cast<const float*>(start + gains_at(p)) + at.segment * COLUMNS + at.lane * 8;
        const int rows = item.rows_of(at.segment);
        wait(s.stages.ready + stage, i / STAGES & 1);
#if SCALED
        if (at.row < 32 / LANES && at.segment < item.count) {  // the segment's first warp waits for all
            const int n = in_stream(p, item.sample + at.segment);
#pragma unroll
            for (int t = 0; t < NORMS; t++) {
                const float rzeta = p.norms[t].rzeta[n], kappa = projection(p, wait_for_channel_sums(p, p.norms[t], at, n), rzeta);
                if (at.warp_lane == 0) s.scaling[stage][at.segment][t] = make_float2(rzeta, kappa);
            }
        }
        sync<2>();
#endif
        wait(s.stages.reduced + stage, i / STAGES & 1);
        const long long at_row = (item.first_row + at.segment * p.pixels) * pitch + at.slab * LANES + at.lane;
        float gain[NORMS][8], slope[NORMS][8], constant[NORMS][8], centre[NORMS][8];
#pragma unroll
        for (int t = 0; t < NORMS; t++) {
            load8(gains + t * WIDTH, gain[t]);
            load8(gains + p.segments * COLUMNS + t * WIDTH, slope[t]);
            load8(gains + 2 * p.segments * COLUMNS + t * WIDTH, constant[t]);
#pragma unroll
            for (int k = 0; k < 8; k++) centre[t][k] = own[(t * p.segments + at.segment) * WIDTH + at.lane * 8 + k].x;
#if SCALED
            const float own_rzeta = s.scaling[stage][at.segment][t].x, kappa = s.scaling[stage][at.segment][t].y;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                slope[t][k] -= gain[t][k] * gain[t][k] * own_rzeta * kappa;
                gain[t][k] *= own_rzeta;
                constant[t][k] -= gain[t][k] * kappa * bias[t][k];
            }
#endif
        }
        auto put = [&](int t, int row, const float (&g)[8], const float (&x)[8]) {
            float r[8];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float d = x[k] - centre[t][k];
                float masked = g[k];
                if (CLAMP && SHORTCUT) masked = fabsf(fmaf(d, gain[t][k], bias[t][k])) < p.clamp ? masked : 0.f;  // as above
                r[k] = masked * gain[t][k] + (d * slope[t][k] + constant[t][k]);
            }
            (t ? p.out_residual : p.out)[at_row + (long long)row * pitch] = pack(r);
        };
#if POOL
        visit_pixels(p, at, item, start, start + grad_size(p), indices_of(p, start),
                     [&](int row, const float (&g)[8], const float (&x)[8]) { put(0, row, g, x); });
#else
#pragma unroll 4 / NORMS
        for (int row = at.row; row < rows; row += at.step) {
            float g[8];
            unpack(tile[row * LANES], g);
#pragma unroll
            for (int t = 0; t < NORMS; t++) {
                float x[8];
                unpack(tile[(1 + t) * tile_size + row * LANES], x);
                put(t, row, g, x);
            }
        }
#endif
        release(s.stages.empty + stage, at);
    });
}

extern "C" __global__ void __launch_bounds__(2 * GROUP + COLUMNS + 32, 1) online_norm_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) uint4 memory[];
    Scratch& s = *reinterpret_cast<Scratch*>(memory + STAGES * stage_size(p));
    const int role = min(int(threadIdx.x) / GROUP, 2), index = threadIdx.x - role * GROUP;
    const bool states = role == 2 && index < COLUMNS, loads = role == 2 && index == COLUMNS;
    auto load = [&](int i) {
        return load_tile(p, s.stages, i, [&](const Item& item, int stage) {
            u64* barrier = s.stages.full + stage;
            uint4* to = memory + stage * stage_size(p);
            const int slab = blockIdx.x % (p.channels / WIDTH), row = int(item.first_row), pooled = item.tile * p.tile_rows / 4;
            const int grad_row = POOL ? item.sample * pooled_pixels(p) + pooled : row;
            u32 bits = p.segments > 1 ? item.count * even(p.pixels) * 8 : even(item.rows) * 8;
            if (POOL) bits = min(mask_bytes(p), (pooled_pixels(p) - pooled) * 32);
            arrive_expecting(barrier, states_at(p) * 16 + item.count * COLUMNS * 8 + (MASK || POOL ? bits : 0));
            tma_load_boxes(p, to, p.maps[0], grad_row, grad_box_rows(p), grad_boxes(p), barrier);
            if (SKIP_GRAD) tma_load_boxes(p, to + skip_grad_at(p), p.maps[1 + NORMS], grad_row, grad_box_rows(p), grad_boxes(p), barrier);
#pragma unroll
            for (int t = 0; t < NORMS; t++) {
                tma_load_boxes(p, to + grad_size(p) + t * stage_rows(p) * LANES, p.maps[1 + t], row, p.box_rows, p.boxes, barrier);
                uint4* states = to + states_at(p) + t * p.segments * WIDTH / 2;
                const float2* from = p.norms[t].tables + (long long)in_stream(p, item.sample) * p.channels + slab * WIDTH;
                for (int k = 0; k < item.count; k++)
                    tma_load_bytes(states + k * WIDTH / 2, from + (long long)k * PEERS * p.channels, WIDTH * 8, barrier);
            }
            if (MASK) tma_load_bytes(to + mask_at(p), p.mask + mask_offset(p, slab, item.sample, item.tile * p.tile_rows), bits, barrier);
            if (POOL) tma_load_bytes(to + mask_at(p), p.mask + index_offset(p, slab, item.sample, pooled), bits, barrier);
        });
    };
    if (loads) prepare_stages<1 + NORMS + SKIP_GRAD>(p, s.stages);
    wait_for_earlier_kernels();
    bool more = loads && load(0);
    // The state is overwritten once all sums are published, so it has to be here before this CTA publishes any.
    float u = 0.f, v = 0.f;
    if (states) {
        const Place at(p, index);
        u = p.norms[at.norm].state_a[at.channel], v = p.norms[at.norm].state_b[at.channel];
        s.table[0][0][index] = u, s.table[1][0][index] = v;
    }
    __syncthreads();
    if (role == 0) {
        reduce_warps(p, Place(p, index), s, memory);
    } else if (role == 1) {
        clear_messages(p, index);
        write_warps(p, Place(p, index), s, memory);
    } else if (states) {
        state_warps(p, Place(p, index), s, memory, u, v);
    } else {
        for (int i = 1; more; i++) more = load(i);
    }
}
