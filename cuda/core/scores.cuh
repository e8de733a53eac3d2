// Softcap and ALiBi: from products of q and k to scores in the log2 domain. The twin of src/cpu/scores.rs.
#pragma once

#include "fragment.cuh"
#include "mask.cuh"
#include "types.cuh"

namespace fa2 {

// Sets what the mask hides to 0, in the block that begins at (first_row, first_col) of the sequence.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void hide(Accumulator<kMTiles, kNTiles>& block, const Visibility& sees, int first_row,
                                     int first_col, int lane) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (!sees.visible(first_row + 16 * i + fragment_row(lane, e / 2), first_col + fragment_col(lane, j) + e % 2))
                    block.x[i][j][e] = 0.f;
}

// tanh by exp: 1 - 2 / (exp(2x) + 1), its error below a rounding step of a 16-bit input's scores.
__device__ __forceinline__ float tanh_approx(float x) {
    const float e = exp2_approx(2.f * kLog2e * x);
    return 1.f - __fdividef(2.f, e + 1.f);
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

    // The score in the log2 domain, less `factor`; `derivative` is that of the softcap.
    __device__ __forceinline__ float apply(float x, int row, int col, float* derivative = nullptr) const {
        if constexpr (kModified) {
            x *= product;
            if (softcap_log2 != 0.f) {
                const float t = tanh_approx(x);
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
