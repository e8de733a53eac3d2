// A consumer warpgroup of the backward: dk and dv of its 64 keys, and its part of dq.
#pragma once

#include "bwd_block.cuh"
#include "bwd_consumer_base.cuh"

namespace fa2::sm90 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kQStages_, int kDoStages_,
          typename ScoreMod_>
struct BwdTraits<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 1, kQStages_, kDoStages_, ScoreMod_>
    : BwdShape<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 1, kQStages_, kDoStages_, ScoreMod_> {
    using Base = BwdShape<T_, kHeadDim_, kBlockM_, kBlockN_, kWarps_, 1, kQStages_, kDoStages_, ScoreMod_>;
    using typename Base::TileDs;
    using typename Base::TileK;
    using typename Base::TileQ;
    using Base::kBlockM;
    using Base::kConsumers;
    using Base::kDoStages;
    using Base::kDsStages;
    using Base::kHeadDim;
    using Base::kQStages;
    using Base::kRowValuesBytes;

    // A consumer's first key in the tile.
    __device__ __forceinline__ static int first_key(int consumer) { return consumer * kWarpgroupRows; }

    // dq of a tile of queries: the consumers split its rows if each gets 64, otherwise the panels of its columns.
    static constexpr bool kDqSplitsRows = kBlockM == kWarpgroupRows * kConsumers;
    __device__ __forceinline__ static constexpr int dq_cols(int consumer) {
        return kDqSplitsRows ? kHeadDim : consumer == 0 ? Base::kFirstDqCols : kHeadDim - Base::kFirstDqCols;
    }
    __device__ __forceinline__ static int dq_row(int consumer) { return kDqSplitsRows ? consumer * kWarpgroupRows : 0; }
    __device__ __forceinline__ static int dq_col(int consumer) { return kDqSplitsRows ? 0 : consumer * Base::kFirstDqCols; }

    // Byte offsets in shared memory. For buffers that exist once per stage, the offset is that of stage 0.
    static constexpr int kKeysBytes = 2 * TileK::kBytes;  // k, then v
    static constexpr uint32_t sK = 0, sV = TileK::kBytes, sQ = kKeysBytes, sDo = sQ + kQStages * TileQ::kBytes;
    static constexpr uint32_t sDs = sDo + kDoStages * TileQ::kBytes, sDq = sDs + kDsStages * TileDs::kBytes;  // sDq: row groups of dq_accum
    static constexpr uint32_t sLseLog2 = sDq + kBlockM * kHeadDim * sizeof(float), sDelta = sLseLog2 + kQStages * kRowValuesBytes;
    static constexpr uint32_t sControl = sDelta + kDoStages * kRowValuesBytes;
    static constexpr int kSharedBytes = sControl + Base::kControlBytes;

    // kDvFirst: in tiles of more than 64 queries, a score_mod needs the registers of dP while it runs. So dv comes before dP.
    // kReadsEarly: in smaller tiles there are registers to read lse and delta before the products arrive.
    static constexpr bool kDvFirst = !ScoreMod_::kIdentity && kBlockM > kWarpgroupRows;
    static constexpr bool kReadsEarly = kBlockM <= kWarpgroupRows;

    static constexpr int kDqThreads = kWarpgroupThreads + kWarpSize;  // a consumer, and the warp that adds its dq

    static_assert(Base::kBlockN == kConsumers * kWarpgroupRows, "a consumer owns 64 keys");
    static_assert(kDqSplitsRows || kBlockM == kWarpgroupRows, "a consumer computes 64 rows of dq");
    static_assert(kSharedBytes <= kMaxSharedBytes, "a thread block gets no more shared memory");
};

// kDqCols: Traits::dq_cols() of this consumer.
template <typename Traits, int kDqCols>
struct BwdConsumer : BwdConsumerBase<Traits> {
    using Base = BwdConsumerBase<Traits>;
    using typename Base::RowValues;
    using T = typename Traits::T;
    using TileK = typename Traits::TileK;
    using TileDs = typename Traits::TileDs;
    using DsRing = Ring<Traits::kDsStages>;
    static constexpr int kDqThreads = Traits::kDqThreads;
    using Base::bytes;
    using Base::control;
    using Base::ds_ring;
    using Base::lane;
    using Base::params;
    using Base::walk;
    using Base::consumer;
    using Base::warp;

    typename Base::SumTile dk, dv;
    typename Base::ScoreTile s, dp;
    typename Base::RoundedTile p, ds;
    Accumulator<1, kDqCols / 8> dq;

    // Starts this consumer's part of dq = dS k, with the dS of all consumers at ring position `at`. In the first step there is no
    // dS yet (exists: false). The product then reads what the stage holds, and nothing uses its result. So no branch surrounds the wgmmas.
    // With one, ptxas would run them one by one.
    __device__ __forceinline__ void start_dq(DsRing at, bool exists) {
        if (exists) wait_full(control.ds_full, at);
        fence_proxy_async();
        const Operand<TileDs, Order::kTransposed> a(Base::operand(Traits::sDs + at.stage() * TileDs::kBytes), Traits::dq_row(consumer));
        const Operand<TileK, Order::kTransposed> b(Base::operand(Traits::sK), Traits::dq_col(consumer));
        start_multiply<T, Traits::kBlockN / 16>(dq, a, b);
    }

    // Passes dq, which has arrived, to the warp that adds it to dq_accum.
    __device__ __forceinline__ void pass_on_dq(DsRing at) {
        Base::arrive(control.ds_empty[at.stage()]);
        bar_sync<kDqThreads>(kDqRead + consumer);
        const int row = Traits::dq_row(consumer) + warp * kWarpRows;
        store_dq<Traits::kHeadDim>(reinterpret_cast<float*>(bytes + Traits::sDq), row, Traits::dq_col(consumer), dq, lane);
        bar_arrive<kDqThreads>(kDqWritten + consumer);
    }

    // One step of the main loop. It also computes the dq of the step before.
    __device__ __forceinline__ void step(bool first) {
        const uint32_t q = Base::q(), do_ = Base::do_();
        RowValues lse_log2, delta;
        Base::wait_for_q();
        Base::start_product(s, Traits::sK, q);
        if (Traits::kReadsEarly) Base::load_lse_log2(lse_log2);
        Base::wait_for_do();
        if (!Traits::kDvFirst) Base::start_product(dp, Traits::sV, do_);
        wgmma_wait<Traits::kDvFirst ? 0 : 1>();
        wgmma_arrived(s);
        if (!Traits::kReadsEarly) Base::load_lse_log2(lse_log2);
        if (walk.masked()) {
            Base::template to_p<true, !Traits::ScoreMod::kIdentity>(s, p, lse_log2);
        } else {
            Base::template to_p<false, !Traits::ScoreMod::kIdentity>(s, p, lse_log2);
        }
        if (Traits::kReadsEarly) Base::load_delta(delta);
        wait_empty(control.ds_empty, ds_ring);
        if constexpr (Traits::kDvFirst) {
            Base::start_sum(dv, p, do_);
            wgmma_wait<0>();
            wgmma_arrived(dv);
            Base::start_product(dp, Traits::sV, do_);
        }
        wgmma_wait<0>();
        wgmma_arrived(dp);
        if (!Traits::kReadsEarly) Base::load_delta(delta);
        Base::to_ds(dp, ds, delta, [&](int j) { return make_float4(s.x[0][j][0], s.x[0][j][1], s.x[0][j][2], s.x[0][j][3]); });
        // Without a score_mod, P^T is rounded only here, because fewer registers are in use than in to_p().
        if constexpr (Traits::ScoreMod::kIdentity) Base::round(s, p);
        Base::store_ds(ds);
        Base::arrive(control.ds_full[ds_ring.stage()]);
        if (!Traits::kDvFirst) Base::start_sum(dv, p, do_);
        start_dq(ds_ring.before(), !first);
        Base::start_sum(dk, ds, q);
        wgmma_wait<1>();
        wgmma_arrived(dv);
        wgmma_arrived(dq);
        Base::arrive(control.do_empty[Base::do_ring.stage()]);
        if (!first) pass_on_dq(ds_ring.before());
        wgmma_wait<0>();
        wgmma_arrived(dk);
        Base::arrive(control.q_empty[Base::q_ring.stage()]);
        Base::advance();
    }

    __device__ __forceinline__ void clear_key_tails() const {
        const int rows = Base::tile().cols.size();
        if (rows == Traits::kBlockN) return;
        Base::template clear_tail<TileK>(Traits::sK, rows);
        Base::template clear_tail<TileK>(Traits::sV, rows);
        Base::tails_cleared();
    }

    __device__ __forceinline__ void clear_sums() {
        dk.clear();
        dv.clear();
    }

    __device__ __forceinline__ void write_sums() {
        Base::write_dk(dk);
        Base::write_dv(dv);
    }

    __device__ __forceinline__ void run() {
        Base::run(*this);
        bar_sync<kDqThreads>(kDqRead + consumer);  // matches the producer's last arrival, so that the barrier is complete
    }
};

}  // namespace fa2::sm90
