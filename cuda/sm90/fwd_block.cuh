// What the warps of a block of the forward share: tile shapes, shared memory, and who does what of a tile.
#pragma once

#include "../core/mask.cuh"
#include "../core/tile.cuh"
#include "../core/types.cuh"
#include "../params.h"
#include "schedule.cuh"

namespace fa2::sm90 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, bool kModified_>
struct FwdTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr bool kModified = kModified_;
    static constexpr int kThreads = kWarps_ * kWarpSize;
    static constexpr int kMinBlocks = 1;
    static constexpr int kGroupRows = 64;  // of a warpgroup
    static constexpr int kConsumers = kBlockM / kGroupRows;
    static constexpr int kNTiles = kBlockN / 8;
    static constexpr int kDTiles = kHeadDim / 8;
    using TileQ = Tile<kBlockM, kHeadDim>;
    using TileK = Tile<kBlockN, kHeadDim>;

    static constexpr int kStages = 2;  // of k, and of v
    static constexpr int kMaxShared = 232448, kControlBytes = 3072;
    static constexpr int kKeyBytes = 2 * kStages * TileK::kBytes;
    static constexpr int kQStages = 2 * TileQ::kBytes + kKeyBytes + kControlBytes <= kMaxShared ? 2 : 1;
    static constexpr uint32_t sQ = 0, sK = kQStages * TileQ::kBytes, sV = sK + kStages * TileK::kBytes;
    static constexpr int kSharedBytes = kQStages * TileQ::kBytes + kKeyBytes + kControlBytes;
    static constexpr int kMaxTiles = 512;  // of a block
    static constexpr int kWorks = 4;       // tiles on their way through the block
    static constexpr int kParts = 2;       // of them, in a warp that multiplies
    // Where to wait for o and to rescale it, by measurement: see docs/log/hopper.md. kHolds: between the softmax of a thread's two rows;
    // otherwise where ptxas puts the wait, which is in front. kDefers: behind the start of the next S; otherwise in front of it.
    static constexpr bool kHolds = kHeadDim > 64;
    static constexpr bool kDefers = kHolds && kHeadDim <= 128;

    // Registers of a thread: what the driver gives a block at its launch, moved from the warpgroup that loads to the others.
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;

    static_assert(kBlockM % kGroupRows == 0 && (kConsumers == 2 || kConsumers == 3), "two or three warpgroups of 64 rows");
    static_assert(kWarps_ == 4 * (kConsumers + 1), "and one that loads");
    static_assert(kBlockN % 16 == 0, "P is the A operand in steps of 16 keys");
    static_assert(2 * kNTiles <= 32, "what a row sees of a tile is one word of bits a thread");
};

// What a warpgroup does for one tile; the rest is in the tile's Work. In tiles of keys.
struct Part {
    Range own;           // that this warpgroup's rows see; if it has rows, at least one where any warpgroup sees one
    Range plain;         // of its steps but the first, those where nothing is hidden
    bool plain_at_first; // nothing is hidden in the first
    int before;          // that the producer loads before its own ..
    int behind;          // .. and behind
};

// What follows the tiles in shared memory.
template <typename Traits>
struct Control {
    uint64_t k_full[Traits::kStages], k_empty[Traits::kStages];
    uint64_t v_full[Traits::kStages], v_empty[Traits::kStages];
    uint64_t q_full[Traits::kQStages], q_empty[Traits::kQStages];  // full: also the tile's Work is there
    Work works[Traits::kWorks];
    Part parts[4 * Traits::kConsumers][Traits::kParts];
    uint32_t noted[Traits::kMaxTiles / 32];  // tiles to mend, by their number in this block
    int taken[Traits::kMaxTiles];
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Tiles of keys that some row of a tile of queries sees.
template <typename Traits>
__device__ __forceinline__ Range key_tiles(const Visibility& sees, Range rows) {
    const Range keys = sees.keys_of(rows);
    if (keys.empty()) return {0, 0};
    return {keys.begin / Traits::kBlockN, ceil_div(keys.end, Traits::kBlockN)};
}

template <typename Traits>
__device__ __forceinline__ Range rows_of(const Work& work) {
    return {work.m_block * Traits::kBlockM, min((work.m_block + 1) * Traits::kBlockM, work.seqlen_q)};
}

}  // namespace fa2::sm90
