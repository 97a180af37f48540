// Backward: what a CTA shares, the recurrence, and the warps that advance it.

struct Scratch {
    Stages stages;
    alignas(16) float2 warps[2][NORMS][WARPS * WIDTH];
    float table[6][CHUNK][COLUMNS];  // of the samples to advance over, see `row_of`
    float2 scaling[STAGES][SEGMENTS][NORMS];  // 1 / zeta and kappa, of layer scaling
};

// To all CTAs: the sums of g and g (x - m) of own sample n, of the thread's channel.
__device__ __forceinline__ void announce(const Params& p, const Norm& norm, const Place& at, int n, float2 sums, float rstd) {
    n = in_stream(p, n);
    publish_sums(p, norm, at, n, sums.x, sums.y);
    if (!SCALED) return;
    // Layer scaling wants mean(g w) over a sample: this channel's part is taken from its sums.
    const float weight = norm.weight ? norm.weight[at.channel] : 1.f, bias = norm.bias ? norm.bias[at.channel] : 0.f;
    const float part = weight * rstd * sums.y + bias * sums.x;
    publish_channel_sum<true>(p, norm, at, n, sum_of_lanes(part * (1.f / p.pixels)));
}

__device__ __forceinline__ float projection(const Params& p, float total, float rzeta) { return total * (1.f / p.channels) * rzeta * rzeta; }

// A thread a channel of each layer; u and v are the state before this launch.
__device__ __forceinline__ void state_warps(const Params& p, const Place& at, Scratch& s, uint4* memory, float u, float v) {
    const Norm& norm = p.norms[at.norm];
    const float weight = norm.weight ? norm.weight[at.channel] : 1.f, own_bias = norm.bias ? norm.bias[at.channel] : 0.f;
    const float per_pixels = 1.f / p.pixels;
    float grad_weight = 0.f, grad_bias = 0.f;
    int position = 0;  // u and v are those before this sample
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
        for (int i = 0; i < 6; i++) row[i] = s.table[i][j][at.thread];
    };

    // Ask for the sums of the next samples up to `last`, which may not be there yet.
    u64 words[CHUNK], channel_sums[CHUNK] = {};
    auto of_sample = [&](const float2* table, int sample) { return table[(long long)sample * p.channels + at.channel]; };
    auto ask = [&](int last) {
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            const bool wanted = position + j < last;
            words[j] = wanted ? peek_sums(p, norm, at, position + j) : present(at);
            if (SCALED) channel_sums[j] = wanted ? peek_channel_sums(p, norm, at, position + j) : present(at);
        }
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
#if SCALED
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                if (is_half_missing(channel_sums[j], at)) channel_sums[j] = peek_channel_sums(p, norm, at, position + j);
#pragma unroll
            for (int j = 0; j < CHUNK; j++) missing |= is_half_missing(channel_sums[j], at);
#endif
        }
    };

    // Bring the recurrence to `last`, leaving the coefficients of samples first..last in `gains` and behind; `own` are the
    // states of those.
    auto advance = [&](int first, int last, const float2* own, float* gains) {
        while (true) {
            const int batch = min(CHUNK, last - position);
            float2 before[CHUNK] = {}, moments[CHUNK] = {};
            float rzeta[CHUNK] = {};
#pragma unroll
            for (int j = 0; j < CHUNK; j++) {
                if (j >= batch) break;
                before[j] = of_sample(norm.tables, position + j), moments[j] = of_sample(norm.moments, position + j);
                if (SCALED) rzeta[j] = norm.rzeta[position + j];
            }
            collect();
#pragma unroll
            for (int j = 0; j < CHUNK; j++) {
                if (j < batch) {
                    float row[6];
                    const float kappa = SCALED ? projection(p, total_of_channel_sums(channel_sums[j]), rzeta[j]) : 0.f;
                    row_of(before[j], moments[j], sums_in(words[j]), rzeta[j], kappa, row);
#pragma unroll
                    for (int i = 0; i < 6; i++) s.table[i][j][at.thread] = row[i];
                }
            }
            if (position + batch < last) {
                position += batch;
                ask(last);
                position -= batch;
            }
            auto record = [&](int j) {
                const int n = position + j;
                if (n >= first && (j < batch || n == last) && is_own(p, n)) {
                    const int i = (n - first) / PEERS;
                    const float rstd = rsqrtf(own[(at.norm * p.segments + i) * WIDTH + at.c].y + p.eps), k = p.one_minus_alpha_bkw / p.scale;
                    float* to = gains + i * COLUMNS + at.thread;
                    to[0] = weight * rstd;
                    to[p.segments * COLUMNS] = -k * v * rstd * rstd;
                    to[2 * p.segments * COLUMNS] = -k * u;
                }
            };
            const float start[4] = {u, v, grad_weight, grad_bias};
            // Samples this tile does not hold go by in fours, so that only the recurrence itself is waited for.
            const int passing = min(batch, first - position);
            int j = 0;
            for (; j + 4 <= passing; j += 4) {
                float rows[4][6];
#pragma unroll
                for (int i = 0; i < 24; i++) rows[i / 6][i % 6] = s.table[i % 6][j + i / 6][at.thread];
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
            position += batch;
            if (position >= last) break;
        }
    };

    visit_tiles(p, s.stages, [&](const Item& item, int stage, int) {
        uint4* start = memory + stage * stage_size(p);
        const float2* own = reinterpret_cast<const float2*>(start + states_at(p));
        const int first = in_stream(p, item.sample), last = in_stream(p, item.sample + item.count - 1);
        if (p.tiles > 1 && item.tile == p.tiles - 1) {
            float centre;
            const float2 total = merge_tile_sums(p, at, tile_sums_of(p, norm, at, item.sample), centre,
                                                 [](float2& sum, float2 part, int) { sum.x += part.x, sum.y += part.y; });
            announce(p, norm, at, item.sample, total, SCALED ? rsqrtf(own[at.norm * p.segments * WIDTH + at.c].y + p.eps) : 0.f);
        }
        ask(last);
        advance(first, last, own, reinterpret_cast<float*>(start + gains_at(p)));
        release(s.stages.ready + stage, at);
        closing |= last == in_stream(p, p.samples - 1) && item.tile == 0;
    });
    if (!closing) return;
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
        const float kappa = SCALED ? projection(p, wait_for_channel_sums(p, norm, at, n), last_rzeta) : 0.f;
        float row[6];
        row_of(states[j], moments[j], wait_for_sums(p, norm, at, n, last[j]), last_rzeta, kappa, row);
        step_if_finite(n, row);
    }
    if (PEERS > 1 && at.thread == 0) p.launches[at.slab] = at.launch;
    norm.state_a[at.channel] = u, norm.state_b[at.channel] = v;
    norm.grad_weight[at.channel] = grad_weight * p.pixels, norm.grad_bias[at.channel] = grad_bias * p.pixels;
}
