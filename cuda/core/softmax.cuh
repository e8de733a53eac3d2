// Online softmax over the accumulators of S: the division by the sum is left to the end, and only lse is kept
// (FlashAttention-2, 3.1).
#pragma once

#include "fragment.cuh"
#include "types.cuh"

namespace fa2 {

// Running maximum and sum of the rows that a thread holds: two for each 16 rows of its warp.
template <int kMTiles>
struct OnlineSoftmax {
    float max[kMTiles][2];  // of the scores, before the factor; after lagging_scores() what weights are measured from instead
    float sum[kMTiles][2];  // this thread's columns only, until finish()

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                max[i][half] = -INFINITY;
                sum[i][half] = 0.f;
            }
    }

    // Turns scores into exp2(factor * (score - max)), and rescales the sums and the output so far. factor > 0.
    template <int kNTiles, int kDTiles>
    __device__ __forceinline__ void step(Accumulator<kMTiles, kNTiles>& s, Accumulator<kMTiles, kDTiles>& o, float factor) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) rescale(o, i, half, scores(s, i, half, factor));
    }

    // Turns the scores of one row into exp2(factor * (score - max)), and rescales its sum. Returns the factor of its output so far.
    template <int kNTiles>
    __device__ __forceinline__ float scores(Accumulator<kMTiles, kNTiles>& s, int i, int half, float factor) {
        float row_max = max[i][half];
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) row_max = fmaxf(row_max, fmaxf(s.x[i][j][2 * half], s.x[i][j][2 * half + 1]));
        // The four threads of a row are neighbours.
        row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, 1));
        row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, 2));
        // With nothing visible so far, any finite reference gives exp2(-inf) = 0 instead of NaN.
        const float reference = row_max == -INFINITY ? 0.f : row_max * factor;
        const float rescale = exp2_approx(max[i][half] * factor - reference);
        max[i][half] = row_max;
        float row_sum = 0.f;
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = s.x[i][j][2 * half + e];
                x = exp2_approx(fmaf(x, factor, -reference));
                row_sum += x;
            }
        sum[i][half] = fmaf(sum[i][half], rescale, row_sum);
        return rescale;
    }

    // What a thread's sum may come to before its maximum must catch up: no weight is above it, and the largest f16 is 65504.
    static constexpr float kMostLag = 32768.f;

    // As scores() of both rows, but from the maximum so far: scores above it become more than 1, and neither a new maximum nor a
    // rescale is needed. True if a sum has become too large: then catch_up() comes next. Where a weight or the sum outgrows f32, 128 /
    // factor above the maximum or a little less, and where there is no maximum yet, the output does not stay finite.
    template <int kNTiles>
    __device__ __forceinline__ bool lagging_scores(Accumulator<kMTiles, kNTiles>& s, int i, float factor) {
        const float reference[2] = {max[i][0] * factor, max[i][1] * factor};
        float tile_sum[2] = {0.f, 0.f};  // long sums lose digits with every term
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float& x = s.x[i][j][e];
                x = exp2_approx(fmaf(x, factor, -reference[e / 2]));
                tile_sum[e / 2] += x;
            }
        sum[i][0] += tile_sum[0];
        sum[i][1] += tile_sum[1];
        return !(fmaxf(sum[i][0], sum[i][1]) <= kMostLag);
    }

    // Raises the maximum of one row so far that no thread's sum is above 32. Returns the factor of the weights of the last tile and
    // of the output so far.
    __device__ __forceinline__ float catch_up(int i, int half, float factor) {
        float most = fmaxf(sum[i][half], 32.f);
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float before = max[i][half];
        max[i][half] += log2f(most / 32.f) / factor;
        // Products rounded as the references are: a maximum that stays changes nothing. A sum alone may have overflowed: its output
        // must not stay finite either.
        const float rescale = max[i][half] < INFINITY
                                  ? exp2_approx(__fmul_rn(before, factor) - __fmul_rn(max[i][half], factor))
                                  : NAN;
        sum[i][half] *= rescale;
        return rescale;
    }

    // One row of the output, multiplied.
    template <int kDTiles>
    __device__ __forceinline__ static void rescale(Accumulator<kMTiles, kDTiles>& o, int i, int half, float factor) {
#pragma unroll
        for (int j = 0; j < kDTiles; ++j) {
            o.x[i][j][2 * half] *= factor;
            o.x[i][j][2 * half + 1] *= factor;
        }
    }

    // Adds up the sums of a row's four threads; every thread then has its rows' sums.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[i][half] += __shfl_xor_sync(~0u, sum[i][half], 1);
                sum[i][half] += __shfl_xor_sync(~0u, sum[i][half], 2);
            }
    }

    // Natural logarithm of the row's sum of exp(score).
    __device__ __forceinline__ float lse(int i, int half, float factor) const {
        return (max[i][half] * factor + log2f(sum[i][half])) * kLn2;
    }
};

}  // namespace fa2
