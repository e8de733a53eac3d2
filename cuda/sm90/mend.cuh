// Tiles in which an o is not finite, computed anew: row by row, key by key, with those alone that a row sees.
//
// A hidden key has weight 0, and 0 times a NaN or an infinity of v is NaN. That is rare, so the main loop does not care: it notes the
// tile, and the block comes back to it at the end.
#pragma once

#include "../core/mask.cuh"
#include "../core/scores.cuh"
#include "../core/types.cuh"
#include "../params.h"
#include "schedule.cuh"

namespace fa2::sm90 {

// 16-bit pairs of a row times those of another, summed in f32.
template <typename T>
__device__ __forceinline__ float dot(const T* a, const T* b, int head_dim) {
    const uint32_t *pairs_a = reinterpret_cast<const uint32_t*>(a), *pairs_b = reinterpret_cast<const uint32_t*>(b);
    float2 sum = {0.f, 0.f};
    for (int i = 0; i < head_dim / 2; ++i) {
        const float2 x = unpack2<T>(pairs_a[i]), y = unpack2<T>(pairs_b[i]);
        sum.x = fmaf(x.x, y.x, sum.x);
        sum.y = fmaf(x.y, y.y, sum.y);
    }
    return sum.x + sum.y;
}

// weight * x; an infinity stays one where the weight has been rounded to 0.
__device__ __forceinline__ float weigh(float weight, float x) {
    const bool special = (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u;
    return special ? fmaf(weight, 0.f, x) : weight * x;
}

// One row, by one warp.
template <typename Traits>
__device__ __forceinline__ void mend_row(const FwdParams& params, const Work& work, const Visibility& sees,
                                         const Scoring<Traits::kModified>& scoring, int row, int lane) {
    using T = typename Traits::T;
    constexpr int kPairs = ceil_div(Traits::kHeadDim, 2 * kWarpSize);
    const Shape& shape = params.shape;
    const int head_k = work.head / (shape.num_heads / shape.num_heads_k), pairs = shape.head_dim / 2;
    const T* q = row_of<const T>(params.q, params.q_strides, work.batch, work.first_q + row, work.head);
    const T* k = row_of<const T>(params.k, params.k_strides, work.batch, work.first_k, head_k);
    const T* v = row_of<const T>(params.v, params.v_strides, work.batch, work.first_k, head_k);
    const Range keys = sees.keys(row);
    float max = -INFINITY, sum = 0.f;
    float2 o[kPairs] = {};
    for (int first = keys.begin; first < keys.end; first += kWarpSize) {
        const int key = first + lane;
        const bool seen = key < keys.end;
        const float score =
            seen ? scoring.apply(dot(q, k + int64_t(key) * params.k_strides.row, shape.head_dim), row, key) : -INFINITY;
        float new_max = fmaxf(max, score);
        for (int step = 1; step < kWarpSize; step *= 2) new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, step));
        const float reference = new_max == -INFINITY ? 0.f : __fmul_rn(new_max, scoring.factor);
        // Rounded as the reference is: a maximum that stays leaves the sum as it is.
        const float rescale = exp2_approx(__fmul_rn(max, scoring.factor) - reference);
        const float p = seen ? exp2_approx(fmaf(score, scoring.factor, -reference)) : 0.f;
        max = new_max;
        sum = fmaf(sum, rescale, p);
        const float rounded = unpack2<T>(pack2<T>(p, p)).x;
        for (int i = 0; i < kPairs; ++i) o[i].x *= rescale, o[i].y *= rescale;
        for (int other = 0; other < min(kWarpSize, keys.end - first); ++other) {
            const float weight = __shfl_sync(~0u, rounded, other);
            const uint32_t* values = reinterpret_cast<const uint32_t*>(v + int64_t(first + other) * params.v_strides.row);
            for (int i = 0; i < kPairs; ++i) {
                const int pair = lane + i * kWarpSize;
                const float2 x = pair < pairs ? unpack2<T>(values[pair]) : float2{};
                o[i].x += weigh(weight, x.x);
                o[i].y += weigh(weight, x.y);
            }
        }
    }
    for (int step = 1; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float scale = keys.empty() ? 0.f : 1.f / sum;
    // Pairs of elements are 4 bytes if o is rounded, 8 if not.
    T* to = row_of<T>(params.o, params.o_strides, work.batch, work.first_q + row, work.head);
    float* to_unrounded = row_of<float>(params.o, params.o_strides, work.batch, work.first_q + row, work.head);
    for (int i = 0; i < kPairs; ++i) {
        const int pair = lane + i * kWarpSize;
        if (pair >= pairs) continue;
        const float2 x = {o[i].x * scale, o[i].y * scale};
        if (params.unrounded) {
            reinterpret_cast<float2*>(to_unrounded)[pair] = x;
        } else {
            reinterpret_cast<uint32_t*>(to)[pair] = pack2<T>(x.x, x.y);
        }
    }
    if (lane == 0) {
        float* lse = params.lse + work.sequence(shape).statistics(shape, work.head);
        lse[row] = keys.empty() ? -INFINITY : (max * scoring.factor + log2f(sum)) * kLn2;
    }
}

// The rows of one warp of every tile that is noted in `noted`, a bit for each of `taken`.
template <typename Traits>
__device__ __noinline__ void mend(const HopperFwdParams& params, const uint32_t* noted, const int* taken, int warp_row, int lane) {
    const Shape& shape = params.fwd.shape;
#pragma unroll 1
    for (int number = 0; number < Traits::kMaxTiles; ++number) {
        if ((noted[number / 32] >> number % 32 & 1) == 0) continue;
        const Work work = tile_at<Traits::kBlockM>(shape, params.schedule, taken[number], lane);
        const Sequence sequence = work.sequence(shape);
        const Visibility sees(shape, sequence);
        const Scoring<Traits::kModified> scoring(shape, sequence, work.batch, work.head);
        const int first = work.m_block * Traits::kBlockM + warp_row;
#pragma unroll 1
        for (int row = first; row < min(first + 16, work.seqlen_q); ++row)
            mend_row<Traits>(params.fwd, work, sees, scoring, row, lane);
    }
}

}  // namespace fa2::sm90
