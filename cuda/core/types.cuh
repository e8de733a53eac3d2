// Element types, and the constants and conversions that every kernel shares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../params.h"

namespace fa2 {

constexpr int kMaxSharedBytes = 227 * 1024;    // of a thread block on compute capability 9.0, which has the most
constexpr int kRegistersPerSm = 64 * 1024;     // on every GPU from 8.0 on
constexpr float kLog2e = 1.4426950408889634f;  // 1 / ln 2
constexpr float kLn2 = 0.6931471805599453f;

using f16 = __half;
using bf16 = __nv_bfloat16;

// An f32 of which products use 11 bits: one product of TF32, where `float` takes three of split operands (sm80/tf32.cuh). The user asks for
// it by name.
struct tf32 {
    float value;
};

// Whether a product is three products of split operands.
template <typename T>
constexpr bool kIsSplit = false;
template <>
constexpr bool kIsSplit<float> = true;

constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rounds two f32 to nearest and packs them, `low` into the low half.
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

// x rounded to T.
template <typename T>
__device__ __forceinline__ float round_to(float x) {
    if constexpr (sizeof(T) == 4) return x;
    else return unpack2<T>(pack2<T>(x, x)).x;
}

// Elements 2i and 2i + 1 of a row.
template <typename T>
__device__ __forceinline__ float2 load2(const T* row, int i) {
    if constexpr (sizeof(T) == 4) return reinterpret_cast<const float2*>(row)[i];
    else return unpack2<T>(reinterpret_cast<const uint32_t*>(row)[i]);
}

// Returns x, but the compiler no longer knows its value. It then recomputes what depends on x where it is used, instead of
// keeping it in registers across a loop.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 2^x in one MUFU instruction. Subnormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace fa2
