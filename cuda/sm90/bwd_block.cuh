// Types that the warps of a backward's thread block share: tile shapes, shared memory, and work tiles.
#pragma once

#include "../core/barrier.cuh"
#include "../core/dq_accum.cuh"
#include "../core/mask.cuh"
#include "../core/tile.cuh"
#include "../core/types.cuh"
#include "../params.h"
#include "barrier.cuh"
#include "schedule.cuh"
#include "warpgroups.cuh"

namespace fa2::sm90 {

constexpr int kBwdConsumers = 2;
// The least that setmaxnreg takes. The kernels of head_dim 96 use 8 bytes of local memory (cuda/instances.def).
constexpr int kBwdProducerMinRegisters = 24;

// Shared by the backward with a cluster and the one without. kCluster: thread blocks of a cluster.
template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kCluster_, int kQStages_,
          int kDoStages_, typename ScoreMod_>
struct BwdShape : Warpgroups<kBwdConsumers, kBwdProducerMinRegisters> {
    using Groups = Warpgroups<kBwdConsumers, kBwdProducerMinRegisters>;
    using T = T_;
    using ScoreMod = ScoreMod_;
    using Groups::kConsumers;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;  // keys of a thread block
    static constexpr int kWarps = kWarps_;
    static constexpr int kCluster = kCluster_;
    static constexpr int kQStages = kQStages_;
    static constexpr int kDoStages = kDoStages_;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
    static constexpr int kConsumerWarps = kConsumers * kWarpgroupWarps;
    static constexpr int kMinBlocks = 1;          // the registers of a block fill a multiprocessor
    static constexpr int kNTiles = kBlockM / 8;   // n8 tiles of S^T and dP^T
    static constexpr int kDTiles = kHeadDim / 8;  // n8 tiles of dk and dv
    static constexpr int kKSteps = kBlockM / 16;  // of dk and dv

    static constexpr int kClusterKeys = kCluster * kBlockN;
    static constexpr int kBlockCols = kHeadDim / kCluster;  // columns of dq that a thread block computes
    static constexpr int kPanel = kBlockCols % 64 == 0 ? 64 : 32;
    // Columns of dq of consumer 0, if the consumers split the block's columns: half of the panels, rounded up. Consumer 1 has the others.
    static constexpr int kFirstDqCols = ceil_div(kBlockCols / kPanel, kConsumers) * kPanel;
    static constexpr int kDqAdditions = kCluster * kConsumers;  // of a block, or a cluster, to the dq of a tile of queries
    using TileQ = Tile<kBlockM, kHeadDim, kPanel>;
    using TileK = Tile<kBlockN, kHeadDim, kPanel>;
    using TileDs = Tile<kClusterKeys, kBlockM>;  // dS^T
    static constexpr int kDsStages = 2;          // the dS of a step is read in the next step
    // Warps that read BwdTile: the consumers, the one that loads lse and delta, and without a cluster those that add dq.
    static constexpr int kTileReaders = kConsumerWarps + 1 + (kCluster == 1 ? kConsumers : 0);
    static constexpr int kTileStages = 2;        // slots of BwdTile: the current one of a warp, and the next one
    static constexpr int kControlBytes = 512;    // room for BwdControl, asserted in bwd.cuh
    static constexpr int kRowValuesBytes = kBlockM * sizeof(float);  // lse, or delta, of a tile of queries

    static_assert(kBlockN % kWarpgroupRows == 0 && kBlockM % kWarpgroupRows == 0, "wgmma has 64 rows");
    static_assert(kBlockM <= kClusterKeys, "a tile of queries is not longer than the keys of a block or cluster (DqSemaphores)");
    static_assert(kWarps == kWarpgroupWarps * (kConsumers + 1), "the consumers and one producer warpgroup");
    static_assert(2 * kNTiles <= 32, "a thread has one word of bits for the visible queries of a key");
};

template <typename T, int kHeadDim, int kBlockM, int kBlockN, int kWarps, int kCluster, int kQStages, int kDoStages,
          typename ScoreMod>
struct BwdTraits;

// Named barriers, one for each consumer: add its number.
enum BwdBarrier {
    kTailsCleared = kFirstNamedBarrier,
    kTailsSeen = kTailsCleared + kBwdConsumers,
    kDqWritten = kTailsSeen + kBwdConsumers,
    kDqRead = kDqWritten + kBwdConsumers,
    kOneConsumer = kDqRead + kBwdConsumers,
};

// A work tile: kBlockN keys of one key head, against every tile of queries that sees them, of every head of its group.
struct BwdTile {
    Sequence sequence;
    Range cols;      // keys of this thread block. In a cluster, a block can lie after the last key: then cols.end <= cols.begin
    int n_block;     // of the cluster. -1: there is no further work tile
    int head_k;
    int group_size;  // query heads of a key head
    Range m_blocks;  // tiles of queries, of each head

    __device__ __forceinline__ bool exists() const { return n_block >= 0; }
    __device__ __forceinline__ int steps() const { return m_blocks.size() * group_size; }
};

// rank: of the thread block in its cluster.
template <typename Traits>
__device__ __forceinline__ BwdTile bwd_tile(const Shape& shape, const WorkTile& taken, int rank) {
    BwdTile tile;
    tile.sequence = taken.sequence;
    const int seqlen_k = tile.sequence.seqlen_k;
    const Range cluster_cols = tile_range(taken.block * Traits::kClusterKeys, Traits::kClusterKeys, seqlen_k);
    tile.cols = tile_range(cluster_cols.begin + rank * Traits::kBlockN, Traits::kBlockN, seqlen_k);
    tile.n_block = taken.block;
    tile.head_k = taken.head;
    tile.group_size = group_size(shape);
    tile.m_blocks = Visibility(shape, tile.sequence).queries_of(cluster_cols).tiles(Traits::kBlockM);
    return tile;
}

// A step of the walk over the tiles of queries.
struct QueryStep {
    int head;
    int m_block;

    __device__ __forceinline__ void advance(const Range& m_blocks) {
        if (++m_block < m_blocks.end) return;
        m_block = m_blocks.begin;
        ++head;
    }
};

__device__ __forceinline__ QueryStep first_queries(const BwdTile& tile) { return {tile.head_k * tile.group_size, tile.m_blocks.begin}; }

// Number of additions to the dq of `queries` that come before those of this work tile (DqSemaphores).
template <typename Traits>
__device__ __forceinline__ int additions_before(const Shape& shape, const BwdTile& tile, const QueryStep& queries) {
    const Range rows = tile_range(queries.m_block * Traits::kBlockM, Traits::kBlockM, tile.sequence.seqlen_q);
    const Visibility sees(shape, tile.sequence);
    return Traits::kDqAdditions * DqSemaphores::blocks_before(sees, rows, tile.n_block, Traits::kClusterKeys);
}

// The data after the tiles in shared memory.
template <typename Traits>
struct BwdControl {
    BwdTile tiles[Traits::kTileStages];
    uint64_t tile_full[Traits::kTileStages], tile_empty[Traits::kTileStages];
    uint64_t keys_full, keys_empty;                                          // k and v
    uint64_t q_full[Traits::kQStages], q_empty[Traits::kQStages];            // q and lse
    uint64_t do_full[Traits::kDoStages], do_empty[Traits::kDoStages];        // do and delta
    uint64_t ds_full[Traits::kDsStages], ds_empty[Traits::kDsStages];
    // Clusters only.
    uint64_t p_full[kWarpgroupWarps], p_empty[kWarpgroupWarps];  // P, from a warp of consumer 0 to one of consumer 1
    uint64_t index_full, index_empty;                            // the next work tile's index, from block 0 to block 1
    int index;
};

// The work tiles of a thread block, as one of its warps reads them.
template <typename Traits>
struct BwdTiles {
    BwdControl<Traits>& control;
    Ring<Traits::kTileStages> ring;

    __device__ __forceinline__ const BwdTile& current() const { return control.tiles[ring.stage()]; }

    // Waits until the producer has published the current work tile. Returns whether it exists.
    __device__ __forceinline__ bool wait() const {
        wait_full(control.tile_full, ring);
        return current().exists();
    }

    // This warp is done with the current work tile.
    __device__ __forceinline__ void advance(int lane) {
        arrive_warp(control.tile_empty[ring.stage()], lane);
        ring.advance();
    }
};

}  // namespace fa2::sm90
