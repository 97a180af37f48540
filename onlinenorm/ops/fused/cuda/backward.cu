// grad_x = A g + B (x - m) + D behind the masks of ReLU and clamp, the residual's gradient, those of the parameters, and
// the controls moved past the batch. g replaces the gradient in shared memory once it is masked; with a SHORTCUT as far as
// both layers share it, which is before the clamps.

__device__ __forceinline__ void write_warps(const Params& p, const Place& at, Scratch& s, const uint4* memory, float u, float v) {
    const int tile_size = stage_rows(p) * LANES, pitch = p.channels / 8;
    const Norm& norm = p.norms[at.norm];  // of table work
    const float weight = norm.weight ? norm.weight[at.channel] : 1.f, own_bias = norm.bias ? norm.bias[at.channel] : 0.f;
    const float per_pixels = 1.f / p.pixels, per_channels = 1.f / p.channels;
    float bias[NORMS][8], grad_weight = 0.f, grad_bias = 0.f;
#pragma unroll
    for (int t = 0; t < NORMS; t++)
        if (SCALED || CLAMP && SHORTCUT) parameters8(p.norms[t].bias, at, 0.f, bias[t]);
    int position = 0;  // u and v are those before this sample, one column a thread of the first COLUMNS
    bool closing = false;

    // v <- row[0] v + row[1] and u <- alpha u + row[2] - row[3] v, with G and GY behind, from a sample's moments, the
    // state before it and its sums. Of layer scaling also from 1 / zeta and from the projection kappa of the gradient on
    // z, mean(g w) / zeta^2. Where a product meets a sum, fmaf says which are rounded together: this is inlined at several
    // places, of which the compiler would choose at each, and another process may take the same sample at another.
    auto row_of = [&](float2 before, float2 moment, float2 sums, float rzeta, float kappa, float (&row)[6]) {
        const float rstd = rsqrtf(before.y + p.eps), y = (moment.x - before.x) * rstd;
        const float yy = fmaf(y, y, moment.y * rstd * rstd);
        row[4] = sums.x * per_pixels;
        row[5] = sums.y * rstd * per_pixels;
        if (SCALED) {
            row[4] = fmaf(-kappa, fmaf(weight, y, own_bias), row[4]) * rzeta;
            row[5] = fmaf(-kappa, fmaf(weight, yy, own_bias * y), row[5]) * rzeta;
        }
        row[0] = fmaf(-p.one_minus_alpha_bkw, yy, 1.f);
        row[1] = p.scale * weight * row[5];
        row[2] = p.scale * weight * row[4] * rstd;
        row[3] = p.one_minus_alpha_bkw * y * rstd;
    };
    auto step = [&](int n, const float (&row)[6]) {
        u = fmaf(p.alpha_bkw, u, fmaf(-row[3], v, row[2]));
        v = fmaf(row[0], v, row[1]);
        if (is_own(p, n)) {  // other processes' gradients of the parameters are added to these later
            grad_bias += row[4];
            grad_weight += row[5];
        }
    };
    auto step_if_finite = [&](int n, const float (&row)[6]) {
        const float old_u = u, old_v = v;
        step(n, row);
        if (!is_finite(u) || !is_finite(v)) u = old_u, v = old_v;
    };
    auto row_at = [&](int j, float (&row)[6]) {
#pragma unroll
        for (int i = 0; i < 6; i++) row[i] = s.table[i][j][at.column];
    };

    // Ask for the sums of the chunk of samples from `from` on, up to `last`, which may not be there yet, and read their
    // states and moments.
    struct Asked {
        u64 words[WORDS], channel_sums[WORDS] = {};
        float2 before[WORDS], moments[WORDS];
        float rzeta[WORDS] = {};
    };
    constexpr int AHEAD = chunks_ahead(6);
    Asked asked[AHEAD];
    auto mine = [&](int j) { return at.reader + READERS * j; };
    auto of_sample = [&](const float2* table, int sample) { return table[(long long)sample * p.channels + at.channel]; };
    auto ask = [&](Asked& a, int from, int last) {
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            const int sample = from + mine(j);
            const bool wanted = sample < last;
            a.words[j] = wanted ? peek_sums(p, norm, at, sample) : present(at);
            if (wanted) a.before[j] = of_sample(norm.tables, sample), a.moments[j] = of_sample(norm.moments, sample);
            if (SCALED) {
                a.channel_sums[j] = wanted ? peek_channel_sums(p, norm, at, sample) : present(at);
                a.rzeta[j] = wanted ? norm.rzeta[sample] : 0.f;
            }
        }
    };
    auto collect = [&](Asked& a) {
        auto sample_of = [&](int j) { return position + mine(j); };
        bool missing = true;
        Patience patience;
        while (missing) {
            missing = false;
#pragma unroll
            for (int j = 0; j < WORDS; j++)
                if (is_missing(a.words[j], at)) patience.look(p, sample_of(j)), a.words[j] = peek_sums(p, norm, at, sample_of(j));
#pragma unroll
            for (int j = 0; j < WORDS; j++) missing |= is_missing(a.words[j], at);
#if SCALED
#pragma unroll
            for (int j = 0; j < WORDS; j++)
                if (is_half_missing(a.channel_sums[j], at)) a.channel_sums[j] = peek_channel_sums(p, norm, at, sample_of(j));
#pragma unroll
            for (int j = 0; j < WORDS; j++) missing |= is_half_missing(a.channel_sums[j], at);
#endif
        }
    };
    auto projection = [&](float total, float rzeta) { return total * per_channels * rzeta * rzeta; };

    // Bring the recurrence to `last`, leaving the coefficients of samples first..last in shared memory; `own` are the
    // states of those.
    auto advance = [&](int first, int last, const float2* own) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) ask(asked[k], position + k * CHUNK, last);
        for (int chunk = 0;; chunk++) {
            const int batch = min(CHUNK, last - position);
            in_turn(chunk, asked, [&](Asked& a) {
                collect(a);
#pragma unroll
                for (int j = 0; j < WORDS; j++) {
                    const int k = mine(j);
                    if (k < batch) {
                        float row[6];
                        const float kappa = SCALED ? projection(total_of_channel_sums(a.channel_sums[j]), a.rzeta[j]) : 0.f;
                        row_of(a.before[j], a.moments[j], sums_in(a.words[j]), a.rzeta[j], kappa, row);
#pragma unroll
                        for (int i = 0; i < 6; i++) s.table[i][k][at.column] = row[i];
                    }
                }
            });
            sync<2>();
            if (position + (AHEAD - 1) * CHUNK + batch < last) in_turn(chunk, asked, [&](Asked& a) { ask(a, position + (AHEAD - 1) * CHUNK + batch, last); });
            if (at.thread < COLUMNS) {
                auto record = [&](int j) {
                    const int n = position + j;
                    if (n >= first && (j < batch || n == last) && is_own(p, n)) {
                        const int i = (n - first) / PEERS;
                        const float rstd = rsqrtf(own[(at.norm * p.segments + i) * WIDTH + at.c].y + p.eps), k = p.one_minus_alpha_bkw / p.scale;
                        s.gain[i][at.column] = weight * rstd;
                        s.slope[i][at.column] = -k * v * rstd * rstd;
                        s.constant[i][at.column] = -k * u;
                    }
                };
                const float start[4] = {u, v, grad_weight, grad_bias};
                // Samples this tile does not hold go by in fours, so that only the recurrence itself is waited for.
                const int passing = min(batch, first - position);
                int j = 0;
                for (; j + 4 <= passing; j += 4) {
                    float rows[4][6];
#pragma unroll
                    for (int i = 0; i < 24; i++) rows[i / 6][i % 6] = s.table[i % 6][j + i / 6][at.column];
#pragma unroll
                    for (int i = 0; i < 4; i++) step(position + j + i, rows[i]);
                }
                float row[6];
                for (; j < batch; j++) {
                    record(j);
                    row_at(j, row);
                    step(position + j, row);
                }
                // Once not finite they stay so: one look tells whether a sample of the batch must not move them.
                if (!is_finite(u) || !is_finite(v)) {
                    u = start[0], v = start[1], grad_weight = start[2], grad_bias = start[3];
                    for (j = 0; j < batch; j++) {
                        record(j);
                        row_at(j, row);
                        step_if_finite(position + j, row);
                    }
                }
                record(batch);
            }
            position += batch;
            sync<2>();
            if (position >= last) break;
        }
    };

    visit_tiles(p, s.stages, [&](const Item& item, int stage, int i) {
        const uint4* start = memory + stage * stage_size(p);
        const uint4* tile = start + at.segment * p.pixels * LANES + at.lane;
        const float2* own = reinterpret_cast<const float2*>(start + states_at(p));
        const int rows = item.rows_of(at.segment);
        const int first = in_stream(p, item.sample), last = in_stream(p, item.sample + item.count - 1);
        advance(first, last, own);
        closing |= last == in_stream(p, p.samples - 1) && item.tile == 0;
#if SCALED
        if (at.row < 32 / LANES && at.segment < item.count) {  // the segment's first warp waits for all
            const int n = in_stream(p, item.sample + at.segment);
#pragma unroll
            for (int t = 0; t < NORMS; t++) {
                const float rzeta = p.norms[t].rzeta[n], kappa = projection(wait_for_channel_sums(p, p.norms[t], at, n), rzeta);
                if (at.warp_lane == 0) s.scaling[at.segment][t] = make_float2(rzeta, kappa);
            }
        }
        sync<2>();
#endif
        wait(s.stages.reduced + stage, i / STAGES & 1);
        const long long at_row = (item.first_row + at.segment * p.pixels) * pitch + at.slab * LANES + at.lane;
        float gain[NORMS][8], slope[NORMS][8], constant[NORMS][8], centre[NORMS][8];
#pragma unroll
        for (int t = 0; t < NORMS; t++) {
            const int column = t * WIDTH + at.lane * 8;
            load8(s.gain[at.segment] + column, gain[t]);
            load8(s.slope[at.segment] + column, slope[t]);
            load8(s.constant[at.segment] + column, constant[t]);
#pragma unroll
            for (int k = 0; k < 8; k++) centre[t][k] = own[(t * p.segments + at.segment) * WIDTH + at.lane * 8 + k].x;
#if SCALED
            const float own_rzeta = s.scaling[at.segment][t].x, kappa = s.scaling[at.segment][t].y;
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
    if (closing && at.thread < COLUMNS) {
        // The last own sample, and others' behind it: all are asked for before one is waited for.
        const int begin = in_stream(p, p.samples - 1), count = stream_size(p) - begin;
        u64 last[PEERS];
        float2 states[PEERS], moments[PEERS];
#pragma unroll
        for (int j = 0; j < PEERS; j++) {
            last[j] = j < count ? peek_sums(p, norm, at, begin + j) : present(at);
            if (j < count) states[j] = of_sample(norm.tables, begin + j), moments[j] = of_sample(norm.moments, begin + j);
        }
#pragma unroll
        for (int j = 0; j < PEERS; j++) {
            if (j >= count) break;
            const int n = begin + j;
            const float last_rzeta = SCALED ? norm.rzeta[n] : 0.f;
            const float kappa = SCALED ? projection(wait_for_channel_sums(p, norm, at, n), last_rzeta) : 0.f;
            float row[6];
            row_of(states[j], moments[j], wait_for_sums(p, norm, at, n, last[j]), last_rzeta, kappa, row);
            step_if_finite(n, row);
        }
        if (PEERS > 1 && at.thread == 0) p.launches[at.slab] = at.launch;
        norm.state_a[at.channel] = u, norm.state_b[at.channel] = v;
        norm.grad_weight[at.channel] = grad_weight * p.pixels, norm.grad_bias[at.channel] = grad_bias * p.pixels;
    }
}

extern "C" __global__ void __launch_bounds__(2 * GROUP + 32, 1) online_norm_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) uint4 memory[];
    Scratch& s = *reinterpret_cast<Scratch*>(memory + STAGES * stage_size(p));
    const int role = threadIdx.x / GROUP;
    const bool loads = threadIdx.x == 2 * GROUP;
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
    // What needs no memory comes before the wait.
    if (loads) prepare_stages<1 + NORMS + SKIP_GRAD>(p, s.stages);
    if (role == 2) wait_for_earlier_kernels();
    bool more = loads && load(0);
    Place at(p, threadIdx.x % GROUP);
    if (role < 2) wait_for_earlier_kernels();
    at.count_launch(p);
    // The state is overwritten once all sums are published, so it has to be here before this CTA publishes any.
    float u = 0.f, v = 0.f;
    if (role == 1) {
        u = p.norms[at.norm].state_a[at.channel], v = p.norms[at.norm].state_b[at.channel];
        s.gain[0][at.column] = u, s.slope[0][at.column] = v;
    }
    __syncthreads();
    if (role == 0) {
        reduce_warps(p, at, s, memory);
    } else if (role == 1) {
        clear_messages(p, at.thread);
        write_warps(p, at, s, memory, u, v);
    } else {
        for (int i = 1; more; i++) more = load(i);
    }
}
