// The f32 sums of dq: where they lie, and in which order blocks of keys add to them.
//
// They lie tile by tile, and within a tile in the order in which the threads of the backward hold them. A warp then adds to 512
// bytes in a row (128 before compute capability 9.0), and rows and columns past the end need no test: they are part of the
// tile, and the conversion leaves them out. (bench mha/full/s4096 bwd, H100: this, with the barriers of a group in place of the
// block's, took d256 from 184 to 248 TFLOP/s and d128 from 265 to 306.)
#pragma once

#include "../params.h"
#include "fragment.cuh"
#include "mask.cuh"
#include "types.cuh"

namespace fa2 {

// The sums of one tile, kBlockM x kHeadDim.
template <typename Traits>
struct DqTile {
    static constexpr int kElements = Traits::kBlockM * Traits::kHeadDim;
    using Block = Accumulator<Traits::kQMTiles, Traits::kQDTiles>;

    // Of element e of accumulator (i, j) of a thread. Code for 9.0 and later adds and reads four at once.
    __device__ __forceinline__ static int offset(int i, int j, int e, int thread) {
#if __CUDA_ARCH__ >= 900
        return ((i * Traits::kQDTiles + j) * Traits::kThreads + thread) * 4 + e;
#else
        return ((i * Traits::kQDTiles + j) * 4 + e) * Traits::kThreads + thread;
#endif
    }

    __device__ __forceinline__ static void add(float* tile, const Block& dq, int thread) {
#pragma unroll
        for (int i = 0; i < Traits::kQMTiles; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kQDTiles; ++j) {
                const float (&x)[4] = dq.x[i][j];
#if __CUDA_ARCH__ >= 900
                asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(tile + offset(i, j, 0, thread)), "f"(x[0]),
                             "f"(x[1]), "f"(x[2]), "f"(x[3])
                             : "memory");
#else
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(tile + offset(i, j, e, thread)), "f"(x[e]) : "memory");
#endif
            }
    }

    __device__ __forceinline__ static void load(Block& dq, const float* tile, int thread) {
#pragma unroll
        for (int i = 0; i < Traits::kQMTiles; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kQDTiles; ++j) {
#if __CUDA_ARCH__ >= 900
                const float4 x = *reinterpret_cast<const float4*>(tile + offset(i, j, 0, thread));
                dq.x[i][j][0] = x.x;
                dq.x[i][j][1] = x.y;
                dq.x[i][j][2] = x.z;
                dq.x[i][j][3] = x.w;
#else
#pragma unroll
                for (int e = 0; e < 4; ++e) dq.x[i][j][e] = tile[offset(i, j, e, thread)];
#endif
            }
    }

    // Makes NaN of one sum, wherever its thread is: the map of core/fragment.cuh backwards.
    __device__ __forceinline__ static void spoil(float* tile, int row, int col) {
        constexpr int kRows = 16 * Traits::kQMTiles, kCols = 8 * Traits::kQDTiles;
        const int warp = col / kCols * Traits::kWarpsQ + row / kRows;
        const int lane = row % 8 * 4 + col % 8 / 2, e = row % 16 / 8 * 2 + col % 2;
        atomicAdd(tile + offset(row % kRows / 16, col % kCols / 8, e, warp * kWarpSize + lane), NAN);
    }
};

// Index of a tile. A packed sequence begins with a tile of its own, and takes no more of them than fit before the next one's.
__device__ __forceinline__ int64_t dq_tile(const DqTiles& tiles, const Sequence& sequence, int head, int m_block, int block_m) {
    const int first = sequence.packed ? sequence.first_q / block_m + sequence.batch : 0;
    return sequence.batch * tiles.batch + head * tiles.head + first + m_block;
}

// The order in which blocks add to a tile, so that the sums have the same bits each time: the block with the last keys first.
//
// A block waits only for blocks with later keys of its own head. Work is therefore handed out by ticket, later keys first:
// whoever is waited for has started before, on any GPU and however it schedules. Under a causal mask no block has to wait for
// its first tile either, since each begins on its own diagonal (kBlockM <= kBlockN).
struct Turns {
    uint32_t* counters;  // one for each tile, then one of tickets; or null: any order

    __device__ __forceinline__ bool wanted() const { return counters != nullptr; }

    // Where this block works. All threads together, once, before anything else is in shared memory. Tickets go on from one
    // launch to the next, which begins at sequence `first_batch`.
    __device__ __forceinline__ Place place(int64_t tiles, int first_batch, uint8_t* shared) const {
        Place place;
        if (!wanted()) return place;
        volatile uint32_t* to_all = reinterpret_cast<volatile uint32_t*>(shared);
        if (place.thread == 0) *to_all = atomicAdd(counters + tiles, 1u);
        __syncthreads();
        const uint32_t ticket = *to_all, heads = ticket / gridDim.x;
        __syncthreads();  // before the place is used for something else
        place.x = gridDim.x - 1 - ticket % gridDim.x;
        place.y = heads % gridDim.y;
        place.z = heads / gridDim.y - first_batch;
        return place;
    }

    // Until `turn` blocks have added to the tile.
    __device__ __forceinline__ void wait(int64_t tile, uint32_t turn) const {
        if (!wanted()) return;
        if (threadIdx.x == 0) {
            uint32_t passed;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(passed) : "l"(counters + tile) : "memory");
            } while (passed != turn);
        }
        __syncthreads();
    }

    // Lets the next block add.
    __device__ __forceinline__ void pass(int64_t tile) const {
        if (!wanted()) return;
        __syncthreads();
        // The release carries what the other threads added before the barrier, too.
        if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counters + tile) : "memory");
    }
};

}  // namespace fa2
