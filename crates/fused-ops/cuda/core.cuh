// Vectors of f32, f16 and bf16 as they lie in memory, and sums over the threads of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "params.h"

// Defines a kernel. Its body is one call. The host lets a kernel start while the kernel before it ends, so that its launch costs no
// time of the GPU. So each waits first, and then lets the next one start (PTX ISA, "griddepcontrol").
#define KERNEL(bounds, name, Params, ...)                                                          \
    extern "C" __global__ void __launch_bounds__ bounds name(const __grid_constant__ Params params) { \
        ::fused_ops::wait_for_kernel_before();                                                     \
        __VA_ARGS__;                                                                               \
    }

namespace fused_ops {

using f32 = float;
using f16 = __half;
using bf16 = __nv_bfloat16;

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename T>
constexpr int kVector = 16 / int(sizeof(T));  // elements of a 16-byte access

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

// The elements of one access to memory, or of several of 16 bytes, packed as they lie there.
template <typename T, int kElements = kVector<T>>
struct alignas(sizeof(T) * kElements < 16 ? sizeof(T) * kElements : 16) Vector {
    // 32-bit words even for 16-bit types, so that two elements share a register
    using Word = std::conditional_t<sizeof(T) * kElements == 2, uint16_t, uint32_t>;
    Word words[sizeof(T) * kElements / sizeof(Word)];
};

template <typename T, int kElements>
__device__ __forceinline__ void widen(float (&to)[kElements], const Vector<T, kElements>& from) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) to[i] = __uint_as_float(from.words[i]);
    } else if constexpr (kElements == 1) {
        if constexpr (std::is_same_v<T, f16>) to[0] = __half2float(__ushort_as_half(from.words[0]));
        if constexpr (std::is_same_v<T, bf16>) to[0] = __uint_as_float(uint32_t(from.words[0]) << 16);
    } else {
#pragma unroll
        for (int i = 0; i < kElements; i += 2) {
            const uint32_t word = from.words[i / 2];
            if constexpr (std::is_same_v<T, f16>) {
                const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
                to[i] = pair.x, to[i + 1] = pair.y;
            } else {
                to[i] = __uint_as_float(word << 16), to[i + 1] = __uint_as_float(word & 0xffff0000u);
            }
        }
    }
}

template <typename T, int kElements>
__device__ __forceinline__ void add_to(float (&to)[kElements], const Vector<T, kElements>& from) {
    float wide[kElements];
    widen(wide, from);
#pragma unroll
    for (int i = 0; i < kElements; ++i) to[i] += wide[i];
}

// Rounds to nearest even. One instruction rounds two elements.
template <typename T, int kElements>
__device__ __forceinline__ Vector<T, kElements> narrow(const float (&from)[kElements]) {
    Vector<T, kElements> to;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) to.words[i] = __float_as_uint(from[i]);
    } else if constexpr (kElements == 1) {
        if constexpr (std::is_same_v<T, f16>) to.words[0] = __half_as_ushort(__float2half_rn(from[0]));
        if constexpr (std::is_same_v<T, bf16>) to.words[0] = __bfloat16_as_ushort(__float2bfloat16_rn(from[0]));
    } else {
#pragma unroll
        for (int i = 0; i < kElements; i += 2) {
            if constexpr (std::is_same_v<T, f16>) {
                const __half2 pair = __floats2half2_rn(from[i], from[i + 1]);
                to.words[i / 2] = reinterpret_cast<const uint32_t&>(pair);
            } else {
                const __nv_bfloat162 pair = __floats2bfloat162_rn(from[i], from[i + 1]);
                to.words[i / 2] = reinterpret_cast<const uint32_t&>(pair);
            }
        }
    }
    return to;
}

template <typename T, int kElements = kVector<T>>
__device__ __forceinline__ Vector<T, kElements> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T, kElements>*>(from);
}

template <typename T, int kElements>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kElements>& vector) {
    *reinterpret_cast<Vector<T, kElements>*>(to) = vector;
}

template <typename T, int kElements>
__device__ __forceinline__ void load(float (&to)[kElements], const T* from) {
    widen(to, load_vector<T, kElements>(from));
}

template <typename T, int kElements>
__device__ __forceinline__ void store(T* to, const float (&from)[kElements]) {
    store_vector(to, narrow<T>(from));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Starts to copy 16 bytes to shared memory, or zeros if `from` does not exist.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are still running.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
    __device__ double operator()(double a, double b) const { return a + b; }
    __device__ float2 operator()(float2 a, float2 b) const { return make_float2(a.x + b.x, a.y + b.y); }
};
struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

__device__ __forceinline__ float of_lane_xor(float x, int distance) { return __shfl_xor_sync(kAllLanes, x, distance); }
__device__ __forceinline__ double of_lane_xor(double x, int distance) { return __shfl_xor_sync(kAllLanes, x, distance); }
__device__ __forceinline__ float2 of_lane_xor(float2 x, int distance) {
    return make_float2(of_lane_xor(x.x, distance), of_lane_xor(x.y, distance));
}

// Waits for the kWarps warps of a row. A block has several such groups of warps, `group` is the index of this one.
template <int kWarps>
__device__ __forceinline__ void row_barrier(int group) {
    // Barrier 0 is __syncthreads().
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kWarps * kWarpSize) : "memory");
}

// Combines x over the kWarps warps of a row, in a fixed order. Every thread gets the result. `shared` holds kWarps results of this row.
// Other threads may still read the results of the call before. So consecutive calls must use two arrays alternately: the barrier of one
// call protects the array of the other.
template <int kWarps, typename X, typename Combine>
__device__ __forceinline__ X combined(X x, X* shared, int group, Combine combine) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = combine(x, of_lane_xor(x, distance));
    if constexpr (kWarps > 1) {
        if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize % kWarps] = x;
        row_barrier<kWarps>(group);
        x = shared[0];
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) x = combine(x, shared[warp]);
    }
    return x;
}

}  // namespace fused_ops
