// Cross-entropy of rows of logits: the losses, their gradient, or both in place. The formula is in src/loss.rs.
//
// Work       A block has one row.
// Memory     `losses` reads the logits once. `gradients` reads and writes them once. `in_place` too: what it has read stays in shared
//            memory, as far as it fits; the rest is read again, from L2 if the row is not too long.
// Latency    A thread loads kAhead vectors before it uses the first: 64 KB in flight for two blocks per multiprocessor.
// Numerics   f32. exp and ln have base 2: z = x log2(e). The sum of 2^(z - max) is an online sum: a larger maximum rescales it. Each
//            thread adds its own part, and the block combines the parts in a fixed order.
// Alignment  A row may begin at any element. Those before the first and after the last 16-byte boundary are read alone.
// Infinity   max starts finite, so minus infinity minus max is never NaN. Plus infinity minus itself is.
#pragma once

#include <cfloat>

#include "core.cuh"
#include "params.h"

namespace fused_ops {

constexpr int kLossWarps = kLossThreads / kWarpSize;
constexpr int kAhead = 4;

constexpr float kLog2e = 1.4426950408889634f;  // 1 / ln 2
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --use_fast_math makes tanhf an instruction with 11 bits.
__device__ __forceinline__ float tanh_of(float x) {
    const float t = exp2_approx(-2.f * kLog2e * fabsf(x));
    const float far = copysignf(__fdividef(1.f - t, 1.f + t), x);
    const float square = x * x;  // 1 - t cancels near 0
    const float near = x * (1.f + square * (-1.f / 3 + square * (2.f / 15 - square * (17.f / 315))));
    return fabsf(x) < 0.2f ? near : far;
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

// kOptions: with a softcap or label smoothing.
template <bool kOptions>
struct OnlineSum {
    float max = -FLT_MAX;  // of z
    float sum = 0.f;       // of 2^(z - max)
    float plain = 0.f;     // of the capped logits, for label smoothing

    template <int kCount>
    __device__ void add(float (&x)[kCount], float softcap) {
        if constexpr (kOptions) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (softcap != 0.f) x[i] = softcap * tanh_of(__fdividef(x[i], softcap));
                plain += x[i];
            }
        }
        float largest = x[0];
#pragma unroll
        for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
        largest *= kLog2e;
        if (largest > max) {
            sum *= exp2_approx(max - largest);
            max = largest;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum += exp2_approx(fmaf(x[i], kLog2e, -max));
    }
};

// Calls take(i, vector i) for this thread's share of the vectors, in order.
template <typename T, typename Take>
__device__ __forceinline__ void for_vectors(const T* from, int vectors, Take take) {
    int i = threadIdx.x;
    for (; i + (kAhead - 1) * kLossThreads < vectors; i += kAhead * kLossThreads) {
        Vector<T> ahead[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) ahead[k] = load_vector(from + int64_t(i + k * kLossThreads) * kVector<T>);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) take(i + k * kLossThreads, ahead[k]);
    }
    for (; i < vectors; i += kLossThreads) take(i, load_vector(from + int64_t(i) * kVector<T>));
}

struct LossAndLse {
    float loss;
    float lse;  // in base 2
};

// Known to every thread. The first `kept_vectors` of the aligned middle go to shared memory.
template <typename T, bool kOptions>
__device__ __forceinline__ LossAndLse row_loss(const CrossEntropyParams& params, const T* row, int64_t target, Vector<T>* keep,
                                               int kept_vectors) {
    __shared__ float scratch[3][kLossWarps];
    const RowSpan<T> span(row, params.vocab);
    OnlineSum<kOptions> online;
    auto alone = [&](int column) {
        float x[1] = {to_float(row[column])};
        online.add(x, params.softcap);
    };
    if (threadIdx.x < span.head) alone(threadIdx.x);
    for_vectors(row + span.head, span.vectors, [&](int i, const Vector<T>& vector) {
        if (i < kept_vectors) keep[i] = vector;
        float x[kVector<T>];
        widen(x, vector);
        online.add(x, params.softcap);
    });
    if (span.tail_start() + threadIdx.x < params.vocab) alone(span.tail_start() + threadIdx.x);

    const float max = combined<kLossWarps>(online.max, scratch[0], 0, Max());
    const float sum = combined<kLossWarps>(online.sum * exp2_approx(online.max - max), scratch[1], 0, Add());
    const float lse = max + log2f(sum);
    // A target that is no class must not read past the row. It makes the loss NaN.
    float expected = target >= 0 && target < params.vocab ? to_float(row[target]) : NAN;
    if constexpr (kOptions) {
        if (params.softcap != 0.f) expected = params.softcap * tanh_of(__fdividef(expected, params.softcap));
        expected *= 1.f - params.label_smoothing;
        if (params.label_smoothing != 0.f) {
            expected += params.label_smoothing / params.vocab * combined<kLossWarps>(online.plain, scratch[2], 0, Add());
        }
    }
    const float natural = lse * kLn2;
    return {natural - expected + params.z_loss * natural * natural, lse};
}

// The gradient of logits by their row's loss, times a factor.
template <bool kOptions>
struct Gradient {
    float lse, of_p, of_others, of_target, softcap;
    int64_t target;

    __device__ Gradient(const CrossEntropyParams& params, int64_t target, float lse) : lse(lse), softcap(params.softcap), target(target) {
        const float factor = params.dloss == nullptr ? 1.f : *params.dloss / *params.counted;
        of_p = factor * (1.f + 2.f * params.z_loss * lse * kLn2);
        of_others = factor * params.label_smoothing / params.vocab;
        of_target = factor * (1.f - params.label_smoothing);
    }

    // Replaces the logits x from `column` on.
    template <int kCount>
    __device__ void apply(float (&x)[kCount], int column) const {
        float slope[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if constexpr (kOptions) {
                slope[i] = 1.f;
                if (softcap != 0.f) {
                    const float t = tanh_of(__fdividef(x[i], softcap));
                    x[i] = softcap * t;
                    slope[i] -= t * t;
                }
            }
            x[i] = exp2_approx(fmaf(x[i], kLog2e, -lse)) * of_p;
            if constexpr (kOptions) x[i] -= of_others;
        }
        if (target >= column && target < column + kCount) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (column + i == target) x[i] -= of_target;
            }
        }
        if constexpr (kOptions) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[i] *= slope[i];
        }
    }
};

// The gradient of a row. `to` may be `row`. The first `kept_vectors` are in shared memory. The vectors after them are read again from
// global memory. They come first, because L2 still holds the end of the row.
template <typename T, bool kOptions>
__device__ __forceinline__ void row_gradient(const CrossEntropyParams& params, const T* row, T* to, int64_t target, float lse,
                                             const Vector<T>* keep, int kept_vectors) {
    const Gradient<kOptions> gradient(params, target, lse);
    const RowSpan<T> span(row, params.vocab);
    auto write = [&](int i, const Vector<T>& vector) {
        float x[kVector<T>];
        widen(x, vector);
        gradient.apply(x, span.head + i * kVector<T>);
        store(to + span.head + i * kVector<T>, x);
    };
    auto alone = [&](int column) {
        float x[1] = {to_float(row[column])};
        gradient.apply(x, column);
        to[column] = from_float<T>(x[0]);
    };
    if (span.tail_start() + threadIdx.x < params.vocab) alone(span.tail_start() + threadIdx.x);
    if (span.vectors > kept_vectors) {
        const T* rest = row + span.head + int64_t(kept_vectors) * kVector<T>;
        for_vectors(rest, span.vectors - kept_vectors, [&](int i, const Vector<T>& vector) { write(kept_vectors + i, vector); });
    }
    for (int i = threadIdx.x; i < min(kept_vectors, span.vectors); i += kLossThreads) write(i, keep[i]);
    if (threadIdx.x < span.head) alone(threadIdx.x);
}

template <typename T>
__device__ __forceinline__ void zero_row(T* to, int vocab) {
    const RowSpan<T> span(to, vocab);
    if (threadIdx.x < span.head) to[threadIdx.x] = from_float<T>(0.f);
    for (int i = threadIdx.x; i < span.vectors; i += kLossThreads) store_vector(to + span.head + i * kVector<T>, Vector<T>{});
    if (span.tail_start() + threadIdx.x < vocab) to[span.tail_start() + threadIdx.x] = from_float<T>(0.f);
}

enum class LossPass { kLosses, kGradients, kInPlace };

// Grid: (rows). Dynamic shared memory: `kept_bytes` for kInPlace.
template <typename T, LossPass kPass, bool kOptions>
__device__ __forceinline__ void cross_entropy(const CrossEntropyParams& params) {
    extern __shared__ uint4 shared[];
    auto* keep = reinterpret_cast<Vector<T>*>(shared);
    const int kept_vectors = kPass == LossPass::kInPlace ? params.kept_bytes / int(sizeof(Vector<T>)) : 0;
    const int64_t row = blockIdx.x;
    const T* logits = static_cast<const T*>(params.logits) + row * params.stride;
    T* dlogits = static_cast<T*>(params.dlogits) + row * params.stride;
    const int64_t target = params.targets[row];
    if (target == params.ignore_index) {
        if (kPass != LossPass::kLosses) zero_row(dlogits, params.vocab);
        if (kPass != LossPass::kGradients && threadIdx.x == 0) params.losses[row] = 0.f;
        return;
    }
    float lse;
    if constexpr (kPass == LossPass::kGradients) {
        lse = params.lse[row];
    } else {
        const LossAndLse result = row_loss<T, kOptions>(params, logits, target, keep, kept_vectors);
        lse = result.lse;
        if (threadIdx.x == 0) {
            params.losses[row] = result.loss;
            if (params.lse != nullptr) params.lse[row] = lse;
        }
        // In place, every thread must have read the target before one writes a gradient.
        if constexpr (kPass == LossPass::kInPlace) __syncthreads();
    }
    if constexpr (kPass != LossPass::kLosses) row_gradient<T, kOptions>(params, logits, dlogits, target, lse, keep, kept_vectors);
}

// One block. Sums in f64, as on the CPU.
__device__ __forceinline__ void cross_entropy_mean(const CrossEntropyMeanParams& params) {
    constexpr int kWarps = kMeanThreads / kWarpSize;
    __shared__ double sums[kWarps];
    __shared__ float counts[kWarps];
    double sum = 0.;
    float count = 0.f;  // exact up to 2^24 rows of a thread
    for (int64_t row = threadIdx.x; row < params.rows; row += kMeanThreads) {
        sum += params.losses[row];
        count += params.targets[row] == params.ignore_index ? 0.f : 1.f;
    }
    sum = combined<kWarps>(sum, sums, 0, Add());
    count = fmaxf(combined<kWarps>(count, counts, 0, Add()), 1.f);
    if (threadIdx.x == 0) {
        *params.mean = float(sum / count);
        *params.counted = count;
    }
}

// Grid: any. The last thread also has the elements after the last whole vector.
template <typename T>
__device__ __forceinline__ void scale(const ScaleParams& params) {
    const float factor = *params.dloss / *params.counted;
    const int64_t thread = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x, threads = int64_t(gridDim.x) * kScaleThreads;
    const int64_t whole = params.len / kVector<T> * kVector<T>;
    T* to = static_cast<T*>(params.to);
    for (int64_t i = thread * kVector<T>; i < whole; i += threads * kVector<T>) {
        float x[kVector<T>];
#pragma unroll
        for (int j = 0; j < kVector<T>; j += 4) {
            const float4 four = *reinterpret_cast<const float4*>(params.from + i + j);
            x[j] = four.x * factor, x[j + 1] = four.y * factor, x[j + 2] = four.z * factor, x[j + 3] = four.w * factor;
        }
        store(to + i, x);
    }
    if (thread != threads - 1) return;
    for (int64_t i = whole; i < params.len; ++i) to[i] = from_float<T>(params.from[i] * factor);
}

}  // namespace fused_ops
