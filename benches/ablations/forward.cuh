// The forward with contributions of FlashAttention-2 taken away: sm80/fwd.cuh's walk, or one that differs from it in one thing,
// between a start and an epilogue that all variants share.
//
// All leave out what sm80/fwd.cuh does about numbers that are not finite; the variant that takes nothing away shows what that
// is worth. Expects what it expects, and further: no mask or a causal one, seqlen_q == seqlen_k.
#pragma once

#include "sm80/fwd.cuh"
#include "softmax.cuh"
#include "split_k.cuh"

namespace fa2::ablations {

// What thread blocks share out among themselves.
enum class Grid {
    kTiles,  // (tiles, heads, batch), as FlashAttention-2: tiles of queries in the forward, of keys in the backward
    kHeads,  // (1, heads, batch), as FlashAttention-1: a block takes all tiles of its head, one after the other
};

// sm80/fwd.cuh's walk with FlashAttention-1's softmax.
//
// Maximum and sum now outlive P v in registers: at head_dim 128 a step loads 26 spilled ones more than ours does and stores as
// many, among 1,500 instructions (nvcc 13.0, sm_90).
template <typename Traits>
__device__ __forceinline__ void walk_every_step(const FwdParams& params, const FwdContext<Traits>& block,
                                                const Scoring<false>& scoring,
                                                Accumulator<Traits::kMTiles, Traits::kDTiles>& o,
                                                NormalisedSoftmax<Traits::kMTiles>& softmax) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using CopyK = TileCopy<TileK, Traits::kThreads, T>;
    constexpr uint32_t sQ = Traits::sQ, sK = Traits::sK, sV = Traits::sV;
    const uint32_t base = block.base;
    const int thread = block.thread, lane = block.lane, seqlen_k = block.sequence.seqlen_k;
    const Visibility& sees = block.sees;
    const Range rows = block.rows, common = sees.common_keys(rows);
    const CopyK k_copy(block.gK, params.k_strides.row, block.shape.head_dim, thread);
    const CopyK v_copy(block.gV, params.v_strides.row, block.shape.head_dim, thread);
    const int n_first = block.keys.begin / Traits::kBlockN;
    int n_block = (block.keys.end - 1) / Traits::kBlockN;
    TileCopy<TileQ, Traits::kThreads, T>(block.gQ, params.q_strides.row, block.shape.head_dim, thread)
        .start(base + sQ, 0, rows.end - rows.begin);
    k_copy.start(base + sK, n_block * Traits::kBlockN, seqlen_k);
    cp_async_commit();
    for (; n_block >= n_first; --n_block) {
        cp_async_wait<0>();
        __syncthreads();  // k has arrived, and every warp is done with the v before
        const int first_col = n_block * Traits::kBlockN;
        v_copy.start(base + sV, first_col, seqlen_k);
        cp_async_commit();
        Accumulator<Traits::kMTiles, Traits::kNTiles> s;
        s.clear();
        multiply_ahead<T, Traits::kHeadDim / 16>(
            s, OperandA<TileQ, Order::kContiguousK>(base, sQ, block.warp_row, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kBlockN>(base, sK, 0, lane));
        if (first_col < common.begin || first_col + Traits::kBlockN > common.end) {
#pragma unroll
            for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
                for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = rows.begin + block.warp_row + 16 * i + fragment_row(lane, e / 2);
                        const int col = first_col + fragment_col(lane, j) + e % 2;
                        if (!sees.visible(row, col)) s.x[i][j][e] = -INFINITY;
                    }
        }
        cp_async_wait<0>();
        __syncthreads();  // v has arrived, and every warp is done with k
        if (n_block > n_first) k_copy.start(base + sK, first_col - Traits::kBlockN, seqlen_k);
        cp_async_commit();
        softmax.step(s, o, scoring.factor);
        // S: 16 x kBlockN per m16 tile -> A operand, kBlockN / 16 steps
        multiply_ahead<T, Traits::kBlockN / 16>(
            o, AccumulatorA<T, Traits::kMTiles, Traits::kNTiles>{s},
            OperandB<TileK, Order::kTransposed, Traits::kHeadDim>(base, sV, 0, lane));
        softmax.normalise(o);
    }
    __syncthreads();  // every warp is done with shared memory
}

// Warps that split the queries; the traits say which.
template <Rescale kRescale, typename T, int kHeadDim, int kBlockM, int kBlockN, int kWarps, bool kModified, typename O,
          typename S>
__device__ __forceinline__ void walk_as(const FwdParams& params,
                                        const FwdContext<FwdTraits<T, kHeadDim, kBlockM, kBlockN, kWarps, kModified>>& block,
                                        const Scoring<false>& scoring, O& o, S& softmax) {
    using Traits = FwdTraits<T, kHeadDim, kBlockM, kBlockN, kWarps, kModified>;
    if constexpr (kRescale == Rescale::kEveryStep) {
        walk_every_step<Traits>(params, block, scoring, o, softmax);
    } else {
        walk<Traits, false>(params, block, scoring, o, softmax);
        softmax.finish();
    }
}

// Warps that split the keys.
template <Rescale kRescale, typename T, int kHeadDim, typename O, typename S>
__device__ __forceinline__ void walk_as(const FwdParams& params, const FwdContext<SplitKTraits<T, kHeadDim>>& block,
                                        const Scoring<false>& scoring, O& o, S& softmax) {
    walk_split_k<SplitKTraits<T, kHeadDim>, kRescale>(params, block, scoring, o, softmax);
}

// This thread and the tile that its block is at.
template <Grid kGrid>
__device__ __forceinline__ Place at_queries(int m_block) {
    Place place;
    // FwdContext counts tiles back from the last of the grid, which is 0 here.
    if constexpr (kGrid == Grid::kHeads) place.x = -m_block;
    return place;
}

// o of one tile of queries, and lse, or maximum and sum.
template <typename Traits, Rescale kRescale, Grid kGrid>
__device__ __forceinline__ void forward_tile(const FwdParams& params, const Statistics& statistics, uint8_t* shared,
                                             int m_block) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    Accumulator<Traits::kMTiles, Traits::kDTiles> o;
    Softmax<kRescale, Traits::kMTiles> softmax;
    o.clear();
    softmax.clear();
    {
        const FwdContext<Traits> block(params, shared, at_queries<kGrid>(m_block));
        const Scoring<false> scoring(block.shape, block.sequence, block.batch, block.head);
        walk_as<kRescale>(params, block, scoring, o, softmax);
    }
    const FwdContext<Traits> block(params, shared, at_queries<kGrid>(m_block));
    const Range rows = block.rows;
    const float factor = block.shape.product_factor;
    const int64_t first = block.sequence.statistics(block.shape, block.head);
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = rows.begin + block.warp_row + 16 * i + fragment_row(block.lane, half);
            const bool stores = block.lane % 4 == 0 && row < rows.end;
            if constexpr (kRescale == Rescale::kEveryStep) {
                if (stores) {
                    statistics.max[first + row] = softmax.max[i][half] * factor * kLn2;
                    statistics.sum[first + row] = softmax.sum[i][half];
                }
            } else {
                if (stores) params.lse[first + row] = softmax.lse(i, half, factor);
                scale_row(o.x[i], half, 1.f / softmax.sum[i][half]);
            }
        }
    store_fragment<T, TileQ>(block.base, Traits::sQ, o, block.warp_row, 0, block.lane);
    __syncthreads();
    T* gO = row_of<T>(params.o, params.o_strides, block.batch, block.sequence.first_q + rows.begin, block.head);
    store_tile<TileQ, Traits::kThreads>(gO, params.o_strides.row, shared + Traits::sQ, rows.end - rows.begin,
                                        block.shape.head_dim, block.thread);
}

template <typename Traits, Rescale kRescale, Grid kGrid>
__device__ __forceinline__ void forward(const FwdParams& params, const Statistics& statistics) {
    extern __shared__ __align__(1024) uint8_t shared[];
    if constexpr (kGrid == Grid::kTiles) {
        forward_tile<Traits, kRescale, kGrid>(params, statistics, shared, 0);
    } else {
        const int tiles = ceil_div(params.shape.seqlen_q, Traits::kBlockM);
#pragma unroll 1
        for (int m_block = 0; m_block < tiles; ++m_block) {
            forward_tile<Traits, kRescale, kGrid>(params, statistics, shared, m_block);
            __syncthreads();  // o has left shared memory
        }
    }
}

}  // namespace fa2::ablations
