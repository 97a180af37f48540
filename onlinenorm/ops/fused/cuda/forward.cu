// y = relu(clamp(weight (x - m) / s + bias) + residual), the tables, and the state moved past the batch.

struct Scratch {
    float2 warps[WARPS][WIDTH];
    float2 table[CHUNK][WIDTH];  // moments of the samples to advance over
    float mean[SEGMENTS][WIDTH], scale[SEGMENTS][WIDTH];
    int queue[STAGES];
};

constexpr int TENSORS = 1 + RESIDUAL;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) online_norm(const Params p) {
    extern __shared__ uint4 memory[];
    const int tile_size = stage_rows(p) * LANES, stage_size = TENSORS * tile_size;
    Scratch& s = *reinterpret_cast<Scratch*>(memory + STAGES * stage_size);
    const Place at(p);
    const int channel = at.channel_block * WIDTH + at.c;
    float bias[8];
    parameters8(p.bias, at, 0.f, bias);
    const float weight = p.weight ? p.weight[channel] : 1.f;
    // This block's copy of the recurrence: state before sample `position`, one channel a thread of the first 64.
    float mean = p.first[channel], var = p.second[channel];
    int position = 0;
    bool closing = false;
    // The state is overwritten once all sums are published, so it has to be here before this block publishes any.
    s.mean[0][at.c] = mean, s.scale[0][at.c] = var;

    auto announce = [&](int n, float mu, float q) {
        p.moments[(long long)n * p.channels + channel] = make_float2(mu, q);
        publish(p.published + (long long)n * p.channels + channel, mu, q);
    };
    auto step = [&](float2 moment) {
        const float d = moment.x - mean;
        var = p.alpha * var + p.rest * (moment.y + p.alpha * d * d);
        mean += p.rest * d;
    };

    auto fetch = [&](const Item& item, int stage) {
        fetch_tile(p, at, item, memory + stage * stage_size, p.x);
#if RESIDUAL
        fetch_tile(p, at, item, memory + stage * stage_size + tile_size, p.residual);
#endif
    };

    auto reduce_tile = [&](const Item& item, int stage) {
        const uint4* start = memory + stage * stage_size;
        const uint4* tile = start + at.segment * p.pixels * LANES + at.lane;
        const int rows = item.rows_of(at.segment);
        // Sums are shifted by the segment's first row: no cancellation, however large the mean.
        float shift[8], sum[8] = {}, square[8] = {};
        unpack(tile[0], shift);
#pragma unroll
        for (int k = 0; k < 8; k++) shift[k] = finite(shift[k]);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = at.row + i * at.step;
            if (row < rows) {
                float x[8];
                unpack(tile[row * LANES], x);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const float d = x[k] - shift[k];
                    sum[k] += d;
                    square[k] += d * d;
                }
            }
        }
        reduce(sum, square, s.warps);
        const int segment = threadIdx.x / WIDTH;  // in table work
        if (segment < item.count) {
            const int share = WARPS / p.segments;
            float2 total = s.warps[segment * share][at.c];
            for (int w = 1; w < share; w++) {
                const float2 part = s.warps[segment * share + w][at.c];
                total.x += part.x, total.y += part.y;
            }
            const float base = finite(value_of(start + segment * p.pixels * LANES, at.c));
            const float mu = base + total.x / item.rows;
            const float scatter = max_nan(total.y - total.x * (total.x / item.rows), 0.f);
            if (p.tiles == 1) announce(item.sample + segment, mu, scatter / p.pixels);
            else publish(slots_of(p, at, item.sample) + item.tile * WIDTH + at.c, mu, scatter);
        }
        if (p.tiles > 1 && item.tile == p.tiles - 1) {
            float centre;
            float2 total = merge_slots(p, slots_of(p, at, item.sample), s.warps, centre, [&](float2& sum, float2 part, int t) {
                const float count = min(p.tile_rows, p.pixels - t * p.tile_rows), d = part.x - centre;
                sum.x += count * d;
                sum.y += part.y + count * d * d;
            });
            if (threadIdx.x < WIDTH)
                announce(item.sample, centre + total.x / p.pixels, max_nan(total.y - total.x * (total.x / p.pixels), 0.f) / p.pixels);
        }
    };

    // Ask for the moments of the next samples up to `last`; some may not be there yet.
    u64 words[WORDS];
    const int mine = threadIdx.x / WIDTH;
    auto ask = [&](int last) {
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            const int n = position + mine + SEGMENTS * j;
            words[j] = n < last ? peek(p.published + (long long)n * p.channels + channel) : 0;
        }
    };
    auto glance = [&](const Item& item) { ask(item.sample + item.count - 1); };

    // Bring the recurrence to `last`, leaving the normalisation of samples first..last in s.mean and s.scale.
    auto advance = [&](int first, int last, bool record) {
        while (true) {
            const int batch = min(CHUNK, last - position);
#pragma unroll
            for (int j = 0; j < WORDS; j++) {
                const int k = mine + SEGMENTS * j;
                if (k < batch) s.table[k][at.c] = wait_for(p.published + (long long)(position + k) * p.channels + channel, words[j]);
            }
            __syncthreads();
            if (threadIdx.x < WIDTH) {
                // Samples this tile does not hold go by in eights, so that only the recurrence itself is waited for.
                const int passing = min(batch, first - position);
                int j = 0;
                for (; j + 8 <= passing; j += 8) {
                    float2 moments[8];
#pragma unroll
                    for (int i = 0; i < 8; i++) moments[i] = s.table[j + i][at.c];
#pragma unroll
                    for (int i = 0; i < 8; i++) step(moments[i]);
                }
                for (; j <= batch; j++) {
                    const int n = position + j;
                    if (n >= first && (j < batch || n == last)) {
                        s.mean[n - first][at.c] = mean;
                        s.scale[n - first][at.c] = weight * rsqrtf(var + p.eps);
                        if (record) p.state[(long long)n * p.channels + channel] = make_float2(mean, var);
                    }
                    if (j < batch) step(s.table[j][at.c]);
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
        const long long first_row = item.first_row + at.segment * p.pixels;
        const long long offset = first_row * pitch + at.channel_block * LANES + at.lane;
        const int last = item.sample + item.count - 1;
        advance(item.sample, last, item.tile == 0);
        closing |= last == p.samples - 1 && item.tile == 0;
        float m[8], scale[8];
        load8(s.mean[at.segment] + at.lane * 8, m);
        load8(s.scale[at.segment] + at.lane * 8, scale);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = at.row + i * at.step;
            if (row < rows) {
                float z[8];
                unpack(tile[row * LANES], z);
#if RESIDUAL
                float r[8];
                unpack(tile[tile_size + row * LANES], r);
                u32 bits = 0;
#endif
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    z[k] = (z[k] - m[k]) * scale[k] + bias[k];
#if CLAMP
                    z[k] = max_nan(min_nan(z[k], p.clamp), -p.clamp);
#endif
#if RESIDUAL
                    z[k] += r[k];
                    bits |= u32(!(z[k] <= 0.f)) << k;
#endif
#if RELU
                    z[k] = max_nan(z[k], 0.f);
#endif
                }
                p.out[offset + (long long)row * pitch] = pack(z);
#if RESIDUAL && RELU
                p.mask[mask_offset(p, at, first_row + row)] = bits;
#endif
            }
        }
    };

    pipeline(p, at, s.queue, fetch, [](const Item&) {}, glance, reduce_tile, write_tile);
    if (closing && threadIdx.x < WIDTH) {
        const u64* from = p.published + (long long)(p.samples - 1) * p.channels + channel;
        step(wait_for(from, peek(from)));
        p.first[channel] = mean, p.second[channel] = var;
    }
}
