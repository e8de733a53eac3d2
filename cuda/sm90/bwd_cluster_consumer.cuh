// A consumer of the backward for head_dim above 128, where dk and dv of 64 keys fill the registers of both consumers.
//
// Work       a cluster of two thread blocks has 128 keys, each block 64. Consumer 0 computes P^T and dv, consumer 1 dS^T and dk. P goes
//            from one to the other in shared memory, in f32. Each block sends its dS to the other one, and computes half of the columns
//            of dq for all 128 keys. So the cluster adds to dq_accum once, not twice.
// Pipeline   dq one step late, as in bwd_consumer.cuh. Consumer 0 is up to a step ahead of consumer 1.
#pragma once

#include "bwd_block.cuh"
#include "bwd_consumer_base.cuh"
#include "cluster.cuh"

namespace fa2::sm90 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kQStages_, int kDoStages_,
          typename ScoreMod_>
struct BwdTraits<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 2, kQStages_, kDoStages_, ScoreMod_>
    : BwdShape<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 2, kQStages_, kDoStages_, ScoreMod_> {
    using Base = BwdShape<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 2, kQStages_, kDoStages_, ScoreMod_>;
    using typename Base::TileDs;
    using typename Base::TileK;
    using typename Base::TileQ;
    using Base::kBlockCols;
    using Base::kBlockM;
    using Base::kBlockN;
    using Base::kDoStages;
    using Base::kDsStages;
    using Base::kPanel;
    using Base::kQStages;
    using Base::kRowValuesBytes;
    using TilePeerK = Tile<kBlockN, kBlockCols, kPanel>;  // the peer's keys, in the columns of this block's dq

    // Both consumers have all keys of the block.
    __device__ __forceinline__ static int first_key(int) { return 0; }
    __device__ __forceinline__ static Range peer_keys(const BwdTile& tile, int rank) {
        return tile_range(tile.n_block * Base::kClusterKeys + (rank ^ 1) * kBlockN, kBlockN, tile.sequence.seqlen_k);
    }

    // Byte offsets in shared memory, as in bwd_consumer.cuh.
    static constexpr int kKeysBytes = 2 * TileK::kBytes + TilePeerK::kBytes;  // k, v, then the peer's k
    static constexpr int kDsBytes = TileDs::kBytes / Base::kCluster;  // dS^T of one block
    static constexpr uint32_t sK = 0, sV = TileK::kBytes, sPeerK = sV + TileK::kBytes, sQ = kKeysBytes;
    static constexpr uint32_t sDo = sQ + kQStages * TileQ::kBytes, sDs = sDo + kDoStages * TileQ::kBytes;
    static constexpr uint32_t sP = sDs + kDsStages * TileDs::kBytes, sLseLog2 = sP + kBlockN * kBlockM * sizeof(float);
    static constexpr uint32_t sDelta = sLseLog2 + kQStages * kRowValuesBytes, sControl = sDelta + kDoStages * kRowValuesBytes;
    static constexpr int kSharedBytes = sControl + Base::kControlBytes;

    static_assert(kBlockM == kWarpgroupRows && kBlockN == kWarpgroupRows, "a consumer has a tile of 64 x 64");
    static_assert(kSharedBytes <= kMaxSharedBytes, "a thread block gets no more shared memory");
};

// kConsumer: 0 computes P^T and dv, 1 dS^T and dk. kOrdered: adds to dq_accum in the order of DqSemaphores.
template <typename Traits, int kConsumer, bool kOrdered>
struct BwdClusterConsumer : BwdConsumerBase<Traits> {
    using Base = BwdConsumerBase<Traits>;
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
    using Base::rank;
    using Base::shared;
    using Base::walk;
    using Base::warp;

    static constexpr int kDqCols = kConsumer == 0 ? Traits::kFirstDqCols : Traits::kBlockCols - Traits::kFirstDqCols;
    static constexpr int kDqCol = kConsumer == 0 ? 0 : Traits::kFirstDqCols;  // the first one, in the block's columns

    QueryStep before;                     // the step before this one
    typename Base::SumTile sum;           // dv of consumer 0, dk of consumer 1
    typename Base::ScoreTile x;           // consumer 0: S^T, then P^T. Consumer 1: dP^T, then dS^T
    typename Base::RoundedTile rounded;   // P^T, or dS^T
    Accumulator<1, kDqCols / 8> dq;

    __device__ __forceinline__ int peer() const { return rank ^ 1; }

    // Starts this consumer's part of dq = dS k, as in bwd_consumer.cuh: first this block's keys, then the peer's.
    __device__ __forceinline__ void start_dq(DsRing at, bool exists) {
        if (exists) wait_full(control.ds_full, at);
        fence_proxy_async();
        constexpr int kSteps = Traits::kBlockN / 16;
        const Operand<TileDs, Order::kTransposed> a(Base::operand(Traits::sDs + at.stage() * TileDs::kBytes));
        const Operand<TileK, Order::kTransposed> b(Base::operand(Traits::sK), rank * Traits::kBlockCols + kDqCol);
        const Operand<TilePeerK, Order::kTransposed> peer_b(Base::operand(Traits::sPeerK), kDqCol);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kCluster * kSteps; ++step)
            WgmmaShared<T, kDqCols, true, true>::step(dq.x[0], a.at(step), step < kSteps ? b.at(step) : peer_b.at(step - kSteps), step > 0);
        wgmma_commit();
    }

    // Adds dq, which has arrived, to dq_accum.
    __device__ __forceinline__ void pass_on_dq(DsRing at) {
        const uint32_t empty = shared_address(&control.ds_empty[at.stage()]);
        Base::arrive(control.ds_empty[at.stage()]);
        if (lane == 0) mbarrier_arrive_peer(peer_address(empty, peer()));
        const BwdParams& bwd = params.bwd;
        const Sequence& sequence = Base::tile().sequence;
        const int row = before.m_block * Traits::kBlockM + warp * kWarpRows;
        const DqSemaphores semaphores{bwd.semaphores};
        const int64_t index = dq_tile_index<Traits::kBlockM>(bwd, sequence, before.head, before.m_block);
        if constexpr (kOrdered) {
            const int additions = additions_before<Traits>(bwd.shape, Base::tile(), before);
            if (warp == 0 && lane == 0) semaphores.poll(index, additions);
            bar_sync<kWarpgroupThreads>(kOneConsumer + kConsumer);
        }
        const int col = rank * Traits::kBlockCols + kDqCol;
        if (row < sequence.seqlen_q) add_to_dq<Traits::kHeadDim>(bwd, sequence, before.head, row, col, dq, lane);
        if constexpr (kOrdered) {
            bar_sync<kWarpgroupThreads>(kOneConsumer + kConsumer);
            if (warp == 0 && lane == 0) semaphores.post(index);
        }
    }

    // P has one stage.
    __device__ __forceinline__ Ring<1> p_ring() const { return {q_ring.passed}; }

    // This thread's P, for the thread of the other consumer with the same number.
    __device__ __forceinline__ float4* p() const { return reinterpret_cast<float4*>(bytes + Traits::sP) + warp * kWarpSize + lane; }

    // A step of consumer 0: P and dv. After it, as after step_of_ds(), dq of the step before is in registers.
    __device__ __forceinline__ void step_of_p(bool first) {
        RowValues lse_log2;
        Base::wait_for_q();
        Base::start_product(x, Traits::sK, Base::q());
        Base::load_lse_log2(lse_log2);
        wait_empty(&control.p_empty[warp], p_ring());
        wgmma_wait<0>();
        wgmma_arrived(x);
        if (walk.masked()) {
            Base::template to_p<true, true>(x, rounded, lse_log2);
        } else {
            Base::template to_p<false, true>(x, rounded, lse_log2);
        }
        Base::arrive(control.q_empty[q_ring.stage()]);
#pragma unroll
        for (int j = 0; j < Traits::kNTiles; ++j)
            p()[j * kWarpgroupThreads] = make_float4(x.x[0][j][0], x.x[0][j][1], x.x[0][j][2], x.x[0][j][3]);
        Base::arrive(control.p_full[warp]);
        Base::wait_for_do();
        Base::start_sum(sum, rounded, Base::do_());
        start_dq(ds_ring.before(), !first);
        wgmma_wait<1>();
        wgmma_arrived(sum);
        Base::arrive(control.do_empty[Base::do_ring.stage()]);
        wgmma_wait<0>();
        wgmma_arrived(dq);
    }

    // Sends this warp's keys of dS^T to the peer. They are contiguous.
    __device__ __forceinline__ void send_ds() const {
        constexpr int kBytes = Traits::kDsBytes / kWarpgroupWarps;
        const uint32_t full = shared_address(&control.ds_full[ds_ring.stage()]);
        const uint32_t from = shared + Traits::sDs + ds_ring.stage() * TileDs::kBytes + warp * kBytes;
        __syncwarp();
        if (lane == 0) {
            fence_proxy_async();
            mbarrier_arrive_expect(full, kBytes);  // for what the peer's warp sends
            copy_to_peer(peer_address(from + Traits::kDsBytes, peer()), from, kBytes, peer_address(full, peer()));
        }
        __syncwarp();
    }

    // A step of consumer 1: dS and dk.
    __device__ __forceinline__ void step_of_ds(bool first) {
        RowValues delta;
        Base::wait_for_q();
        Base::wait_for_do();
        Base::start_product(x, Traits::sV, Base::do_());
        Base::load_delta(delta);
        wait_empty(control.ds_empty, ds_ring);
        wgmma_wait<0>();
        wgmma_arrived(x);
        wait_full(&control.p_full[warp], p_ring());
        Base::to_ds(x, rounded, delta, [&](int j) { return p()[j * kWarpgroupThreads]; });
        Base::arrive(control.p_empty[warp]);
        Base::arrive(control.do_empty[Base::do_ring.stage()]);
        Base::store_ds(rounded);
        send_ds();
        Base::start_sum(sum, rounded, Base::q());
        start_dq(ds_ring.before(), !first);
        wgmma_wait<1>();
        wgmma_arrived(sum);
        Base::arrive(control.q_empty[q_ring.stage()]);
        wgmma_wait<0>();
        wgmma_arrived(dq);
    }

    __device__ __forceinline__ void step(bool first) {
        if constexpr (kConsumer == 0) {
            step_of_p(first);
        } else {
            step_of_ds(first);
        }
        if (!first) pass_on_dq(ds_ring.before());
        before = walk.queries;
        Base::advance();
    }

    __device__ __forceinline__ void clear_key_tails() const {
        const int rows = Base::tile().cols.size(), peer_rows = Traits::peer_keys(Base::tile(), rank).size();
        if (rows == Traits::kBlockN && peer_rows == Traits::kBlockN) return;
        Base::template clear_tail<TileK>(Traits::sK, rows);
        Base::template clear_tail<TileK>(Traits::sV, rows);
        Base::template clear_tail<TilePeerK>(Traits::sPeerK, peer_rows);
        Base::tails_cleared();
    }

    __device__ __forceinline__ void clear_sums() { sum.clear(); }

    __device__ __forceinline__ void write_sums() {
        if constexpr (kConsumer == 0) {
            Base::write_dv(sum);
        } else {
            Base::write_dk(sum);
        }
    }

    __device__ __forceinline__ void run() { Base::run(*this); }
};

}  // namespace fa2::sm90
