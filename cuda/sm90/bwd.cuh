// dq, dk and dv on wgmma, fed by TMA. One thread block, one (batch, head_k, n_block), every query head of the key head's group.
//
// Work       kBlockN keys against every tile of queries that sees them; P is recomputed from lse.
// Warps      warpgroup 0 is the producer: one thread loads tiles, one warp loads lse and delta. Each consumer warpgroup owns 64 keys. It
//            computes S^T = k q^T and dP^T = v do^T, so P^T and dS^T are already the A operands of dv += P^T do and dk += dS^T q. Only dS
//            goes through shared memory, because dq sums over all keys.
// Pipeline   of a consumer: wait q | start S | wait do | start dP | P | dS | start dv, dq of the step before, dk | add dq. A consumer
//            waits for the dS of the other one only a step later, so the products of one run during the exponentials of the other.
// Shared     sK, sV one tile each, kStages times sQ, sDo, lse and delta, sDs two tiles; then BwdControl.
// Registers  dk and dv in f32 for the whole walk; S, dP, dq come and go.
// Global     all blocks of keys add to dq_accum in f32, in any order, or with params.bwd.semaphores in one order.
// Nonfinite  as sm80/bwd.cuh. The tail of a tile is cleared, because it holds rows of the next packed sequence.
// Expects    head_dim <= kHeadDim, a multiple of 8; lse and delta of the same inputs; dq_accum of zeros.
#pragma once

#include "barrier.cuh"
#include "bwd_consumer.cuh"
#include "bwd_producer.cuh"
#include "tma.cuh"

namespace fa2::sm90 {

template <typename Traits>
__device__ __forceinline__ void init_barriers(BwdControl<Traits>& control) {
    constexpr int kConsumerWarps = Traits::kWarpgroupWarps * Traits::kConsumers;
    mbarrier_init(shared_address(&control.keys_full), 1);
    for (int i = 0; i < Traits::kStages; ++i) {
        // Two arrivals: of the thread that loads the tile, and of the warp that loads lse or delta.
        mbarrier_init(shared_address(&control.q_full[i]), 2);
        mbarrier_init(shared_address(&control.do_full[i]), 2);
        mbarrier_init(shared_address(&control.q_empty[i]), kConsumerWarps);
        mbarrier_init(shared_address(&control.do_empty[i]), kConsumerWarps);
    }
    for (int i = 0; i < Traits::kDsStages; ++i) {
        mbarrier_init(shared_address(&control.ds_full[i]), kConsumerWarps);
        mbarrier_init(shared_address(&control.ds_empty[i]), kConsumerWarps);
    }
    mbarrier_fence_init();
}

template <typename Traits>
__device__ __forceinline__ void backward(const Sm90BwdParams& params) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    BwdControl<Traits>& control = *reinterpret_cast<BwdControl<Traits>*>(bytes + Traits::sControl);
    static_assert(sizeof(BwdControl<Traits>) <= Traits::kControlBytes, "BwdControl must fit after the tiles");
    const Shape& shape = params.bwd.shape;
    const bool ordered = params.bwd.semaphores != nullptr;
    BlockIndex index{int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)};
    if (ordered) index = DqSemaphores{params.bwd.semaphores}.block_index(params.bwd.dq_tiles.count, shape.first_batch, bytes);
    const BwdBlock block = bwd_block<Traits>(shape, index.n_block, index.head_k, shape.first_batch + index.batch);
    if (block.cols.empty()) return;
    // All lanes take the warp index from one lane, so the compiler knows that branches on it are uniform.
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    if (threadIdx.x == 0) {
        control.block = block;
        init_barriers(control);
        tma_prefetch(params.q);
        tma_prefetch(params.k);
        tma_prefetch(params.v);
        tma_prefetch(params.do_);
    }
    __syncthreads();
    if (warp < Traits::kWarpgroupWarps) {
        give_registers<Traits::kProducerRegisters>();
        const BwdProducer<Traits> producer{params, control, bytes, lane};
        if (warp == 0 && lane == 0) producer.load_tiles();
        if (warp == 1) producer.load_lse_and_delta();
        return;
    }
    take_registers<Traits::kConsumerRegisters>();
    const int warpgroup = warp / Traits::kWarpgroupWarps - 1, warp_in_warpgroup = warp % Traits::kWarpgroupWarps;
    // A walk of its own for the order, as in sm80/bwd.cuh.
    if (ordered) {
        BwdConsumer<Traits, true>{params, control, bytes, shared_address(bytes), warpgroup, warp_in_warpgroup, lane}.run();
    } else {
        BwdConsumer<Traits, false>{params, control, bytes, shared_address(bytes), warpgroup, warp_in_warpgroup, lane}.run();
    }
}

}  // namespace fa2::sm90
