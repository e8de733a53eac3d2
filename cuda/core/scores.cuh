// Softcap and ALiBi: from products of q and k to scores in the log2 domain. The twin of src/cpu/scores.rs.
#pragma once

#include "fragment.cuh"
#include "mask.cuh"
#include "types.cuh"

namespace fa2 {

// Sets what the mask hides, and rows from `end_row` on, to 0, in the block that begins at (first_row, first_col) of the sequence.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void hide(Accumulator<kMTiles, kNTiles>& block, const Visibility& sees, int first_row,
                                     int first_col, int lane, int end_row) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = first_row + 16 * i + fragment_row(lane, e / 2);
                const int col = first_col + fragment_col(lane, j) + e % 2;
                if (!sees.visible(row, col) || row >= end_row) block.x[i][j][e] = 0.f;
            }
}

// tanh to two or three rounding steps. Away from 0 by exp: 1 - 2 / (exp(2x) + 1). Near it, where that cancels, by x + x^3 P(x^2):
// P is a least-squares fit of degree 4 to (tanh(x) / x - 1) / x^2 on 0 < x < 0.6, 7e-8 off at most, evaluated in f32.
__device__ __forceinline__ float tanh_precise(float x) {
    constexpr float kNear = 0.6f;
    const float e = exp2_approx(2.f * kLog2e * x);
    const float far = 1.f - __fdividef(2.f, e + 1.f);
    const float t = x * x;
    float p = fmaf(-5.8939480e-3f, t, 2.0794621e-2f);
    p = fmaf(p, t, -5.3783294e-2f);
    p = fmaf(p, t, 1.3331915e-1f);
    p = fmaf(p, t, -3.3333299e-1f);
    const float near = fmaf(p * t, x, x);
    return fabsf(x) < kNear ? near : far;
}

// What is done to each product. kModified false: nothing, the factor is applied inside the exponential.
template <bool kModified>
struct Scoring {
    float factor;         // of the products, in the exponential
    float product;        // of the products, before the softcap
    float softcap_log2;   // 0: none
    float slope_log2;     // 0: none
    int shift;

    __device__ __forceinline__ Scoring(const Shape& shape, const Sequence& sequence, int batch, int head)
        : factor(kModified ? 1.f : shape.product_factor), product(shape.product_factor), softcap_log2(shape.softcap_log2),
          slope_log2(0.f), shift(sequence.shift()) {
        if (kModified && shape.alibi_slopes != nullptr) {
            slope_log2 = shape.alibi_slopes[batch * shape.alibi_batch + head] * kLog2e;
        }
    }

    // The score in the log2 domain, still to be multiplied by `factor`; `derivative` is that of the softcap.
    __device__ __forceinline__ float apply(float x, int row, int col, float* derivative = nullptr) const {
        if constexpr (kModified) {
            x *= product;
            if (softcap_log2 != 0.f) {
                const float t = tanh_precise(x);
                if (derivative != nullptr) *derivative = 1.f - t * t;
                x = t * softcap_log2;
            } else if (derivative != nullptr) {
                *derivative = 1.f;
            }
            x -= slope_log2 * fabsf(float(row + shift - col));
        }
        return x;
    }
};

}  // namespace fa2
