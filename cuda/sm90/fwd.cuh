// o = softmax(mask(softmax_scale * q k^T)) v on wgmma, fed by TMA. Persistent: a block takes tile after tile.
//
// Work       a tile: kBlockM query rows of one head against the keys that the mask leaves visible, last tile of keys first.
// Warps      warpgroup 0 loads, with one warp; each of the others owns 64 rows and all keys (split Q): no sum crosses warps.
// Pipeline   of a warpgroup, step i:  start S = q k_i^T | start o += P v_(i-1) | wait S | mask, softmax | wait o | round P
//            so its softmax runs under the products of the other warpgroups, and in part under its own o += P v. With two buffers of
//            q the first S of a tile is started behind the last product of the one before, and o is written under it.
// Shared     sQ kQStages tiles of q, sK and sV kStages tiles each; then barriers, the tiles on their way, and the list of those taken.
// Registers  S and o in f32, P packed: it is the A operand of the step after the one that computes it.
// Numerics   scores, maximum, sum, o in f32; P is rounded to the input type before P v. o is rescaled where a maximum has grown.
// Numbers    of v that are not finite: see mend.cuh.
// Expects    head_dim <= kHeadDim, a multiple of 8; at most kMaxTiles tiles for a block that no other can take.
#pragma once

#include "../core/barrier.cuh"
#include "barrier.cuh"
#include "fwd_consumer.cuh"
#include "fwd_producer.cuh"
#include "mend.cuh"
#include "tma.cuh"

namespace fa2::sm90 {

template <typename Traits>
__device__ __forceinline__ void forward(const HopperFwdParams& params) {
    extern __shared__ __align__(1024) uint8_t shared[];
    Control<Traits>& control = *reinterpret_cast<Control<Traits>*>(shared + Traits::kSharedBytes - Traits::kControlBytes);
    static_assert(sizeof(Control<Traits>) <= Traits::kControlBytes, "it must fit behind the tiles");
    const uint32_t base = shared_address(shared);
    // One value for all lanes: branches on it are the warp's.
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    if (threadIdx.x == 0) {
        constexpr int kWarpsThatRead = 4 * Traits::kConsumers;
        for (int i = 0; i < Traits::kStages; ++i) {
            mbarrier_init(shared_address(&control.k_full[i]), 1);
            mbarrier_init(shared_address(&control.v_full[i]), 1);
            mbarrier_init(shared_address(&control.k_empty[i]), kWarpsThatRead);
            mbarrier_init(shared_address(&control.v_empty[i]), kWarpsThatRead);
        }
        for (int i = 0; i < Traits::kQStages; ++i) {
            mbarrier_init(shared_address(&control.q_full[i]), 1);
            mbarrier_init(shared_address(&control.q_empty[i]), kWarpsThatRead);
        }
        mbarrier_fence_init();
        tma_prefetch(params.q);
        tma_prefetch(params.k);
        tma_prefetch(params.v);
    }
    if (threadIdx.x < Traits::kMaxTiles / 32) control.noted[threadIdx.x] = 0;
    __syncthreads();
    if (warp < 4) {
        give_registers<Traits::kProducerRegisters>();
        if (warp == 0) Producer<Traits>{params, control, base, lane}.run();
        return;
    }
    take_registers<Traits::kConsumerRegisters>();
    const int group = warp / 4 - 1;
    Consumer<Traits>{params, control, base, group, warp % 4, lane}.run();
    bar_sync<128 * Traits::kConsumers>(1);  // 0 is __syncthreads; what any warp has noted is there
    uint32_t any = 0;
    for (int i = 0; i < Traits::kMaxTiles / 32; ++i) any |= control.noted[i];
    if (any != 0) mend<Traits>(params, control.noted, control.taken, Traits::kGroupRows * group + 16 * (warp % 4), lane);
}

}  // namespace fa2::sm90
