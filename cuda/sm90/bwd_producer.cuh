// The producer of the backward. One warp takes work tiles and loads k, v, q and do by TMA. One loads lse and delta. Without a cluster, two
// more add dq to dq_accum, one for each consumer.
#pragma once

#include "../core/barrier.cuh"
#include "../core/dq_accum.cuh"
#include "barrier.cuh"
#include "bwd_block.cuh"
#include "cluster.cuh"
#include "schedule.cuh"
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
    const int lane;

    // The rank of this block in its cluster. It is read from the special register each time, because the producer has few registers.
    __device__ __forceinline__ static int rank() { return Traits::kCluster == 1 ? 0 : cluster_rank(); }

    __device__ __forceinline__ int batch(const BwdTile& tile) const { return batch_entry(params.bwd.shape, tile.sequence); }

    // Lane 0. The index of the next work tile. In a cluster, one block takes it and sends it to the other one.
    __device__ __forceinline__ int next_index(Ring<1> ring) const {
        if constexpr (Traits::kCluster == 1) {
            return int(atomicAdd(params.schedule.counters, 1u));
        } else {
            const uint32_t full = shared_address(&control.index_full);
            if (rank() == 0) {
                wait_empty(&control.index_empty, ring);
                const int index = int(atomicAdd(params.schedule.counters, 1u));
                store_to_peer(peer_address(shared_address(&control.index), 1), uint32_t(index), peer_address(full, 1));
                return index;
            }
            mbarrier_arrive_expect(full, sizeof(control.index));
            wait_full(&control.index_full, ring);
            const int index = control.index;
            mbarrier_arrive_peer(peer_address(shared_address(&control.index_empty), 0));
            return index;
        }
    }

    // Writes the next work tile that has keys to `tile`. Returns whether there is one. A block takes a work tile while its consumers are in
    // the one before, and finishes them in the order in which it takes them.
    __device__ __forceinline__ bool take(Ring<1>& ring, BwdTile& tile) const {
        const Shape& shape = params.bwd.shape;
        // With semaphores, the blocks of the last keys come first (DqSemaphores). Otherwise the first keys do: under a causal mask, they
        // have the most queries.
        const BlockOrder order = params.bwd.semaphores != nullptr ? BlockOrder::kDescending : BlockOrder::kAscending;
        while (true) {
            int index = lane == 0 ? next_index(ring) : 0;
            index = __shfl_sync(~0u, index, 0);
            ring.advance();
            if (uint32_t(index) >= uint32_t(params.schedule.tiles)) {
                if (lane == 0) tile.n_block = -1;
                return false;
            }
            const WorkTile taken = work_tile<Axis::kKeys, Traits::kClusterKeys>(shape, params.schedule, order, index, lane);
            if (taken.block * Traits::kClusterKeys >= taken.sequence.seqlen_k) continue;
            if (lane == 0) tile = bwd_tile<Traits>(shape, taken, rank());
            return true;
        }
    }

    // Takes all work tiles of this thread block, publishes them and loads what they need. One warp.
    __device__ __forceinline__ void run() const {
        Ring<1> index_ring;
        Ring<Traits::kTileStages> tile_ring;
        uint32_t passed = 0;  // steps of all work tiles so far
        while (true) {
            BwdTile& tile = control.tiles[tile_ring.stage()];
            wait_empty(control.tile_empty, tile_ring);
            const bool exists = take(index_ring, tile);
            if (lane == 0) {
                mbarrier_arrive(shared_address(&control.tile_full[tile_ring.stage()]));
                if (exists) load(tile, {tile_ring.passed}, passed);
            }
            __syncwarp();
            if (!exists) break;
            tile_ring.advance();
        }
        if (lane == 0 && rank() == 0) finish_tiles(params.schedule, gridDim.x / Traits::kCluster);
    }

    // k and v. In a cluster also the peer's k, in the columns of dq that this block computes. One thread.
    __device__ __forceinline__ void load_keys(const BwdTile& tile, const Ring<1>& ring) const {
        wait_empty(&control.keys_empty, ring);
        const uint32_t full = shared_address(&control.keys_full), shared = shared_address(bytes);
        const int row = tile.sequence.first_k + tile.cols.begin;
        mbarrier_arrive_expect(full, Traits::kKeysBytes);
        tma_load_tile<TileK>(shared + Traits::sK, params.k, full, {row, tile.head_k, batch(tile)});
        tma_load_tile<TileK>(shared + Traits::sV, params.v, full, {row, tile.head_k, batch(tile)});
        if constexpr (Traits::kCluster > 1) {
            using TilePeerK = typename Traits::TilePeerK;
            const int peer_row = tile.sequence.first_k + Traits::peer_keys(tile, rank()).begin;
            tma_load_tile<TilePeerK>(shared + Traits::sPeerK, params.k, full, {peer_row, tile.head_k, batch(tile)},
                                     rank() * Traits::kBlockCols);
        }
    }

    // k and v, and q and do of every step. One thread. k and v come after the first q and do, because they wait until the consumers have
    // finished the work tile before.
    __device__ __forceinline__ void load(const BwdTile& tile, const Ring<1>& key_ring, uint32_t& passed) const {
        const uint32_t shared = shared_address(bytes);
        QueryStep queries = first_queries(tile);
        if (tile.steps() == 0) load_keys(tile, key_ring);
#pragma unroll 1
        for (int step = 0; step < tile.steps(); ++step) {
            const int row = tile.sequence.first_q + queries.m_block * Traits::kBlockM;
            const auto load_stage = [&](uint64_t* full, uint64_t* empty, uint32_t tiles, const TensorMap& map, const auto& ring) {
                wait_empty(empty, ring);
                const uint32_t barrier = shared_address(&full[ring.stage()]);
                tma_fill<TileQ>(shared + tiles + ring.stage() * TileQ::kBytes, map, barrier, {row, queries.head, batch(tile)});
            };
            load_stage(control.q_full, control.q_empty, Traits::sQ, params.q, Ring<Traits::kQStages>{passed});
            load_stage(control.do_full, control.do_empty, Traits::sDo, params.do_, Ring<Traits::kDoStages>{passed});
            if (step == 0) load_keys(tile, key_ring);
            ++passed;
            queries.advance(tile.m_blocks);
        }
    }

    // Writes this warp's values of a tile of queries to their stage, when it is free.
    template <int kStages>
    __device__ __forceinline__ void store_stage(const float (&x)[kRows], uint32_t to, uint64_t* full, uint64_t* empty,
                                                const Ring<kStages>& ring) const {
        wait_empty(empty, ring);
        float* stage = reinterpret_cast<float*>(bytes + to) + ring.stage() * Traits::kBlockM + lane;
#pragma unroll
        for (int i = 0; i < kRows; ++i) stage[i * kWarpSize] = x[i];
        arrive_warp(full[ring.stage()], lane);
    }

    // lse and delta of every step. One warp. It reads global memory first, and then waits for the stage in shared memory. Queries past the
    // end get lse = inf, so that P = exp(score - lse) is 0.
    __device__ __forceinline__ void load_lse_and_delta() const {
        Ring<Traits::kQStages> q_ring;
        Ring<Traits::kDoStages> do_ring;
        for (BwdTiles<Traits> tiles{control}; tiles.wait(); tiles.advance(lane)) {
            const BwdTile& tile = tiles.current();
            QueryStep queries = first_queries(tile);
            for (int step = tile.steps(); step > 0; --step) {
                const int64_t head_offset = tile.sequence.lse_offset(params.bwd.shape, queries.head);
                const int first_row = queries.m_block * Traits::kBlockM + lane;
                float lse_log2[kRows], delta[kRows];
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    const int row = first_row + i * kWarpSize;
                    const bool exists = row < tile.sequence.seqlen_q;
                    lse_log2[i] = exists ? params.bwd.lse[head_offset + row] * kLog2e : INFINITY;
                    delta[i] = exists ? params.bwd.delta[head_offset + row] : 0.f;
                }
                store_stage(lse_log2, Traits::sLseLog2, control.q_full, control.q_empty, q_ring);
                store_stage(delta, Traits::sDelta, control.do_full, control.do_empty, do_ring);
                q_ring.advance();
                do_ring.advance();
                queries.advance(tile.m_blocks);
            }
        }
    }

    // In every step, one warp adds the dq that a consumer left in shared memory to dq_accum. Each of 8 lanes adds one row group.
    template <int kConsumer>
    __device__ __forceinline__ void add_dq() const {
        const int row = Traits::dq_row(kConsumer) + lane * kDqGroupRows;
        const int offset = row * Traits::kHeadDim + Traits::dq_col(kConsumer) * kDqGroupRows;
        const BwdParams& bwd = params.bwd;
        constexpr int kGroupBytes = kDqGroupRows * Traits::dq_cols(kConsumer) * int(sizeof(float));
        bar_arrive<Traits::kDqThreads>(kDqRead + kConsumer);  // sDq is free at the start
        for (BwdTiles<Traits> tiles{control}; tiles.wait(); tiles.advance(lane)) {
            const BwdTile& tile = tiles.current();
            const Sequence& sequence = tile.sequence;
            QueryStep queries = first_queries(tile);
            for (int step = tile.steps(); step > 0; --step) {
                const int first_row = queries.m_block * Traits::kBlockM;
                const int64_t first_group = first_row_block(bwd.dq_groups, kDqGroupRows, bwd.shape, sequence, queries.head);
                if (bwd.semaphores != nullptr) wait_for_additions_before(tile, queries);
                bar_sync<Traits::kDqThreads>(kDqWritten + kConsumer);
                fence_proxy_async();  // not in the consumer: there it would wait until the consumer's own writes are done
                if (lane < kWarpgroupRows / kDqGroupRows && first_row + row < sequence.seqlen_q) {
                    float* to = bwd.dq_accum + (first_group * kDqGroupRows + first_row) * Traits::kHeadDim + offset;
                    bulk_add(to, shared_address(bytes) + Traits::sDq + offset * uint32_t(sizeof(float)), kGroupBytes);
                }
                bulk_wait_read();
                __syncwarp();
                bar_arrive<Traits::kDqThreads>(kDqRead + kConsumer);  // the consumer may write the next dq
                if (bwd.semaphores != nullptr) {
                    // Each lane waits until its own additions are in global memory. __syncwarp() then puts them before the post of lane 0.
                    bulk_wait();
                    __syncwarp();
                    if (lane == 0) DqSemaphores{bwd.semaphores}.post(semaphore(tile, queries));
                }
                queries.advance(tile.m_blocks);
            }
        }
    }

    __device__ __forceinline__ int64_t semaphore(const BwdTile& tile, const QueryStep& queries) const {
        return dq_tile_index<Traits::kBlockM>(params.bwd, tile.sequence, queries.head, queries.m_block);
    }

    __device__ __forceinline__ void wait_for_additions_before(const BwdTile& tile, const QueryStep& queries) const {
        const int additions = additions_before<Traits>(params.bwd.shape, tile, queries);
        if (lane == 0) DqSemaphores{params.bwd.semaphores}.poll(semaphore(tile, queries), additions);
        __syncwarp();
    }
};

}  // namespace fa2::sm90
