// The producer warp of the forward: it takes work tiles and loads q, k and v.
#pragma once

#include "barrier.cuh"
#include "fwd_block.cuh"
#include "schedule.cuh"
#include "tma.cuh"

namespace fa2::sm90 {

template <typename Traits>
struct Producer {
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;

    const HopperFwdParams& params;
    Control<Traits>& control;
    const uint32_t base;
    const int lane;
    Ring<Traits::kStages> k, v;
    Ring<Traits::kQStages> q;
    int published = 0;   // number of tiles handed to the consumers
    int taken = 0;       // number of tiles taken, at most kMaxTiles
    int next_index = 0;  // lane 0: index of the next tile; its load may still be in flight
    int index = 0;       // of the tile taken last

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
    __device__ __forceinline__ WorkTile take() {
        while (true) {
            index = __shfl_sync(~0u, next_index, 0);
            if (uint32_t(index) >= uint32_t(params.schedule.tiles)) break;  // each block counts one past the end
            const WorkTile tile = work_tile<Traits::kBlockM>(params.fwd.shape, params.schedule, index, lane);
            if (tile.exists() && !rows_of<Traits>(tile).empty()) {
                ++taken;
                return tile;
            }
            if (params.schedule.counters == nullptr) break;
            request();
        }
        WorkTile end = {};
        end.m_block = -1;
        return end;
    }

    // Hands a tile, or the end, to the consumers. Starts the copy of its q if they will need it.
    __device__ __forceinline__ void publish(WorkTile tile, bool copy) {
        mbarrier_wait(shared_address(&control.q_empty[q.stage()]), q.parity() ^ 1);
        if (lane == 0) {
            const uint32_t full = shared_address(&control.q_full[q.stage()]);
            tile.number = published;
            control.tiles[published % Traits::kWorkStages] = tile;
            if (tile.exists()) control.taken[published] = index;
            if (copy) {
                mbarrier_arrive_expect(full, TileQ::kBytes);
                tma_load_tile<TileQ>(base + Traits::sQ + q.stage() * TileQ::kBytes, params.q, full,
                                     tile.sequence.first_q + tile.m_block * Traits::kBlockM, tile.head, batch_of(tile));
            } else {
                mbarrier_arrive(full);
            }
        }
        __syncwarp();
        q.advance();
        ++published;
    }

    // The tensors of a packed call have one batch entry.
    __device__ __forceinline__ int batch_of(const WorkTile& tile) const {
        return is_packed(params.fwd.shape) ? 0 : tile.sequence.batch;
    }

    __device__ __forceinline__ void load(Ring<Traits::kStages>& ring, uint64_t* full, uint64_t* empty, uint32_t tiles,
                                         const TensorMap& map, int row, int head, int batch) {
        mbarrier_wait(shared_address(&empty[ring.stage()]), ring.parity() ^ 1);
        if (lane == 0) {
            const uint32_t barrier = shared_address(&full[ring.stage()]);
            mbarrier_arrive_expect(barrier, TileK::kBytes);
            tma_load_tile<TileK>(base + tiles + ring.stage() * TileK::kBytes, map, barrier, row, head, batch);
        }
        __syncwarp();
        ring.advance();
    }

    __device__ __forceinline__ Range tiles_of(const WorkTile& tile) const {
        if (!tile.exists()) return {0, 0};
        return key_tiles<Traits>(Visibility(params.fwd.shape, tile.sequence), rows_of<Traits>(tile));
    }

    __device__ __forceinline__ void run() {
        constexpr bool kPublishesEarly = Traits::kQStages > 1;
        // Load v of a step after k of the next step, so that S never waits for a v.
        bool owes_v = false;
        int v_row = 0, v_head = 0, v_batch = 0;
        const auto load_v = [&] {
            if (owes_v) load(v, control.v_full, control.v_empty, Traits::sV, params.v, v_row, v_head, v_batch);
            owes_v = false;
        };
        request();
        WorkTile next = take();
        if (kPublishesEarly) publish(next, !tiles_of(next).empty());
        while (next.exists()) {
            const WorkTile tile = next;
            const Range tiles = tiles_of(tile);
            bool has_next = false, is_published = kPublishesEarly;
            request();
            const auto take_next = [&] {
                next = take();
                if (kPublishesEarly) publish(next, !tiles_of(next).empty());
                has_next = true;
            };
            const int head = key_head(params.fwd.shape, tile.head), batch = batch_of(tile);
            for (int n = tiles.end - 1; n >= tiles.begin; --n) {
                const int row = tile.sequence.first_k + n * Traits::kBlockN;
                load(k, control.k_full, control.k_empty, Traits::sK, params.k, row, head, batch);
                load_v();
                owes_v = true, v_row = row, v_head = head, v_batch = batch;
                if (!is_published) publish(tile, true);
                is_published = true;
                if (!has_next && n < tiles.end - 1) take_next();
            }
            // publish() waits until every warpgroup has released its tile. A warpgroup without rows releases it only after the last v.
            if (tiles.empty()) load_v();
            if (!is_published) publish(tile, false);
            if (!has_next) take_next();
        }
        load_v();
        if (!kPublishesEarly) publish(next, false);
        finish();
    }

    // The last block resets the counters to zero.
    __device__ __forceinline__ void finish() const {
        uint32_t* counters = params.schedule.counters;
        if (counters == nullptr || lane != 0) return;
        __threadfence();
        if (atomicAdd(&counters[1], 1u) == gridDim.x - 1) {
            __threadfence();
            counters[0] = 0;
            counters[1] = 0;
        }
    }
};

}  // namespace fa2::sm90
