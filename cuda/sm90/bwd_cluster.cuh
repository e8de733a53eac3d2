// prototype
#pragma once
#include "barrier.cuh"
#include "bwd_cluster_consumer.cuh"
#include "bwd_cluster_producer.cuh"
#include "tma.cuh"
namespace fa2::sm90 {
template <typename Traits>
__device__ __forceinline__ void init_barriers(BwdClusterControl<Traits>& control) {
    constexpr int kConsumerWarps = Traits::kWarpgroupWarps * Traits::kConsumers;
    mbarrier_init(shared_address(&control.keys_full), 1);
    for (int i = 0; i < Traits::kQStages; ++i) {
        mbarrier_init(shared_address(&control.q_full[i]), 2);
        mbarrier_init(shared_address(&control.q_empty[i]), kConsumerWarps);
    }
    for (int i = 0; i < Traits::kDoStages; ++i) {
        mbarrier_init(shared_address(&control.do_full[i]), 2);
        mbarrier_init(shared_address(&control.do_empty[i]), kConsumerWarps);
    }
    for (int i = 0; i < Traits::kDsStages; ++i) {
        mbarrier_init(shared_address(&control.ds_full[i]), Traits::kWarpgroupWarps);
        mbarrier_init(shared_address(&control.ds_empty[i]), kClusterBlocks * kConsumerWarps);
    }
    for (int i = 0; i < 4; ++i) {
        mbarrier_init(shared_address(&control.p_full[i]), 1);
        mbarrier_init(shared_address(&control.p_empty[i]), 1);
    }
    mbarrier_fence_init();
}

template <typename Traits>
__device__ __forceinline__ void cluster_backward(const Sm90BwdParams& params) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    BwdClusterControl<Traits>& control = *reinterpret_cast<BwdClusterControl<Traits>*>(bytes + Traits::sControl);
    static_assert(sizeof(BwdClusterControl<Traits>) <= Traits::kControlBytes, "control must fit after the tiles");
    const Shape& shape = params.bwd.shape;
    const int rank = cluster_rank(), pair = blockIdx.x / kClusterBlocks;
    BwdBlock block;
    block.sequence = Sequence(shape, shape.first_batch + blockIdx.z);
    const Range pair_cols = tile_range(pair * Traits::kClusterKeys, Traits::kClusterKeys, block.sequence.seqlen_k);
    if (pair_cols.empty()) return;
    block.n_block = pair;
    block.cols = tile_range(pair_cols.begin + rank * Traits::kBlockN, Traits::kBlockN, block.sequence.seqlen_k);
    block.head_k = blockIdx.y;
    block.group_size = group_size(shape);
    const Range queries = Visibility(shape, block.sequence).queries_of(pair_cols);
    block.m_blocks = queries.empty() ? Range{0, 0} : Range{queries.begin / Traits::kBlockM, ceil_div(queries.end, Traits::kBlockM)};

    const int warp = __shfl_sync(~0u, int(threadIdx.x) / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    if (threadIdx.x == 0) {
        control.block = block;
        control.peer_first = pair_cols.begin + (rank ^ 1) * Traits::kBlockN;
        init_barriers(control);
        tma_prefetch(params.q);
        tma_prefetch(params.k);
        tma_prefetch(params.v);
        tma_prefetch(params.do_);
    }
    cluster_sync();
    if (warp < Traits::kWarpgroupWarps) {
        give_registers<Traits::kProducerRegisters>();
        const BwdClusterProducer<Traits> producer{params, control, bytes, rank, lane};
        if (warp == 0 && lane == 0) producer.load_tiles();
        if (warp == 1) producer.load_lse_and_delta();
    } else {
        take_registers<Traits::kConsumerRegisters>();
        const int warpgroup = warp / Traits::kWarpgroupWarps - 1, warp_in_warpgroup = warp % Traits::kWarpgroupWarps;
        if (warpgroup == 0) {
            BwdClusterConsumer<Traits, false>{params, control, bytes, shared_address(bytes), rank, warp_in_warpgroup, lane}.template run<0>();
        } else {
            BwdClusterConsumer<Traits, false>{params, control, bytes, shared_address(bytes), rank, warp_in_warpgroup, lane}.template run<1>();
        }
    }
    __syncwarp();
    cluster_sync();
}
}  // namespace fa2::sm90
