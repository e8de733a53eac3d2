// dq_accum: dq in f32, as it is summed up. Where its tiles lie, and in which order thread blocks add to them.
//
// Each tile of queries has a tile of dq_accum. kDqThreads threads of the backward add to it, and its elements lie in the order of these
// threads. A warp then adds to 512 contiguous bytes (128 before compute capability 9.0). Rows and columns past the end need no test: they
// are part of the tile, and the conversion leaves them out. (bench mha/full/s4096 bwd, H100: this, and barriers of a team instead of the
// block, took d256 from 184 to 248 TFLOP/s and d128 from 265 to 306.)
#pragma once

#include "../params.h"
#include "fragment.cuh"
#include "mask.cuh"
#include "sequence.cuh"
#include "types.cuh"

namespace fa2 {

// One tile of dq_accum, kBlockM x kHeadDim.
template <typename Traits>
struct DqTile {
    static constexpr int kElements = Traits::kBlockM * Traits::kHeadDim;
    using Block = Accumulator<Traits::kDqMTiles, Traits::kDqDTiles>;

    // Offset of element e of accumulator (i, j) of a thread. Code for 9.0 and later adds and reads four elements at once.
    __device__ __forceinline__ static int offset(int i, int j, int e, int thread) {
#if __CUDA_ARCH__ >= 900
        return ((i * Traits::kDqDTiles + j) * Traits::kDqThreads + thread) * 4 + e;
#else
        return ((i * Traits::kDqDTiles + j) * 4 + e) * Traits::kDqThreads + thread;
#endif
    }

    __device__ __forceinline__ static void add(float* tile, const Block& dq, int thread) {
#pragma unroll
        for (int i = 0; i < Traits::kDqMTiles; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kDqDTiles; ++j) {
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
        for (int i = 0; i < Traits::kDqMTiles; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kDqDTiles; ++j) {
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
};

// Index of a tile of dq_accum. A packed sequence starts at a tile of its own, and all of its tiles lie before the first one of the next
// sequence.
__device__ __forceinline__ int64_t dq_tile_index(const DqTiles& tiles, const Shape& shape, const Sequence& sequence, int head,
                                                 int m_block, int block_m) {
    const int first = is_packed(shape) ? sequence.first_q / block_m + sequence.batch : 0;
    return sequence.batch * tiles.batch + head * tiles.head + first + m_block;
}

// The work of a thread block: a tile of keys of one key head of one sequence, which is counted from Shape::first_batch.
struct BlockIndex {
    int n_block, head_k, batch;
};

// The order in which blocks add to the tiles of dq_accum: the block with the last keys first. The sums then have the same bits each time.
//
// A block waits only for blocks with later keys of its own head. So blocks take their work in the order in which they start, later keys
// first: the block that another one waits for has always started before it, on any GPU. Under a causal mask no block waits at its first
// tile either, because each starts on its own diagonal (kBlockM <= kBlockN).
struct DqSemaphores {
    uint32_t* counters;  // one for each tile, then one that counts started blocks

    // Returns the work of this block. All threads call it together, once, before anything else is in shared memory. If a call needs several
    // launches, the count goes on, and `first_batch` is the sequence where this launch starts.
    __device__ __forceinline__ BlockIndex block_index(int64_t tiles, int first_batch, uint8_t* bytes) const {
        volatile uint32_t* to_all = reinterpret_cast<volatile uint32_t*>(bytes);
        if (threadIdx.x == 0) *to_all = atomicAdd(counters + tiles, 1u);
        __syncthreads();
        const uint32_t number = *to_all, heads = number / gridDim.x;
        __syncthreads();  // every thread has read it, and shared memory is free again
        return {int(gridDim.x - 1 - number % gridDim.x), int(heads % gridDim.y), int(heads / gridDim.y) - first_batch};
    }

    // Number of blocks that add to a tile of queries before the block of keys `n_block`. The one with the last keys that the tile sees is
    // the first.
    __device__ __forceinline__ static int blocks_before(const Visibility& sees, Range rows, int n_block, int block_n) {
        return (sees.keys_of(rows).end - 1) / block_n - n_block;
    }

    // One thread. Waits until `count` parts have been added to the tile.
    __device__ __forceinline__ void poll(int64_t tile, uint32_t count) const {
        uint32_t added;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(added) : "l"(counters + tile) : "memory");
        } while (added < count);
    }

    // One thread. Says that a part has been added. The release also covers what other threads added before a barrier.
    __device__ __forceinline__ void post(int64_t tile) const {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counters + tile) : "memory");
    }

    // All threads of a block. Waits until `count` blocks have added to the tile.
    __device__ __forceinline__ void wait(int64_t tile, uint32_t count) const {
        if (threadIdx.x == 0) poll(tile, count);
        __syncthreads();
    }

    // All threads of a block. Lets the next block add to the tile.
    __device__ __forceinline__ void release(int64_t tile) const {
        __syncthreads();
        if (threadIdx.x == 0) post(tile);
    }
};

}  // namespace fa2
