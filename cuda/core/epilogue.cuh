// The end of a forward: divides o by its row sums, and writes o and lse. Every forward uses this file.
#pragma once

#include "fragment.cuh"
#include "mask.cuh"
#include "sequence.cuh"
#include "softmax.cuh"
#include "store.cuh"

namespace fa2 {

// Writes the rows of o in the registers of one warp, starting at row `first_row` of the sequence and column `first_col`. With kLead,
// first_col may be below 0: columns below 0 are not written.
template <typename T, bool kLead, int kMTiles, int kDTiles>
__device__ __forceinline__ void write_o(const FwdParams& params, const Sequence& sequence, int head, int first_row, int lane,
                                        const Accumulator<kMTiles, kDTiles>& o, int first_col = 0) {
    const int head_dim = params.shape.head_dim_v - first_col;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * i + fragment_row(lane, half);
            const bool stored = row < sequence.seqlen_q;
            if (sizeof(T) == 2 && params.o_is_f32) {
                float* to = row_of<float>(params.o, params.o_strides, sequence.batch, sequence.first_q + row, head);
                to += first_col + fragment_col(lane, 0);
#pragma unroll
                for (int j = 0; j < kDTiles; ++j)
                    if (stored && (!kLead || 8 * j + first_col >= 0) && 8 * j < head_dim)
                        *reinterpret_cast<float2*>(to + 8 * j) = {o.x[i][j][2 * half], o.x[i][j][2 * half + 1]};
                continue;
            }
            T* to = row_of<T>(params.o, params.o_strides, sequence.batch, sequence.first_q + row, head);
            store_row<T, kLead>(to + first_col, o.x[i], half, head_dim, stored, lane, -first_col);
        }
}

// Divides o by its row sums, and writes it as write_o() does. The block that has column 0 of o also writes lse. A row that sees no key
// gets o = 0 and lse = -inf.
template <typename T, bool kLead = false, int kMTiles, int kDTiles>
__device__ __forceinline__ void write_rows(const FwdParams& params, const Sequence& sequence, int head, int first_row, int lane,
                                           Accumulator<kMTiles, kDTiles>& o, OnlineSoftmax<kMTiles>& softmax, float scale_log2,
                                           int first_col = 0) {
    const Visibility sees(params.shape, sequence);
    float* lse = params.lse + sequence.lse_offset(params.shape, head);
    softmax.finish();
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * i + fragment_row(lane, half);
            const bool sees_nothing = sees.keys(row).empty();
            if (first_col <= 0 && lane % 4 == 0 && row < sequence.seqlen_q)
                lse[row] = sees_nothing ? -INFINITY : softmax.lse(i, half, scale_log2);
            softmax.rescale(o, i, half, sees_nothing ? 0.f : 1.f / softmax.row_sum[i][half]);
        }
    write_o<T, kLead>(params, sequence, head, first_row, lane, o, first_col);
}

}  // namespace fa2
