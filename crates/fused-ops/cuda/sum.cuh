// y = a + b: the sum of two gradients of one tensor.
//
// Work       A thread has kSumVectors 16-byte vectors of each tensor.
// Memory     Each tensor is read or written once. All loads of a thread are queued before its first result, 64 bytes.
// Numerics   f32, rounded once.
// Expects    tensors aligned to 16 bytes. The elements after the last 16-byte boundary are read alone.
#pragma once

#include "core.cuh"
#include "params.h"

namespace fused_ops {

template <typename T>
__device__ __forceinline__ void sum(const SumParams& params) {
    const T* a = static_cast<const T*>(params.a);
    const T* b = static_cast<const T*>(params.b);
    T* y = static_cast<T*>(params.y);
    const int64_t vectors = params.len / kVector<T>;
    const int64_t first = int64_t(blockIdx.x) * kSumVectors * kSumThreads + threadIdx.x;

    if (vectors > 0) {
        Vector<T> of_a[kSumVectors], of_b[kSumVectors];
#pragma unroll
        for (int i = 0; i < kSumVectors; ++i) {
            // Past the end, the last vector again: a load without a branch can be queued with the others.
            const int64_t vector = min(first + i * kSumThreads, vectors - 1);
            of_a[i] = load_vector(a + vector * kVector<T>);
            of_b[i] = load_vector(b + vector * kVector<T>);
        }
#pragma unroll
        for (int i = 0; i < kSumVectors; ++i) {
            const int64_t vector = first + i * kSumThreads;
            float value[kVector<T>], other[kVector<T>];
            widen(value, of_a[i]);
            widen(other, of_b[i]);
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) value[j] += other[j];
            if (vector < vectors) store<T>(y + vector * kVector<T>, value);
        }
    }

    const int64_t at = vectors * kVector<T> + threadIdx.x;
    if (blockIdx.x == 0 && at < params.len) y[at] = from_float<T>(to_float(a[at]) + to_float(b[at]));
}

}  // namespace fused_ops
