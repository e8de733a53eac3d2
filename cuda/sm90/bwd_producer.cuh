// The producer of the backward: one thread loads tiles by TMA, one warp loads lse and delta, and one warp for each consumer adds
// dq to dq_accum.
#pragma once

#include "../core/barrier.cuh"
#include "../core/dq_accum.cuh"
#include "barrier.cuh"
#include "bwd_block.cuh"
#include "tma.cuh"

namespace fa2::sm90 {

template <typename Traits>
struct BwdProducer {
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    static constexpr int kRows = Traits::kBlockM / kWarpSize;  // queries of a lane

    const Sm90BwdParams& params;
    BwdControl<Traits>& control;
    uint8_t* const bytes;
    const int rank;  // of this block in its cluster
    const int lane;

    __device__ __forceinline__ int batch() const { return batch_entry(params.bwd.shape, control.block.sequence); }

    // k and v. In a cluster also the peer's k, in the columns of dq that this block computes.
    __device__ __forceinline__ void load_keys() const {
        const BwdBlock& block = control.block;
        const uint32_t full = shared_address(&control.keys_full), shared = shared_address(bytes);
        const int row = block.sequence.first_k + block.cols.begin;
        mbarrier_arrive_expect(full, Traits::kKeysBytes);
        tma_load_tile<TileK>(shared + Traits::sK, params.k, full, row, block.head_k, batch());
        tma_load_tile<TileK>(shared + Traits::sV, params.v, full, row, block.head_k, batch());
        if constexpr (Traits::kCluster > 1) {
            using TilePeerK = typename Traits::TilePeerK;
            const int peer_row = block.sequence.first_k + Traits::peer_keys(block, rank).begin;
            tma_load_tile<TilePeerK>(shared + Traits::sPeerK, params.k, full, peer_row, block.head_k, batch(), rank * Traits::kBlockCols);
        }
    }

    // k and v, q and do of every step. One thread.
    __device__ __forceinline__ void load_tiles() const {
        const BwdBlock& block = control.block;
        const uint32_t shared = shared_address(bytes);
        Ring<Traits::kQStages> q_ring;
        Ring<Traits::kDoStages> do_ring;
        QueryTile tile = first_tile(block);
        for (int step = block.steps(); step > 0; --step) {
            const int row = block.sequence.first_q + tile.m_block * Traits::kBlockM;
            const auto load = [&](uint64_t* full, uint64_t* empty, uint32_t tiles, const TensorMap& map, const auto& ring) {
                mbarrier_wait(shared_address(&empty[ring.stage()]), ring.parity() ^ 1);
                const uint32_t barrier = shared_address(&full[ring.stage()]);
                tma_fill<TileQ>(shared + tiles + ring.stage() * TileQ::kBytes, map, barrier, row, tile.head, batch());
            };
            load(control.q_full, control.q_empty, Traits::sQ, params.q, q_ring);
            if (q_ring.passed == 0) load_keys();
            load(control.do_full, control.do_empty, Traits::sDo, params.do_, do_ring);
            q_ring.advance();
            do_ring.advance();
            tile.advance(block.m_blocks);
        }
    }

    // Writes this warp's values of a tile of queries to their stage, when it is free.
    template <int kStages>
    __device__ __forceinline__ void store_stage(const float (&x)[kRows], uint32_t to, uint64_t* full, uint64_t* empty,
                                                const Ring<kStages>& ring) const {
        mbarrier_wait(shared_address(&empty[ring.stage()]), ring.parity() ^ 1);
        float* stage = reinterpret_cast<float*>(bytes + to) + ring.stage() * Traits::kBlockM + lane;
#pragma unroll
        for (int i = 0; i < kRows; ++i) stage[i * kWarpSize] = x[i];
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&full[ring.stage()]));
    }

    // lse and delta of every step. One warp, which reads them before their stage is free. Queries past the end
    // get lse = inf, so that P = exp(score - lse) is 0.
    __device__ __forceinline__ void load_lse_and_delta() const {
        const BwdBlock& block = control.block;
        Ring<Traits::kQStages> q_ring;
        Ring<Traits::kDoStages> do_ring;
        QueryTile tile = first_tile(block);
        for (int step = block.steps(); step > 0; --step) {
            const int64_t head_offset = block.sequence.lse_offset(params.bwd.shape, tile.head);
            const int first_row = tile.m_block * Traits::kBlockM + lane;
            float lse_log2[kRows], delta[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const int row = first_row + i * kWarpSize;
                const bool exists = row < block.sequence.seqlen_q;
                lse_log2[i] = exists ? params.bwd.lse[head_offset + row] * kLog2e : INFINITY;
                delta[i] = exists ? params.bwd.delta[head_offset + row] : 0.f;
            }
            store_stage(lse_log2, Traits::sLseLog2, control.q_full, control.q_empty, q_ring);
            store_stage(delta, Traits::sDelta, control.do_full, control.do_empty, do_ring);
            q_ring.advance();
            do_ring.advance();
            tile.advance(block.m_blocks);
        }
    }

    // In every step, one warp adds the dq that a consumer left in shared memory to dq_accum. Each of 8 lanes adds one row group.
    template <int kConsumer>
    __device__ __forceinline__ void add_dq() const {
        constexpr int kThreads = Traits::kWarpgroupThreads + kWarpSize;
        const BwdParams& bwd = params.bwd;
        const BwdBlock& block = control.block;
        const Sequence& sequence = block.sequence;
        const int row = Traits::dq_row(kConsumer) + lane * kDqGroupRows;
        const int offset = row * Traits::kHeadDim + Traits::dq_col(kConsumer) * kDqGroupRows;
        constexpr int kGroupBytes = kDqGroupRows * Traits::dq_cols(kConsumer) * int(sizeof(float));
        QueryTile tile = first_tile(block);
        const int steps = block.steps();
        if (steps > 0) bar_arrive<kThreads>(kDqRead + kConsumer);  // sDq is free at the start
        for (int step = 0; step < steps; ++step) {
            const int first_row = tile.m_block * Traits::kBlockM;
            const int64_t first_group = first_row_block(bwd.dq_groups, kDqGroupRows, bwd.shape, sequence, tile.head);
            if (bwd.semaphores != nullptr) wait_for_blocks_before(tile);
            bar_sync<kThreads>(kDqWritten + kConsumer);
            if (lane < Traits::kWarpgroupRows / kDqGroupRows && first_row + row < sequence.seqlen_q) {
                float* to = bwd.dq_accum + (first_group * kDqGroupRows + first_row) * Traits::kHeadDim + offset;
                bulk_add(to, shared_address(bytes) + Traits::sDq + offset * uint32_t(sizeof(float)), kGroupBytes);
            }
            bulk_wait_read();
            __syncwarp();
            if (step + 1 < steps) bar_arrive<kThreads>(kDqRead + kConsumer);  // the consumer may write the next dq
            if (bwd.semaphores != nullptr) {
                // Each lane waits until its own additions are in global memory. __syncwarp() then puts them before the post of lane 0.
                bulk_wait();
                __syncwarp();
                if (lane == 0) DqSemaphores{bwd.semaphores}.post(semaphore(tile));
            }
            tile.advance(block.m_blocks);
        }
        bulk_wait();
    }

    __device__ __forceinline__ int64_t semaphore(const QueryTile& tile) const {
        return dq_tile_index<Traits::kBlockM>(params.bwd, control.block.sequence, tile.head, tile.m_block);
    }

    __device__ __forceinline__ void wait_for_blocks_before(const QueryTile& tile) const {
        const BwdBlock& block = control.block;
        const int blocks = DqSemaphores::blocks_before<Traits::kBlockM, Traits::kBlockN>(params.bwd.shape, block.sequence, tile.m_block,
                                                                                         block.n_block);
        if (lane == 0) DqSemaphores{params.bwd.semaphores}.poll(semaphore(tile), Traits::kDqParts * blocks);
        __syncwarp();
    }
};

}  // namespace fa2::sm90
