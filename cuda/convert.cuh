// dq = softmax_scale * dq_accum, rounded, with the layout of dq.
//
// Grid       (a warp for each row group and 32 columns, num_heads, batch). Warps past the end do nothing.
// Work       8 elements per thread: it reads 32 bytes and writes 16, or 32 of f32. Four neighbouring lanes have the same row.
#pragma once

#include "core/dq_accum.cuh"
#include "core/sequence.cuh"
#include "core/types.cuh"
#include "params.h"

namespace fa2 {

constexpr int kConvertThreads = 128;

template <typename T>
__device__ __forceinline__ void convert(const ConvertParams& params) {
    const Shape& shape = params.shape;
    const Sequence sequence(shape, shape.first_batch + blockIdx.z);
    const int head = blockIdx.y, lane = threadIdx.x % kWarpSize;
    const int warp = blockIdx.x * (kConvertThreads / kWarpSize) + threadIdx.x / kWarpSize;
    const int warps_per_group = ceil_div(shape.head_dim, kConvertCols);
    const int group = warp / warps_per_group, row = group * kDqGroupRows + lane / 4;
    const int col = warp % warps_per_group * kConvertCols + lane % 4 * 8;
    if (row >= sequence.seqlen_q || col >= shape.head_dim) return;
    const int64_t first_group = first_row_block(params.dq_groups, kDqGroupRows, shape, sequence, head);
    const int cell_col = col / kDqCellCols * kDqCellCols, half = col % kDqCellCols / 8;
    float x[8];
    load_dq_cell<T>(x, params.dq_accum + ((first_group + group) * params.dq_accum_head_dim + cell_col) * kDqGroupRows, lane / 4, half);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= params.softmax_scale;
    T* to = row_of<T>(params.dq, params.dq_strides, sequence.batch, sequence.first_q + row, head);
    if constexpr (sizeof(T) == 4) {
        reinterpret_cast<float4*>(to + col)[0] = {x[0], x[1], x[2], x[3]};
        if (col + 4 < shape.head_dim) reinterpret_cast<float4*>(to + col)[1] = {x[4], x[5], x[6], x[7]};
    } else {
        *reinterpret_cast<uint4*>(to + col) =
            make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
    }
}

}  // namespace fa2
