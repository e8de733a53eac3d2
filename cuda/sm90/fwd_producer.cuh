// The warp of the forward that loads.
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
    int number = 0;   // tiles published
    int wanted = 0;   // tiles taken, and at most kMaxTiles
    int ticket = 0;   // lane 0: the next tile's index, perhaps still on its way from memory
    int index = 0;    // of the tile taken last

    __device__ __forceinline__ void request() {
        const Schedule& schedule = params.schedule;
        if (wanted == Traits::kMaxTiles || (schedule.counters == nullptr && wanted > 0)) {
            ticket = schedule.tiles;
        } else if (schedule.counters == nullptr) {
            ticket = int(blockIdx.x);
        } else if (lane == 0) {
            ticket = int(atomicAdd(schedule.counters, 1u));
        }
    }

    // The tile of the last request().
    __device__ __forceinline__ Work take() {
        while (true) {
            index = __shfl_sync(~0u, ticket, 0);
            if (uint32_t(index) >= uint32_t(params.schedule.tiles)) break;  // each block counts one past the end
            const Work work = tile_at<Traits::kBlockM>(params.fwd.shape, params.schedule, index, lane);
            if (work.m_block >= 0 && !rows_of<Traits>(work).empty()) {
                ++wanted;
                return work;
            }
            if (params.schedule.counters == nullptr) break;
            request();
        }
        Work end = {};
        end.m_block = -1;
        return end;
    }

    // Hands a tile, or the end, to the consumers, and starts the copy of its q if they will need it.
    __device__ __forceinline__ void publish(Work work, bool copy) {
        mbarrier_wait(shared_address(&control.q_empty[q.stage()]), q.parity() ^ 1);
        if (lane == 0) {
            const uint32_t full = shared_address(&control.q_full[q.stage()]);
            work.number = number;
            control.works[number % Traits::kWorks] = work;
            if (work.m_block >= 0) control.taken[number] = index;
            if (copy) {
                mbarrier_arrive_expect(full, TileQ::kBytes);
                tma_load_tile<TileQ>(base + Traits::sQ + q.stage() * TileQ::kBytes, params.q, full,
                                     work.first_q + work.m_block * Traits::kBlockM, work.head,
                                     params.fwd.shape.cu_seqlens_q == nullptr ? work.batch : 0);
            } else {
                mbarrier_arrive(full);
            }
        }
        __syncwarp();
        q.advance();
        ++number;
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

    __device__ __forceinline__ Range tiles_of(const Work& work) const {
        if (work.m_block < 0) return {0, 0};
        return key_tiles<Traits>(Visibility(params.fwd.shape, work.sequence(params.fwd.shape)), rows_of<Traits>(work));
    }

    __device__ __forceinline__ void run() {
        const Shape& shape = params.fwd.shape;
        // v of a step is loaded behind k of the next one: S never waits for a v.
        bool v_owed = false;
        int v_row = 0, v_head = 0, v_batch = 0;
        const auto load_v = [&] {
            if (v_owed) load(v, control.v_full, control.v_empty, Traits::sV, params.v, v_row, v_head, v_batch);
            v_owed = false;
        };
        request();
        Work next = take();
        if (Traits::kQStages > 1) publish(next, !tiles_of(next).empty());
        while (next.m_block >= 0) {
            const Work work = next;
            const Range tiles = tiles_of(work);
            bool taken = false, published = Traits::kQStages > 1;
            request();
            const auto go_on = [&] {
                next = take();
                if (Traits::kQStages > 1) publish(next, !tiles_of(next).empty());
                taken = true;
            };
            const int head = work.head / (shape.num_heads / shape.num_heads_k);
            const int batch = shape.cu_seqlens_q == nullptr ? work.batch : 0;
            for (int n = tiles.end - 1; n >= tiles.begin; --n) {
                const int row = work.first_k + n * Traits::kBlockN;
                load(k, control.k_full, control.k_empty, Traits::sK, params.k, row, head, batch);
                load_v();
                v_owed = true, v_row = row, v_head = head, v_batch = batch;
                if (!published) publish(work, true);
                published = true;
                if (!taken && n < tiles.end - 1) go_on();
            }
            // A warpgroup without rows lets v go by before it gives up its tile, for which publish() waits.
            if (tiles.empty()) load_v();
            if (!published) publish(work, false);
            if (!taken) go_on();
        }
        load_v();
        if (Traits::kQStages == 1) publish(next, false);
        finish();
    }

    // The last block to come here leaves the counters as it found them.
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
