// o = softmax(mask(softmax_scale * q k^T)) v on wgmma, fed by TMA. Persistent: a block takes work tile after work tile.
//
// Work       a tile: kBlockM query rows of one head and the keys that they see, last key tile first.
// Warps      warpgroup 0 is the producer, with one active warp. Each consumer warpgroup owns 64 rows and all keys (split Q), so no sum
//            crosses warps.
// Pipeline   of a consumer, step i:  start S = q k_i^T | start o += P v_(i-1) | wait S | mask, softmax | wait o | round P
//            Its softmax runs during the products of the other consumers, and in part during its own o += P v. With two stages of q, the
//            first S of a tile starts right after the last product of the previous tile, and the consumer writes o while S runs.
// Shared     sQ kQStages tiles of q, sK and sV kKeyStages tiles each; then FwdControl.
// Registers  S and o in f32, P packed, because P is the A operand of the next step.
// Numerics   scores, row_max, row_sum, o in f32; P is rounded to the input type before P v. o is rescaled where a maximum has grown.
// Nonfinite  see core/nonfinite.cuh. recompute_rows() needs registers, so a block recomputes its tiles after all its other work.
// Expects    head_dim and head_dim_v <= kHeadDim, multiples of 8; a schedule that leaves no block more than kMaxTiles tiles.
#pragma once

#include "../core/barrier.cuh"
#include "../core/nonfinite.cuh"
#include "barrier.cuh"
#include "fwd_consumer.cuh"
#include "fwd_producer.cuh"
#include "tma.cuh"

namespace fa2::sm90 {

template <typename Traits>
__device__ __forceinline__ void init_barriers(FwdControl<Traits>& control) {
    constexpr int kConsumerWarps = kWarpgroupWarps * Traits::kConsumers;
    mbarriers_init(control.k_full, 1);
    mbarriers_init(control.v_full, 1);
    mbarriers_init(control.k_empty, kConsumerWarps);
    mbarriers_init(control.v_empty, kConsumerWarps);
    mbarriers_init(control.q_full, 1);
    mbarriers_init(control.q_empty, kConsumerWarps);
    mbarrier_fence_init();
}

// Recomputes the rows of one consumer warp, in all tiles of this block with a nonfinite o.
template <typename Traits>
__device__ __forceinline__ void recompute_tiles(const Sm90FwdParams& params, const FwdControl<Traits>& control, int warp_row, int lane) {
#pragma unroll 1
    for (int number = 0; number < Traits::kMaxTiles; ++number) {
        if ((control.nonfinite[number / 32] >> number % 32 & 1) == 0) continue;
        const FwdTile tile = query_tile<Traits>(params, control.taken[number], lane);
        recompute_rows<Traits>(params.fwd, {tile.block * Traits::kBlockM + warp_row, tile.head, tile.sequence.batch});
    }
}

template <typename Traits>
__device__ __forceinline__ void forward(const Sm90FwdParams& params) {
    extern __shared__ __align__(kSharedAlignment) uint8_t bytes[];
    FwdControl<Traits>& control = *reinterpret_cast<FwdControl<Traits>*>(bytes + Traits::kSharedBytes - Traits::kControlBytes);
    static_assert(sizeof(FwdControl<Traits>) <= Traits::kControlBytes, "FwdControl must fit after the tiles");
    const uint32_t shared = shared_address(bytes);
    // All lanes take the warp index from one lane, so the compiler knows that branches on it are uniform.
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    if (threadIdx.x == 0) {
        init_barriers(control);
        tma_prefetch(params.q);
        tma_prefetch(params.k);
        tma_prefetch(params.v);
    }
    if (threadIdx.x < Traits::kMaxTiles / 32) control.nonfinite[threadIdx.x] = 0;
    __syncthreads();
    if (warp < kWarpgroupWarps) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0) FwdProducer<Traits>{params, control, shared, lane}.run();
        return;
    }
    take_registers<Traits::kConsumerRegisters>();
    const ConsumerThread thread = Traits::consumer_thread(warp, lane);
    FwdConsumer<Traits>{thread, params, control, shared}.run();
    // All consumers have set their bits and written their rows.
    bar_sync<kWarpgroupWarps * kWarpSize * Traits::kConsumers>(kFirstNamedBarrier);
    uint32_t any = 0;
    for (int i = 0; i < Traits::kMaxTiles / 32; ++i) any |= control.nonfinite[i];
    if (any != 0) recompute_tiles(params, control, kWarpgroupRows * thread.consumer + kWarpRows * thread.warp, lane);
}

}  // namespace fa2::sm90
