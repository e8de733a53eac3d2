// GELU in both forms, SwiGLU and GEGLU, forward and backward. The formulas are in src/activation.rs.
//
// Work       A thread has one 16-byte vector of each tensor; in the forward of one tensor it has two.
// Memory     Each tensor is read or written once. All loads of a thread are queued before its first result, at least 32 bytes. With
//            1,536 threads per multiprocessor (40 registers) or more, at least 48 KB are in flight.
// Numerics   f32, with the fast exp and division. 16-bit types have a short erf.
// Expects    tensors aligned to 16 bytes. The elements after the last 16-byte boundary are read alone.
#pragma once

#include "core.cuh"
#include "params.h"

namespace fused_ops {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// (1 - erf(a / sqrt(2))) / 2 for a >= 0, where e = exp(-a^2 / 2).
template <typename T>
__device__ __forceinline__ float normal_tail(float a, float e) {
    constexpr float kRoot = 0.7071067812f;  // 1 / sqrt(2)
    if constexpr (sizeof(T) == 4) {
        return 0.5f - 0.5f * erff(kRoot * a);
    } else {
        // Abramowitz and Stegun, 7.1.26: the error is at most 1.5e-7. erff has so many instructions that the forward would wait for
        // them instead of for memory.
        const float t = __fdividef(1.f, 1.f + 0.3275911f * kRoot * a);
        float sum = 0.5f * 1.061405429f;
        sum = sum * t - 0.5f * 1.453152027f;
        sum = sum * t + 0.5f * 1.421413741f;
        sum = sum * t - 0.5f * 0.284496736f;
        sum = sum * t + 0.5f * 0.254829592f;
        return sum * t * e;
    }
}

// The value of an activation, and its slope. From |x| = kSaturated on, both forms of GELU are x or 0 in every type. Powers of a
// larger x would overflow, so the formulas use a bounded x. NaN stays NaN.
struct Gelu {
    static constexpr float kSaturated = 20.f;
    static constexpr float kLinear = 1.5957691216f;           // 2 sqrt(2 / pi)
    static constexpr float kCubic = 0.044715f * 1.5957691216f;

    static __device__ __forceinline__ float bounded(float x) { return fabsf(x) > kSaturated ? copysignf(kSaturated, x) : x; }

    template <typename T>
    static __device__ __forceinline__ float value(float x) {
        const float y = x * sigmoid(x * (kLinear + kCubic * x * x));
        return x < -kSaturated ? 0.f : y;
    }
    template <typename T>
    static __device__ __forceinline__ float2 value_slope(float x) {
        const float near = bounded(x);
        const float s = sigmoid(near * (kLinear + kCubic * near * near));
        const float slope = s + near * s * (1.f - s) * (kLinear + 3.f * kCubic * near * near);
        return make_float2(x < -kSaturated ? 0.f : x * s, slope);
    }
};

struct GeluErf {
    template <typename T>
    static __device__ __forceinline__ float value(float x) {
        const float a = fminf(fabsf(x), Gelu::kSaturated);
        return (x < 0.f ? 0.f : x) - a * normal_tail<T>(a, __expf(-0.5f * a * a));
    }
    template <typename T>
    static __device__ __forceinline__ float2 value_slope(float x) {
        constexpr float kDensity = 0.3989422804f;  // 1 / sqrt(2 pi)
        const float near = Gelu::bounded(x), e = __expf(-0.5f * near * near);
        const float tail = normal_tail<T>(fabsf(near), e), distribution = x < 0.f ? tail : 1.f - tail;
        return make_float2(x < -Gelu::kSaturated ? 0.f : x * distribution, distribution + near * kDensity * e);
    }
};

struct Silu {
    template <typename T>
    static __device__ __forceinline__ float value(float x) {
        return x * sigmoid(x);
    }
    template <typename T>
    static __device__ __forceinline__ float2 value_slope(float x) {
        const float s = sigmoid(x);
        return make_float2(x * s, s * (1.f + x * (1.f - s)));
    }
};

template <typename T, typename Function, bool kGated>
__device__ __forceinline__ void activation_forward(const ActivationForwardParams& params) {
    constexpr int kVectors = kGated ? kGatedVectors : kUnaryVectors;
    const T* x = static_cast<const T*>(params.x);
    const T* up = static_cast<const T*>(params.up);
    T* y = static_cast<T*>(params.y);
    const int64_t vectors = params.len / kVector<T>;
    const int64_t first = int64_t(blockIdx.x) * kVectors * kActivationThreads + threadIdx.x;

    if (vectors > 0) {
        float value[kVectors][kVector<T>], factor[kVectors][kVector<T>];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            // Past the end, the last vector again: a load without a branch can be queued with the others.
            const int64_t vector = min(first + i * kActivationThreads, vectors - 1);
            load<T>(value[i], x + vector * kVector<T>);
            if constexpr (kGated) load<T>(factor[i], up + vector * kVector<T>);
        }
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int64_t vector = first + i * kActivationThreads;
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) {
                value[i][j] = Function::template value<T>(value[i][j]);
                if constexpr (kGated) value[i][j] *= factor[i][j];
            }
            if (vector < vectors) store<T>(y + vector * kVector<T>, value[i]);
        }
    }

    const int64_t at = vectors * kVector<T> + threadIdx.x;
    if (blockIdx.x == 0 && at < params.len) {
        const float value = Function::template value<T>(to_float(x[at]));
        y[at] = from_float<T>(kGated ? value * to_float(up[at]) : value);
    }
}

// One vector of each tensor per thread.
template <typename T, typename Function, bool kGated>
__device__ __forceinline__ void activation_backward(const ActivationBackwardParams& params) {
    const T* x = static_cast<const T*>(params.x);
    const T* up = static_cast<const T*>(params.up);
    const T* dy = static_cast<const T*>(params.dy);
    T* dx = static_cast<T*>(params.dx);
    T* dup = static_cast<T*>(params.dup);
    const int64_t vectors = params.len / kVector<T>;

    if (const int64_t vector = int64_t(blockIdx.x) * kActivationThreads + threadIdx.x; vector < vectors) {
        const int64_t at = vector * kVector<T>;
        float of_x[kVector<T>], of_up[kVector<T>], of_y[kVector<T>];
        load<T>(of_x, x + at);
        load<T>(of_y, dy + at);
        if constexpr (kGated) load<T>(of_up, up + at);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
            const float2 value_slope = Function::template value_slope<T>(of_x[j]);
            of_x[j] = of_y[j] * (kGated ? of_up[j] * value_slope.y : value_slope.y);
            if constexpr (kGated) of_up[j] = of_y[j] * value_slope.x;
        }
        store<T>(dx + at, of_x);
        if constexpr (kGated) store<T>(dup + at, of_up);
    }

    const int64_t at = vectors * kVector<T> + threadIdx.x;
    if (blockIdx.x == 0 && at < params.len) {
        const float2 value_slope = Function::template value_slope<T>(to_float(x[at]));
        const float of_y = to_float(dy[at]);
        dx[at] = from_float<T>(of_y * (kGated ? to_float(up[at]) * value_slope.y : value_slope.y));
        if constexpr (kGated) dup[at] = from_float<T>(of_y * value_slope.x);
    }
}

}  // namespace fused_ops
