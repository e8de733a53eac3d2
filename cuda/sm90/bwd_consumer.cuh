// A consumer warpgroup of the backward: dk and dv of its 64 keys, and its part of dq.
#pragma once

#include "../core/barrier.cuh"
#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/score_mod.cuh"
#include "../core/softmax.cuh"
#include "../core/store.cuh"
#include "barrier.cuh"
#include "bwd_block.cuh"
#include "wgmma.cuh"

namespace fa2::sm90 {

// Stores four 8 x 8 matrices (PTX ISA, "stmatrix"). Lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                 "r"(r[3])
                 : "memory");
}

// kOrdered: adds to dq_accum in the order of DqSemaphores.
template <typename Traits, bool kOrdered>
struct BwdConsumer {
    using T = typename Traits::T;
    using ScoreMod = typename Traits::ScoreMod;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using TileDs = typename Traits::TileDs;
    using DsRing = Ring<Traits::kDsStages>;

    const Sm90BwdParams& params;
    BwdControl<Traits>& control;
    uint8_t* const bytes;
    const uint32_t shared;
    const int warpgroup;  // 0 .. kConsumers - 1
    const int warp;       // in the warpgroup
    const int lane;
    Ring<Traits::kStages> ring;
    DsRing ds_ring;
    Accumulator<1, Traits::kDTiles> dk, dv;
    Accumulator<1, Traits::kNTiles> s, dp;  // S^T and dP^T: a row is a key
    uint32_t p[Traits::kKSteps][4], ds[Traits::kKSteps][4];
    Accumulator<1, Traits::kDqDTiles> dq;

    // This warp's first key in the tile.
    __device__ __forceinline__ int tile_key() const { return warpgroup * Traits::kWarpgroupRows + warp * Traits::kWarpRows; }

    // This thread's number, counted from the first consumer.
    __device__ __forceinline__ int consumer_thread() const { return (warpgroup * Traits::kWarpgroupWarps + warp) * kWarpSize + lane; }

    // Says that this warp has read a stage, or written its part of it.
    __device__ __forceinline__ void release(uint64_t& barrier) const {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&barrier));
    }

    __device__ __forceinline__ const float* row_values(uint32_t offset) const {
        return reinterpret_cast<const float*>(bytes + offset) + ring.stage() * Traits::kBlockM + fragment_col(lane, 0);
    }

    // Clears the rows of a tile that lie after the sequence, because TMA has filled them with rows of the next one: 0 times their NaN would
    // be NaN. All consumers share the block.
    template <typename Tile>
    __device__ __forceinline__ void clear_tail(uint32_t tile, int rows) const {
        for (int i = rows * Tile::kChunksPerRow + consumer_thread(); i < Tile::kRows * Tile::kChunksPerRow; i += Traits::kConsumerThreads)
            *reinterpret_cast<uint4*>(bytes + tile + Tile::offset(i / Tile::kChunksPerRow, i % Tile::kChunksPerRow)) = uint4{};
    }

    __device__ __forceinline__ void tails_cleared() const {
        fence_proxy_async();
        bar_sync<Traits::kConsumerThreads>(kFirstNamedBarrier + Traits::kConsumers);
    }

    // Starts S^T = k q^T, or dP^T = v do^T, of this warpgroup's keys and a tile of queries.
    __device__ __forceinline__ void start_product(Accumulator<1, Traits::kNTiles>& d, uint32_t keys, uint32_t queries) {
        const Operand<TileK, Order::kContiguousK> a(shared + keys, warpgroup * Traits::kWarpgroupRows);
        const Operand<TileQ, Order::kContiguousK> b(shared + queries);
        start_multiply<T, Traits::kHeadDim / 16>(d, a, b);
    }

    // Starts dv += P^T do, or dk += dS^T q.
    __device__ __forceinline__ void start_sum(Accumulator<1, Traits::kDTiles>& d, const uint32_t (&a)[Traits::kKSteps][4],
                                              uint32_t queries) {
        start_multiply_add<T>(d, a, Operand<TileQ, Order::kTransposed>(shared + queries));
    }

    // Starts this warpgroup's part of dq = dS k, with the dS of all consumers at ring position `at`. In the first step no such dS `exists`:
    // it multiplies old data, and nothing uses the result. With a branch around the wgmmas, ptxas would run them one by one.
    __device__ __forceinline__ void start_dq(DsRing at, bool exists) {
        if (exists) mbarrier_wait(shared_address(&control.ds_full[at.stage()]), at.parity());
        const int first_warp = warpgroup * Traits::kWarpgroupWarps;
        const uint32_t tile_ds = shared + Traits::sDs + at.stage() * TileDs::kBytes;
        const Operand<TileDs, Order::kTransposed> a(tile_ds, Traits::dq_row(first_warp));
        const Operand<TileK, Order::kTransposed> b(shared + Traits::sK, Traits::dq_col(first_warp));
        start_multiply<T, Traits::kBlockN / 16>(dq, a, b);
    }

    // Waits until the blocks that add to a tile of dq_accum before this one have done so.
    __device__ __forceinline__ void wait_for_blocks_before(int64_t index, const QueryTile& tile) const {
        const Visibility sees(params.bwd.shape, control.block.sequence);
        const Range rows = tile_range(tile.m_block * Traits::kBlockM, Traits::kBlockM, control.block.sequence.seqlen_q);
        const int blocks = DqSemaphores::blocks_before(sees, rows, control.block.n_block, Traits::kBlockN);
        const DqSemaphores semaphores{params.bwd.semaphores};
        if (warp == 0 && lane == 0) semaphores.poll(index, Traits::kConsumers * blocks);
        bar_sync<Traits::kWarpgroupThreads>(kFirstNamedBarrier + warpgroup);
    }

    __device__ __forceinline__ void let_next_block_add(int64_t index) const {
        const DqSemaphores semaphores{params.bwd.semaphores};
        bar_sync<Traits::kWarpgroupThreads>(kFirstNamedBarrier + warpgroup);
        if (warp == 0 && lane == 0) semaphores.post(index);
    }

    // Adds dq, which has arrived, to the tile of dq_accum.
    __device__ __forceinline__ void add_dq(DsRing at, const QueryTile& tile) {
        release(control.ds_empty[at.stage()]);
        const BwdParams& bwd = params.bwd;
        const Sequence& sequence = control.block.sequence;
        const int64_t index = first_row_block(bwd.dq_tiles, Traits::kBlockM, bwd.shape, sequence, tile.head) + tile.m_block;
        if constexpr (kOrdered) wait_for_blocks_before(index, tile);
        const int dq_warp = warpgroup * Traits::kWarpgroupWarps + warp;
        const int row = tile.m_block * Traits::kBlockM + Traits::dq_row(dq_warp);
        if (row < sequence.seqlen_q) add_to_dq<Traits::kHeadDim>(bwd, sequence, tile.head, row, Traits::dq_col(dq_warp), dq, lane);
        if constexpr (kOrdered) let_next_block_add(index);
    }

    // P^T = exp2(score - lse). With a score_mod, s becomes P^T times its derivative, and P^T itself is in p.
    template <bool kMasked>
    __device__ __forceinline__ void to_p(const QueryTile& tile) {
        const Shape& shape = params.bwd.shape;
        const float scale_log2 = ScoreMod::scale_log2(shape);
        const ScoreMod score_mod(shape, control.block.sequence, tile.head);
        const float* lse = row_values(Traits::sLse);
        const int first_query = tile.m_block * Traits::kBlockM + fragment_col(lane, 0);
        const int first_key = control.block.cols.begin + tile_key();
        uint32_t seen[2];  // for each of the thread's keys, a bit for each of its queries
        if constexpr (kMasked) {
            const Visibility sees(shape, control.block.sequence);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = first_key + fragment_row(lane, half);
                const Range queries = key < control.block.cols.end ? sees.queries_of({key, key + 1}) : Range{0, 0};
                seen[half] = columns_in(queries, first_query);
            }
        }
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) {
            float derivative[2][4];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int j = 2 * step + c;
                const float2 lse_j = *reinterpret_cast<const float2*>(lse + 8 * j);
                const float lse_log2[2] = {lse_j.x * kLog2e, lse_j.y * kLog2e};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& x = s.x[0][j][e];
                    x = score_mod.apply(x, first_query + 8 * j + e % 2, first_key + fragment_row(lane, e / 2), derivative[c][e]);
                    x = weight_of(x, scale_log2, lse_log2[e % 2]);
                    if (kMasked && (seen[e / 2] & 1u << (2 * j + e % 2)) == 0) x = 0.f;
                }
            }
            if constexpr (!ScoreMod::kIdentity) {
                to_a_operand<T>(p[step], s.x[0], step);
#pragma unroll
                for (int c = 0; c < 2; ++c)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s.x[0][2 * step + c][e] *= derivative[c][e];
            }
        }
    }

    // dS^T = P^T (dP^T - delta). P^T and dS^T are rounded last, when fewer registers are in use.
    __device__ __forceinline__ void to_ds() {
        const float* delta = row_values(Traits::sDelta);
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j) {
            const float2 delta_j = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
            for (int e = 0; e < 4; ++e) dp.x[0][j][e] = ds_of(s.x[0][j][e], dp.x[0][j][e], e % 2 ? delta_j.y : delta_j.x);
        }
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) {
            if constexpr (ScoreMod::kIdentity) to_a_operand<T>(p[step], s.x[0], step);
            to_a_operand<T>(ds[step], dp.x[0], step);
        }
    }

    // dS^T into shared memory, for the dq of all consumers.
    __device__ __forceinline__ void store_ds() {
        mbarrier_wait(shared_address(&control.ds_empty[ds_ring.stage()]), ds_ring.parity() ^ 1);
        const uint32_t to = shared + Traits::sDs + ds_ring.stage() * TileDs::kBytes + TileDs::offset(tile_key() + lane % 16, lane / 16);
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) stmatrix_x4(TileDs::advance(to, 2 * step), ds[step]);
        fence_proxy_async();
        release(control.ds_full[ds_ring.stage()]);
    }

    // One step of the main loop. `before`: the tile of the step before, whose dq is computed here.
    __device__ __forceinline__ void step(bool first, QueryTile& before) {
        const uint32_t q = Traits::sQ + ring.stage() * TileQ::kBytes, do_ = Traits::sDo + ring.stage() * TileQ::kBytes;
        const uint32_t q_full = shared_address(&control.q_full[ring.stage()]), do_full = shared_address(&control.do_full[ring.stage()]);
        const BwdStep& info = control.steps[ring.stage()];
        mbarrier_wait(q_full, ring.parity());
        if (info.rows < Traits::kBlockM) {
            mbarrier_wait(do_full, ring.parity());
            clear_tail<TileQ>(q, info.rows);
            clear_tail<TileQ>(do_, info.rows);
            tails_cleared();
        }
        start_product(s, Traits::sK, q);
        mbarrier_wait(do_full, ring.parity());
        if (!Traits::kDvFirst) start_product(dp, Traits::sV, do_);
        wgmma_wait<Traits::kDvFirst ? 0 : 1>();
        wgmma_arrived(s);
        if (info.hides >> warpgroup & 1) {
            to_p<true>(info.tile);
        } else {
            to_p<false>(info.tile);
        }
        if constexpr (Traits::kDvFirst) {
            start_sum(dv, p, do_);
            wgmma_wait<0>();
            wgmma_arrived(dv);
            start_product(dp, Traits::sV, do_);
        }
        wgmma_wait<0>();
        wgmma_arrived(dp);
        to_ds();
        store_ds();
        const DsRing ds_before{ds_ring.passed - 1};
        if (!Traits::kDvFirst) start_sum(dv, p, do_);
        start_dq(ds_before, !first);
        start_sum(dk, ds, q);
        wgmma_wait<1>();
        wgmma_arrived(dv);
        wgmma_arrived(dq);
        release(control.do_empty[ring.stage()]);
        if (!first) add_dq(ds_before, before);
        before = info.tile;
        wgmma_wait<0>();
        wgmma_arrived(dk);
        release(control.q_empty[ring.stage()]);
        ring.advance();
        ds_ring.advance();
    }

    // Writes this warp's keys of dk, or of dv.
    __device__ __forceinline__ void write(void* to, const Accumulator<1, Traits::kDTiles>& x) const {
        const BwdBlock& block = control.block;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = block.cols.begin + tile_key() + fragment_row(lane, half);
            T* row = row_of<T>(to, params.bwd.dk_strides, block.sequence.batch, block.sequence.first_k + key, block.head_k);
            store_row(row, x.x[0], half, params.bwd.shape.head_dim, key < block.cols.end, lane);
        }
    }

    __device__ __forceinline__ void walk_queries(int steps) {
        const int keys = control.block.cols.end - control.block.cols.begin;
        mbarrier_wait(shared_address(&control.keys_full), 0);
        if (keys < Traits::kBlockN) {
            clear_tail<TileK>(Traits::sK, keys);
            clear_tail<TileK>(Traits::sV, keys);
            tails_cleared();
        }
        QueryTile before{};
#pragma unroll 1
        for (int i = 0; i < steps; ++i) step(i == 0, before);
        const DsRing last{ds_ring.passed - 1};
        start_dq(last, true);
        wgmma_wait<0>();
        wgmma_arrived(dq);
        add_dq(last, before);
    }

    __device__ __forceinline__ void run() {
        dk.clear();
        dv.clear();
        dq.clear();
        const int steps = control.block.steps();
        if (steps > 0) walk_queries(steps);
        dk.scale(params.bwd.softmax_scale);
        write(params.bwd.dk, dk);
        write(params.bwd.dv, dv);
    }
};

}  // namespace fa2::sm90
