// dq, dk and dv on mma.sync. One thread block, one (batch, head_k, n_block), every query head of the group.
//
// Work       kBlockN keys against every tile of queries that sees them; P is recomputed from lse.
// Warps      share each product in two dimensions, so that an operand is read from shared memory by few of them:
//            S, dP kWarpsM x the rest | dk, dv kWarpsN x the rest | dq kWarpsM x the rest.
// Pipeline   wait q, do | S = q k^T | start next q | P | dP = do v^T | dS | dv += P^T do | start next do | dq = dS k |
//            dk += dS^T q
// Shared     sK, sV, sDo one tile each, sQ kStages tiles, sP and sDs kBlockM x kBlockN; the epilogue reuses sK and sV.
// Registers  dk and dv in f32 for the whole walk; S, dP, dq come and go.
// Global     dq is added in f32, from all blocks of keys, in no fixed order.
// Expects    as fwd.cuh; lse and delta of the same inputs.
#pragma once

#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/scores.cuh"
#include "../core/tile.cuh"
#include "../params.h"
#include "copy.cuh"
#include "matmul.cuh"

namespace fa2 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, bool kModified_>
struct BwdTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr int kWarps = kWarps_;
    static constexpr bool kModified = kModified_;
    static constexpr int kThreads = kWarps * kWarpSize;
    // Rows of warps: a warp's blocks are then as square as the tiles allow.
    static constexpr int kWarpsM = kBlockM == 128 ? 4 : kBlockN == 128 ? 2 : 4;
    static constexpr int kWarpsN = kBlockN == 128 ? 4 : 2;
    // dq is head_dim wide: where its share of a warp would be an odd number of n8 tiles, more rows of fewer columns.
    static constexpr int kWarpsQ = kHeadDim * kWarpsM / kWarps % 16 == 0 ? kWarpsM : 2 * kWarpsM;
    static constexpr int kColsM = kWarps / kWarpsM;  // columns of warps beside kWarpsM rows
    static constexpr int kColsN = kWarps / kWarpsN;
    static constexpr int kColsQ = kWarps / kWarpsQ;
    static constexpr int kMTiles = kBlockM / kWarpsM / 16;       // S, dP: m16 tiles of a warp
    static constexpr int kNTiles = kBlockN / kColsM / 8;         // S, dP: n8 tiles of a warp
    static constexpr int kKvMTiles = kBlockN / kWarpsN / 16;     // dk, dv: m16 tiles of a warp
    static constexpr int kKvDTiles = kHeadDim / kColsN / 8;      // dk, dv: n8 tiles of a warp
    static constexpr int kQMTiles = kBlockM / kWarpsQ / 16;      // dq: m16 tiles of a warp
    static constexpr int kQDTiles = kHeadDim / kColsQ / 8;       // dq: n8 tiles of a warp
    using TileQ = Tile<kBlockM, kHeadDim>;
    using TileK = Tile<kBlockN, kHeadDim>;
    using TileP = Tile<kBlockM, kBlockN>;
    static constexpr int kBytesOneStage = 2 * TileK::kBytes + 2 * TileQ::kBytes + 2 * TileP::kBytes;
    // Two tiles of q where an A100 (163 KB) still has room.
    static constexpr int kStages = kBytesOneStage + TileQ::kBytes <= 160 * 1024 ? 2 : 1;
    static constexpr int kStatisticsBytes = kBlockM * 4;  // lse, or delta, of a tile of queries
    static constexpr int kSharedBytes =
        kBytesOneStage + (kStages - 1) * TileQ::kBytes + (kStages + 1) * kStatisticsBytes;
};

template <typename Traits>
__device__ __forceinline__ void backward(const BwdParams& params) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using TileP = typename Traits::TileP;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = uint32_t(__cvta_generic_to_shared(shared));
    constexpr uint32_t sK = 0, sV = TileK::kBytes, sDo = sV + TileK::kBytes, sP = sDo + TileQ::kBytes;
    constexpr uint32_t sDs = sP + TileP::kBytes, sQ = sDs + TileP::kBytes;
    constexpr uint32_t sLse = sQ + Traits::kStages * TileQ::kBytes;
    constexpr uint32_t sDelta = sLse + Traits::kStages * Traits::kStatisticsBytes;

    const Shape& shape = params.shape;
    const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int n_block = blockIdx.x, head_k = blockIdx.y, batch = blockIdx.z;
    const Sequence sequence(shape, batch);
    const Range cols{n_block * Traits::kBlockN, min((n_block + 1) * Traits::kBlockN, sequence.seqlen_k)};
    if (cols.empty()) return;
    const Visibility sees(shape, sequence);
    const Range queries = sees.queries_of(cols);

    // This warp's block of S, dP and dq, and of dk and dv.
    const int s_row = warp % Traits::kWarpsM * (Traits::kBlockM / Traits::kWarpsM);
    const int s_col = warp / Traits::kWarpsM * (Traits::kBlockN / Traits::kColsM);
    const int q_row = warp % Traits::kWarpsQ * (Traits::kBlockM / Traits::kWarpsQ);
    const int q_col = warp / Traits::kWarpsQ * (Traits::kHeadDim / Traits::kColsQ);
    const int kv_row = warp % Traits::kWarpsN * (Traits::kBlockN / Traits::kWarpsN);
    const int kv_col = warp / Traits::kWarpsN * (Traits::kHeadDim / Traits::kColsN);

    Accumulator<Traits::kKvMTiles, Traits::kKvDTiles> dk, dv;
    dk.clear();
    dv.clear();

    if (!queries.empty()) {
        const auto start = [&](const void* tensor, const Strides& strides, int first_row, int head) {
            return static_cast<const T*>(tensor) + batch * strides.batch + first_row * strides.row + head * strides.head;
        };
        const int m_first = queries.begin / Traits::kBlockM;
        const int m_count = (queries.end - 1) / Traits::kBlockM + 1 - m_first;
        const int group = shape.num_heads / shape.num_heads_k;
        const int steps = m_count * group;
        // Of a tile of queries, by its first threads.
        const auto start_statistics = [&](uint32_t shared, const float* statistics, int head, int m_block) {
            const int row = m_block * Traits::kBlockM + thread;
            const float* from = statistics + batch * shape.lse_batch + head * shape.lse_head + sequence.first_q;
            const bool valid = row < sequence.seqlen_q;
            if (thread < Traits::kBlockM) cp_async_4(shared + thread * 4, valid ? from + row : from, valid);
        };
        const auto start_q = [&](int stage, int head, int m_block) {
            const T* gQ = start(params.q, params.q_strides, sequence.first_q, head);
            TileCopy<TileQ, Traits::kThreads, T>(gQ, params.q_strides.row, shape.head_dim, thread)
                .start(base + sQ + stage * TileQ::kBytes, m_block * Traits::kBlockM, sequence.seqlen_q);
            start_statistics(base + sLse + stage * Traits::kStatisticsBytes, params.lse, head, m_block);
        };
        const auto start_do = [&](int head, int m_block) {
            const T* gDo = start(params.do_, params.do_strides, sequence.first_q, head);
            TileCopy<TileQ, Traits::kThreads, T>(gDo, params.do_strides.row, shape.head_dim, thread)
                .start(base + sDo, m_block * Traits::kBlockM, sequence.seqlen_q);
            start_statistics(base + sDelta, params.delta, head, m_block);
        };
        int head = head_k * group, m_block = m_first;
        TileCopy<TileK, Traits::kThreads, T>(start(params.k, params.k_strides, sequence.first_k, head_k),
                                             params.k_strides.row, shape.head_dim, thread)
            .start(base + sK, cols.begin, sequence.seqlen_k);
        TileCopy<TileK, Traits::kThreads, T>(start(params.v, params.v_strides, sequence.first_k, head_k),
                                             params.v_strides.row, shape.head_dim, thread)
            .start(base + sV, cols.begin, sequence.seqlen_k);
        start_q(0, head, m_block);
        start_do(head, m_block);
        cp_async_commit();

        for (int step = 0; step < steps; ++step) {
            const bool last_of_head = m_block + 1 == m_first + m_count;
            const int next_head = head + last_of_head, next_m_block = last_of_head ? m_first : m_block + 1;
            const int first_row = m_block * Traits::kBlockM;
            const Range rows{first_row, min(first_row + Traits::kBlockM, sequence.seqlen_q)};
            const uint32_t q_base = base + step % Traits::kStages * TileQ::kBytes;  // less sQ
            const Scoring<Traits::kModified> scoring(shape, sequence, batch, head);
            cp_async_wait<0>();
            __syncthreads();  // q and do have arrived, and every warp is done with the step before

            Accumulator<Traits::kMTiles, Traits::kNTiles> p;
            p.clear();
            multiply<T, Traits::kHeadDim / 16>(p, OperandA<TileQ, Order::kContiguousK>(q_base, sQ, s_row, lane),
                                               OperandB<TileK, Order::kContiguousK, Traits::kNTiles * 8>(base, sK, s_col, lane));
            if (Traits::kStages == 2 && step + 1 < steps) {
                start_q((step + 1) % 2, next_head, next_m_block);
                cp_async_commit();
            }

            const float* lse = reinterpret_cast<const float*>(shared + sLse) + step % Traits::kStages * Traits::kBlockM;
            const float* delta = reinterpret_cast<const float*>(shared + sDelta);
            float lse_log2[Traits::kMTiles][2];
#pragma unroll
            for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // Rows past the end: P = exp2(score - inf) = 0, whatever ALiBi makes of their score.
                    const int row = s_row + 16 * i + fragment_row(lane, half);
                    lse_log2[i][half] = first_row + row < rows.end ? lse[row] * kLog2e : INFINITY;
                }

            const Range common = sees.common_keys(rows);
            const bool partial = cols.begin < common.begin || cols.begin + Traits::kBlockN > common.end;
            // Under a softcap dS is multiplied by its derivative; it lives as long as P does.
            Accumulator<Traits::kModified ? Traits::kMTiles : 1, Traits::kModified ? Traits::kNTiles : 1> derivative;
#pragma unroll
            for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
                for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float& x = p.x[i][j][e];
                        if constexpr (Traits::kModified) {
                            const int row = first_row + s_row + 16 * i + fragment_row(lane, e / 2);
                            const int col = cols.begin + s_col + fragment_col(lane, j) + e % 2;
                            x = scoring.apply(x, row, col, &derivative.x[i][j][e]);
                        }
                        x = exp2_approx(fmaf(x, scoring.factor, -lse_log2[i][e / 2]));
                    }
            if (partial) {
#pragma unroll
                for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
                    for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int row = first_row + s_row + 16 * i + fragment_row(lane, e / 2);
                            const int col = cols.begin + s_col + fragment_col(lane, j) + e % 2;
                            if (!sees.visible(row, col)) p.x[i][j][e] = 0.f;
                        }
            }
            store_fragment<T, TileP>(base, sP, p, s_row, s_col, lane);

            Accumulator<Traits::kMTiles, Traits::kNTiles> ds;
            ds.clear();
            multiply<T, Traits::kHeadDim / 16>(ds, OperandA<TileQ, Order::kContiguousK>(base, sDo, s_row, lane),
                                               OperandB<TileK, Order::kContiguousK, Traits::kNTiles * 8>(base, sV, s_col, lane));
#pragma unroll
            for (int i = 0; i < Traits::kMTiles; ++i) {
                const int first = s_row + 16 * i;
                const float delta_row[2] = {delta[first + fragment_row(lane, 0)], delta[first + fragment_row(lane, 1)]};
#pragma unroll
                for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float& x = ds.x[i][j][e];
                        x = p.x[i][j][e] * (x - delta_row[e / 2]);
                        if constexpr (Traits::kModified) x *= derivative.x[i][j][e];
                    }
            }
            store_fragment<T, TileP>(base, sDs, ds, s_row, s_col, lane);
            __syncthreads();  // P and dS are there

            multiply<T, Traits::kBlockM / 16>(dv, OperandA<TileP, Order::kTransposed>(base, sP, kv_row, lane),
                                              OperandB<TileQ, Order::kTransposed, Traits::kKvDTiles * 8>(base, sDo, kv_col, lane));
            __syncthreads();  // every warp is done with do
            if (step + 1 < steps) {
                start_do(next_head, next_m_block);
                cp_async_commit();
            }

            Accumulator<Traits::kQMTiles, Traits::kQDTiles> dq;
            dq.clear();
            multiply<T, Traits::kBlockN / 16>(dq, OperandA<TileP, Order::kContiguousK>(base, sDs, q_row, lane),
                                              OperandB<TileK, Order::kTransposed, Traits::kQDTiles * 8>(base, sK, q_col, lane));
            float* gDq = params.dq + batch * params.dq_strides.batch +
                         (sequence.first_q + first_row) * params.dq_strides.row + head * params.dq_strides.head;
#pragma unroll
            for (int i = 0; i < Traits::kQMTiles; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = q_row + 16 * i + fragment_row(lane, half);
                    float* to = gDq + int64_t(row) * params.dq_strides.row + q_col + fragment_col(lane, 0);
#pragma unroll
                    for (int j = 0; j < Traits::kQDTiles; ++j)
                        red_add_2(to + 8 * j, dq.x[i][j][2 * half], dq.x[i][j][2 * half + 1],
                                  first_row + row < rows.end && q_col + 8 * j < shape.head_dim);
                }

            multiply<T, Traits::kBlockM / 16>(dk, OperandA<TileP, Order::kTransposed>(base, sDs, kv_row, lane),
                                              OperandB<TileQ, Order::kTransposed, Traits::kKvDTiles * 8>(q_base, sQ, kv_col, lane));
            if (Traits::kStages == 1 && step + 1 < steps) {
                __syncthreads();  // every warp is done with q
                start_q(0, next_head, next_m_block);
                cp_async_commit();
            }
            head = next_head;
            m_block = next_m_block;
        }
    }

    // Epilogue: dk and dv through shared memory, so that global memory is written in 16-byte pieces.
#pragma unroll
    for (int i = 0; i < Traits::kKvMTiles; ++i)
#pragma unroll
        for (int j = 0; j < Traits::kKvDTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) dk.x[i][j][e] *= params.softmax_scale;
    __syncthreads();  // every warp is done with k and v
    store_fragment<T, TileK>(base, sK, dk, kv_row, kv_col, lane);
    store_fragment<T, TileK>(base, sV, dv, kv_row, kv_col, lane);
    __syncthreads();
    const int64_t first = batch * params.dk_strides.batch + (sequence.first_k + cols.begin) * params.dk_strides.row +
                          head_k * params.dk_strides.head;
    T* gDk = static_cast<T*>(params.dk) + first;
    T* gDv = static_cast<T*>(params.dv) + first;
    for (int index = thread; index < TileK::kRows * TileK::kChunksPerRow; index += Traits::kThreads) {
        const int row = index / TileK::kChunksPerRow, chunk = index % TileK::kChunksPerRow;
        if (row < cols.end - cols.begin && chunk * TileK::kChunk < shape.head_dim) {
            const int64_t at = row * params.dk_strides.row + chunk * TileK::kChunk;
            *reinterpret_cast<uint4*>(gDk + at) = *reinterpret_cast<const uint4*>(shared + TileK::offset(row, chunk));
            *reinterpret_cast<uint4*>(gDv + at) =
                *reinterpret_cast<const uint4*>(shared + TileK::kBytes + TileK::offset(row, chunk));
        }
    }
}

}  // namespace fa2
