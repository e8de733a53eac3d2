// dq from its f32 sums: times softmax_scale, rounded, out of the order of the backward's threads and into that of q.
//
// Grid       (m_block, num_heads, batch) of the backward's tiles, with the backward's threads: each has its own sums back.
// Expects    the tile in shared memory to be at most 48 KB.
#pragma once

#include "core/dq.cuh"
#include "core/mask.cuh"
#include "params.h"
#include "sm80/bwd.cuh"

namespace fa2 {

template <typename Traits>
__device__ __forceinline__ void convert(const ConvertParams& params) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    __shared__ __align__(1024) uint8_t shared[TileQ::kBytes];
    const int thread = threadIdx.x, m_block = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const Sequence sequence(params.shape, batch);
    const int first_row = m_block * Traits::kBlockM, rows = min(sequence.seqlen_q - first_row, Traits::kBlockM);
    if (rows <= 0) return;
    const int64_t tile = dq_tile(params.dq_tiles, sequence, head, m_block, Traits::kBlockM);
    typename DqTile<Traits>::Block dq;
    DqTile<Traits>::load(dq, params.dq_sums + tile * DqTile<Traits>::kElements, thread);
    dq.scale(params.softmax_scale);
    const BwdWarp<Traits> warp(thread / kWarpSize);
    const int lane = thread % kWarpSize;
    const Visibility sees(params.shape, sequence);
#pragma unroll
    for (int i = 0; i < Traits::kQMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // A query that sees no key has a dq of 0, whatever NaN its do or q has put into the sums.
            if (!sees.keys(first_row + warp.q_row + 16 * i + fragment_row(lane, half)).empty()) continue;
#pragma unroll
            for (int j = 0; j < Traits::kQDTiles; ++j) dq.x[i][j][2 * half] = dq.x[i][j][2 * half + 1] = 0.f;
        }
    store_fragment<T, TileQ>(uint32_t(__cvta_generic_to_shared(shared)), 0, dq, warp.q_row, warp.q_col, lane);
    __syncthreads();
    T* to = static_cast<T*>(params.dq) + batch * params.dq_strides.batch +
            (sequence.first_q + first_row) * params.dq_strides.row + head * params.dq_strides.head;
    store_tile<TileQ, Traits::kThreads>(to, params.dq_strides.row, shared, rows, params.shape.head_dim, thread);
}

}  // namespace fa2
