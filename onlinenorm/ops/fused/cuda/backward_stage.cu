// What a stage of backward's ring holds.

constexpr bool MASK = RELU && RESIDUAL, REWRITES = SKIP_GRAD || !POOL && (RELU || CLAMP && !SHORTCUT);

// A stage, in 16 bytes: tiles of grad, x of each layer and skip_grad, (m, var) of its samples, layer by layer, and the
// ReLU's bits or the indices of a max-pool. A pooled gradient's tile has the rows of all windows that the tile's pixels
// are in, one more than it makes.
__device__ __forceinline__ int grad_boxes(const Params& p) { return POOL ? p.tile_rows / (2 * p.width) + 1 : p.boxes; }
__device__ __forceinline__ int grad_box_rows(const Params& p) { return POOL ? p.width / 2 : p.box_rows; }
__device__ __forceinline__ int grad_size(const Params& p) { return grad_boxes(p) * grad_box_rows(p) * LANES; }
__device__ __forceinline__ int skip_grad_at(const Params& p) { return grad_size(p) + NORMS * stage_rows(p) * LANES; }
__device__ __forceinline__ int states_at(const Params& p) { return skip_grad_at(p) + SKIP_GRAD * grad_size(p); }
__device__ __forceinline__ int mask_at(const Params& p) { return states_at(p) + NORMS * p.segments * WIDTH / 2; }
__device__ __forceinline__ int mask_bytes(const Params& p) {
    return POOL ? grad_size(p) / LANES * 32 : MASK ? p.segments * even(p.tile_rows) * 8 : 0;
}
__device__ __forceinline__ int stage_size(const Params& p) { return mask_at(p) + (mask_bytes(p) + 127) / 128 * 8; }

#if POOL
__device__ __forceinline__ const u32* indices_of(const Params& p, const uint4* start) {
    return reinterpret_cast<const u32*>(start + mask_at(p));
}

// Reduce warps: the sum of both pooled gradients in place of the first, rounded as torch's would be.
__device__ __forceinline__ void add_skip_grad(const Params& p, const Place& at, uint4* start) {
    const uint4* skip_grad = start + skip_grad_at(p);
    for (int i = at.thread; i < grad_size(p); i += GROUP) {
        float a[8], b[8];
        unpack(start[i], a);
        unpack(skip_grad[i], b);
#pragma unroll
        for (int k = 0; k < 8; k++) a[k] += b[k];
        start[i] = pack(a);
    }
    sync<1>();
}
#endif
