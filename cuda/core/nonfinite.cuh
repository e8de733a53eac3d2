// Recomputes rows of o that are not finite, from their visible keys only.
//
// A hidden key has a weight of 0, and 0 times a NaN or an infinity of v is NaN. So a NaN in v could reach rows that do not see
// it. That is rare. The main loop of a forward therefore ignores it. If o is finite at the end, no hidden NaN has reached it. If o is
// not finite, the warp writes its rows and then calls recompute_rows(). That works row by row and key by key. This is slow, but it is
// simple and needs no shared memory.
#pragma once

#include "mask.cuh"
#include "sequence.cuh"
#include "softmax.cuh"
#include "types.cuh"

namespace fa2 {

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 1; step < kWarpSize; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 1; step < kWarpSize; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// The inner product of two rows, summed in f32.
template <typename T>
__device__ __forceinline__ float dot(const T* a, const T* b, int head_dim) {
    float2 sum = {0.f, 0.f};
    for (int i = 0; i < head_dim / 2; ++i) {
        const float2 x = load2(a, i), y = load2(b, i);
        sum.x = fmaf(x.x, y.x, sum.x);
        sum.y = fmaf(x.y, y.y, sum.y);
    }
    return sum.x + sum.y;
}

// p * v, where p has been rounded to the input type. A p that was not 0 before it was rounded keeps an infinity of v. A p of exactly 0,
// from a score of -inf, turns it into NaN; the caller passes that p as -0.
__device__ __forceinline__ float weigh(float p, float v) { return isinf(v) && !signbit(p) ? fmaf(p, 0.f, v) : p * v; }

// The maximum of a row's scores. A lane takes every 32nd key. A score of NaN or +inf makes NaN of the whole row: row_sum becomes NaN, and
// the search ends. So a model whose numbers are all NaN costs one step of 32 keys per row.
template <typename Score>
__device__ __forceinline__ void find_max(const Range& keys, int lane, const Score& score, float& row_max, float& row_sum) {
    for (int first = keys.begin; first < keys.end && row_sum == 0.f; first += kWarpSize) {
        const float s = score(first + lane);
        row_max = fmaxf(row_max, s);
        if (__any_sync(~0u, isnan(s) || s == INFINITY)) row_sum = NAN;
    }
    row_max = warp_max(row_max);
}

// Writes a row of o from column `first_col` on, times `scale`.
template <typename T, int kPairs>
__device__ __forceinline__ void write_row(const FwdParams& params, const Sequence& sequence, int head, int row, int lane,
                                          const float2 (&o)[kPairs], int first_col, int pairs, float scale) {
    const int row_of_o = sequence.first_q + row;
    float* to_f32 = row_of<float>(params.o, params.o_strides, sequence.batch, row_of_o, head) + first_col;
    T* to = row_of<T>(params.o, params.o_strides, sequence.batch, row_of_o, head) + first_col;
    float2* o_f32 = reinterpret_cast<float2*>(to_f32);
    uint32_t* o_rounded = reinterpret_cast<uint32_t*>(to);
    for (int i = 0; i < kPairs; ++i) {
        const int pair = lane + i * kWarpSize;
        if (pair >= pairs) continue;
        const float2 x = {o[i].x * scale, o[i].y * scale};
        if constexpr (sizeof(T) == 4) {
            o_f32[pair] = x;
        } else if (params.o_is_f32) {
            o_f32[pair] = x;
        } else {
            o_rounded[pair] = pack2<T>(x.x, x.y);
        }
    }
}

// One warp computes one row of the block's columns of o, and its lse. A lane takes every 32nd key for the scores, and every 32nd pair of
// columns for o.
template <typename Traits>
__device__ __forceinline__ void recompute_row(const FwdParams& params, const Sequence& sequence, int head, int row, int lane,
                                              int first_col) {
    using T = typename Traits::T;
    using ScoreMod = typename Traits::ScoreMod;
    constexpr int kPairs = ceil_div(8 * Traits::kDTiles, 2 * kWarpSize);
    const Shape& shape = params.shape;
    const int pairs = (shape.head_dim_v - first_col) / 2, head_k = key_head(shape, head);
    const float scale_log2 = ScoreMod::scale_log2(shape);
    const T* q = row_of<const T>(params.q, params.q_strides, sequence.batch, sequence.first_q + row, head);
    const T* k = row_of<const T>(params.k, params.k_strides, sequence.batch, sequence.first_k, head_k);
    const T* v = row_of<const T>(params.v, params.v_strides, sequence.batch, sequence.first_k, head_k) + first_col;
    const Range keys = Visibility(shape, sequence).keys(row);
    const ScoreMod score_mod(shape, sequence, head);
    const auto score = [&](int key) {
        return score_mod.apply(dot(q, k + key * params.k_strides.row, shape.head_dim), row, key);
    };
    const auto score_or_hidden = [&](int key) { return key < keys.end ? score(key) : -INFINITY; };

    float row_max = -INFINITY, row_sum = 0.f;
    find_max(keys, lane, score_or_hidden, row_max, row_sum);
    const float offset = exponent_offset(row_max, scale_log2);
    float2 o[kPairs] = {};
    for (int first = keys.begin; first < keys.end && !isnan(row_sum); first += kWarpSize) {
        const float s = score_or_hidden(first + lane);
        const float p = s == -INFINITY ? -0.f : exp2_approx(fmaf(s, scale_log2, -offset));
        row_sum += p;
        const float rounded = round_to<T>(p);
        for (int other = 0; other < min(kWarpSize, keys.end - first); ++other) {
            const float weight = __shfl_sync(~0u, rounded, other);
            const T* values = v + (first + other) * params.v_strides.row;
            for (int i = 0; i < kPairs; ++i) {
                const int pair = lane + i * kWarpSize;
                const float2 x = pair < pairs ? load2(values, pair) : float2{};
                o[i].x += weigh(weight, x.x);
                o[i].y += weigh(weight, x.y);
            }
        }
    }
    row_sum = warp_sum(row_sum);
    const float scale = keys.empty() ? 0.f : 1.f / row_sum;
    write_row<T>(params, sequence, head, row, lane, o, first_col, pairs, scale);
    if (first_col == 0 && lane == 0) {
        float* lse = params.lse + sequence.lse_offset(shape, head);
        lse[row] = keys.empty() ? -INFINITY : natural_lse(row_max, row_sum, scale_log2);
    }
}

// A row of one head of a sequence.
struct RowAt {
    int row, head, batch;
};

// One warp recomputes its rows of a tile, Traits::kWarpRows from `first` on, and their columns from first_col on. It is not inlined, so
// that it takes no registers from the main loop.
template <typename Traits>
__device__ __noinline__ void recompute_rows(const FwdParams& params, RowAt first, int first_col = 0) {
    const Sequence sequence(params.shape, first.batch);
    const int lane = threadIdx.x % kWarpSize;
    __syncwarp();  // other lanes have written these rows
#pragma unroll 1
    for (int row = first.row; row < min(first.row + Traits::kWarpRows, sequence.seqlen_q); ++row)
        recompute_row<Traits>(params, sequence, first.head, row, lane, first_col);
}

}  // namespace fa2
