// Element types and the constants and conversions that every kernel shares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>

namespace fa2 {

constexpr int kWarpSize = 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

using f16 = __half;
using bf16 = __nv_bfloat16;

constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Two f32 rounded to nearest and packed, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t packed);

template <>
__device__ __forceinline__ float2 unpack2<f16>(uint32_t packed) {
    return __half22float2(*reinterpret_cast<__half2*>(&packed));
}

template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t packed) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&packed));
}

// This thread and its block, read anew each time. What is computed from one reading is not kept in registers for code that reads
// again: a pass that rarely runs then costs the usual one nothing.
struct Place {
    int thread, x, y, z;

    __device__ __forceinline__ Place() {
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
        asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
        asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
    }
};

// x, from here on unknown to the compiler: what follows from it is worked out where it is used, not kept in registers.
__device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Of two packed numbers: bit 15 (31) is set if the low (high) one is infinite or NaN. An exponent of all ones carries over.
template <typename T>
__device__ __forceinline__ uint32_t carry_of_special(uint32_t packed);

template <>
__device__ __forceinline__ uint32_t carry_of_special<f16>(uint32_t packed) {
    return (packed & 0x7c007c00u) + 0x04000400u;
}

template <>
__device__ __forceinline__ uint32_t carry_of_special<bf16>(uint32_t packed) {
    return (packed & 0x7f807f80u) + 0x00800080u;
}

// 2^x, one MUFU instruction; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace fa2
