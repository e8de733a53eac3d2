// Turns a product q . k into a score, before the exponential. src/cpu/scores.rs does the same on the CPU.
//
// A score_mod is a type with the members of NoScoreMod. A kernel takes one as a template argument; the table of kernels has a row for
// each.
#pragma once

#include "fragment.cuh"
#include "sequence.cuh"
#include "types.cuh"

namespace fa2 {

// The plain softmax: exp2 multiplies the products by softmax_scale_log2 itself.
struct NoScoreMod {
    static constexpr bool kIdentity = true;

    __device__ __forceinline__ NoScoreMod(const Shape&, const Sequence&, int /* head */) {}

    // exp2 multiplies the result of apply() by this.
    __device__ __forceinline__ static float scale_log2(const Shape& shape) { return shape.softmax_scale_log2; }

    // The score of query `row` and key `col`, from their product. The second form also gives its derivative by the scaled product.
    __device__ __forceinline__ float apply(float product, int /* row */, int /* col */) const { return product; }
    __device__ __forceinline__ float apply(float product, int, int, float& /* derivative */) const { return product; }
};

// tanh, accurate to two or three rounding steps. Away from 0 it uses exp: 1 - 2 / (exp(2x) + 1). Near 0 that cancels, so it uses
// x + x^3 P(x^2). P is a least-squares fit of degree 4 to (tanh(x) / x - 1) / x^2 on 0 < x < 0.6. In f32 it is off by at most 7e-8.
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

// Softcap, then ALiBi. Each may be off. It also allows a softmax_scale that is not above 0, because it applies the scale before the
// maximum is taken.
struct SoftcapAlibi {
    static constexpr bool kIdentity = false;

    float to_tanh_or_log2;  // times a product: with a softcap, the argument of tanh; without, the score in the log2 domain
    float softcap_log2;     // 0: no softcap
    float slope_log2;       // 0: no ALiBi
    int shift;

    __device__ __forceinline__ SoftcapAlibi(const Shape& shape, const Sequence& sequence, int head)
        : to_tanh_or_log2(shape.softcap_log2 != 0.f ? shape.softmax_scale_over_softcap : shape.softmax_scale_log2),
          softcap_log2(shape.softcap_log2), slope_log2(0.f), shift(sequence.shift()) {
        if (shape.alibi_slopes != nullptr) slope_log2 = shape.alibi_slopes[int64_t(sequence.batch) * shape.alibi_batch + head] * kLog2e;
    }

    __device__ __forceinline__ static float scale_log2(const Shape&) { return 1.f; }

    __device__ __forceinline__ float apply(float product, int row, int col, float& derivative) const {
        float score = to_tanh_or_log2 * product;
        derivative = 1.f;
        if (softcap_log2 != 0.f) {
            const float t = tanh_precise(score);
            derivative = 1.f - t * t;
            score = t * softcap_log2;
        }
        return score - slope_log2 * fabsf(float(row + shift - col));
    }

    __device__ __forceinline__ float apply(float product, int row, int col) const {
        float derivative;
        return apply(product, row, col, derivative);
    }
};

// Turns products into scores, in the block that begins at (first_row, first_col) of the sequence.
template <typename ScoreMod, int kMTiles, int kNTiles>
__device__ __forceinline__ void apply(const ScoreMod& score_mod, Accumulator<kMTiles, kNTiles>& block, int first_row, int first_col,
                                      int lane) {
    visit_elements(block, first_row, first_col, lane, [&](float& x, int row, int col) { x = score_mod.apply(x, row, col); });
}

}  // namespace fa2
