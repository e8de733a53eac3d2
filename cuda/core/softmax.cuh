// Online softmax over the accumulators of S. The division by the row sum waits until the end, and only lse is kept
// (FlashAttention-2, section 3.1).
#pragma once

#include "fragment.cuh"
#include "types.cuh"

namespace fa2 {

// Maximum of three floats, computed on their bit patterns as signed integers. That is correct if at least one of the three is not
// negative; the caller guarantees it for `bits`. A positive NaN counts as the largest, a negative one as negative. From 9.0 on it is
// one instruction (VIMNMX3); floats take two. One asm block, because with two ptxas copies x and y to other registers.
__device__ __forceinline__ int max3_bits(int bits, float x, float y) {
    asm("{\n.reg .s32 a, b;\nmov.b32 a, %1;\nmov.b32 b, %2;\nmax.s32 a, a, b;\nmax.s32 %0, %0, a;\n}" : "+r"(bits) : "f"(x), "f"(y));
    return bits;
}

// The number that is subtracted from a row's exponents: its maximum in the log2 domain. A row that has seen no key yet gets 0, because
// any finite number gives exp2(-inf) = 0, and -inf would give NaN. The product is rounded on its own, not fused into a later
// multiply-add. So an unchanged maximum gives the same number again, and the row sum keeps its value.
__device__ __forceinline__ float exponent_offset(float row_max, float scale_log2) {
    return row_max == -INFINITY ? 0.f : __fmul_rn(row_max, scale_log2);
}

// Natural logarithm of a row's sum of exp(score).
__device__ __forceinline__ float natural_lse(float row_max, float row_sum, float scale_log2) {
    return (row_max * scale_log2 + log2f(row_sum)) * kLn2;
}

// The four threads that hold a row are neighbours.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// P of one score in the backward, which has lse from the forward.
__device__ __forceinline__ float weight_of(float score, float scale_log2, float lse_log2) {
    return exp2_approx(fmaf(score, scale_log2, -lse_log2));
}

// dS of one element. It still lacks the derivative of the score_mod.
__device__ __forceinline__ float ds_of(float p, float dp, float delta) { return p * (dp - delta); }

// The row statistics of a thread's rows: two of each 16 rows of its warp.
template <int kMTiles>
struct OnlineSoftmax {
    float row_max[kMTiles][2];  // of the scores, before scale_log2
    float row_sum[kMTiles][2];  // of this thread's columns, until finish()

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row_max[i][half] = -INFINITY;
                row_sum[i][half] = 0.f;
            }
    }

    // Turns scores into P = exp2(scale_log2 * (score - row_max)), and rescales the row sums and o. scale_log2 > 0.
    template <int kNTiles, int kDTiles>
    __device__ __forceinline__ void step(Accumulator<kMTiles, kNTiles>& s, Accumulator<kMTiles, kDTiles>& o, float scale_log2) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) rescale(o, i, half, step_row(s, i, half, scale_log2));
    }

    // Turns the scores of one row into P and rescales its sum. Returns the factor by which the caller must rescale the row of o.
    template <int kNTiles>
    __device__ __forceinline__ float step_row(Accumulator<kMTiles, kNTiles>& s, int i, int half, float scale_log2) {
        const float factor = raise_max(i, half, quad_max(max_of(s, i, half)), scale_log2);
        exponentiate(s, i, half, scale_log2, factor);
        return factor;
    }

    // The maximum of the row so far and of this thread's new scores.
    template <int kNTiles>
    __device__ __forceinline__ float max_of(const Accumulator<kMTiles, kNTiles>& s, int i, int half) const {
        float most = row_max[i][half];
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) most = fmaxf(most, fmaxf(s.x[i][j][2 * half], s.x[i][j][2 * half + 1]));
        return most;
    }

    // As max_of(), but the maximum of the row so far must not be negative.
    template <int kNTiles>
    __device__ __forceinline__ float max_of_nonnegative(const Accumulator<kMTiles, kNTiles>& s, int i, int half) const {
        int most = __float_as_int(row_max[i][half]);
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) most = max3_bits(most, s.x[i][j][2 * half], s.x[i][j][2 * half + 1]);
        return __int_as_float(most);
    }

    // Whether no row of this warp has a negative maximum.
    __device__ __forceinline__ bool all_nonnegative(int i) const {
        return !__any_sync(~0u, (__float_as_int(row_max[i][0]) | __float_as_int(row_max[i][1])) < 0);
    }

    // Sets the maximum of one row. Returns the factor by which its sum and its o must be rescaled.
    __device__ __forceinline__ float raise_max(int i, int half, float new_max, float scale_log2) {
        const float before = __fmul_rn(row_max[i][half], scale_log2);
        row_max[i][half] = new_max;
        return exp2_approx(before - exponent_offset(new_max, scale_log2));
    }

    // Turns the scores of one row into P with the maximum of raise_max(), and adds them to the row sum, rescaled by `factor`.
    template <int kNTiles>
    __device__ __forceinline__ void exponentiate(Accumulator<kMTiles, kNTiles>& s, int i, int half, float scale_log2, float factor) {
        const float offset = exponent_offset(row_max[i][half], scale_log2);
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = s.x[i][j][2 * half + e];
                x = exp2_approx(fmaf(x, scale_log2, -offset));
                sum += x;
            }
        row_sum[i][half] = fmaf(row_sum[i][half], factor, sum);
    }

    // Multiplies one row of o.
    template <int kDTiles>
    __device__ __forceinline__ static void rescale(Accumulator<kMTiles, kDTiles>& o, int i, int half, float factor) {
#pragma unroll
        for (int j = 0; j < kDTiles; ++j) {
            o.x[i][j][2 * half] *= factor;
            o.x[i][j][2 * half + 1] *= factor;
        }
    }

    // Adds up the sums of a row's four threads. Afterwards every thread has the sums of its rows.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) row_sum[i][half] = quad_sum(row_sum[i][half]);
    }

    __device__ __forceinline__ float lse(int i, int half, float scale_log2) const {
        return natural_lse(row_max[i][half], row_sum[i][half], scale_log2);
    }
};

}  // namespace fa2
