// A consumer warpgroup of the backward for head_dim above 128, where dk and dv of 64 keys fill the registers of two warpgroups.
//
// Work       a cluster of two thread blocks has 128 keys, each block 64. Warpgroup 0 computes P^T and dv, warpgroup 1 dS^T and dk. P goes
//            from one to the other in shared memory, in f32. Each block sends its dS to the other one, and computes half of the columns
//            of dq for all 128 keys. So the cluster adds to dq_accum once, not twice.
// Pipeline   dq one step late, as in bwd_consumer.cuh. Warpgroup 0 is up to a step ahead of warpgroup 1.
#pragma once

#include "bwd_block.cuh"
#include "bwd_warpgroup.cuh"
#include "cluster.cuh"

namespace fa2::sm90 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kQStages_, int kDoStages_, typename ScoreMod_>
struct BwdTraits<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 2, kQStages_, kDoStages_, ScoreMod_>
    : BwdShape<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 2, kQStages_, kDoStages_, ScoreMod_> {
    using Base = BwdShape<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 2, kQStages_, kDoStages_, ScoreMod_>;
    using typename Base::TileDs;
    using typename Base::TileK;
    using typename Base::TileQ;
    using Base::kBlockCols;
    using Base::kBlockM;
    using Base::kBlockN;
    using Base::kConsumers;
    using Base::kDoStages;
    using Base::kDsStages;
    using Base::kPanel;
    using Base::kQStages;
    using Base::kStatBytes;
    using TilePeerK = Tile<kBlockN, kBlockCols, kPanel>;  // the peer's keys, in the columns of this block's dq

    // Both consumers have all keys of the block.
    __device__ __forceinline__ static int first_key(int) { return 0; }
    __device__ __forceinline__ static Range peer_keys(const BwdBlock& block, int rank) {
        return tile_range(block.n_block * Base::kClusterKeys + (rank ^ 1) * kBlockN, kBlockN, block.sequence.seqlen_k);
    }

    // Columns of dq of warpgroup 0: half of the block's, rounded up to panels. Warpgroup 1 has the others.
    static constexpr int kFirstDqCols = (kBlockCols / kPanel + 1) / kConsumers * kPanel;
    static constexpr int kDqParts = Base::kCluster * kConsumers;  // additions of a cluster to a tile

    // Offsets in shared memory, as in bwd_consumer.cuh.
    static constexpr int kDsBytes = TileDs::kBytes / Base::kCluster;  // dS^T of one block
    static constexpr uint32_t sK = 0, sV = TileK::kBytes, sPeerK = sV + TileK::kBytes, sQ = sPeerK + TilePeerK::kBytes;
    static constexpr uint32_t sDo = sQ + kQStages * TileQ::kBytes, sDs = sDo + kDoStages * TileQ::kBytes;
    static constexpr uint32_t sP = sDs + kDsStages * TileDs::kBytes, sLse = sP + kBlockN * kBlockM * sizeof(float);
    static constexpr uint32_t sDelta = sLse + kQStages * kStatBytes, sControl = sDelta + kDoStages * kStatBytes;
    static constexpr int kSharedBytes = sControl + Base::kControlBytes;
    static constexpr int kKeysBytes = 2 * TileK::kBytes + TilePeerK::kBytes;

    static_assert(kBlockM == Base::kWarpgroupRows && kBlockN == Base::kWarpgroupRows, "a consumer has a tile of 64 x 64");
    static_assert(kSharedBytes <= kMaxSharedBytes, "a thread block gets no more shared memory");
};

// kWarpgroup: 0 computes P^T and dv, 1 dS^T and dk. kOrdered: adds to dq_accum in the order of DqSemaphores.
template <typename Traits, int kWarpgroup, bool kOrdered>
struct BwdClusterConsumer : BwdWarpgroup<Traits> {
    using Base = BwdWarpgroup<Traits>;
    using typename Base::RowValues;
    using T = typename Traits::T;
    using TileK = typename Traits::TileK;
    using TilePeerK = typename Traits::TilePeerK;
    using TileDs = typename Traits::TileDs;
    using DsRing = Ring<Traits::kDsStages>;
    using Base::bytes;
    using Base::control;
    using Base::ds_ring;
    using Base::lane;
    using Base::params;
    using Base::q_ring;
    using Base::shared;
    using Base::walk;
    using Base::warp;

    static constexpr int kDqCols = kWarpgroup == 0 ? Traits::kFirstDqCols : Traits::kBlockCols - Traits::kFirstDqCols;
    static constexpr int kDqCol = kWarpgroup == 0 ? 0 : Traits::kFirstDqCols;  // the first one, in the block's columns

    int rank;                             // of this block in its cluster
    QueryTile before;                     // the tile of the step before
    typename Base::SumTile sum;           // dv, or dk
    typename Base::ScoreTile x;           // S^T, then P^T; or dP^T, then dS^T
    typename Base::RoundedTile rounded;   // P^T, or dS^T
    Accumulator<1, kDqCols / 8> dq;

    __device__ __forceinline__ int peer() const { return rank ^ 1; }

    // Starts this warpgroup's part of dq = dS k, as in bwd_consumer.cuh: first this block's keys, then the peer's.
    __device__ __forceinline__ void start_dq(DsRing at, bool exists) {
        if (exists) mbarrier_wait(shared_address(&control.ds_full[at.stage()]), at.parity());
        constexpr int kSteps = Traits::kBlockN / 16;
        const Operand<TileDs, Order::kTransposed> a(Base::operand(Traits::sDs + at.stage() * TileDs::kBytes));
        const Operand<TileK, Order::kTransposed> b(Base::operand(Traits::sK), rank * Traits::kBlockCols + kDqCol);
        const Operand<TilePeerK, Order::kTransposed> peer_b(Base::operand(Traits::sPeerK), kDqCol);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2 * kSteps; ++step)
            WgmmaShared<T, kDqCols, true, true>::step(dq.x[0], a.at(step), step < kSteps ? b.at(step) : peer_b.at(step - kSteps), step > 0);
        wgmma_commit();
    }

    // Adds dq, which has arrived, to dq_accum.
    __device__ __forceinline__ void add_dq(DsRing at) {
        const uint32_t empty = shared_address(&control.ds_empty[at.stage()]);
        Base::release(control.ds_empty[at.stage()]);
        if (lane == 0) mbarrier_arrive_peer(peer_address(empty, peer()));
        const BwdParams& bwd = params.bwd;
        const Sequence& sequence = control.block.sequence;
        const int first_row = before.m_block * Traits::kBlockM, row = first_row + warp * Traits::kWarpRows;
        const DqSemaphores semaphores{bwd.semaphores};
        const int64_t index = first_row_block(bwd.dq_tiles, Traits::kBlockM, bwd.shape, sequence, before.head) + before.m_block;
        if constexpr (kOrdered) {
            const Range rows = tile_range(first_row, Traits::kBlockM, sequence.seqlen_q);
            const Visibility sees(bwd.shape, sequence);
            const int clusters = DqSemaphores::blocks_before(sees, rows, control.block.n_block, Traits::kClusterKeys);
            if (warp == 0 && lane == 0) semaphores.poll(index, Traits::kDqParts * clusters);
            bar_sync<Traits::kWarpgroupThreads>(kOneWarpgroup + kWarpgroup);
        }
        const int col = rank * Traits::kBlockCols + kDqCol;
        if (row < sequence.seqlen_q) add_to_dq<Traits::kHeadDim>(bwd, sequence, before.head, row, col, dq, lane);
        if constexpr (kOrdered) {
            bar_sync<Traits::kWarpgroupThreads>(kOneWarpgroup + kWarpgroup);
            if (warp == 0 && lane == 0) semaphores.post(index);
        }
    }

    // This thread's P, for the thread of the other warpgroup with the same number.
    __device__ __forceinline__ float4* p() const { return reinterpret_cast<float4*>(bytes + Traits::sP) + warp * kWarpSize + lane; }

    // P and dv. Both steps return when dq of the step before has arrived.
    __device__ __forceinline__ void step_of_p(bool first) {
        RowValues lse;
        Base::wait_for_q();
        Base::start_product(x, Traits::sK, Base::q());
        Base::load_lse(lse);
        mbarrier_wait(shared_address(&control.p_empty[warp]), q_ring.passed % 2 ^ 1);
        wgmma_wait<0>();
        wgmma_arrived(x);
        if (walk.masked()) {
            Base::template to_p<true, true>(x, rounded, lse);
        } else {
            Base::template to_p<false, true>(x, rounded, lse);
        }
        Base::release(control.q_empty[q_ring.stage()]);
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j)
            p()[j * Traits::kWarpgroupThreads] = make_float4(x.x[0][j][0], x.x[0][j][1], x.x[0][j][2], x.x[0][j][3]);
        Base::release(control.p_full[warp]);
        Base::wait_for_do();
        Base::start_sum(sum, rounded, Base::do_());
        start_dq(ds_ring.before(), !first);
        wgmma_wait<1>();
        wgmma_arrived(sum);
        Base::release(control.do_empty[Base::do_ring.stage()]);
        wgmma_wait<0>();
        wgmma_arrived(dq);
    }

    // dS^T = P^T (dP^T - delta)
    __device__ __forceinline__ void to_ds(const RowValues& delta) {
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j) {
            const float4 p_j = p()[j * Traits::kWarpgroupThreads];
            x.x[0][j][0] = ds_of(p_j.x, x.x[0][j][0], delta[j].x);
            x.x[0][j][1] = ds_of(p_j.y, x.x[0][j][1], delta[j].y);
            x.x[0][j][2] = ds_of(p_j.z, x.x[0][j][2], delta[j].x);
            x.x[0][j][3] = ds_of(p_j.w, x.x[0][j][3], delta[j].y);
        }
#pragma unroll
        for (int step = 0; step < Traits::kKSteps; ++step) to_a_operand<T>(rounded[step], x.x[0], step);
    }

    // Sends this warp's keys of dS^T to the peer. They are contiguous.
    __device__ __forceinline__ void send_ds() const {
        constexpr int kBytes = Traits::kDsBytes / Traits::kWarpgroupWarps;
        const uint32_t full = shared_address(&control.ds_full[ds_ring.stage()]);
        const uint32_t from = shared + Traits::sDs + ds_ring.stage() * TileDs::kBytes + warp * kBytes;
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive_expect(full, kBytes);  // for what the peer's warp sends
            copy_to_peer(peer_address(from + Traits::kDsBytes, peer()), from, kBytes, peer_address(full, peer()));
        }
        __syncwarp();
    }

    // dS and dk.
    __device__ __forceinline__ void step_of_ds(bool first) {
        RowValues delta;
        Base::wait_for_q();
        Base::wait_for_do();
        Base::start_product(x, Traits::sV, Base::do_());
        Base::load_delta(delta);
        mbarrier_wait(shared_address(&control.ds_empty[ds_ring.stage()]), ds_ring.parity() ^ 1);
        wgmma_wait<0>();
        wgmma_arrived(x);
        mbarrier_wait(shared_address(&control.p_full[warp]), q_ring.passed % 2);
        to_ds(delta);
        Base::release(control.p_empty[warp]);
        Base::release(control.do_empty[Base::do_ring.stage()]);
        Base::store_ds(rounded);
        send_ds();
        Base::start_sum(sum, rounded, Base::q());
        start_dq(ds_ring.before(), !first);
        wgmma_wait<1>();
        wgmma_arrived(sum);
        Base::release(control.q_empty[q_ring.stage()]);
        wgmma_wait<0>();
        wgmma_arrived(dq);
    }

    __device__ __forceinline__ void walk_queries(int steps) {
        const auto count = [](const Range& keys) { return keys.empty() ? 0 : keys.end - keys.begin; };
        const int keys = count(control.block.cols), peer_keys = count(Traits::peer_keys(control.block, rank));
        mbarrier_wait(shared_address(&control.keys_full), 0);
        if (keys < Traits::kBlockN || peer_keys < Traits::kBlockN) {
            Base::template clear_tail<TileK>(Traits::sK, keys);
            Base::template clear_tail<TileK>(Traits::sV, keys);
            Base::template clear_tail<TilePeerK>(Traits::sPeerK, peer_keys);
            Base::tails_cleared();
        }
        Base::start_walk();
#pragma unroll 1
        for (int i = 0; i < steps; ++i) {
            if constexpr (kWarpgroup == 0) {
                step_of_p(i == 0);
            } else {
                step_of_ds(i == 0);
            }
            if (i > 0) add_dq(ds_ring.before());
            before = walk.tile;
            Base::advance();
        }
        start_dq(ds_ring.before(), true);
        wgmma_wait<0>();
        wgmma_arrived(dq);
        add_dq(ds_ring.before());
    }

    __device__ __forceinline__ void run() {
        sum.clear();
        dq.clear();
        const int steps = control.block.steps();
        if (steps > 0) walk_queries(steps);
        if constexpr (kWarpgroup == 1) sum.scale(params.bwd.softmax_scale);
        Base::write(kWarpgroup == 0 ? params.bwd.dv : params.bwd.dk, sum);
    }
};

}  // namespace fa2::sm90
