// dq = softmax_scale * dq_accum, rounded, in the order of q.
//
// Grid       (any, num_heads, batch); each warp takes 32 columns of a row group, those of one row group after each other.
// Work       a thread reads two times 16 bytes. Four neighbouring lanes have the same row, and exchange so that each writes 16 bytes.
#pragma once

#include "core/dq_accum.cuh"
#include "core/sequence.cuh"
#include "core/store.cuh"
#include "core/types.cuh"
#include "params.h"

namespace fa2 {

constexpr int kConvertThreads = 128;
constexpr int kConvertCols = 2 * kDqBlockCols;

template <typename T>
__device__ __forceinline__ void convert(const ConvertParams& params) {
    const Shape& shape = params.shape;
    const int head = blockIdx.y, lane = threadIdx.x % kWarpSize;
    const int part = blockIdx.x * (kConvertThreads / kWarpSize) + threadIdx.x / kWarpSize;
    const int parts_per_group = ceil_div(shape.head_dim, kConvertCols);
    const int first_row = part / parts_per_group * kDqGroupRows, col = part % parts_per_group * kConvertCols;
    const Sequence sequence(shape, shape.first_batch + blockIdx.z);
    if (first_row >= sequence.seqlen_q) return;
    const float* from =
        params.dq_accum + dq_offset(params.dq_groups, shape, sequence, head, first_row, col, params.dq_accum_head_dim);
    float dq[4][4];  // as accumulators; only the first row of each thread
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
        const float4 x = load_dq_block(from + j / 2 * kDqBlockElements, lane);
        dq[j][0] = x.x * params.softmax_scale;
        dq[j][1] = x.y * params.softmax_scale;
        dq[j + 1][0] = x.z * params.softmax_scale;
        dq[j + 1][1] = x.w * params.softmax_scale;
    }
    const int row = first_row + fragment_row(lane, 0);
    T* to = row_of<T>(params.dq, params.dq_strides, sequence.batch, sequence.first_q + row, head);
    store_row<T>(to + col, dq, 0, shape.head_dim - col, row < sequence.seqlen_q, lane);
}

}  // namespace fa2
