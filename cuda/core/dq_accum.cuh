// dq_accum: dq in f32, as it is summed up. Where its rows lie, and in which order thread blocks add to them.
//
// The rows of a head follow each other in row groups of 8, and every sequence starts at a row group of its own. A row group has kHeadDim / 16
// blocks of 8 rows and 16 columns, 512 bytes each. Inside a block, the elements lie in the order in which the lanes of a warp hold them. So
// a warp adds to 512 contiguous bytes (128 before compute capability 9.0). The layout does not depend on tiles and warps, so all backwards
// share one conversion.
#pragma once

#include "../params.h"
#include "fragment.cuh"
#include "mask.cuh"
#include "sequence.cuh"
#include "types.cuh"

namespace fa2 {

constexpr int kDqGroupRows = 8;
constexpr int kDqBlockCols = 16;
constexpr int kDqBlockElements = kDqGroupRows * kDqBlockCols;

// Index of the first block of rows of one head of a sequence. The blocks have `rows` rows. Packed sequences start at a block of their own:
// all blocks of a sequence lie before the first one of the next sequence.
__device__ __forceinline__ int64_t first_row_block(const RowBlocks& blocks, int rows, const Shape& shape, const Sequence& sequence,
                                                   int head) {
    const int first = is_packed(shape) ? sequence.first_q / rows + sequence.batch : 0;
    return sequence.batch * blocks.batch + head * blocks.head + first;
}

// Offset of the block of 8 rows and 16 columns that begins at (row, col) of a head. dq_accum has `head_dim` columns.
__device__ __forceinline__ int64_t dq_offset(const RowBlocks& groups, const Shape& shape, const Sequence& sequence, int head, int row,
                                             int col, int head_dim) {
    return (first_row_block(groups, kDqGroupRows, shape, sequence, head) * kDqGroupRows + row) * head_dim + col * kDqGroupRows;
}

// A lane has four elements of a block: row lane / 4 and columns c, c + 1, c + 8 and c + 9 with c = 2 (lane % 4). So they are elements
// 2 half and 2 half + 1 of two neighbouring accumulators. Code for 9.0 and later adds and reads the four at once.
__device__ __forceinline__ void add_to_dq_block(float* block, const float (&x)[4], int lane, bool exists) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred exists;\n"
        "setp.ne.u32 exists, %5, 0;\n"
        "@exists red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(block + lane * 4),
        "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(uint32_t(exists))
        : "memory");
#else
#pragma unroll
    for (int e = 0; e < 4; ++e)
        asm volatile(
            "{\n.reg .pred exists;\n"
            "setp.ne.u32 exists, %2, 0;\n"
            "@exists red.global.add.f32 [%0], %1;\n}" ::"l"(block + e * kWarpSize + lane),
            "f"(x[e]), "r"(uint32_t(exists))
            : "memory");
#endif
}

__device__ __forceinline__ float4 load_dq_block(const float* block, int lane) {
#if __CUDA_ARCH__ >= 900
    return reinterpret_cast<const float4*>(block)[lane];
#else
    return {block[lane], block[lane + kWarpSize], block[lane + 2 * kWarpSize], block[lane + 3 * kWarpSize]};
#endif
}

// Adds the accumulators of one warp to dq_accum of a head. They begin at (row, col). Row groups after the end of the sequence are left out,
// because the next sequence has its rows there. The test is a predicate: with a branch, ptxas would not overlap the additions with products.
template <int kHeadDim, int kMTiles, int kNTiles>
__device__ __forceinline__ void add_to_dq(const BwdParams& params, const Sequence& sequence, int head, int row, int col,
                                          const Accumulator<kMTiles, kNTiles>& dq, int lane) {
    static_assert(kHeadDim % 32 == 0 && kNTiles % 2 == 0, "the conversion reads two blocks at once, and a warp adds to whole blocks");
    float* const first = params.dq_accum + dq_offset(params.dq_groups, params.shape, sequence, head, row, col, kHeadDim);
    const int rows = sequence.seqlen_q - row;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < kNTiles; j += 2) {
                const float x[4] = {dq.x[i][j][2 * half], dq.x[i][j][2 * half + 1], dq.x[i][j + 1][2 * half],
                                    dq.x[i][j + 1][2 * half + 1]};
                const int first_row = 16 * i + 8 * half;
                add_to_dq_block(first + first_row * kHeadDim + j / 2 * kDqBlockElements, x, lane, first_row < rows);
            }
}

// The work of a thread block: x is a tile of keys, y a key head, z a sequence counted from Shape::first_batch.
struct BlockIndex {
    int x, y, z;
};

// The order in which blocks add to a tile of queries in dq_accum: the block with the last keys first. The sums then have the same bits each time.
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
