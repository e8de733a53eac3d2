// The backward with contributions of FlashAttention-2 taken away: sm80/bwd.cuh's walk, or one that differs from it in one
// thing, between a start and an epilogue that all variants share. What holds for forward.cuh holds here; dq is summed in any
// order.
#pragma once

#include "convert.cuh"
#include "forward.cuh"
#include "sm80/bwd.cuh"
#include "softmax.cuh"

namespace fa2::ablations {

// P = exp(score - max) / sum, of a forward with Rescale::kEveryStep. The maxima take the place of lse, in shared memory and in
// BwdParams; the sums lie behind delta.
template <typename Base>
struct MaxAndSumTraits : Base {
    static constexpr int kStageBytes = Base::kStageBytes + Base::kStatisticsBytes;
    static constexpr int kSharedBytes = Base::kSharedBytes + Base::kStages * Base::kStatisticsBytes;
    static constexpr uint32_t sSum = Base::sDelta + Base::kStatisticsBytes;
    static_assert(kStageBytes % 128 == 0, "the swizzle begins anew with every buffer");
};

// As BwdContext::start_tile, and the sums.
template <typename Traits>
__device__ __forceinline__ void start_tile(const BwdContext<Traits>& block, const Statistics& statistics, uint32_t stage,
                                           int head, int m_block) {
    const int row = m_block * Traits::kBlockM + block.thread;
    if (block.thread < Traits::kBlockM) {
        const bool valid = row < block.sequence.seqlen_q;
        const int64_t at = block.sequence.statistics(block.shape, head) + (valid ? row : 0);
        cp_async_4(block.base + Traits::sSum + stage + block.thread * 4, statistics.sum + at, valid);
    }
    block.start_tile(stage, head, m_block);
}

// P from exp(score - max).
template <typename Traits, typename Block>
__device__ __forceinline__ void divide(Block& p, const float* sums, const BwdWarp<Traits>& warp, int lane) {
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            scale_row(p.x[i], half, inverse(sums[warp.s_row + 16 * i + fragment_row(lane, half)]));
}

// sm80/bwd.cuh's walk with P from maximum and sum.
template <typename Traits, typename BlockKv>
__device__ __forceinline__ void walk_max_and_sum(const BwdContext<Traits>& block, const Statistics& statistics, BlockKv& dk,
                                                 BlockKv& dv) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using TileP = typename Traits::TileP;
    const uint32_t base = block.base;
    const BwdWarp<Traits>& warp = block.warp;
    const int lane = block.lane;
    const Visibility& sees = block.sees;
    const Range cols = block.cols;
    const int steps = (block.m_last - block.m_first + 1) * block.group_size;
    int head = block.head_k * block.group_size, m_block = block.m_first;
    QueryTile last;
    dk.clear();
    dv.clear();
    start_tile(block, statistics, 0, head, m_block);

    for (int step = 0; step < steps; ++step) {
        const uint32_t stage = step % Traits::kStages * Traits::kStageBytes;
        const uint32_t ds_buffer = step % Traits::kDsBuffers * TileP::kBytes;
        const int first_row = m_block * Traits::kBlockM;
        const QueryTile tile{head, m_block, {first_row, min(first_row + Traits::kBlockM, block.sequence.seqlen_q)}, false};
        const Range common = sees.common_keys(tile.rows);
        const bool partial = cols.begin < common.begin || cols.begin + Traits::kBlockN > common.end;
        const bool next_head = m_block == block.m_last;
        head += next_head;
        m_block = next_head ? block.m_first : m_block + 1;

        cp_async_wait<0>();
        __syncthreads();  // q and do have arrived, and every warp is done with the step before
        static_assert(Traits::kStages == 2, "the next tile is copied while this one is worked on");
        if (step + 1 < steps) start_tile(block, statistics, Traits::kStageBytes - stage, head, m_block);
        if (Traits::kDefer && step > 0) add_dq<Traits, false>(block, last, TileP::kBytes - ds_buffer);

        Accumulator<Traits::kMTiles, Traits::kNTiles> p, ds;
        Accumulator<1, 1> derivative;  // of a softcap, which no plain kernel has
        p.clear();
        multiply_ahead<T, Traits::kHeadDim / 16>(
            p, OperandA<TileQ, Order::kContiguousK>(base + stage, Traits::sQ, warp.s_row, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kGroupKeys>(base, Traits::sK, warp.s_col, lane));
        const Scoring<false> scoring(block.shape, block.sequence, block.batch, tile.head);
        recompute_p<Traits>(p, derivative, scoring, reinterpret_cast<const float*>(block.shared + Traits::sLse + stage),
                            tile.rows, cols.begin, warp, lane);
        divide<Traits>(p, reinterpret_cast<const float*>(block.shared + Traits::sSum + stage), warp, lane);
        if (partial) hide(p, sees, tile.rows.begin + warp.s_row, cols.begin + warp.s_col, lane, INT_MAX);
        store_fragment<T, TileP>(base, Traits::sP, p, warp.s_row, warp.s_col, lane);

        ds.clear();
        multiply_ahead<T, Traits::kHeadDim / 16>(
            ds, OperandA<TileQ, Order::kContiguousK>(base + stage, Traits::sDo, warp.s_row, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kGroupKeys>(base, Traits::sV, warp.s_col, lane));
        to_ds<Traits>(ds, p, derivative, reinterpret_cast<const float*>(block.shared + Traits::sDelta + stage), warp, lane);
        if (partial) hide(ds, sees, tile.rows.begin + warp.s_row, cols.begin + warp.s_col, lane, INT_MAX);
        store_fragment<T, TileP>(base + ds_buffer, Traits::sDs, ds, warp.s_row, warp.s_col, lane);
        group_sync<Traits::kGroupThreads>(warp.group);  // the group's P and dS are there

        multiply<T, Traits::kBlockM / 16>(
            dv, OperandA<TileP, Order::kTransposed>(base, Traits::sP, warp.kv_row, lane),
            OperandB<TileQ, Order::kTransposed, Traits::kKvDTiles * 8>(base + stage, Traits::sDo, warp.kv_col, lane));
        multiply<T, Traits::kBlockM / 16>(
            dk, OperandA<TileP, Order::kTransposed>(base + ds_buffer, Traits::sDs, warp.kv_row, lane),
            OperandB<TileQ, Order::kTransposed, Traits::kKvDTiles * 8>(base + stage, Traits::sQ, warp.kv_col, lane));
        if constexpr (Traits::kDefer) {
            last = tile;
        } else {
            __syncthreads();  // all of dS is there, and every warp is done with q and do
            add_dq<Traits, false>(block, tile, 0);
        }
    }
    if constexpr (Traits::kDefer) {
        __syncthreads();  // all of the last dS is there
        add_dq<Traits, false>(block, last, (steps - 1) % Traits::kDsBuffers * TileP::kBytes);
    }
    __syncthreads();  // every warp is done with shared memory
}

template <typename Base, typename BlockKv>
__device__ __forceinline__ void walk_as(const BwdContext<MaxAndSumTraits<Base>>& block, const Statistics& statistics,
                                        BlockKv& dk, BlockKv& dv) {
    walk_max_and_sum(block, statistics, dk, dv);
}

// P from lse.
template <typename Traits, typename BlockKv>
__device__ __forceinline__ void walk_as(const BwdContext<Traits>& block, const Statistics&, BlockKv& dk, BlockKv& dv) {
    bool special = false;
    walk<Traits, false>(block, dk, dv, false, true, special);
}

// This thread and the tile that its block is at.
template <Grid kGrid>
__device__ __forceinline__ Place at_keys(int n_block) {
    Place place;
    if constexpr (kGrid == Grid::kHeads) place.x = n_block;
    return place;
}

// dk and dv of one tile of keys, and what they add to dq.
template <typename Traits, Grid kGrid>
__device__ __forceinline__ void backward_tile(const BwdParams& params, const Statistics& statistics, uint8_t* shared,
                                              int n_block) {
    using T = typename Traits::T;
    using TileK = typename Traits::TileK;
    Accumulator<Traits::kKvMTiles, Traits::kKvDTiles> dk, dv;
    {
        const BwdContext<Traits> block(params, shared, at_keys<kGrid>(n_block));
        block.start_k();
        block.start_v();
        cp_async_commit();
        walk_as(block, statistics, dk, dv);  // waits for all copies before its first step
    }
    const BwdContext<Traits> block(params, shared, at_keys<kGrid>(n_block));
    dk.scale(params.softmax_scale);
    store_fragment<T, TileK>(block.base, Traits::sK, dk, block.warp.kv_row, block.warp.kv_col, block.lane);
    store_fragment<T, TileK>(block.base, Traits::sV, dv, block.warp.kv_row, block.warp.kv_col, block.lane);
    __syncthreads();
    const int rows = block.cols.end - block.cols.begin;
    const auto store = [&](void* to, uint32_t from) {
        const int first_row = block.sequence.first_k + block.cols.begin;
        T* rows_of_head = row_of<T>(to, params.dk_strides, block.batch, first_row, block.head_k);
        store_tile<TileK, Traits::kThreads>(rows_of_head, params.dk_strides.row, shared + from, rows, block.shape.head_dim,
                                            block.thread);
    };
    store(params.dk, Traits::sK);
    store(params.dv, Traits::sV);
}

template <typename Traits, Grid kGrid>
__device__ __forceinline__ void backward(const BwdParams& params, const Statistics& statistics) {
    extern __shared__ __align__(1024) uint8_t shared[];
    if constexpr (kGrid == Grid::kTiles) {
        backward_tile<Traits, kGrid>(params, statistics, shared, 0);
    } else {
        const int tiles = ceil_div(params.shape.seqlen_k, Traits::kBlockN);
#pragma unroll 1
        for (int n_block = 0; n_block < tiles; ++n_block) {
            backward_tile<Traits, kGrid>(params, statistics, shared, n_block);
            __syncthreads();  // dk and dv have left shared memory
        }
    }
}

}  // namespace fa2::ablations
