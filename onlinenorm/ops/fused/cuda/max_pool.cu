// The 3x3 max-pool of stride 2 and padding 1 that may scale_warps the ReLU (POOL).

// Max-pool: pixels of a pooled image, and the indices of its row, 4 bytes a lane.
__device__ __forceinline__ int pooled_pixels(const Params& p) { return p.pixels / 4; }

__device__ __forceinline__ long long index_offset(const Params& p, int slab, int sample, int row) {
    return (((long long)slab * p.samples + sample) * pooled_pixels(p) + row) * LANES * 4;
}

#if POOL
// Forward: which pixel a window takes.
constexpr u32 NOTHING = 15;  // index of a window whose gradient goes nowhere

#if HALF
#define PAIR "f16x2"
constexpr u32 LOWEST = 0xfc00fc00u, ONE = 0x3c00u;  // -inf twice, and 1
#else
#define PAIR "bf16x2"
constexpr u32 LOWEST = 0xff80ff80u, ONE = 0x3f80u;
#endif

// Bits of the halves where a > b, or where a is NaN.
__device__ __forceinline__ u32 above(u32 a, u32 b) {
    u32 greater, unlike;
    asm("set.gt.u32." PAIR " %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
    asm("set.nan.u32." PAIR " %0, %1, %1;" : "=r"(unlike) : "r"(a));
    return greater | unlike;
}

__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 r;
    asm("mul." PAIR " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ __forceinline__ u32 sign_of(float scale) { return scale > 0.f ? ONE : scale < 0.f ? ONE | 0x8000u : 0; }

// What a window takes of 8 channels: the first of the largest, as torch does; a NaN before all, the last of them. All that
// follows is monotone, so the largest of x times the scale's sign is the largest of the results.
struct Window {
    u32 best[4], index[4];

    __device__ Window(bool top, bool left) {
        const u32 first = (top ? 3 : 0) + (left ? 1 : 0);
#pragma unroll
        for (int j = 0; j < 4; j++) best[j] = LOWEST, index[j] = first * 0x10001u;
    }
    __device__ void look(uint4 pixel, u32 position, const u32 (&signs)[4]) {
        const u32 words[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 key = times(words[j], signs[j]), take = above(key, best[j]);
            best[j] = (best[j] & ~take) | (key & take);
            index[j] = (index[j] & ~take) | (position * 0x10001u & take);
        }
    }
};

// Backward: visit(row of the tile, gradient, x) for all pixels of a tile, 2x2 at a time: those have four windows between them.
template <class Visit>
__device__ __forceinline__ void visit_pixels(const Params& p, const Place& at, const Item& item, const uint4* grads, const uint4* xs,
                                             const u32* indices, Visit visit) {
    const int width = p.width / 2, lines = p.pixels / p.width / 2, first_line = item.tile * (p.tile_rows / (2 * p.width));
    grads += at.lane, xs += at.lane, indices += at.lane;
    for (int q = at.row; q < item.rows / 4; q += at.step) {
        const int line = q / width, column = q - line * width;
        uint4 grad[4];
        u32 index[4];
#pragma unroll
        for (int w = 0; w < 4; w++) {  // of the windows here, right, below, and below right
            const bool inside = column + w % 2 < width && first_line + line + w / 2 < lines;
            const int from = (q + w / 2 * width + w % 2) * LANES;
            index[w] = inside ? indices[from] : ~0u;
            grad[w] = inside ? grads[from] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int pixel = 0; pixel < 4; pixel++) {
            float g[8] = {}, x[8];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                if (w & ~pixel) continue;  // upper pixels are not in windows below, left ones not in those to the right
                // The pixel's place in the window: of three rows the middle or last, of one below the first.
                const int down = pixel / 2 + 1 - w / 2 * 2, right = pixel % 2 + 1 - w % 2 * 2;
                const u32 unlike = index[w] ^ (3 * down + right) * 0x11111111u;
                float value[8];
                unpack(grad[w], value);
#pragma unroll
                for (int k = 0; k < 8; k++)
                    if (!(unlike & 15u << 4 * k)) g[k] += value[k];
            }
            const int row = (2 * line + pixel / 2) * p.width + 2 * column + pixel % 2;
            unpack(xs[row * LANES], x);
            visit(row, g, x);
        }
    }
}
#endif

