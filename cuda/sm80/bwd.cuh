// dq, dk and dv on mma.sync. One thread block, one (batch, head_k, n_block, part), every query head of the key head's group.
//
// Work       kBlockN keys against every tile of queries that sees them; P is recomputed from lse.
//            Above head_dim 256, kParts blocks share this work: each computes P and dS, and kWidth columns of dq, dk and dv.
// Warps      form teams, and each team owns some of the keys: it computes S, dP, dk and dv of those keys, S and dP split by queries,
//            dk and dv by keys and columns. Only dq sums over all keys, so it needs every warp.
// Pipeline   wait q, do | start next q, do | S = q k^T | P | dP = do v^T | dS | team barrier | dv += P^T do | barrier | dq = dS k |
//            dk += dS^T q. With one stage: .. | dv, dk | barrier | start next q, do | dq. With kDefersDq: dq comes after the first barrier
//            of the next step, and that is the only barrier of a step. With kOneTile, q and do take turns: walk_queries_in_one_tile.
// Shared     sK, sV one tile each, sP kBlockM x kBlockN, sDs the same (twice with kDefersDq), kStages times sQ, sDo, lse and delta; with
//            kOneTile sDo is sQ. The epilogue reuses sK and sV.
// Registers  dk and dv in f32 for the whole walk; S, dP, dq come and go.
// Global     all blocks of keys add to dq_accum in f32, in any order, or with params.semaphores in one order.
// Nonfinite  NaN and infinity spread within their sequence and their group of heads, also to rows that do not see them. They never
//            leave it: a block reads one sequence and one group only.
// Expects    as fwd.cuh; lse and delta of the same inputs; dq_accum of zeros.
#pragma once

#include "../core/barrier.cuh"
#include "../core/dq_accum.cuh"
#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/score_mod.cuh"
#include "../core/sequence.cuh"
#include "../core/softmax.cuh"
#include "../core/store.cuh"
#include "../core/tile.cuh"
#include "../params.h"
#include "block_index.cuh"
#include "copy.cuh"
#include "matmul.cuh"

namespace fa2::sm80 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kMinBlocks_, int kStages_, int kWarpsM_,
          int kWarpsN_, int kWarpsQ_, typename ScoreMod_>
struct BwdTraits {
    using T = T_;
    using ScoreMod = ScoreMod_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kMinBlocks = kMinBlocks_;
    static constexpr int kStages = kStages_;
    static constexpr int kWarpsM = kWarpsM_;  // warps of a team; they split the queries of S and dP
    static constexpr int kWarpsN = kWarpsN_;  // warps along the keys of dk and dv, over all teams; the others divide head_dim
    static constexpr int kWarpsQ = kWarpsQ_;  // warps along the queries of dq; the others divide head_dim
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kTeams = kWarps / kWarpsM;
    static constexpr int kTeamThreads = kWarpsM * kWarpSize;
    static constexpr int kTeamKeys = kBlockN / kTeams;
    static constexpr int kTeamWarpsN = kWarpsN / kTeams;  // warps of a team along its keys of dk and dv
    static constexpr int kMTiles = kBlockM / kWarpsM / 16;                // S, dP: m16 tiles of a warp
    static constexpr int kNTiles = kTeamKeys / 8;                         // S, dP: n8 tiles of a warp
    static constexpr int kKvMTiles = kBlockN / kWarpsN / 16;              // dk, dv: m16 tiles of a warp
    static constexpr int kParts = ceil_div(kHeadDim, kMaxWidth);          // thread blocks that share the columns of dq, dk and dv
    static constexpr int kWidth = kHeadDim / kParts;                      // columns of a thread block
    static constexpr int kKvDTiles = kWidth / (kWarps / kWarpsN) / 8;     // dk, dv: n8 tiles of a warp
    static constexpr int kDqMTiles = kBlockM / kWarpsQ / 16;               // dq: m16 tiles of a warp
    static constexpr int kDqDTiles = kWidth / (kWarps / kWarpsQ) / 8;      // dq: n8 tiles of a warp
    // The block of dq of a warp, in the columns of its thread block.
    __device__ __forceinline__ static int dq_row(int warp) { return warp % kWarpsQ * kDqMTiles * 16; }
    __device__ __forceinline__ static int dq_col(int warp) { return warp / kWarpsQ * kDqDTiles * 8; }
    // If a team is one warp, dk needs no barrier after dS. dq comes after the barrier of the next step, so a step has only one barrier.
    static constexpr bool kDefersDq = kWarpsM == 1;
    // The additions to dq_accum then run during the products of dk: 318 TFLOP/s at head_dim 128, 297 with dk before dq (tune.py, full mask,
    // 4k tokens, H200). With one stage, dk comes first, because the copies of the next q and do wait for it.
    static constexpr bool kDqBeforeDk = kStages == 2 && !kDefersDq;
    using TileQ = TileOf<T, kBlockM, kHeadDim>;
    using TileK = TileOf<T, kBlockN, kHeadDim>;
    using TileKv = TileOf<T, kBlockN, kWidth>;  // dk and dv as they leave
    using TileP = TileOf<T, kBlockM, kBlockN>;
    using TileDs = TileP;
    static constexpr int kRowValuesBytes = kBlockM * sizeof(float);  // lse, or delta, of a tile of queries
    static constexpr bool kOneTile = kParts > 1 && sizeof(T) == 4;  // for q and do: two of these tiles do not fit
    static constexpr int kStageBytes = (kOneTile ? 1 : 2) * TileQ::kBytes + 2 * kRowValuesBytes;
    static constexpr int kDsStages = kDefersDq ? 2 : 1;
    static constexpr int kSharedBytes = 2 * TileK::kBytes + TileP::kBytes + kDsStages * TileDs::kBytes + kStages * kStageBytes;
    // Byte offsets in shared memory. For buffers that exist once per stage, the offset is that of stage 0.
    static constexpr uint32_t sK = 0, sV = TileK::kBytes, sP = sV + TileK::kBytes, sDs = sP + TileP::kBytes;
    static constexpr uint32_t sQ = sDs + kDsStages * TileDs::kBytes, sDo = kOneTile ? sQ : sQ + TileQ::kBytes;
    static constexpr uint32_t sLse = sDo + TileQ::kBytes, sDelta = sLse + kRowValuesBytes;
    static_assert(kWarps % kWarpsM == 0 && kWarps % kWarpsN == 0 && kWarps % kWarpsQ == 0, "warps fill each grid");
    static_assert(kWarpsN % kTeams == 0, "dk and dv of a warp lie within its team's keys");
    static_assert(kStages == 2 || (kStages == 1 && !kDefersDq), "with one stage, q and do are free only after the second barrier");
    static_assert(!kOneTile || kStages == 1, "q and do that take turns have one stage");
    static_assert(kMTiles * kWarpsM * 16 == kBlockM && kNTiles * kTeams * 8 == kBlockN, "the warps divide S evenly");
    static_assert(kKvMTiles * kWarpsN * 16 == kBlockN, "and the rows of dk and dv");
    static_assert(kKvDTiles * (kWarps / kWarpsN) * 8 == kWidth, "and their columns");
    static_assert(kDqMTiles * kWarpsQ * 16 == kBlockM, "and the rows of dq");
    static_assert(kDqDTiles * (kWarps / kWarpsQ) * 8 == kWidth, "and its columns");
    static_assert((kKvMTiles & (kKvMTiles - 1)) == 0, "OperandA's rows of a warp do not cross a panel");
    static_assert(kStageBytes % 128 == 0, "every buffer starts at a whole swizzle pattern");
    static_assert(kBlockM <= kBlockN, "a tile of queries is not longer than the keys of a block (DqSemaphores)");
    static_assert(kBlockM <= kThreads, "a thread copies lse and delta of one query");
};

// The blocks of S, dk and dv, and dq that belong to one warp: first row and first column.
template <typename Traits>
struct BwdWarp {
    int team;
    int s_row, s_col;
    int kv_row, kv_col;
    int dq_row, dq_col;

    // first_col: of the thread block.
    __device__ __forceinline__ BwdWarp(int warp, int first_col) {
        const int in_team = warp % Traits::kWarpsM;
        team = warp / Traits::kWarpsM;
        s_row = in_team * Traits::kMTiles * 16;
        s_col = team * Traits::kTeamKeys;
        kv_row = s_col + in_team % Traits::kTeamWarpsN * Traits::kKvMTiles * 16;
        kv_col = first_col + in_team / Traits::kTeamWarpsN * Traits::kKvDTiles * 8;
        dq_row = Traits::dq_row(warp);
        dq_col = first_col + Traits::dq_col(warp);
    }
};

// The work of one thread block, as each thread knows it.
template <typename Traits_>
struct BwdBlock {
    using Traits = Traits_;
    using T = typename Traits::T;
    using CopyQ = TileCopy<typename Traits::TileQ, Traits::kThreads, T>;
    using CopyK = TileCopy<typename Traits::TileK, Traits::kThreads, T>;

    const BwdParams& params;
    uint8_t* bytes;   // shared memory ..
    uint32_t shared;  // .. and its address
    int thread, lane;
    int part, first_col;  // of dq, dk and dv
    BwdWarp<Traits> warp;
    int n_block, head_k;
    Sequence sequence;
    Visibility sees;
    Range cols;      // keys of this block
    Range queries;   // queries that see any of them
    Range m_blocks;  // tiles of these queries, of each head. Not from Range::tiles(): its test for an empty range makes ptxas spill more
    int group_size;  // query heads of a key head

    __device__ __forceinline__ BwdBlock(const BwdParams& params, uint8_t* bytes, const BlockIndex& index)
        : params(params), bytes(bytes), shared(uint32_t(__cvta_generic_to_shared(bytes))), thread(threadIdx.x),
          lane(thread % kWarpSize), part(index.part), first_col(part * Traits::kWidth), warp(thread / kWarpSize, first_col),
          n_block(index.n_block), head_k(index.head_k),
          sequence(params.shape, params.shape.first_batch + index.batch), sees(params.shape, sequence),
          cols(tile_range(n_block * Traits::kBlockN, Traits::kBlockN, sequence.seqlen_k)),
          queries(sees.queries_of(cols)), m_blocks{queries.begin / Traits::kBlockM, (queries.end - 1) / Traits::kBlockM + 1},
          group_size(fa2::group_size(params.shape)) {}

    __device__ __forceinline__ const T* head_of(const void* tensor, const Strides& strides, int first_row, int head) const {
        return row_of<const T>(tensor, strides, sequence.batch, first_row, head);
    }
    // One f32 for each row of a tile, in shared memory.
    __device__ __forceinline__ const float* row_values(uint32_t offset) const {
        return reinterpret_cast<const float*>(bytes + offset);
    }

    __device__ __forceinline__ void start_keys() const {
        CopyK(head_of(params.k, params.k_strides, sequence.first_k, head_k), params.k_strides.row, params.shape.head_dim, thread)
            .start(shared + Traits::sK, cols.begin, sequence.seqlen_k);
        CopyK(head_of(params.v, params.v_strides, sequence.first_k, head_k), params.v_strides.row, params.shape.head_dim_v, thread)
            .start(shared + Traits::sV, cols.begin, sequence.seqlen_k);
        cp_async_commit();
    }

    __device__ __forceinline__ void start_q(uint32_t stage_offset, int head, int m_block) const {
        CopyQ(head_of(params.q, params.q_strides, sequence.first_q, head), params.q_strides.row, params.shape.head_dim, thread)
            .start(shared + Traits::sQ + stage_offset, m_block * Traits::kBlockM, sequence.seqlen_q);
    }

    __device__ __forceinline__ void start_do(uint32_t stage_offset, int head, int m_block) const {
        CopyQ(head_of(params.do_, params.do_strides, sequence.first_q, head), params.do_strides.row, params.shape.head_dim_v, thread)
            .start(shared + Traits::sDo + stage_offset, m_block * Traits::kBlockM, sequence.seqlen_q);
    }

    // lse and delta.
    __device__ __forceinline__ void start_row_values(uint32_t stage_offset, int head, int m_block) const {
        const int row = m_block * Traits::kBlockM + thread;
        if (thread < Traits::kBlockM) {
            const bool valid = row < sequence.seqlen_q;
            const int64_t at = sequence.lse_offset(params.shape, head) + (valid ? row : 0);
            cp_async_4(shared + Traits::sLse + stage_offset + thread * int(sizeof(float)), params.lse + at, valid);
            cp_async_4(shared + Traits::sDelta + stage_offset + thread * int(sizeof(float)), params.delta + at, valid);
        }
    }

    // q, do, lse and delta of a tile of queries.
    __device__ __forceinline__ void start_queries(uint32_t stage_offset, int head, int m_block) const {
        start_q(stage_offset, head, m_block);
        start_do(stage_offset, head, m_block);
        start_row_values(stage_offset, head, m_block);
        cp_async_commit();
    }
};

// One tile of queries of one head.
struct QueryTile {
    int head;
    int m_block;
    Range rows;  // of the sequence
};

// Waits for the warps of a team.
template <int kThreads>
__device__ __forceinline__ void team_sync(int team) {
    if constexpr (kThreads == kWarpSize) {
        __syncwarp();
    } else {
        bar_sync<kThreads>(kFirstNamedBarrier + team);
    }
}

// This warp's block of P, and of the derivative of the score_mod, which lives as long as P does. Without a score_mod it is not used.
template <typename Traits>
struct WarpP {
    static constexpr bool kIdentity = Traits::ScoreMod::kIdentity;
    Accumulator<Traits::kMTiles, Traits::kNTiles> p;
    Accumulator<kIdentity ? 1 : Traits::kMTiles, kIdentity ? 1 : Traits::kNTiles> derivative;
};

// P = exp2(score - lse), from the products of q and k.
template <typename Traits>
__device__ __forceinline__ void to_p(WarpP<Traits>& warp_p, const BwdBlock<Traits>& block, const QueryTile& tile,
                                     uint32_t stage_offset) {
    using ScoreMod = typename Traits::ScoreMod;
    const float* lse = block.row_values(Traits::sLse + stage_offset);
    const ScoreMod score_mod(block.params.shape, block.sequence, tile.head);
    const float scale_log2 = ScoreMod::scale_log2(block.params.shape);
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int tile_row = block.warp.s_row + 16 * i + fragment_row(block.lane, half), row = tile.rows.begin + tile_row;
            // Rows past the end get P = exp2(score - inf) = 0, for any score that ALiBi gives them.
            const float lse_log2 = row < tile.rows.end ? lse[tile_row] * kLog2e : INFINITY;
#pragma unroll
            for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = warp_p.p.x[i][j][2 * half + e];
                    if constexpr (!ScoreMod::kIdentity) {
                        const int col = block.cols.begin + block.warp.s_col + fragment_col(block.lane, j) + e;
                        x = score_mod.apply(x, row, col, warp_p.derivative.x[i][j][2 * half + e]);
                    }
                    x = weight_of(x, scale_log2, lse_log2);
                }
        }
}

// dS = P (dP - delta), times the derivative of the score_mod, in place of dP.
template <typename Traits, typename Ds>
__device__ __forceinline__ void to_ds(Ds& ds, const WarpP<Traits>& warp_p, const BwdBlock<Traits>& block, uint32_t stage_offset) {
    const float* delta = block.row_values(Traits::sDelta + stage_offset);
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float delta_row = delta[block.warp.s_row + 16 * i + fragment_row(block.lane, half)];
#pragma unroll
            for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    ds.x[i][j][e] = ds_of(warp_p.p.x[i][j][e], ds.x[i][j][e], delta_row);
                    if constexpr (!Traits::ScoreMod::kIdentity) ds.x[i][j][e] *= warp_p.derivative.x[i][j][e];
                }
        }
}

// P of one tile of queries: this warp's block into `warp_p`, and rounded into sP.
template <typename Block>
__device__ __forceinline__ void recompute_p(WarpP<typename Block::Traits>& warp_p, const Block& block, const QueryTile& tile,
                                            uint32_t stage_offset) {
    using Traits = typename Block::Traits;
    using T = typename Traits::T;
    const BwdWarp<Traits>& warp = block.warp;
    const int first_row = tile.rows.begin + warp.s_row, first_key = block.cols.begin + warp.s_col;
    const Range common = block.sees.common_keys(tile.rows);
    const bool masked = !common.contains({block.cols.begin, block.cols.begin + Traits::kBlockN});

    warp_p.p.clear();
    multiply_ahead<T, Traits::kHeadDim / kStepK<T>>(
        warp_p.p, OperandA<typename Traits::TileQ, Order::kContiguousK>(block.shared + stage_offset, Traits::sQ, warp.s_row, block.lane),
        OperandB<typename Traits::TileK, Order::kContiguousK, Traits::kTeamKeys>(block.shared, Traits::sK, warp.s_col, block.lane));
    to_p(warp_p, block, tile, stage_offset);
    if (masked) hide(warp_p.p, block.sees, first_row, first_key, block.lane, 0.f);
    store_operand<T, typename Traits::TileP>(block.shared, Traits::sP, warp_p.p, warp.s_row, warp.s_col, block.lane);
}

// dS of one tile of queries, rounded, into sDs.
template <typename Block>
__device__ __forceinline__ void recompute_ds(const WarpP<typename Block::Traits>& warp_p, const Block& block, uint32_t stage_offset,
                                             uint32_t ds_offset) {
    using Traits = typename Block::Traits;
    using T = typename Traits::T;
    const BwdWarp<Traits>& warp = block.warp;
    Accumulator<Traits::kMTiles, Traits::kNTiles> ds;
    ds.clear();
    multiply_ahead<T, Traits::kHeadDim / kStepK<T>>(
        ds, OperandA<typename Traits::TileQ, Order::kContiguousK>(block.shared + stage_offset, Traits::sDo, warp.s_row, block.lane),
        OperandB<typename Traits::TileK, Order::kContiguousK, Traits::kTeamKeys>(block.shared, Traits::sV, warp.s_col, block.lane));
    to_ds(ds, warp_p, block, stage_offset);
    store_operand<T, typename Traits::TileDs>(block.shared + ds_offset, Traits::sDs, ds, warp.s_row, warp.s_col, block.lane);
}

// dq_accum += dS k, of one tile of queries. kOrdered: in the order of DqSemaphores.
template <bool kOrdered, typename Traits>
__device__ __forceinline__ void add_dq(const BwdBlock<Traits>& block, const QueryTile& tile, uint32_t ds_offset) {
    using T = typename Traits::T;
    Accumulator<Traits::kDqMTiles, Traits::kDqDTiles> dq;
    dq.clear();
    multiply<T, Traits::kBlockN / kStepK<T>>(
        dq,
        OperandA<typename Traits::TileDs, Order::kContiguousK>(block.shared + ds_offset, Traits::sDs, block.warp.dq_row, block.lane),
        OperandB<typename Traits::TileK, Order::kTransposed, Traits::kDqDTiles * 8>(block.shared, Traits::sK, block.warp.dq_col,
                                                                                   block.lane));
    const BwdParams& params = block.params;
    const int64_t index = dq_tile_index<Traits::kBlockM>(params, block.sequence, tile.head, tile.m_block) * Traits::kParts + block.part;
    const DqSemaphores semaphores{params.semaphores};
    if (kOrdered) semaphores.wait(index, DqSemaphores::blocks_before(block.sees, tile.rows, block.n_block, Traits::kBlockN));
    add_to_dq<Traits::kHeadDim>(params, block.sequence, tile.head, tile.rows.begin + block.warp.dq_row, block.warp.dq_col, dq,
                                block.lane);
    if (kOrdered) semaphores.release(index);
}

// dv += P^T do, of one tile of queries.
template <typename Block, typename BlockKv>
__device__ __forceinline__ void add_dv(const Block& block, BlockKv& dv, uint32_t stage_offset) {
    using Traits = typename Block::Traits;
    using T = typename Traits::T;
    multiply<T, Traits::kBlockM / kStepK<T>>(
        dv, OperandA<typename Traits::TileP, Order::kTransposed>(block.shared, Traits::sP, block.warp.kv_row, block.lane),
        OperandB<typename Traits::TileQ, Order::kTransposed, Traits::kKvDTiles * 8>(block.shared + stage_offset, Traits::sDo,
                                                                                   block.warp.kv_col, block.lane));
}

// dk += dS^T q, of one tile of queries.
template <typename Block, typename BlockKv>
__device__ __forceinline__ void add_dk(const Block& block, BlockKv& dk, uint32_t stage_offset, uint32_t ds_offset) {
    using Traits = typename Block::Traits;
    using T = typename Traits::T;
    multiply<T, Traits::kBlockM / kStepK<T>>(
        dk, OperandA<typename Traits::TileDs, Order::kTransposed>(block.shared + ds_offset, Traits::sDs, block.warp.kv_row, block.lane),
        OperandB<typename Traits::TileQ, Order::kTransposed, Traits::kKvDTiles * 8>(block.shared + stage_offset, Traits::sQ,
                                                                                   block.warp.kv_col, block.lane));
}

// Every tile of queries that sees the keys of `block`: dk and dv in registers, and what they add to dq_accum.
template <bool kOrdered, typename Block, typename BlockKv>
__device__ __forceinline__ void walk_queries(const Block& block, BlockKv& dk, BlockKv& dv) {
    using Traits = typename Block::Traits;
    constexpr uint32_t kDsBytes = Traits::TileDs::kBytes;
    const int steps = (block.m_blocks.end - block.m_blocks.begin) * block.group_size;
    int head = block.head_k * block.group_size, m_block = block.m_blocks.begin;
    QueryTile tile{}, before;
    block.start_queries(0, head, m_block);
    for (int step = 0; step < steps; ++step) {
        const uint32_t stage_offset = step % Traits::kStages * Traits::kStageBytes;
        const uint32_t ds_offset = step % Traits::kDsStages * kDsBytes;
        before = tile;
        tile = {head, m_block, tile_range(m_block * Traits::kBlockM, Traits::kBlockM, block.sequence.seqlen_q)};
        const bool next_head = m_block == block.m_blocks.end - 1;
        head += next_head;
        m_block = next_head ? block.m_blocks.begin : m_block + 1;

        cp_async_wait<0>();
        __syncthreads();  // q and do have arrived, and every warp is done with the step before
        if (Traits::kStages == 2 && step + 1 < steps) block.start_queries(Traits::kStageBytes - stage_offset, head, m_block);
        if (Traits::kDefersDq && step > 0) add_dq<kOrdered>(block, before, kDsBytes - ds_offset);
        {
            WarpP<Traits> warp_p;
            recompute_p(warp_p, block, tile, stage_offset);
            recompute_ds(warp_p, block, stage_offset, ds_offset);
        }
        team_sync<Traits::kTeamThreads>(block.warp.team);  // the team's P and dS are in shared memory
        add_dv(block, dv, stage_offset);
        if constexpr (Traits::kDqBeforeDk) {
            __syncthreads();  // all of dS is in shared memory
            add_dq<kOrdered>(block, tile, 0);
        }
        add_dk(block, dk, stage_offset, ds_offset);
        if constexpr (Traits::kStages == 1) {
            __syncthreads();  // all of dS is in shared memory, and every warp is done with q and do
            if (step + 1 < steps) block.start_queries(0, head, m_block);
            add_dq<kOrdered>(block, tile, 0);
        }
    }
    if constexpr (Traits::kDefersDq) {
        __syncthreads();  // all of the last dS is in shared memory
        add_dq<kOrdered>(block, tile, (steps - 1) % Traits::kDsStages * kDsBytes);
    }
}

// The walk with one tile for q and do. It loads q, then do over it, then q again for dk. Only the second load of q overlaps work (dq).
template <bool kOrdered, typename Block, typename BlockKv>
__device__ __forceinline__ void walk_queries_in_one_tile(const Block& block, BlockKv& dk, BlockKv& dv) {
    using Traits = typename Block::Traits;
    const auto arrive = [] {
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    };
    const int first_head = block.head_k * block.group_size;
    for (int head = first_head; head < first_head + block.group_size; ++head)
        for (int m_block = block.m_blocks.begin; m_block < block.m_blocks.end; ++m_block) {
            const QueryTile tile{head, m_block, tile_range(m_block * Traits::kBlockM, Traits::kBlockM, block.sequence.seqlen_q)};
            block.start_q(0, head, m_block);
            block.start_row_values(0, head, m_block);
            arrive();
            {
                WarpP<Traits> warp_p;
                recompute_p(warp_p, block, tile, 0);
                __syncthreads();  // every warp is done with q
                block.start_do(0, head, m_block);
                arrive();
                recompute_ds(warp_p, block, 0, 0);
            }
            team_sync<Traits::kTeamThreads>(block.warp.team);  // the team's P and dS are in shared memory
            add_dv(block, dv, 0);
            __syncthreads();  // all of dS is in shared memory, and every warp is done with do
            block.start_q(0, head, m_block);
            add_dq<kOrdered>(block, tile, 0);
            arrive();
            add_dk(block, dk, 0, 0);
            __syncthreads();  // every warp is done with q
        }
}

// dk and dv leave through shared memory, so that each thread writes 16 bytes at once.
template <typename Traits, typename BlockKv>
__device__ __forceinline__ void write_keys(const BwdBlock<Traits>& block, BlockKv& dk, const BlockKv& dv) {
    using T = typename Traits::T;
    using TileKv = typename Traits::TileKv;
    const BwdParams& params = block.params;
    dk.scale(params.softmax_scale);
    __syncthreads();  // every warp is done with k and v
    const int col = block.warp.kv_col - block.first_col;
    store_product<T, TileKv>(block.shared, Traits::sK, dk, block.warp.kv_row, col, block.lane);
    store_product<T, TileKv>(block.shared, Traits::sV, dv, block.warp.kv_row, col, block.lane);
    __syncthreads();
    const auto store = [&](void* to, const Strides& strides, int head_dim, uint32_t from) {
        T* rows = row_of<T>(to, strides, block.sequence.batch, block.sequence.first_k + block.cols.begin, block.head_k);
        store_tile<TileKv, Traits::kThreads>(rows + block.first_col, strides.row, block.bytes + from, block.cols.end - block.cols.begin,
                                             head_dim - block.first_col, block.thread);
    };
    store(params.dk, params.dk_strides, params.shape.head_dim, Traits::sK);
    store(params.dv, params.dv_strides, params.shape.head_dim_v, Traits::sV);
}

// All of a block's work.
template <typename Traits, bool kOrdered>
__device__ __forceinline__ void backward_block(const BwdParams& params, uint8_t* bytes, const BlockIndex& index) {
    const BwdBlock<Traits> block(params, bytes, index);
    if (block.cols.empty()) return;
    if (Traits::kParts > 1 && block.first_col >= max(params.shape.head_dim, params.shape.head_dim_v)) return;
    Accumulator<Traits::kKvMTiles, Traits::kKvDTiles> dk, dv;
    dk.clear();
    dv.clear();
    if (!block.queries.empty()) {
        block.start_keys();
        if constexpr (Traits::kOneTile)
            walk_queries_in_one_tile<kOrdered>(block, dk, dv);
        else
            walk_queries<kOrdered>(block, dk, dv);
    }
    write_keys(block, dk, dv);
}

// A function of its own, and a walk of its own: with a branch on the order in the walk, the compiler no longer overlaps the additions to
// dq_accum with products (head_dim 256: 8% slower, H200).
template <typename Traits>
__device__ __noinline__ void ordered_backward(const BwdParams& params) {
    extern __shared__ __align__(kSharedAlignment) uint8_t bytes[];
    backward_block<Traits, true>(params, bytes, ordered_block_index<Traits::kParts>(params, bytes));
}

template <typename Traits>
__device__ __forceinline__ void backward(const BwdParams& params) {
    extern __shared__ __align__(kSharedAlignment) uint8_t bytes[];
    if (params.semaphores != nullptr) return ordered_backward<Traits>(params);
    const int n_block = int(blockIdx.x) / Traits::kParts, part = int(blockIdx.x) % Traits::kParts;
    backward_block<Traits, false>(params, bytes, {n_block, int(blockIdx.y), int(blockIdx.z), part});
}

}  // namespace fa2::sm80
