// The producer warp of the forward: it takes work tiles and loads q, k and v.
#pragma once

#include "barrier.cuh"
#include "fwd_block.cuh"
#include "schedule.cuh"
#include "tma.cuh"

namespace fa2::sm90 {

template <typename Traits>
struct FwdProducer {
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;

    const Sm90FwdParams& params;
    FwdControl<Traits>& control;
    const uint32_t shared;
    const int lane;
    Ring<Traits::kKeyStages> k_ring, v_ring;
    Ring<Traits::kQStages> q_ring;
    int published = 0;   // number of tiles handed to the consumers
    int taken = 0;       // number of tiles taken, at most kMaxTiles
    int next_index = 0;  // lane 0: index of the next tile; its load may still be in flight
    int index = 0;       // of the tile taken last

    // v of the last key tile whose k has been loaded.
    struct PendingV {
        bool exists;
        BoxAt first;
        int lead;
    } pending_v = {};

    // Asks for the index of the next tile.
    __device__ __forceinline__ void request() {
        const Schedule& schedule = params.schedule;
        if (taken == Traits::kMaxTiles || (schedule.counters == nullptr && taken > 0)) {
            next_index = schedule.tiles;
        } else if (schedule.counters == nullptr) {
            next_index = int(blockIdx.x);
        } else if (lane == 0) {
            next_index = int(atomicAdd(schedule.counters, 1u));
        }
    }

    // Takes the tile of the last request(), or the next one that has rows.
    __device__ __forceinline__ FwdTile take() {
        while (true) {
            index = __shfl_sync(~0u, next_index, 0);
            if (uint32_t(index) >= uint32_t(params.schedule.tiles)) break;  // each block counts one past the end
            const FwdTile tile = query_tile<Traits>(params, index, lane);
            if (!rows_of<Traits>(tile).empty()) {
                ++taken;
                return tile;
            }
            if (params.schedule.counters == nullptr) break;
            request();
        }
        FwdTile end = {};
        end.block = -1;
        return end;
    }

    // Hands a tile, or the end, to the consumers. Starts the copy of its q if they will need it.
    __device__ __forceinline__ void publish(FwdTile tile, bool copy) {
        wait_empty(control.q_empty, q_ring);
        if (lane == 0) {
            const uint32_t full = shared_address(&control.q_full[q_ring.stage()]);
            tile.number = published;
            control.tiles[published % Traits::kTileStages] = tile;
            if (tile.exists()) control.taken[published] = index;
            if (copy) {
                const int row = tile.sequence.first_q + tile.block * Traits::kBlockM;
                const int lead = lead_of_k<Traits>(params.fwd, key_head(params.fwd.shape, tile.head));
                tma_fill<TileQ>(shared + Traits::sQ + q_ring.stage() * TileQ::kBytes, params.q, full, {row, tile.head, batch_of(tile)},
                                -lead);
            } else {
                mbarrier_arrive(full);
            }
        }
        __syncwarp();
        q_ring.advance();
        ++published;
    }

    __device__ __forceinline__ int batch_of(const WorkTile& tile) const { return batch_entry(params.fwd.shape, tile.sequence); }

    __device__ __forceinline__ void load(Ring<Traits::kKeyStages>& ring, uint64_t* full, uint64_t* empty, uint32_t tiles,
                                         const TensorMap& map, const BoxAt& first, int lead) {
        wait_empty(empty, ring);
        if (lane == 0) {
            const uint32_t barrier = shared_address(&full[ring.stage()]);
            tma_fill<TileK>(shared + tiles + ring.stage() * TileK::kBytes, map, barrier, first, -lead);
        }
        __syncwarp();
        ring.advance();
    }

    __device__ __forceinline__ Range tiles_of(const WorkTile& tile) const {
        if (!tile.exists()) return {0, 0};
        return key_tiles<Traits>(Visibility(params.fwd.shape, tile.sequence), rows_of<Traits>(tile));
    }

    // Loads k of key tile n_block, and v of the key tile before. So S never waits for a v.
    __device__ __forceinline__ void load_keys(const WorkTile& tile, int n_block) {
        const int row = tile.sequence.first_k + n_block * Traits::kBlockN, head = key_head(params.fwd.shape, tile.head);
        const BoxAt first = {row, head, batch_of(tile)};
        load(k_ring, control.k_full, control.k_empty, Traits::sK, params.k, first, lead_of_k<Traits>(params.fwd, head));
        load_pending_v();
        pending_v = {true, first, lead_of_v<Traits>(params.fwd, head)};
    }

    __device__ __forceinline__ void load_pending_v() {
        if (pending_v.exists) load(v_ring, control.v_full, control.v_empty, Traits::sV, params.v, pending_v.first, pending_v.lead);
        pending_v.exists = false;
    }

    __device__ __forceinline__ void run() {
        // With two stages of q, a tile is published while the keys of the tile before are loaded. With one, after its own first k.
        constexpr bool kPublishesEarly = Traits::kQStages > 1;
        request();
        FwdTile next = take();
        if (kPublishesEarly) publish(next, !tiles_of(next).empty());
        while (next.exists()) {
            const FwdTile tile = next;
            const Range tiles = tiles_of(tile);
            request();
            const auto take_next = [&] {
                next = take();
                if (kPublishesEarly) publish(next, !tiles_of(next).empty());
            };
            for (int n_block = tiles.end - 1; n_block >= tiles.begin; --n_block) {
                load_keys(tile, n_block);
                if (!kPublishesEarly && n_block == tiles.end - 1) publish(tile, true);
                if (n_block == tiles.end - 2) take_next();
            }
            // publish() waits until every consumer has released its tile. A consumer without rows releases it only after the last v.
            if (tiles.empty()) load_pending_v();
            if (!kPublishesEarly && tiles.empty()) publish(tile, false);
            if (tiles.end - tiles.begin < 2) take_next();
        }
        load_pending_v();
        if (!kPublishesEarly) publish(next, false);
        if (lane == 0 && params.schedule.counters != nullptr) finish_tiles(params.schedule, gridDim.x);
    }
};

}  // namespace fa2::sm90
