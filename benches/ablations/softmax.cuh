// The softmax of FlashAttention-1.
#pragma once

#include <cstddef>
#include <type_traits>

#include "core/fragment.cuh"
#include "core/softmax.cuh"

namespace fa2::ablations {

// When o is divided by its row sums.
enum class Rescale {
    kAtTheEnd,   // once, after the last key tile; of the row statistics only lse is kept: FlashAttention-2
    kEveryStep,  // after each tile; row_max and row_sum are kept: FlashAttention-1
};

// Where Rescale::kEveryStep keeps the row statistics, in the order of lse: (batch, num_heads, seqlen_q). Other variants ignore it.
struct Statistics {
    float* max;  // of the scores, natural
    float* sum;  // of exp(score - max)
};
static_assert(sizeof(Statistics) == 16 && offsetof(Statistics, sum) == 8, "call.rs of the bench has the same struct");

// A row that has seen no key yet has a sum of 0 and an o of 0.
__device__ __forceinline__ float inverse(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }

// o <- (sum_old e^(max_old - max) o + P v) / sum (FlashAttention-1, algorithm 1, line 12). P is computed with the new maximum, which saves
// the second exponential of that line. The division of a step happens at the start of the next one, or in finish(). row_sum is always
// the sum of the whole row.
template <int kMTiles>
struct NormalisedSoftmax : OnlineSoftmax<kMTiles> {
    using Base = OnlineSoftmax<kMTiles>;
    using Base::row_sum;

    template <int kNTiles, int kDTiles>
    __device__ __forceinline__ void step(Accumulator<kMTiles, kNTiles>& s, Accumulator<kMTiles, kDTiles>& o, float scale_log2) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float before = row_sum[i][half];
                Base::rescale(o, i, half, inverse(before));
                row_sum[i][half] = 0.f;
                const float kept = before * Base::step_row(s, i, half, scale_log2);
                row_sum[i][half] = kept + quad_sum(row_sum[i][half]);
                Base::rescale(o, i, half, kept);
            }
    }

    template <int kDTiles>
    __device__ __forceinline__ void finish(Accumulator<kMTiles, kDTiles>& o) const {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) Base::rescale(o, i, half, inverse(row_sum[i][half]));
    }
};

template <Rescale kRescale, int kMTiles>
using Softmax = std::conditional_t<kRescale == Rescale::kEveryStep, NormalisedSoftmax<kMTiles>, OnlineSoftmax<kMTiles>>;

}  // namespace fa2::ablations
