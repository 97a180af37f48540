// The scratch memory of backward, and its reduce warps: sums of the gradient behind the masks, and of its products with x - m.

struct Scratch {
    Stages stages;
    alignas(16) float2 warps[2][NORMS][WARPS * WIDTH];
    float2 parts[SEGMENTS][WIDTH];
    float table[6][CHUNK][COLUMNS];  // of the samples to advance over, see `row_of`
    float gain[SEGMENTS][COLUMNS], slope[SEGMENTS][COLUMNS], constant[SEGMENTS][COLUMNS];
    float2 scaling[SEGMENTS][NORMS];  // 1 / zeta and kappa, of layer scaling
};

__device__ __forceinline__ void reduce_warps(const Params& p, const Place& at, Scratch& s, uint4* memory) {
    const int tile_size = stage_rows(p) * LANES, pitch = p.channels / 8;
    // Layer scaling wants mean(g w) over a sample: this channel's part is taken from its sums.
    float bias[NORMS][8], own_bias[NORMS], own_weight[NORMS];
#pragma unroll
    for (int t = 0; t < NORMS; t++) {
        const Norm& norm = p.norms[t];
        parameters8(norm.bias, at, 0.f, bias[t]);
        own_bias[t] = norm.bias ? norm.bias[at.channel] : 0.f, own_weight[t] = norm.weight ? norm.weight[at.channel] : 1.f;
    }
    const float per_pixels = 1.f / p.pixels;
    auto announce = [&](int t, int n, float2 sums, float rstd) {  // of g and g (x - m)
        n = in_stream(p, n);
        publish_sums(p, p.norms[t], at, n, sums.x, sums.y);
        const float part = own_weight[t] * rstd * sums.y + own_bias[t] * sums.x;
        if (SCALED) publish_channel_sum<true>(p, p.norms[t], at, n, sum_of_lanes(part * per_pixels));
    };
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
                if (p.tiles == 1) announce(t, item.sample + segment, total, rstd[t]);
                else publish(tile_sums_of(p, p.norms[t], at, item.sample) + item.tile * WIDTH + at.c, total.x, total.y);
            }
        }
        if (p.tiles == 1 || item.tile < p.tiles - 1) return;
        float centre;
        const float2 total = merge_tile_sums(p, at, tile_sums_of(p, p.norms[at.norm], at, item.sample), s.parts, centre,
                                             [](float2& sum, float2 part, int) { sum.x += part.x, sum.y += part.y; });
#pragma unroll
        for (int t = 0; t < NORMS; t++)
            if (at.thread / WIDTH == t) announce(t, item.sample, total, rstd[t]);
    });
}
