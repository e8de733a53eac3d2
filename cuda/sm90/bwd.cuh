// dq, dk and dv on wgmma, fed by TMA. Persistent: a thread block takes work tile after work tile.
//
// Work       a tile: kBlockN keys of one key head against every tile of queries that sees them, of every query head of the group; P is
//            recomputed from lse. This comment describes the kernels up to head_dim 128 (bwd_consumer.cuh). Above, two blocks work
//            together: bwd_cluster_consumer.cuh says what is different.
// Warps      warpgroup 0 is the producer: one warp takes work tiles and loads, one loads lse and delta, two add dq to dq_accum. Each
//            consumer warpgroup owns 64 keys. It computes S^T = k q^T and dP^T = v do^T, so P^T and dS^T are already the A operands of
//            dv += P^T do and dk += dS^T q. Only dS goes through shared memory, because dq sums over all keys.
// Pipeline   of a consumer: wait q | start S | wait do | start dP | P | dS | start dv, dq of the step before, dk | pass on dq. A consumer
//            waits for the dS of the other one only a step later, so the products of one run during the exponentials of the other. The
//            producer loads the first q and do of the next work tile early.
// Shared     sK, sV one tile each; stages of sQ, sDo, lse and delta; sDs two tiles; sDq one tile of f32; then BwdControl.
// Registers  dk and dv in f32 for the whole work tile; S, dP, dq come and go.
// Global     all blocks of keys add to dq_accum in f32, in any order, or with params.bwd.semaphores in one order.
// Nonfinite  as sm80/bwd.cuh. The tail of a tile is cleared, because it can hold rows of another sequence, or padding.
// Expects    head_dim and head_dim_v <= kHeadDim, multiples of 8; lse and delta of the same inputs; dq_accum of zeros; gridDim.x a
//            multiple of kCluster.
#pragma once

#include "barrier.cuh"
#include "bwd_cluster_consumer.cuh"
#include "bwd_consumer.cuh"
#include "bwd_producer.cuh"
#include "tma.cuh"

namespace fa2::sm90 {

template <typename Traits>
__device__ __forceinline__ void init_barriers(BwdControl<Traits>& control) {
    mbarriers_init(control.tile_full, 1);
    mbarriers_init(control.tile_empty, Traits::kTileReaders);
    mbarrier_init(shared_address(&control.keys_full), 1);
    mbarrier_init(shared_address(&control.keys_empty), Traits::kConsumerWarps);
    // Two arrivals: of the thread that loads the tile, and of the warp that loads lse or delta.
    mbarriers_init(control.q_full, 2);
    mbarriers_init(control.q_empty, Traits::kConsumerWarps);
    mbarriers_init(control.do_full, 2);
    mbarriers_init(control.do_empty, Traits::kConsumerWarps);
    // In a cluster one of the block's warpgroups writes dS, and the warps of both blocks read it.
    mbarriers_init(control.ds_full, Traits::kConsumerWarps / Traits::kCluster);
    mbarriers_init(control.ds_empty, Traits::kConsumerWarps * Traits::kCluster);
    if (Traits::kCluster > 1) {
        mbarriers_init(control.p_full, 1);
        mbarriers_init(control.p_empty, 1);
        mbarrier_init(shared_address(&control.index_full), 1);
        mbarrier_init(shared_address(&control.index_empty), 1);
    }
    mbarrier_fence_init();
}

// kOrdered: consumers add to dq_accum in the order of DqSemaphores. Only clusters use it. Without a cluster the producer adds dq, and tests
// for semaphores at run time.
template <bool kOrdered, typename Traits>
__device__ __forceinline__ void consume(BwdConsumerBase<Traits> base) {
    // Consumers that differ have code of their own, in which the number of the consumer is a constant.
    const bool is_first = base.consumer == 0;
    if constexpr (Traits::kCluster > 1) {
        if (is_first) {
            base.consumer = 0;
            BwdClusterConsumer<Traits, 0, kOrdered>{base}.run();
        } else {
            base.consumer = 1;
            BwdClusterConsumer<Traits, 1, kOrdered>{base}.run();
        }
    } else if constexpr (Traits::dq_cols(0) == Traits::dq_cols(1)) {
        BwdConsumer<Traits, Traits::dq_cols(0)>{base}.run();
    } else if (is_first) {
        base.consumer = 0;
        BwdConsumer<Traits, Traits::dq_cols(0)>{base}.run();
    } else {
        base.consumer = 1;
        BwdConsumer<Traits, Traits::dq_cols(1)>{base}.run();
    }
}

template <typename Traits>
__device__ __forceinline__ void backward(const Sm90BwdParams& params) {
    extern __shared__ __align__(kSharedAlignment) uint8_t bytes[];
    BwdControl<Traits>& control = *reinterpret_cast<BwdControl<Traits>*>(bytes + Traits::sControl);
    static_assert(sizeof(BwdControl<Traits>) <= Traits::kControlBytes, "BwdControl must fit after the tiles");
    const int rank = Traits::kCluster == 1 ? 0 : cluster_rank();
    // All lanes take the warp index from one lane, so the compiler knows that branches on it are uniform.
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    if (threadIdx.x == 0) {
        init_barriers(control);
        tma_prefetch(params.q);
        tma_prefetch(params.k);
        tma_prefetch(params.v);
        tma_prefetch(params.do_);
    }
    if (Traits::kCluster == 1) {
        __syncthreads();
    } else {
        cluster_sync();
    }
    if (warp < kWarpgroupWarps) {
        give_registers<Traits::kProducerRegisters>();
        const BwdProducer<Traits> producer{params, control, bytes, lane};
        if (warp == 0) producer.run();
        if (warp == 1) producer.load_lse_and_delta();
        if constexpr (Traits::kCluster == 1) {
            if (warp == 2) producer.template add_dq<0>();
            if (warp == 3) producer.template add_dq<1>();
        }
    } else {
        take_registers<Traits::kConsumerRegisters>();
        const ConsumerThread thread = Traits::consumer_thread(warp, lane);
        const BwdConsumerBase<Traits> base{thread, params, control, bytes, shared_address(bytes), rank};
        // In a cluster the consumers add dq themselves. So the ordered walk is compiled separately, as in sm80/bwd.cuh.
        if (Traits::kCluster > 1 && params.bwd.semaphores != nullptr) {
            consume<true>(base);
        } else {
            consume<false>(base);
        }
    }
    // A block may exit only after its peer's last write to its shared memory.
    if (Traits::kCluster > 1) {
        __syncwarp();
        cluster_sync();
    }
}

}  // namespace fa2::sm90
