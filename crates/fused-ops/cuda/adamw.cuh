// One step of AdamW for all parameters of one type, and the global norm of the gradients. The formula is in src/adamw.rs.
//
// Work       A block has a chunk of kAdamWChunk elements of one tensor. A table in device memory says which.
// Memory     `adamw_norm` reads the gradients. `adamw_update` reads gradient, w, m and v, and writes w, m, v and the rounded copy: each
//            once, 28 bytes per element of a 16-bit parameter. The factor that clips is read from device memory.
// Numerics   f32. The norm adds squares in f32 within a chunk and in f64 over the chunks, in a fixed order.
// Expects    all tensors aligned to 16 bytes. The elements after the last 16-byte boundary are read alone.
#pragma once

#include "core.cuh"
#include "params.h"

namespace fused_ops {

constexpr int kAdamWWarps = kAdamWThreads / kWarpSize;
constexpr int kNormVectors = 4;  // loads of a thread in flight
// Elements that a thread updates at once: 16 bytes of f32, so that the accesses of a warp to w, m and v have no gaps.
constexpr int kUpdated = kVector<f32>;

// The chunk of a block: elements begin..end, of which those before `tail` are whole vectors.
template <typename T>
struct Chunk {
    const AdamWTensor& tensor;
    int64_t begin, end, tail;

    __device__ explicit Chunk(const AdamWParams& params) : tensor(params.tensors[params.blocks[blockIdx.x].tensor]) {
        begin = int64_t(params.blocks[blockIdx.x].chunk) * kAdamWChunk;
        end = min(begin + kAdamWChunk, tensor.len);
        tail = begin + (end - begin) / kVector<T> * kVector<T>;
    }
};

template <typename T>
__device__ __forceinline__ void adamw_norm(const AdamWParams& params) {
    __shared__ float scratch[kAdamWWarps];
    const Chunk<T> chunk(params);
    const T* gradient = static_cast<const T*>(chunk.tensor.gradient);
    float squares[kVector<T>] = {};
    auto add = [&](const float (&g)[kVector<T>]) {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) squares[j] += g[j] * g[j];
    };
    constexpr int kStride = kAdamWThreads * kVector<T>;
    int64_t at = chunk.begin + threadIdx.x * kVector<T>;
    for (; at + (kNormVectors - 1) * kStride < chunk.tail; at += kNormVectors * kStride) {
        float g[kNormVectors][kVector<T>];
#pragma unroll
        for (int i = 0; i < kNormVectors; ++i) load<T>(g[i], gradient + at + i * kStride);
#pragma unroll
        for (int i = 0; i < kNormVectors; ++i) add(g[i]);
    }
    for (; at < chunk.tail; at += kStride) {
        float g[kVector<T>];
        load<T>(g, gradient + at);
        add(g);
    }
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) sum += squares[j];
    if (chunk.tail + threadIdx.x < chunk.end) {
        const float g = to_float(gradient[chunk.tail + threadIdx.x]);
        sum += g * g;
    }
    sum = combined<kAdamWWarps>(sum, scratch, 0, Add());
    if (threadIdx.x == 0) params.partial[blockIdx.x] = sum;
}

// One block for all partial sums.
__device__ __forceinline__ void finish_norm(const GlobalNormParams& params) {
    constexpr int kWarps = kGlobalNormThreads / kWarpSize;
    __shared__ double scratch[kWarps];
    double sum = 0;
#pragma unroll 8
    for (uint32_t block = threadIdx.x; block < params.blocks; block += kGlobalNormThreads) sum += params.partial[block];
    sum = combined<kWarps>(sum, scratch, 0, Add());
    if (threadIdx.x != 0) return;
    const float norm = float(sqrt(sum));
    *params.norm = norm;
    *params.factor = norm > params.max_norm ? params.max_norm / norm : 1.f;  // 1 for NaN
}

// The new w, m and v of one element.
__device__ __forceinline__ void adamw_element(const AdamWParams& params, float keep, float g, float& w, float& m, float& v) {
    m = params.beta1 * m + params.of_gradient * g;
    v = params.beta2 * v + params.of_square * g * g;
    w = keep * w - params.rate * m / (sqrtf(v) + params.epsilon);
}

template <typename T>
__device__ __forceinline__ void adamw_update(const AdamWParams& params) {
    const Chunk<T> chunk(params);
    const AdamWTensor tensor = chunk.tensor;
    const T* gradient = static_cast<const T*>(tensor.gradient);
    T* rounded = static_cast<T*>(tensor.rounded);
    const float factor = *params.factor;
    for (int64_t at = chunk.begin + threadIdx.x * kUpdated; at < chunk.tail; at += kAdamWThreads * kUpdated) {
        float g[kUpdated], w[kUpdated], m[kUpdated], v[kUpdated];
        load(g, gradient + at);
        load(w, tensor.w + at);
        load(m, tensor.m + at);
        load(v, tensor.v + at);
#pragma unroll
        for (int j = 0; j < kUpdated; ++j) adamw_element(params, tensor.keep, factor * g[j], w[j], m[j], v[j]);
        store(tensor.w + at, w);
        store(tensor.m + at, m);
        store(tensor.v + at, v);
        if constexpr (sizeof(T) == 2) store(rounded + at, w);
    }
    if (const int64_t at = chunk.tail + threadIdx.x; at < chunk.end) {
        adamw_element(params, tensor.keep, factor * to_float(gradient[at]), tensor.w[at], tensor.m[at], tensor.v[at]);
        if constexpr (sizeof(T) == 2) rounded[at] = from_float<T>(tensor.w[at]);
    }
}

}  // namespace fused_ops
