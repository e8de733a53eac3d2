// The softmax of FlashAttention-1, and the steps of one row that it and a split of the keys are made of.
#pragma once

#include <type_traits>

#include "core/fragment.cuh"
#include "core/softmax.cuh"

namespace fa2::ablations {

// When o is divided by the sums of its rows.
enum class Rescale {
    kAtTheEnd,   // once, behind the last tile of keys, and of maximum and sum only lse is kept: FlashAttention-2
    kEveryStep,  // behind each tile, and maximum and sum are kept: FlashAttention-1
};

// Where Rescale::kEveryStep keeps them, as lse lies: (batch, num_heads, seqlen_q). Others do not touch it.
struct Statistics {
    float* max;  // of the scores, natural
    float* sum;  // of exp(score - max)
};

// The four threads of a row are neighbours.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// One m16 tile of accumulators, of which a thread holds two rows, by `half`.
template <int kTiles>
using Rows = float[kTiles][4];

// The largest score of a row in this warp's columns.
template <int kNTiles>
__device__ __forceinline__ float row_max(const Rows<kNTiles>& s, int half) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    return quad_max(largest);
}

// With nothing visible so far, any finite reference gives exp2(-inf) = 0 instead of NaN.
__device__ __forceinline__ float reference_of(float max, float factor) { return max == -INFINITY ? 0.f : max * factor; }

// Turns the scores of a row into exp2(factor * score - reference); the sum is that of this thread's columns.
template <int kNTiles>
__device__ __forceinline__ float exponentials(Rows<kNTiles>& s, int half, float factor, float reference) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[j][e] = exp2_approx(fmaf(s[j][e], factor, -reference));
            sum += s[j][e];
        }
    return sum;
}

template <int kDTiles>
__device__ __forceinline__ void scale_row(Rows<kDTiles>& o, int half, float factor) {
#pragma unroll
    for (int j = 0; j < kDTiles; ++j) {
        o[j][2 * half] *= factor;
        o[j][2 * half + 1] *= factor;
    }
}

// A row that has seen no key yet has a sum of 0 and an o of 0.
__device__ __forceinline__ float inverse(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }

// o <- (sum_old e^(max_old - max) o + P v) / sum (FlashAttention-1, algorithm 1, line 12): o is that of the keys so far after
// every step. P is taken with the new maximum, which spares the second exponential of that line. The sums are of whole rows.
template <int kMTiles>
struct NormalisedSoftmax : OnlineSoftmax<kMTiles> {
    using OnlineSoftmax<kMTiles>::max;
    using OnlineSoftmax<kMTiles>::sum;

    // Before P v is added to o: turns scores into P, and gives o its old sum back.
    template <int kNTiles, int kDTiles>
    __device__ __forceinline__ void step(Accumulator<kMTiles, kNTiles>& s, Accumulator<kMTiles, kDTiles>& o, float factor) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float largest = fmaxf(max[i][half], row_max(s.x[i], half));
                const float reference = reference_of(largest, factor);
                const float kept = sum[i][half] * exp2_approx(max[i][half] * factor - reference);
                max[i][half] = largest;
                sum[i][half] = kept + quad_sum(exponentials(s.x[i], half, factor, reference));
                scale_row(o.x[i], half, kept);
            }
    }

    // After it.
    template <int kDTiles>
    __device__ __forceinline__ void normalise(Accumulator<kMTiles, kDTiles>& o) const {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) scale_row(o.x[i], half, inverse(sum[i][half]));
    }
};

template <Rescale kRescale, int kMTiles>
using Softmax = std::conditional_t<kRescale == Rescale::kEveryStep, NormalisedSoftmax<kMTiles>, OnlineSoftmax<kMTiles>>;

}  // namespace fa2::ablations
