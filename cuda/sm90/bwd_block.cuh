// Types that the warps of a backward's block share: tile shapes, shared memory, and the work of a block.
#pragma once

#include "../core/dq_accum.cuh"
#include "../core/mask.cuh"
#include "../core/score_mod.cuh"
#include "../core/tile.cuh"
#include "../core/types.cuh"
#include "../params.h"
#include "barrier.cuh"
#include "warpgroups.cuh"

namespace fa2::sm90 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kStages_, typename ScoreMod_>
struct BwdTraits : Warpgroups<kBlockN_ / 64, 24> {
    using Groups = Warpgroups<kBlockN_ / 64, 24>;
    using T = T_;
    using ScoreMod = ScoreMod_;
    using Groups::kConsumers;
    using Groups::kWarpgroupRows;
    using Groups::kWarpgroupThreads;
    using Groups::kWarpgroupWarps;
    using Groups::kWarpRows;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kStages = kStages_;  // tiles of q, and of do
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kMinBlocks = 1;          // the registers of a block fill a multiprocessor
    static constexpr int kNTiles = kBlockM / 8;   // n8 tiles of S^T and dP^T
    static constexpr int kDTiles = kHeadDim / 8;  // n8 tiles of dk and dv
    static constexpr int kKSteps = kBlockM / 16;  // of dk and dv

    // dq of a tile of queries: the consumers split its rows if each gets 64, otherwise its columns.
    static constexpr bool kDqSplitsRows = kBlockM == kWarpgroupRows * kConsumers;
    static constexpr int kDqCols = kDqSplitsRows ? kHeadDim : kHeadDim / kConsumers;
    static constexpr int kDqDTiles = kDqCols / 8;  // dq: n8 tiles of a warp
    static constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
    // The block of dq of a warp. Warps count from the first consumer.
    __device__ __forceinline__ static int dq_row(int warp) {
        return warp % kWarpgroupWarps * kWarpRows + (kDqSplitsRows ? first_row(warp) : 0);
    }
    __device__ __forceinline__ static int dq_col(int warp) { return kDqSplitsRows ? 0 : warp / kWarpgroupWarps * kDqCols; }
    __device__ __forceinline__ static int first_row(int warp) { return warp / kWarpgroupWarps * kWarpgroupRows; }

    using TileQ = Tile<kBlockM, kHeadDim>;
    using TileK = Tile<kBlockN, kHeadDim>;
    using TileDs = Tile<kBlockN, kBlockM>;   // dS^T
    static constexpr int kDsStages = 2;      // the dS of a step is read in the next step
    static constexpr int kControlBytes = 512;  // room for BwdControl, asserted in bwd.cuh
    static constexpr int kStatBytes = kBlockM * sizeof(float);  // lse, or delta, of a tile of queries
    // Offsets in shared memory. For buffers that exist once per stage, the offset is that of stage 0.
    static constexpr uint32_t sK = 0, sV = TileK::kBytes, sQ = sV + TileK::kBytes, sDo = sQ + kStages * TileQ::kBytes;
    static constexpr uint32_t sDs = sDo + kStages * TileQ::kBytes, sLse = sDs + kDsStages * TileDs::kBytes;
    static constexpr uint32_t sDelta = sLse + kStages * kStatBytes, sControl = sDelta + kStages * kStatBytes;
    static constexpr int kSharedBytes =
        2 * TileK::kBytes + 2 * kStages * (TileQ::kBytes + kStatBytes) + kDsStages * TileDs::kBytes + kControlBytes;

    // A score_mod needs the registers of dP while it runs, if the tile has more than 64 queries. So dv then comes before dP.
    static constexpr bool kDvFirst = !ScoreMod::kIdentity && kBlockM > 64;

    static_assert(kBlockN % kWarpgroupRows == 0, "a consumer warpgroup owns 64 keys");
    static_assert(kWarps == kWarpgroupWarps * (kConsumers + 1), "the consumers and one producer warpgroup");
    static_assert(kDqSplitsRows || (kBlockM == kWarpgroupRows && kDqCols % TileK::kPanel == 0),
                  "a consumer computes 64 rows of dq, and whole panels of its columns");
    static_assert(kDqDTiles % 2 == 0 && 2 * kNTiles <= 32, "a thread has one word of bits for the visible queries of a key");
    static_assert(kSharedBytes <= kMaxSharedBytes, "a thread block gets no more shared memory");
};

// The work of a block: kBlockN keys of one key head, against every tile of queries that sees them, of every head of its group.
struct BwdBlock {
    Sequence sequence;
    Range cols;          // keys of this block
    int n_block, head_k;
    int group_size;      // query heads of a key head
    Range m_blocks;      // tiles of queries, of each head

    __device__ __forceinline__ int steps() const { return m_blocks.empty() ? 0 : (m_blocks.end - m_blocks.begin) * group_size; }
};

template <typename Traits>
__device__ __forceinline__ BwdBlock bwd_block(const Shape& shape, int n_block, int head_k, int batch) {
    BwdBlock block;
    block.sequence = Sequence(shape, batch);
    block.cols = tile_range(n_block * Traits::kBlockN, Traits::kBlockN, block.sequence.seqlen_k);
    block.n_block = n_block;
    block.head_k = head_k;
    block.group_size = group_size(shape);
    block.m_blocks = Visibility(shape, block.sequence).queries_of(block.cols).tiles(Traits::kBlockM);
    return block;
}

// The tile of queries of one step.
struct QueryTile {
    int head;
    int m_block;

    __device__ __forceinline__ void advance(const BwdBlock& block) {
        if (++m_block < block.m_blocks.end) return;
        m_block = block.m_blocks.begin;
        ++head;
    }
};

__device__ __forceinline__ QueryTile first_tile(const BwdBlock& block) { return {block.head_k * block.group_size, block.m_blocks.begin}; }

// What the consumers need to know of a step.
struct BwdStep {
    QueryTile tile;
    int rows;        // queries of the tile that exist
    uint32_t hides;  // bit w: the mask hides part of the tile from the keys of consumer w
};

// The data after the tiles in shared memory.
template <typename Traits>
struct BwdControl {
    BwdBlock block;
    BwdStep steps[Traits::kStages];
    uint64_t keys_full;                                            // k and v
    uint64_t q_full[Traits::kStages], q_empty[Traits::kStages];    // q, lse and the BwdStep
    uint64_t do_full[Traits::kStages], do_empty[Traits::kStages];  // do and delta
    uint64_t ds_full[Traits::kDsStages], ds_empty[Traits::kDsStages];
};

}  // namespace fa2::sm90
