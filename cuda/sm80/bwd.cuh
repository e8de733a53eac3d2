// dq, dk and dv on mma.sync. One thread block, one (batch, head_k, n_block), every query head of the group.
//
// Work       kBlockN keys against every tile of queries that sees them; P is recomputed from lse.
// Warps      form groups, each with keys of its own: S, dP, dk and dv of those keys are the group's, which shares S and dP by
//            queries, dk and dv by keys and columns. Only dq sums over all keys and needs every warp.
// Pipeline   wait q, do | start next q, do | S = q k^T | P | dP = do v^T | dS | group barrier | dv += P^T do | dk += dS^T q |
//            barrier | dq = dS k. With one stage the next q and do start behind the last barrier. With kDefer, where a group is
//            one warp, dq waits until the barrier of the next step: it is then the only one.
// Shared     sK, sV one tile each, sP kBlockM x kBlockN, sDs the same (twice with kDefer), kStages times sQ, sDo, lse and
//            delta; the epilogue reuses sK and sV.
// Registers  dk and dv in f32 for the whole walk; S, dP, dq come and go.
// Global     the sums of dq in f32 are added to by all blocks of keys: in any order, or, with params.turns, one after the other.
// Numbers    that are not finite must not reach a row or key that they are hidden from, and 0 times NaN is NaN. The first walk does
//            not care; where keys, values or its results are not finite, a careful one takes its place. With params.turns the
//            careful one is the only one.
// Expects    as fwd.cuh; lse and delta of the same inputs; sums of dq that are zero.
#pragma once

#include "../core/barrier.cuh"
#include "../core/dq.cuh"
#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/scores.cuh"
#include "../core/tile.cuh"
#include "../params.h"
#include "copy.cuh"
#include "matmul.cuh"

namespace fa2 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kStages_, int kWarpsM_, int kWarpsN_,
          bool kModified_>
struct BwdTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kStages = kStages_;
    static constexpr int kWarpsM = kWarpsM_;  // warps of a group: rows of warps of S and dP
    static constexpr int kWarpsN = kWarpsN_;  // rows of warps of dk and dv, over all groups
    static constexpr bool kModified = kModified_;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kGroups = kWarps / kWarpsM;
    static constexpr int kGroupThreads = kWarpsM * kWarpSize;
    static constexpr int kGroupKeys = kBlockN / kGroups;
    static constexpr int kGroupRows = kWarpsN / kGroups;  // rows of warps of dk and dv in a group
    // Rows of warps of dq. One m16 tile each, as wide as may be: at head_dim 256, 16 x 128 a warp runs at 278 TFLOP/s, 32 x 64
    // at 255 (bench mha/d256/full/s4096 bwd, H100).
    static constexpr int kWarpsQ = kBlockM / 16 < kWarps ? kBlockM / 16 : kWarps;
    static constexpr int kMTiles = kBlockM / kWarpsM / 16;                // S, dP: m16 tiles of a warp
    static constexpr int kNTiles = kGroupKeys / 8;                        // S, dP: n8 tiles of a warp
    static constexpr int kKvMTiles = kBlockN / kWarpsN / 16;              // dk, dv: m16 tiles of a warp
    static constexpr int kKvDTiles = kHeadDim / (kWarps / kWarpsN) / 8;   // dk, dv: n8 tiles of a warp
    static constexpr int kQMTiles = kBlockM / kWarpsQ / 16;               // dq: m16 tiles of a warp
    static constexpr int kQDTiles = kHeadDim / (kWarps / kWarpsQ) / 8;    // dq: n8 tiles of a warp
    static constexpr bool kDefer = kWarpsM == 1;
    static constexpr int kMinBlocks = 1;  // to a multiprocessor: shared memory allows two at most, and registers as many
    using TileQ = Tile<kBlockM, kHeadDim>;
    using TileK = Tile<kBlockN, kHeadDim>;
    using TileP = Tile<kBlockM, kBlockN>;
    static constexpr int kStatisticsBytes = kBlockM * 4;  // lse, or delta, of a tile of queries
    static constexpr int kStageBytes = 2 * TileQ::kBytes + 2 * kStatisticsBytes;
    static constexpr int kDsBuffers = kDefer ? 2 : 1;
    static constexpr int kSharedBytes = 2 * TileK::kBytes + (1 + kDsBuffers) * TileP::kBytes + kStages * kStageBytes;
    // Offsets in shared memory; those of a stage are of the first.
    static constexpr uint32_t sK = 0, sV = TileK::kBytes, sP = sV + TileK::kBytes, sDs = sP + TileP::kBytes;
    static constexpr uint32_t sQ = sDs + kDsBuffers * TileP::kBytes, sDo = sQ + TileQ::kBytes;
    static constexpr uint32_t sLse = sDo + TileQ::kBytes, sDelta = sLse + kStatisticsBytes;
    static_assert(kWarpsN % kGroups == 0, "dk and dv of a warp lie within its group's keys");
    static_assert(kStages == 2 || (kStages == 1 && !kDefer), "q and do of one stage are free only behind the second barrier");
    static_assert(kMTiles * kWarpsM * 16 == kBlockM && kNTiles * kGroups * 8 == kBlockN, "warps share S without a rest");
    static_assert(kKvMTiles * kWarpsN * 16 == kBlockN, "and the rows of dk and dv");
    static_assert(kKvDTiles * (kWarps / kWarpsN) * 8 == kHeadDim, "and their columns");
    static_assert(kQMTiles * kWarpsQ * 16 == kBlockM, "and the rows of dq");
    static_assert(kQDTiles * (kWarps / kWarpsQ) * 8 == kHeadDim, "and its columns");
    static_assert((kKvMTiles & (kKvMTiles - 1)) == 0, "OperandA's rows of a warp do not cross a panel");
    static_assert(kStageBytes % 128 == 0, "the swizzle begins anew with every buffer");
    static_assert(kBlockM <= kThreads, "a thread copies lse and delta of one query");
};

// The blocks of S, dk and dv, and dq that belong to one warp: first row and first column.
template <typename Traits>
struct BwdWarp {
    int group;
    int s_row, s_col;
    int kv_row, kv_col;
    int q_row, q_col;

    __device__ __forceinline__ explicit BwdWarp(int warp) {
        const int in_group = warp % Traits::kWarpsM;
        group = warp / Traits::kWarpsM;
        s_row = in_group * Traits::kMTiles * 16;
        s_col = group * Traits::kGroupKeys;
        kv_row = s_col + in_group % Traits::kGroupRows * Traits::kKvMTiles * 16;
        kv_col = in_group / Traits::kGroupRows * Traits::kKvDTiles * 8;
        q_row = warp % Traits::kWarpsQ * Traits::kQMTiles * 16;
        q_col = warp / Traits::kWarpsQ * Traits::kQDTiles * 8;
    }
};

// What one thread block works on, as each thread knows it.
template <typename Traits>
struct BwdContext {
    using T = typename Traits::T;
    using CopyQ = TileCopy<typename Traits::TileQ, Traits::kThreads, T>;
    using CopyK = TileCopy<typename Traits::TileK, Traits::kThreads, T>;

    const BwdParams& params;
    const Shape& shape;
    uint8_t* shared;
    uint32_t base;  // of shared memory
    int thread, lane;
    BwdWarp<Traits> warp;
    int n_block, head_k, batch;
    Sequence sequence;
    Visibility sees;
    Range cols;     // keys of this block
    Range queries;  // that see any of them
    int m_first, m_last;
    int group_size;

    __device__ __forceinline__ BwdContext(const BwdParams& params, uint8_t* shared, const Place& place)
        : params(params), shape(params.shape), shared(shared), base(uint32_t(__cvta_generic_to_shared(shared))),
          thread(place.thread), lane(thread % kWarpSize), warp(thread / kWarpSize), n_block(place.x), head_k(place.y),
          batch(shape.first_batch + place.z), sequence(shape, batch), sees(shape, sequence),
          cols{n_block * Traits::kBlockN, min((n_block + 1) * Traits::kBlockN, sequence.seqlen_k)},
          queries(sees.queries_of(cols)), m_first(queries.begin / Traits::kBlockM),
          m_last((queries.end - 1) / Traits::kBlockM), group_size(shape.num_heads / shape.num_heads_k) {}

    __device__ __forceinline__ const T* head_of(const void* tensor, const Strides& strides, int first_row, int head) const {
        return row_of<const T>(tensor, strides, batch, first_row, head);
    }
    __device__ __forceinline__ void start_k() const {
        CopyK(head_of(params.k, params.k_strides, sequence.first_k, head_k), params.k_strides.row, shape.head_dim, thread)
            .start(base + Traits::sK, cols.begin, sequence.seqlen_k);
    }
    __device__ __forceinline__ void start_v() const {
        CopyK(head_of(params.v, params.v_strides, sequence.first_k, head_k), params.v_strides.row, shape.head_dim, thread)
            .start(base + Traits::sV, cols.begin, sequence.seqlen_k);
    }
    // q, do, lse and delta of a tile of queries.
    __device__ __forceinline__ void start_tile(uint32_t stage, int head, int m_block) const {
        const int first_row = m_block * Traits::kBlockM, row = first_row + thread;
        CopyQ(head_of(params.q, params.q_strides, sequence.first_q, head), params.q_strides.row, shape.head_dim, thread)
            .start(base + Traits::sQ + stage, first_row, sequence.seqlen_q);
        CopyQ(head_of(params.do_, params.do_strides, sequence.first_q, head), params.do_strides.row, shape.head_dim, thread)
            .start(base + Traits::sDo + stage, first_row, sequence.seqlen_q);
        if (thread < Traits::kBlockM) {
            const bool valid = row < sequence.seqlen_q;
            const int64_t at = sequence.statistics(shape, head) + (valid ? row : 0);
            cp_async_4(base + Traits::sLse + stage + thread * 4, params.lse + at, valid);
            cp_async_4(base + Traits::sDelta + stage + thread * 4, params.delta + at, valid);
        }
        cp_async_commit();
    }
};

// One tile of queries of one head.
struct QueryTile {
    int head;
    int m_block;
    Range rows;    // of the sequence
    bool special;  // partly hidden, and has or meets a number of q, k, v or do that is not finite; known to a careful walk alone
};

// Waits for the warps of a group.
template <int kThreads>
__device__ __forceinline__ void group_sync(int group) {
    if constexpr (kThreads == kWarpSize) {
        __syncwarp();
    } else {
        bar_sync<kThreads>(1 + group);  // 0 is __syncthreads
    }
}

// P = exp2(score - lse) of this warp's block, from the products of q and k. `derivative` is that of the softcap.
template <typename Traits, typename Block, typename Derivative>
__device__ __forceinline__ void recompute_p(Block& p, Derivative& derivative, const Scoring<Traits::kModified>& scoring,
                                            const float* lse, Range rows, int first_col, const BwdWarp<Traits>& warp,
                                            int lane) {
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int tile_row = warp.s_row + 16 * i + fragment_row(lane, half), row = rows.begin + tile_row;
            // Rows past the end: P = exp2(score - inf) = 0, whatever ALiBi makes of their score.
            const float lse_log2 = row < rows.end ? lse[tile_row] * kLog2e : INFINITY;
#pragma unroll
            for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = p.x[i][j][2 * half + e];
                    if constexpr (Traits::kModified) {
                        const int col = first_col + warp.s_col + fragment_col(lane, j) + e;
                        x = scoring.apply(x, row, col, &derivative.x[i][j][2 * half + e]);
                    }
                    x = exp2_approx(fmaf(x, scoring.factor, -lse_log2));
                }
        }
}

// dS = P (dP - delta), times the derivative of the softcap, in place of dP.
template <typename Traits, typename Block, typename Derivative>
__device__ __forceinline__ void to_ds(Block& ds, const Block& p, const Derivative& derivative, const float* delta,
                                      const BwdWarp<Traits>& warp, int lane) {
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float delta_row = delta[warp.s_row + 16 * i + fragment_row(lane, half)];
#pragma unroll
            for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    ds.x[i][j][e] = p.x[i][j][e] * (ds.x[i][j][e] - delta_row);
                    if constexpr (Traits::kModified) ds.x[i][j][e] *= derivative.x[i][j][e];
                }
        }
}

// dq += dS k, of one tile. kCareful: without keys that are not finite, and in turn.
template <typename Traits, bool kCareful>
__device__ __forceinline__ void add_dq(const BwdContext<Traits>& block, const QueryTile& tile, uint32_t ds_buffer) {
    using CopyK = typename BwdContext<Traits>::CopyK;
    uint8_t* k = block.shared + Traits::sK;
    if (kCareful && tile.special) {
        __syncthreads();
        CopyK::clear_special(k, block.thread);
        __syncthreads();
    }
    typename DqTile<Traits>::Block dq;
    dq.clear();
    multiply<typename Traits::T, Traits::kBlockN / 16>(
        dq,
        OperandA<typename Traits::TileP, Order::kContiguousK>(block.base + ds_buffer, Traits::sDs, block.warp.q_row, block.lane),
        OperandB<typename Traits::TileK, Order::kTransposed, Traits::kQDTiles * 8>(block.base, Traits::sK, block.warp.q_col,
                                                                                   block.lane));
    const int64_t at = dq_tile(block.params.dq_tiles, block.sequence, tile.head, tile.m_block, Traits::kBlockM);
    float* sums = block.params.dq_sums + at * DqTile<Traits>::kElements;
    if constexpr (!kCareful) {
        DqTile<Traits>::add(sums, dq, block.thread);
    } else {
        const Turns turns{block.params.turns};
        // The block with the last keys adds first.
        turns.wait(at, (block.sees.keys_of(tile.rows).end - 1) / Traits::kBlockN - block.n_block);
        DqTile<Traits>::add(sums, dq, block.thread);
        turns.pass(at);
        if (tile.special) {
            __syncthreads();
            block.start_k();  // as it was, for the scores of the next tile
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
        }
    }
}

// Every tile of queries, for dk and dv, and for dq, which a careful walk may leave out.
//
// kCareful: nothing that is not finite reaches a row or key that it is hidden from, where 0 times NaN would be NaN: it is taken
// out of the products, and `special` remembers to add it where it is seen. Blocks also take turns at dq.
template <typename Traits, bool kCareful, typename BlockKv>
__device__ __forceinline__ void walk(const BwdContext<Traits>& block, BlockKv& dk, BlockKv& dv, bool special_keys, bool wants_dq,
                                     bool& special) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using TileP = typename Traits::TileP;
    using CopyQ = typename BwdContext<Traits>::CopyQ;
    const uint32_t base = block.base;
    const BwdWarp<Traits>& warp = block.warp;
    const int lane = block.lane;
    const Visibility& sees = block.sees;
    const Range cols = block.cols;
    const int steps = (block.m_last - block.m_first + 1) * block.group_size;
    int head = block.head_k * block.group_size, m_block = block.m_first;
    const bool adds_dq = !kCareful || wants_dq;
    QueryTile last;
    dk.clear();
    dv.clear();
    block.start_tile(0, head, m_block);

    for (int step = 0; step < steps; ++step) {
        const uint32_t stage = step % Traits::kStages * Traits::kStageBytes;
        const uint32_t ds_buffer = step % Traits::kDsBuffers * TileP::kBytes;
        const int first_row = m_block * Traits::kBlockM;
        QueryTile tile{head, m_block, {first_row, min(first_row + Traits::kBlockM, block.sequence.seqlen_q)}, false};
        const Range common = sees.common_keys(tile.rows);
        // Rows past the end have a P of 0, unless a key makes NaN of it.
        const bool partial = cols.begin < common.begin || cols.begin + Traits::kBlockN > common.end ||
                             (kCareful && first_row + Traits::kBlockM > tile.rows.end);
        const int end_row = kCareful ? tile.rows.end : INT_MAX;
        const bool next_head = m_block == block.m_last;
        head += next_head;
        m_block = next_head ? block.m_first : m_block + 1;

        cp_async_wait<0>();
        __syncthreads();  // q and do have arrived, and every warp is done with the step before
        if (kCareful && partial) {
            tile.special = __syncthreads_or(special_keys || CopyQ::special(block.shared + Traits::sQ + stage, block.thread) ||
                                            CopyQ::special(block.shared + Traits::sDo + stage, block.thread));
            special |= tile.special;
        }
        if (Traits::kStages == 2 && step + 1 < steps) block.start_tile(Traits::kStageBytes - stage, head, m_block);
        if (Traits::kDefer && step > 0 && adds_dq) add_dq<Traits, kCareful>(block, last, TileP::kBytes - ds_buffer);

        Accumulator<Traits::kMTiles, Traits::kNTiles> p, ds;
        // Of the softcap; lives as long as P does. Not used by the plain kernels.
        Accumulator<Traits::kModified ? Traits::kMTiles : 1, Traits::kModified ? Traits::kNTiles : 1> derivative;
        p.clear();
        multiply_ahead<T, Traits::kHeadDim / 16>(
            p, OperandA<TileQ, Order::kContiguousK>(base + stage, Traits::sQ, warp.s_row, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kGroupKeys>(base, Traits::sK, warp.s_col, lane));
        const Scoring<Traits::kModified> scoring(block.shape, block.sequence, block.batch, tile.head);
        recompute_p<Traits>(p, derivative, scoring, reinterpret_cast<const float*>(block.shared + Traits::sLse + stage),
                            tile.rows, cols.begin, warp, lane);
        if (partial) hide(p, sees, tile.rows.begin + warp.s_row, cols.begin + warp.s_col, lane, end_row);
        store_fragment<T, TileP>(base, Traits::sP, p, warp.s_row, warp.s_col, lane);

        ds.clear();
        multiply_ahead<T, Traits::kHeadDim / 16>(
            ds, OperandA<TileQ, Order::kContiguousK>(base + stage, Traits::sDo, warp.s_row, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kGroupKeys>(base, Traits::sV, warp.s_col, lane));
        to_ds<Traits>(ds, p, derivative, reinterpret_cast<const float*>(block.shared + Traits::sDelta + stage), warp, lane);
        // A P of 0 makes no 0 of a dP or delta that is not finite.
        if (partial) hide(ds, sees, tile.rows.begin + warp.s_row, cols.begin + warp.s_col, lane, end_row);
        store_fragment<T, TileP>(base + ds_buffer, Traits::sDs, ds, warp.s_row, warp.s_col, lane);
        group_sync<Traits::kGroupThreads>(warp.group);  // the group's P and dS are there

        if (kCareful && tile.special) {
            __syncthreads();
            CopyQ::clear_special(block.shared + Traits::sQ + stage, block.thread);
            CopyQ::clear_special(block.shared + Traits::sDo + stage, block.thread);
            __syncthreads();
        }
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
            if (Traits::kStages == 1 && step + 1 < steps) block.start_tile(0, head, m_block);
            if (adds_dq) add_dq<Traits, kCareful>(block, tile, 0);
        }
    }
    if constexpr (Traits::kDefer) {
        __syncthreads();  // all of the last dS is there
        if (adds_dq) add_dq<Traits, kCareful>(block, last, (steps - 1) % Traits::kDsBuffers * TileP::kBytes);
    }
    __syncthreads();  // every warp is done with shared memory
}

// Makes NaN of dq where a query sees a key that is not finite: its score is +-inf or NaN, so its dS is 0 or NaN, and their product
// NaN.
template <typename Traits>
__device__ __forceinline__ void spoil_dq(const BwdContext<Traits>& block) {
    using T = typename Traits::T;
    using TileK = typename Traits::TileK;
    const uint8_t* k = block.shared + Traits::sK;
    const int first_head = block.head_k * block.group_size;
    for (int index = block.thread; index < Traits::kBlockN * Traits::kHeadDim; index += Traits::kThreads) {
        const int key = index / Traits::kHeadDim, dim = index % Traits::kHeadDim;
        const uint16_t x = reinterpret_cast<const uint16_t*>(k + TileK::offset(key, dim / TileK::kChunk))[dim % TileK::kChunk];
        if ((carry_of_special<T>(x) & 0x8000u) == 0) continue;
        const Range rows = block.sees.queries_of({block.cols.begin + key, block.cols.begin + key + 1});
        for (int head = first_head; head < first_head + block.group_size; ++head)
            for (int row = rows.begin; row < rows.end; ++row) {
                const int64_t tile =
                    dq_tile(block.params.dq_tiles, block.sequence, head, row / Traits::kBlockM, Traits::kBlockM);
                DqTile<Traits>::spoil(block.params.dq_sums + tile * DqTile<Traits>::kElements, row % Traits::kBlockM, dim);
            }
    }
}

// What is left to do after a pass.
enum class Rest { kNothing, kKv, kAll };

// All of the block's work, or dk and dv alone. kCareful false: also says what a careful pass has to do again; of that nothing has
// been written.
template <typename Traits, bool kCareful>
__device__ __forceinline__ Rest backward_pass(const BwdParams& params, uint8_t* shared, const Place& place, Rest todo) {
    using T = typename Traits::T;
    using TileK = typename Traits::TileK;
    using CopyK = typename BwdContext<Traits>::CopyK;
    Accumulator<Traits::kKvMTiles, Traits::kKvDTiles> dk, dv;
    bool special = false;
    if (const BwdContext<Traits> block(params, shared, place); block.cols.empty()) {
        return Rest::kNothing;
    } else if (block.queries.empty()) {
        dk.clear();
        dv.clear();
    } else {
        const int thread = block.thread;
        block.start_k();
        block.start_v();
        cp_async_commit();
        cp_async_wait<0>();
        // A thread looks at what it has copied itself.
        const bool special_keys = __syncthreads_or(CopyK::special(shared + Traits::sK, thread) ||
                                                   CopyK::special(shared + Traits::sV, thread));
        if (!kCareful && special_keys) return Rest::kAll;
        walk<Traits, kCareful>(block, dk, dv, special_keys, todo == Rest::kAll, special);
        // With keys and values that are finite, dq is right.
        if (!kCareful && __syncthreads_or(!dk.finite() || !dv.finite())) return Rest::kKv;
        if (kCareful && special_keys && todo == Rest::kAll) {
            spoil_dq(block);
            __syncthreads();
        }
    }

    const BwdContext<Traits> block(params, shared, kCareful ? place : Place());
    const int thread = block.thread;
    // Epilogue: dk and dv through shared memory, so that global memory is written in 16-byte pieces.
    dk.scale(params.softmax_scale);
    store_fragment<T, TileK>(block.base, Traits::sK, dk, block.warp.kv_row, block.warp.kv_col, block.lane);
    store_fragment<T, TileK>(block.base, Traits::sV, dv, block.warp.kv_row, block.warp.kv_col, block.lane);
    __syncthreads();
    const int rows = block.cols.end - block.cols.begin;
    if (kCareful && special) {
        const int first_head = block.head_k * block.group_size;
        const auto sees = [&](int key, int row) { return block.sees.visible(row, block.cols.begin + key); };
        for (int head = first_head; head < first_head + block.group_size; ++head) {
            add_special<TileK, Traits::kThreads, false>(
                shared + Traits::sV, rows, block.head_of(params.do_, params.do_strides, block.sequence.first_q, head),
                params.do_strides.row, block.queries, block.shape.head_dim, thread, sees);
            // The dS of a query that is not finite is NaN, or 0 where a softcap bounds its score.
            add_special<TileK, Traits::kThreads, true>(
                shared + Traits::sK, rows, block.head_of(params.q, params.q_strides, block.sequence.first_q, head),
                params.q_strides.row, block.queries, block.shape.head_dim, thread, sees);
        }
    }
    const int64_t first = block.batch * params.dk_strides.batch +
                          (block.sequence.first_k + block.cols.begin) * params.dk_strides.row +
                          block.head_k * params.dk_strides.head;
    store_tile<TileK, Traits::kThreads>(static_cast<T*>(params.dk) + first, params.dk_strides.row, shared + Traits::sK, rows,
                                        block.shape.head_dim, thread);
    store_tile<TileK, Traits::kThreads>(static_cast<T*>(params.dv) + first, params.dk_strides.row, shared + Traits::sV, rows,
                                        block.shape.head_dim, thread);
    return Rest::kNothing;
}

// A function of its own: the usual pass then has the registers to itself.
template <typename Traits>
__device__ __noinline__ void careful_backward(const BwdParams& params, Rest todo) {
    extern __shared__ __align__(1024) uint8_t shared[];
    backward_pass<Traits, true>(params, shared, Turns{params.turns}.place(params.dq_tiles.count, params.shape.first_batch, shared), todo);
}

template <typename Traits>
__device__ __forceinline__ void backward(const BwdParams& params) {
    extern __shared__ __align__(1024) uint8_t shared[];
    Rest todo = Rest::kAll;
    // A hidden NaN or infinity shows in dk or dv: where they are finite, none has reached them.
    if (!Turns{params.turns}.wanted()) todo = backward_pass<Traits, false>(params, shared, Place(), todo);
    if (todo != Rest::kNothing) careful_backward<Traits>(params, todo);
}

}  // namespace fa2
