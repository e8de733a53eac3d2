// Types that the warps of a forward's block share: tile shapes, shared memory, and each consumer's key tiles.
#pragma once

#include "../core/mask.cuh"
#include "../core/score_mod.cuh"
#include "../core/tile.cuh"
#include "../core/types.cuh"
#include "../params.h"
#include "barrier.cuh"
#include "schedule.cuh"
#include "warpgroups.cuh"

namespace fa2::sm90 {

constexpr int kFwdProducerMinRegisters = 32;  // enough without local memory (docs/kernels.md)

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kQStages_, int kMidWait_,
          int kLateRescale_, typename ScoreMod_>
struct FwdTraits : Warpgroups<kBlockM_ / kWarpgroupRows, kFwdProducerMinRegisters> {
    using Groups = Warpgroups<kBlockM_ / kWarpgroupRows, kFwdProducerMinRegisters>;
    using Groups::kConsumers;
    using T = T_;
    using ScoreMod = ScoreMod_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kWarpRows = sm90::kWarpRows;  // for recompute_rows()
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kMinBlocks = 1;  // the registers of a block fill a multiprocessor
    static constexpr int kNTiles = kBlockN / 8;
    static constexpr int kDTiles = kHeadDim / 8;
    using TileQ = Tile<kBlockM, kHeadDim>;
    using TileK = Tile<kBlockN, kHeadDim>;

    static constexpr int kKeyStages = 2;  // pipeline stages of k, and of v
    static constexpr int kControlBytes = 3072;  // for FwdControl, asserted in fwd.cuh. At head_dim 256, the tiles leave no more
    static constexpr int kKeyBytes = 2 * kKeyStages * TileK::kBytes;
    static constexpr int kQStages = kQStages_;
    static constexpr uint32_t sQ = 0, sK = kQStages * TileQ::kBytes, sV = sK + kKeyStages * TileK::kBytes;
    static constexpr int kSharedBytes = kQStages * TileQ::kBytes + kKeyBytes + kControlBytes;
    // Work tiles that one block can take (max_tiles of the launch). At head_dim 256 the tiles (64 + 160 KB) leave 3 KB of the 227 for
    // FwdControl, and the indices of 512 work tiles take 2 KB of these.
    static constexpr int kMaxTiles = 512;
    // Slots of FwdTile: while a consumer writes tile n, the producer may publish n + 1 and n + 2. A power of two makes the index cheap.
    static constexpr int kTileStages = 4;
    static constexpr int kKeyStepsStages = 2;  // slots of KeySteps: the current tile of a consumer warp, and the next one

    static constexpr bool kMidWait = kMidWait_ != 0;
    static constexpr bool kLateRescale = kLateRescale_ != 0;

    static_assert(kBlockM % kWarpgroupRows == 0 && (kConsumers == 2 || kConsumers == 3), "two or three consumer warpgroups of 64 rows");
    static_assert(kWarps == kWarpgroupWarps * (kConsumers + 1), "and one producer warpgroup");
    static_assert(kQStages == 1 || kQStages == 2, "the producer is at most one tile of q ahead");
    static_assert(kSharedBytes <= kMaxSharedBytes, "a thread block gets no more shared memory");
    static_assert(kBlockN % 16 == 0, "P is the A operand in steps of 16 keys");
};

// Number of zero columns before a head in its tile. Memory is read in sectors of 32 bytes. If a head begins in the middle of a sector, it
// begins at the same place in its tile, so that TMA copies whole sectors. Every second head of 72 needs this. 0 if not all rows begin
// there, or if the tile has no room.
template <typename Traits>
__device__ __forceinline__ int lead(const void* tensor, const Strides& strides, int head, int head_dim) {
    constexpr int kSector = 32 / int(sizeof(typename Traits::T));
    if ((strides.row | strides.batch) % kSector != 0) return 0;
    const int columns = int((int64_t(reinterpret_cast<uintptr_t>(tensor) / sizeof(typename Traits::T)) + head * strides.head) % kSector);
    return columns + head_dim <= Traits::kHeadDim ? columns : 0;
}
// For k, and for q: both need the same columns.
template <typename Traits>
__device__ __forceinline__ int lead_of_k(const FwdParams& params, int head_k) {
    return lead<Traits>(params.k, params.k_strides, head_k, params.shape.head_dim);
}
// For v and o.
template <typename Traits>
__device__ __forceinline__ int lead_of_v(const FwdParams& params, int head_k) {
    return lead<Traits>(params.v, params.v_strides, head_k, params.shape.head_dim_v);
}

// A work tile of the forward.
struct FwdTile : WorkTile {
    int number;  // among those of its thread block; publish() sets it
};

// The steps of one consumer in a work tile. Ranges and counts are in key tiles.
struct KeySteps {
    Range own;             // key tiles that this consumer's rows see. If they see none but those of another consumer do: one hidden tile
    Range unmasked;        // key tiles of the steps after the first in which nothing is hidden
    bool first_unmasked;   // nothing is hidden in the first step
    int tiles_before;      // tiles that the producer loads before `own` ..
    int tiles_after;       // .. and after it
};

// The data after the tiles in shared memory.
template <typename Traits>
struct FwdControl {
    uint64_t k_full[Traits::kKeyStages], k_empty[Traits::kKeyStages];
    uint64_t v_full[Traits::kKeyStages], v_empty[Traits::kKeyStages];
    uint64_t q_full[Traits::kQStages], q_empty[Traits::kQStages];  // full: the FwdTile is there too
    FwdTile tiles[Traits::kTileStages];
    KeySteps key_steps[kWarpgroupWarps * Traits::kConsumers][Traits::kKeyStepsStages];
    uint32_t nonfinite[Traits::kMaxTiles / 32];  // a bit for each of this block's tiles: some o is not finite
    int taken[Traits::kMaxTiles];                // the index in the schedule of each of this block's tiles
};

// Key tiles that any of `rows` sees.
template <typename Traits>
__device__ __forceinline__ Range key_tiles(const Visibility& sees, Range rows) {
    return sees.keys_of(rows).tiles(Traits::kBlockN);
}

// Work tile `index` of the schedule. The last queries come first: under a causal mask, they see the most keys.
template <typename Traits>
__device__ __forceinline__ FwdTile query_tile(const Sm90FwdParams& params, int index, int lane) {
    return {work_tile<Axis::kQueries, Traits::kBlockM>(params.fwd.shape, params.schedule, BlockOrder::kDescending, index, lane), 0};
}

template <typename Traits>
__device__ __forceinline__ Range rows_of(const WorkTile& tile) {
    return tile_range(tile.block * Traits::kBlockM, Traits::kBlockM, tile.sequence.seqlen_q);
}

}  // namespace fa2::sm90
