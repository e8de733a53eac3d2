// Online softmax over the accumulators of S: the division by the sum is left to the end, and only lse is kept
// (FlashAttention-2, 3.1).
#pragma once

#include "fragment.cuh"
#include "types.cuh"

namespace fa2 {

// The largest of three numbers, as bits, of which `bits` is not negative: those order as integers do, but for two that are negative.
// A NaN counts as the largest, or as negative. One instruction from 9.0 on (VIMNMX3), where floats take two. In one asm, so that x and
// y are not copied to other registers.
__device__ __forceinline__ int largest_bits(int bits, float x, float y) {
    asm("{\n.reg .s32 a, b;\nmov.b32 a, %1;\nmov.b32 b, %2;\nmax.s32 a, a, b;\nmax.s32 %0, %0, a;\n}" : "+r"(bits) : "f"(x), "f"(y));
    return bits;
}

// Running maximum and sum of the rows that a thread holds: two for each 16 rows of its warp.
template <int kMTiles>
struct OnlineSoftmax {
    float max[kMTiles][2];  // of the scores, before the factor
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
        const float rescale = raise(i, half, largest(s, i, half), factor);
        weights(s, i, half, factor, rescale);
        return rescale;
    }

    // The largest of the maximum so far and this thread's scores of one row.
    template <int kNTiles>
    __device__ __forceinline__ float largest(const Accumulator<kMTiles, kNTiles>& s, int i, int half) const {
        float most = max[i][half];
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) most = fmaxf(most, fmaxf(s.x[i][j][2 * half], s.x[i][j][2 * half + 1]));
        return most;
    }

    // The same where the maximum so far is not negative.
    template <int kNTiles>
    __device__ __forceinline__ float largest_from_positive(const Accumulator<kMTiles, kNTiles>& s, int i, int half) const {
        int most = __float_as_int(max[i][half]);
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) most = largest_bits(most, s.x[i][j][2 * half], s.x[i][j][2 * half + 1]);
        return __int_as_float(most);
    }

    // Whether no maximum of this warp's rows is negative.
    __device__ __forceinline__ bool positive(int i) const {
        return !__any_sync(~0u, (__float_as_int(max[i][0]) | __float_as_int(max[i][1])) < 0);
    }

    // The maximum of one row becomes the largest of its four threads'. Returns the factor of its sum and its output so far.
    __device__ __forceinline__ float raise(int i, int half, float row_max, float factor) {
        // The four threads of a row are neighbours.
        row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, 1));
        row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, 2));
        // Rounded as the reference is, not a fused multiply-add: a maximum that stays leaves the sum as it is.
        const float before = __fmul_rn(max[i][half], factor);
        max[i][half] = row_max;
        return exp2_approx(before - reference(i, half, factor));
    }

    // Scores of one row become exp2(factor * score - reference), and are summed up.
    template <int kNTiles>
    __device__ __forceinline__ void weights(Accumulator<kMTiles, kNTiles>& s, int i, int half, float factor, float rescale) {
        const float from = reference(i, half, factor);
        float row_sum = 0.f;
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = s.x[i][j][2 * half + e];
                x = exp2_approx(fmaf(x, factor, -from));
                row_sum += x;
            }
        sum[i][half] = fmaf(sum[i][half], rescale, row_sum);
    }

    // With nothing visible so far, any finite reference gives exp2(-inf) = 0 instead of NaN.
    __device__ __forceinline__ float reference(int i, int half, float factor) const {
        return max[i][half] == -INFINITY ? 0.f : __fmul_rn(max[i][half], factor);
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
