// Many tensors from float to 16 bits, or back (TO_FLOAT), in one launch; compiled at run time with -D HALF and TO_FLOAT (0 or
// 1), TENSORS, THREADS and EACH, values that a CTA casts. A tensor's CTAs follow those of the one before it.

typedef unsigned short u16;
typedef unsigned int u32;

struct Cast {
    const void* from;
    void* to;
    int size;  // values
    int end;   // the first CTA behind its own
};

struct Params {
    Cast casts[TENSORS];
    int count;
};

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 word;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
    return word;
}

__device__ __forceinline__ float unpack(u16 value) {
#if HALF
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(value));
    return f;
#else
    return __uint_as_float(u32(value) << 16);
#endif
}

// Eight values from `i` on, at addresses of whole 16 bytes.
__device__ __forceinline__ void cast8(const Cast& cast, int i) {
#if TO_FLOAT
    const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const u16*>(cast.from) + i);
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(cast.to) + i);
    to[0] = make_float4(unpack(u16(words.x)), unpack(u16(words.x >> 16)), unpack(u16(words.y)), unpack(u16(words.y >> 16)));
    to[1] = make_float4(unpack(u16(words.z)), unpack(u16(words.z >> 16)), unpack(u16(words.w)), unpack(u16(words.w >> 16)));
#else
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(cast.from) + i);
    const float4 a = from[0], b = from[1];
    *reinterpret_cast<uint4*>(static_cast<u16*>(cast.to) + i) = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
#endif
}

__device__ __forceinline__ void cast1(const Cast& cast, int i) {
#if TO_FLOAT
    static_cast<float*>(cast.to)[i] = unpack(static_cast<const u16*>(cast.from)[i]);
#else
    static_cast<u16*>(cast.to)[i] = u16(pack(static_cast<const float*>(cast.from)[i], 0.f));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) cast_tensors(const __grid_constant__ Params p) {
    int n = 0, last = p.count - 1;
    while (n < last) {
        const int middle = (n + last) / 2;
        if (int(blockIdx.x) < p.casts[middle].end) last = middle;
        else n = middle + 1;
    }
    const Cast& cast = p.casts[n];
    const int first = (int(blockIdx.x) - (n ? p.casts[n - 1].end : 0)) * EACH, count = min(EACH, cast.size - first);
    const bool whole = ((unsigned long long)cast.from | (unsigned long long)cast.to) % 16 == 0;
    const int by8 = whole ? count / 8 : 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < by8; i += THREADS) cast8(cast, first + 8 * i);
    for (int i = 8 * by8 + threadIdx.x; i < count; i += THREADS) cast1(cast, first + i);
}
