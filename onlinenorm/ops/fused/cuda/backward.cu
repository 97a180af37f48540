// grad_x = A g + B (x - m) + D behind the masks of ReLU and clamp, the residual's gradient, those of the parameters, and
// the controls moved past the batch. g replaces the gradient in shared memory once it is masked.

struct Scratch {
    float2 warps[WARPS][WIDTH];
    float table[6][CHUNK][WIDTH];  // of the samples to advance over, see `row_of`
    float gain[SEGMENTS][WIDTH], slope[SEGMENTS][WIDTH], constant[SEGMENTS][WIDTH], mean[SEGMENTS][WIDTH];
    int queue[STAGES];
};

constexpr int TENSORS = 2 + EXTRA;
constexpr bool MASK = RELU && RESIDUAL;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) online_norm(const Params p) {
    extern __shared__ uint4 memory[];
    const int tile_size = stage_rows(p) * LANES, stage_size = TENSORS * tile_size + (MASK ? (stage_rows(p) + 1) / 2 : 0);
    Scratch& s = *reinterpret_cast<Scratch*>(memory + STAGES * stage_size);
    const Place at(p);
    const int channel = at.channel_block * WIDTH + at.c;
    float weight8[8], bias8[8];
    parameters8(p.weight, at, 1.f, weight8);
    parameters8(p.bias, at, 0.f, bias8);
    const float weight = p.weight ? p.weight[channel] : 1.f;
    // This block's copy of the recurrence: controls before sample `position`, one channel a thread of the first 64.
    float u = p.first[channel], v = p.second[channel], grad_weight = 0.f, grad_bias = 0.f;
    int position = 0;
    bool closing = false;
    // The state is overwritten once all sums are published, so it has to be here before this block publishes any.
    s.gain[0][at.c] = u, s.slope[0][at.c] = v;

    // v <- row[0] v + row[1] and u <- alpha u + row[2] - row[3] v, with G and GY behind, from a sample's tables and its
    // sums of g and g (x - m).
    auto row_of = [&](float2 moment, float2 state, float2 sums, float (&row)[6]) {
        const float rstd = rsqrtf(state.y + p.eps), y = (moment.x - state.x) * rstd;
        row[4] = sums.x / p.pixels;
        row[5] = sums.y * rstd / p.pixels;
        row[0] = 1.f - p.rest * (moment.y * rstd * rstd + y * y);
        row[1] = p.scale * weight * row[5];
        row[2] = p.scale * weight * row[4] * rstd;
        row[3] = p.rest * y * rstd;
    };
    auto step = [&](const float (&row)[6]) {
        u = p.alpha * u + (row[2] - row[3] * v);
        v = row[0] * v + row[1];
        grad_bias += row[4];
        grad_weight += row[5];
    };
    auto step_over = [&](int j) {
        float row[6];
#pragma unroll
        for (int i = 0; i < 6; i++) row[i] = s.table[i][j][at.c];
        step(row);
    };

    auto fetch = [&](const Item& item, int stage) {
        uint4* to = memory + stage * stage_size;
        fetch_tile(p, at, item, to, p.grad);
        fetch_tile(p, at, item, to + tile_size, p.x);
#if EXTRA
        fetch_tile(p, at, item, to + 2 * tile_size, p.extra);
#endif
        if (MASK && at.lane == 0) {
            unsigned char* bits = reinterpret_cast<unsigned char*>(to + TENSORS * tile_size);
            for (int row = at.row; row < item.rows_of(at.segment); row += at.step) {
                const int tile_row = at.segment * p.pixels + row;
                copy_async<8>(bits + tile_row * 8, p.mask + mask_offset(p, at, item.first_row + tile_row));
            }
        }
    };

    float m[8], scale[8];  // of the tile to reduce: w = (x - m) scale + bias
    auto prepare = [&](const Item& item) {
        const int n = min(item.sample + at.segment, p.samples - 1);
        const float2* states = p.state + (long long)n * p.channels + at.channel_block * WIDTH + at.lane * 8;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float4 two = reinterpret_cast<const float4*>(states)[k];
            m[2 * k] = two.x, scale[2 * k] = weight8[2 * k] * rsqrtf(two.y + p.eps);
            m[2 * k + 1] = two.z, scale[2 * k + 1] = weight8[2 * k + 1] * rsqrtf(two.w + p.eps);
        }
    };

    auto reduce_tile = [&](const Item& item, int stage) {
        const int rows = item.rows_of(at.segment), pitch = p.channels / 8;
        uint4* start = memory + stage * stage_size;
        uint4* tile = start + at.segment * p.pixels * LANES + at.lane;
        const unsigned char* bits = reinterpret_cast<const unsigned char*>(start + TENSORS * tile_size) + at.segment * p.pixels * 8 + at.lane;
        const long long offset = (item.first_row + at.segment * p.pixels) * pitch + at.channel_block * LANES + at.lane;
        float sum[8] = {}, product[8] = {};
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = at.row + i * at.step;
            if (row < rows) {
                float g[8], x[8];
                unpack(tile[row * LANES], g);
                unpack(tile[tile_size + row * LANES], x);
#if EXTRA
                float other[8];
                unpack(tile[2 * tile_size + row * LANES], other);
#pragma unroll
                for (int k = 0; k < 8; k++) g[k] += other[k];
#endif
                const u32 mask = MASK ? bits[row * 8] : 0;
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    x[k] -= m[k];
                    if (MASK) g[k] = mask >> k & 1 ? g[k] : 0.f;
                    else if (RELU) g[k] = x[k] * scale[k] + bias8[k] <= 0.f ? 0.f : g[k];
                }
                if (MASK) p.out_residual[offset + (long long)row * pitch] = pack(g);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    if (CLAMP) g[k] = fabsf(x[k] * scale[k] + bias8[k]) < p.clamp ? g[k] : 0.f;
                    sum[k] += g[k];
                    product[k] += g[k] * x[k];
                }
                if (EXTRA || RELU || CLAMP) tile[row * LANES] = pack(g);
            }
        }
        reduce(sum, product, s.warps);
        const int segment = threadIdx.x / WIDTH;  // in table work
        if (segment < item.count) {
            const int share = WARPS / p.segments;
            float2 total = s.warps[segment * share][at.c];
            for (int w = 1; w < share; w++) {
                const float2 part = s.warps[segment * share + w][at.c];
                total.x += part.x, total.y += part.y;
            }
            u64* to = p.tiles == 1 ? p.published + (long long)(item.sample + segment) * p.channels + channel
                                   : slots_of(p, at, item.sample) + item.tile * WIDTH + at.c;
            publish(to, total.x, total.y);
        }
        if (p.tiles > 1 && item.tile == p.tiles - 1) {
            float centre;
            const float2 total = merge_slots(p, slots_of(p, at, item.sample), s.warps, centre,
                                             [](float2& sum, float2 part, int) { sum.x += part.x, sum.y += part.y; });
            if (threadIdx.x < WIDTH) publish(p.published + (long long)item.sample * p.channels + channel, total.x, total.y);
        }
    };

    // Ask for the sums of the next samples up to `last`, which may not be there yet, and read their tables.
    u64 words[WORDS];
    float2 moments[WORDS], states[WORDS], own;
    const int mine = threadIdx.x / WIDTH;
    auto ask = [&](int last) {
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            const int n = position + mine + SEGMENTS * j;
            const long long index = (long long)n * p.channels + channel;
            words[j] = n < last ? peek(p.published + index) : 0;
            if (n < last) moments[j] = p.moments[index], states[j] = p.state[index];
        }
    };
    auto glance = [&](const Item& item) {
        if (mine < item.count) own = p.state[(long long)(item.sample + mine) * p.channels + channel];
        ask(item.sample + item.count - 1);
    };

    // Bring the recurrence to `last`, leaving the coefficients of samples first..last in shared memory.
    auto advance = [&](int first, int last) {
        if (mine <= last - first) s.mean[mine][at.c] = own.x, s.gain[mine][at.c] = rsqrtf(own.y + p.eps);
        while (true) {
            const int batch = min(CHUNK, last - position);
#pragma unroll
            for (int j = 0; j < WORDS; j++) {
                const int k = mine + SEGMENTS * j;
                if (k < batch) {
                    float row[6];
                    row_of(moments[j], states[j], wait_for(p.published + (long long)(position + k) * p.channels + channel, words[j]), row);
#pragma unroll
                    for (int i = 0; i < 6; i++) s.table[i][k][at.c] = row[i];
                }
            }
            __syncthreads();
            if (threadIdx.x < WIDTH) {
                // Samples this tile does not hold go by in fours, so that only the recurrence itself is waited for.
                const int passing = min(batch, first - position);
                int j = 0;
                for (; j + 4 <= passing; j += 4) {
                    float rows[4][6];
#pragma unroll
                    for (int i = 0; i < 24; i++) rows[i / 6][i % 6] = s.table[i % 6][j + i / 6][at.c];
#pragma unroll
                    for (int i = 0; i < 4; i++) step(rows[i]);
                }
                for (; j <= batch; j++) {
                    const int n = position + j;
                    if (n >= first && (j < batch || n == last)) {
                        const float rstd = s.gain[n - first][at.c], k = p.rest / p.scale;
                        s.gain[n - first][at.c] = weight * rstd;
                        s.slope[n - first][at.c] = -k * v * rstd * rstd;
                        s.constant[n - first][at.c] = -k * u;
                    }
                    if (j < batch) step_over(j);
                }
            }
            position += batch;
            if (position < last) ask(last);
            __syncthreads();
            if (position >= last) break;
        }
    };

    auto write_tile = [&](const Item& item, int stage) {
        const uint4* tile = memory + stage * stage_size + at.segment * p.pixels * LANES + at.lane;
        const int rows = item.rows_of(at.segment), pitch = p.channels / 8;
        const long long offset = (item.first_row + at.segment * p.pixels) * pitch + at.channel_block * LANES + at.lane;
        const int last = item.sample + item.count - 1;
        advance(item.sample, last);
        closing |= last == p.samples - 1 && item.tile == 0;
        float gain[8], slope[8], constant[8], centre[8];
        load8(s.gain[at.segment] + at.lane * 8, gain);
        load8(s.slope[at.segment] + at.lane * 8, slope);
        load8(s.constant[at.segment] + at.lane * 8, constant);
        load8(s.mean[at.segment] + at.lane * 8, centre);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = at.row + i * at.step;
            if (row < rows) {
                float g[8], x[8];
                unpack(tile[row * LANES], g);
                unpack(tile[tile_size + row * LANES], x);
#pragma unroll
                for (int k = 0; k < 8; k++) g[k] = g[k] * gain[k] + ((x[k] - centre[k]) * slope[k] + constant[k]);
                p.out[offset + (long long)row * pitch] = pack(g);
            }
        }
    };

    pipeline(p, at, s.queue, fetch, prepare, glance, reduce_tile, write_tile);
    if (closing && threadIdx.x < WIDTH) {
        const long long index = (long long)(p.samples - 1) * p.channels + channel;
        float row[6];
        row_of(p.moments[index], p.state[index], wait_for(p.published + index, peek(p.published + index)), row);
        step(row);
        p.first[channel] = u, p.second[channel] = v;
        p.grad_weight[channel] = grad_weight * p.pixels, p.grad_bias[channel] = grad_bias * p.pixels;
    }
}
