// Cross-entropy of rows of logits: the losses, their gradient, or both in place. The formula is in src/loss.rs.
//
// Work       A block has one row at a time.
// Memory     `losses` reads the logits once. `gradients` reads and writes them once. `in_place` reads them twice, the second time
//            backwards, so that what the first pass read last is still in a cache; it writes them once.
// Numerics   f32. The sum of exp(z - max) is an online sum: a larger maximum rescales it. Each thread adds its own part, and the
//            block combines the parts in a fixed order.
// Expects    logits and dlogits aligned to 16 bytes. Rows may begin at any element. Elements before the first and after the last 16-byte boundary are read alone.
#pragma once

#include "core.cuh"
#include "params.h"

namespace fused_ops {

constexpr int kLossThreads = 512;
constexpr int kLossWarps = kLossThreads / kWarpSize;

__device__ __forceinline__ float capped(float x, float softcap) {
    return softcap == 0.f ? x : softcap * tanhf(x / softcap);
}

// The aligned middle of a row. The elements around it are `head` and `tail`, each fewer than a vector.
template <typename T>
struct RowSpan {
    int head, vectors, vocab;

    __device__ RowSpan(const T* row, int vocab) : vocab(vocab) {
        const int past = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
        head = min(past == 0 ? 0 : kVector<T> - past, vocab);
        vectors = (vocab - head) / kVector<T>;
    }
    __device__ int tail_start() const { return head + vectors * kVector<T>; }
};

// max, and the sum of exp(z - max), of the elements so far
struct OnlineSum {
    float max = -INFINITY, sum = 0.f;

    __device__ void add(float z) {
        if (z == -INFINITY) return;  // probability 0; minus infinity minus itself would be NaN
        if (z <= max) {
            sum += __expf(z - max);
        } else if (z < INFINITY) {
            sum = sum * __expf(max - z) + 1.f;  // exp(-inf) = 0 for the first element
            max = z;
        } else {
            sum = NAN;  // NaN or infinity
        }
    }
};

// Loss and lse of a row, known to every thread.
template <typename T>
__device__ __forceinline__ float2 row_loss(const CrossEntropyParams& params, const T* row, int64_t target, float* scratch) {
    const RowSpan<T> span(row, params.vocab);
    OnlineSum online;
    float z_sum = 0.f;
    auto take = [&](float x) {
        const float z = capped(x, params.softcap);
        online.add(z);
        z_sum += z;
    };
    if (threadIdx.x < span.head) take(to_float(row[threadIdx.x]));
    for (int i = threadIdx.x; i < span.vectors; i += kLossThreads) {
        float x[kVector<T>];
        load<T>(x, row + span.head + i * kVector<T>);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) take(x[j]);
    }
    if (span.tail_start() + threadIdx.x < params.vocab) take(to_float(row[span.tail_start() + threadIdx.x]));

    const float max = combined<kLossWarps>(online.max, scratch, Max());
    // A thread without an element has the sum 0. Otherwise NaN of minus infinity minus itself would spread.
    const float scaled = online.sum == 0.f ? 0.f : online.sum * __expf(online.max - max);
    const float lse = max + logf(combined<kLossWarps>(scaled, scratch, Add()));
    float expected = (1.f - params.label_smoothing) * capped(to_float(row[target]), params.softcap);
    if (params.label_smoothing != 0.f) {
        expected += params.label_smoothing / params.vocab * combined<kLossWarps>(z_sum, scratch, Add());
    }
    return make_float2(lse - expected + params.z_loss * lse * lse, lse);
}

// The gradient of a row, from its end to its start. `to` may be `row`.
template <typename T>
__device__ __forceinline__ void row_gradient(const CrossEntropyParams& params, const T* row, T* to, int64_t target, float lse) {
    const float factor = params.factor == nullptr ? 1.f : *params.factor;
    const float of_p = factor * (1.f + 2.f * params.z_loss * lse);
    const float of_others = factor * params.label_smoothing / params.vocab;
    const float of_target = factor * (1.f - params.label_smoothing);
    auto gradient = [&](float x, int column) {
        const float z = capped(x, params.softcap);
        const float slope = params.softcap == 0.f ? 1.f : 1.f - (z / params.softcap) * (z / params.softcap);
        const float d = __expf(z - lse) * of_p - of_others;
        return (column == target ? d - of_target : d) * slope;
    };
    const RowSpan<T> span(row, params.vocab);
    const int tail = span.tail_start() + threadIdx.x;
    if (tail < params.vocab) to[tail] = from_float<T>(gradient(to_float(row[tail]), tail));
    for (int i = span.vectors - 1 - int(threadIdx.x); i >= 0; i -= kLossThreads) {
        const int column = span.head + i * kVector<T>;
        float x[kVector<T>];
        load<T>(x, row + column);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) x[j] = gradient(x[j], column + j);
        store<T>(to + column, x);
    }
    if (threadIdx.x < span.head) to[threadIdx.x] = from_float<T>(gradient(to_float(row[threadIdx.x]), threadIdx.x));
}

template <typename T>
__device__ __forceinline__ void zero_row(T* to, int vocab) {
    for (int column = threadIdx.x; column < vocab; column += kLossThreads) to[column] = from_float<T>(0.f);
}

enum class LossPass { kLosses, kGradients, kInPlace };

template <typename T, LossPass kPass>
__device__ __forceinline__ void cross_entropy(const CrossEntropyParams& params) {
    __shared__ float scratch[kLossWarps];
    for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
        const T* logits = static_cast<const T*>(params.logits) + row * params.vocab;
        T* dlogits = static_cast<T*>(params.dlogits) + row * params.vocab;
        const int64_t target = params.targets[row];
        if (target == params.ignore_index) {
            if (kPass != LossPass::kLosses) zero_row(dlogits, params.vocab);
            if (kPass != LossPass::kGradients && threadIdx.x == 0) params.losses[row] = params.lse[row] = 0.f;
            continue;
        }
        float lse;
        if constexpr (kPass == LossPass::kGradients) {
            lse = params.lse[row];
        } else {
            const float2 loss_lse = row_loss<T>(params, logits, target, scratch);
            lse = loss_lse.y;
            if (threadIdx.x == 0) {
                params.losses[row] = loss_lse.x;
                params.lse[row] = lse;
            }
            // In place, `row_loss` must have read the target everywhere before a thread writes a gradient.
            if constexpr (kPass == LossPass::kInPlace) __syncthreads();
        }
        if constexpr (kPass != LossPass::kLosses) row_gradient<T>(params, logits, dlogits, target, lse);
    }
}

}  // namespace fused_ops
