// 16-byte vectors of f32, f16 and bf16, and sums over the threads of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fused_ops {

using f32 = float;
using f16 = __half;
using bf16 = __nv_bfloat16;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
constexpr int kVector = 16 / int(sizeof(T));  // elements of a 16-byte load

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// The elements of one 16-byte load.
template <typename T>
struct alignas(16) Vector {
    T at[kVector<T>];
};

template <typename T>
__device__ __forceinline__ void load(float (&to)[kVector<T>], const T* from) {
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to[i] = to_float(vector.at[i]);
}

template <typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[kVector<T>]) {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) vector.at[i] = from_float<T>(from[i]);
    *reinterpret_cast<Vector<T>*>(to) = vector;
}

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Combines x over the kWarps warps of a row, in a fixed order. Every thread gets the result. `shared` has kWarps floats of this
// row, and all threads of the block take part.
template <int kWarps, typename Combine>
__device__ __forceinline__ float combined(float x, float* shared, Combine combine) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        x = combine(x, __shfl_xor_sync(kAllLanes, x, distance));
    }
    if constexpr (kWarps > 1) {
        __syncthreads();  // the last use of `shared` is over
        if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize % kWarps] = x;
        __syncthreads();
        x = shared[0];
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) x = combine(x, shared[warp]);
    }
    return x;
}

}  // namespace fused_ops
