// Converts dq_accum to dq: multiplies by softmax_scale, rounds, and changes the order from that of the backward's threads to that of q.
//
// Grid       (m_block, num_heads, batch) of the backward's tiles, with as many threads as the backward. Thread i reads what the i-th
//            of the threads that add to dq_accum has added. Every backward uses this file.
#pragma once

#include "../params.h"
#include "dq_accum.cuh"
#include "sequence.cuh"
#include "store.cuh"

namespace fa2 {

template <typename Traits>
__device__ __forceinline__ void convert(const ConvertParams& params) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    static_assert(TileQ::kBytes <= 48 * 1024, "a kernel gets 48 KB of static shared memory at most");
    __shared__ __align__(1024) uint8_t bytes[TileQ::kBytes];
    const int thread = threadIdx.x, m_block = blockIdx.x, head = blockIdx.y;
    const int batch = params.shape.first_batch + blockIdx.z;
    const Sequence sequence(params.shape, batch);
    const int first_row = m_block * Traits::kBlockM, rows = min(sequence.seqlen_q - first_row, Traits::kBlockM);
    if (rows <= 0) return;
    const int64_t index = dq_tile_index(params.dq_tiles, params.shape, sequence, head, m_block, Traits::kBlockM);
    if (thread < Traits::kDqThreads) {
        typename DqTile<Traits>::Block dq;
        DqTile<Traits>::load(dq, params.dq_accum + index * DqTile<Traits>::kElements, thread);
        dq.scale(params.softmax_scale);
        const int warp = thread / kWarpSize;
        store_fragment<T, TileQ>(uint32_t(__cvta_generic_to_shared(bytes)), 0, dq, Traits::dq_row(warp), Traits::dq_col(warp),
                                 thread % kWarpSize);
    }
    __syncthreads();
    T* to = row_of<T>(params.dq, params.dq_strides, batch, sequence.first_q + first_row, head);
    store_tile<TileQ, Traits::kThreads>(to, params.dq_strides.row, bytes, rows, params.shape.head_dim, thread);
}

}  // namespace fa2
