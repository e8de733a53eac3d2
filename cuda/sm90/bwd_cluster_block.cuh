// Types that the warps of a clustered backward's block share: tile shapes, shared memory, and the work of a block.
#pragma once

#include "bwd_block.cuh"
#include "cluster.cuh"

namespace fa2::sm90 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kQStages_, int kDoStages_, typename ScoreMod_>
struct BwdClusterTraits : Warpgroups<2, 24> {
    using Groups = Warpgroups<2, 24>;
    using T = T_;
    using ScoreMod = ScoreMod_;
    using Groups::kConsumers;
    using Groups::kWarpgroupRows;
    using Groups::kWarpgroupThreads;
    using Groups::kWarpgroupWarps;
    using Groups::kWarpRows;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;  // keys of a block
    static constexpr int kWarps = kWarps_;
    static constexpr int kQStages = kQStages_;
    static constexpr int kDoStages = kDoStages_;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kMinBlocks = 1;
    static constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
    static constexpr int kNTiles = kBlockM / 8;
    static constexpr int kDTiles = kHeadDim / 8;
    static constexpr int kKSteps = kBlockM / 16;

    static constexpr int kBlockKeys = kBlockN;
    static constexpr int kClusterKeys = kClusterBlocks * kBlockN;
    // Each block computes half of the columns of dq, each consumer half of these.
    static constexpr int kBlockCols = kHeadDim / kClusterBlocks;
    static constexpr int kDqCols = kBlockCols / kConsumers;
    static constexpr int kDqDTiles = kDqCols / 8;

    using TileQ = Tile<kBlockM, kHeadDim>;
    using TileK = Tile<kBlockN, kHeadDim>;
    using TilePeerK = Tile<kBlockN, kBlockCols>;
    using TileDs = Tile<kClusterKeys, kBlockM>;  // dS^T: first the keys of this block, then those of the peer
    static constexpr int kDsStages = 2;
    static constexpr int kDsBytes = TileDs::kBytes / kClusterBlocks;
    static constexpr int kPBytes = kBlockN * kBlockM * int(sizeof(float));
    static constexpr int kControlBytes = 512;
    static constexpr int kStatBytes = kBlockM * sizeof(float);
    static constexpr uint32_t sK = 0, sV = TileK::kBytes, sPeerK = sV + TileK::kBytes, sQ = sPeerK + TilePeerK::kBytes;
    static constexpr uint32_t sDo = sQ + kQStages * TileQ::kBytes, sDs = sDo + kDoStages * TileQ::kBytes;
    static constexpr uint32_t sP = sDs + kDsStages * TileDs::kBytes, sLse = sP + kPBytes, sDelta = sLse + kQStages * kStatBytes;
    static constexpr uint32_t sControl = sDelta + kDoStages * kStatBytes;
    static constexpr int kSharedBytes = sControl + kControlBytes;

    static_assert(kBlockN == kWarpgroupRows && kBlockM == kWarpgroupRows);
    static_assert(kSharedBytes <= kMaxSharedBytes, "a thread block gets no more shared memory");
};

template <typename Traits>
struct BwdClusterControl {
    BwdBlock block;
    int peer_first;  // the peer's first key
    BwdStep steps[Traits::kQStages];
    uint64_t keys_full;
    uint64_t q_full[Traits::kQStages], q_empty[Traits::kQStages];
    uint64_t do_full[Traits::kDoStages], do_empty[Traits::kDoStages];
    uint64_t ds_full[Traits::kDsStages], ds_empty[Traits::kDsStages];
    uint64_t p_full[4], p_empty[4];
};

}  // namespace fa2::sm90
