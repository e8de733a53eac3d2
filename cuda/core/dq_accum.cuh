// dq_accum holds dq in f32. A head is a list of row groups: 8 queries, all columns. Each sequence starts a new row group. A row group is
// stored in cells of 8 rows x 16 columns. A lane holds four floats of a cell. All backwards use this layout, so there is one conversion.
#pragma once

#include "../params.h"
#include "fragment.cuh"
#include "mask.cuh"
#include "sequence.cuh"
#include "types.cuh"

namespace fa2 {

constexpr int kDqCellCols = 16;
constexpr int kDqCellElements = kDqGroupRows * kDqCellCols;

// Index of the first row block of one head of a sequence. Row blocks have `rows` rows: 8 for a row group, kBlockM for a tile of queries.
// Packed sequences start at a row block of their own: all of a sequence lie before the first one of the next sequence.
__device__ __forceinline__ int64_t first_row_block(const RowBlocks& blocks, int rows, const Shape& shape, const Sequence& sequence,
                                                   int head) {
    const int first = is_packed(shape) ? sequence.first_q / rows + sequence.batch : 0;
    return sequence.batch * blocks.batch + head * blocks.head + first;
}

// Lane l has row l / 4 of a cell, and four of its columns: c, c + 1, c + 8 and c + 9 for c = 2 (l % 4). For f32, c = 4 (l % 4) and they are
// c, c + 2, c + 1 and c + 3 (product_columns()). From 9.0 on, these four are next to each other. Before, each of the four has 32 floats of
// its own, in the order of the lanes. All kernels of a GPU are compiled for the same side of 9.0, so the backward and the conversion agree.

// Adds a lane's four elements to a cell.
__device__ __forceinline__ void add_to_dq_cell(float* cell, const float4& x, int lane) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(cell + 4 * lane), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
#else
    // One asm block, so that one address serves all four.
    asm volatile(
        "red.global.add.f32 [%0], %1;\n"
        "red.global.add.f32 [%0 + 128], %2;\n"
        "red.global.add.f32 [%0 + 256], %3;\n"
        "red.global.add.f32 [%0 + 384], %4;\n" ::"l"(cell + lane), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
        : "memory");
#endif
}

// The four elements of one lane of a row of a cell.
__device__ __forceinline__ float4 load_dq_lane(const float* cell, int row, int lane_in_row) {
    const int lane = 4 * row + lane_in_row;
#if __CUDA_ARCH__ >= 900
    return reinterpret_cast<const float4*>(cell)[lane];
#else
    return make_float4(cell[lane], cell[kWarpSize + lane], cell[2 * kWarpSize + lane], cell[3 * kWarpSize + lane]);
#endif
}

// Reads eight columns of one row of a cell: the first ones, or the last ones if `half` is 1. T: the type of q.
template <typename T>
__device__ __forceinline__ void load_dq_cell(float (&x)[8], const float* cell, int row, int half) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 lane = load_dq_lane(cell, row, 2 * half + i);
            const float columns[4] = {lane.x, lane.z, lane.y, lane.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) x[4 * i + e] = columns[e];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 lane = load_dq_lane(cell, row, i);
            x[2 * i] = half == 0 ? lane.x : lane.z;
            x[2 * i + 1] = half == 0 ? lane.y : lane.w;
        }
    }
}

// Adds a warp's accumulators, which begin at (row, col), to dq_accum of a head: a whole cell at a time, 512 contiguous bytes, with one
// `red`, or before compute capability 9.0 with four.
//
// A row group after the end of the sequence does not exist. Its accumulators are zeros (or NaN, which may spread within the sequence), and
// they go to the last row group that exists. There is no condition on `red`, because ptxas makes a branch of it, and then no longer
// overlaps the additions with products.
template <int kHeadDim, int kMTiles, int kNTiles>
__device__ __forceinline__ void add_to_dq(const BwdParams& params, const Sequence& sequence, int head, int row, int col,
                                          const Accumulator<kMTiles, kNTiles>& dq, int lane) {
    constexpr int kGroupElements = kDqGroupRows * kHeadDim;
    const int group = row / kDqGroupRows, last_group = (sequence.seqlen_q - 1) / kDqGroupRows;
    const int64_t first_group = first_row_block(params.dq_groups, kDqGroupRows, params.shape, sequence, head);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
        float* to[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            to[half] = params.dq_accum + (first_group + min(group + 2 * i + half, last_group)) * kGroupElements + col * kDqGroupRows;
        static_assert(kNTiles % 2 == 0, "a cell has two accumulators");
        // Both rows of a pair of accumulators follow each other, so that their registers are free early.
#pragma unroll
        for (int j = 0; j < kNTiles; j += 2)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                add_to_dq_cell(to[half] + j / 2 * kDqCellElements, row_of_pair(dq.x[i], j / 2, half), lane);
    }
}

// Writes a warp's accumulators, which begin at (row, col), to a tile in shared memory with the layout of row groups. TMA then adds
// the columns of a consumer in a row group to dq_accum. Compute capability 9.0 only.
template <int kHeadDim, int kNTiles>
__device__ __forceinline__ void store_dq(float* tile, int row, int col, const Accumulator<1, kNTiles>& dq, int lane) {
    float* to = tile + row * kHeadDim + col * kDqGroupRows + 4 * lane;
#pragma unroll
    for (int j = 0; j < kNTiles; j += 2)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float4*>(to + half * kDqGroupRows * kHeadDim + j / 2 * kDqCellElements) = row_of_pair(dq.x[0], j / 2, half);
}

// Index of a tile of queries, for its semaphore.
template <int kBlockM>
__device__ __forceinline__ int64_t dq_tile_index(const BwdParams& params, const Sequence& sequence, int head, int m_block) {
    return first_row_block(params.dq_tiles, kBlockM, params.shape, sequence, head) + m_block;
}

// The order in which blocks add to the rows of a tile of queries: the block with the last keys first. The sums then have the same bits each
// time.
//
// A block waits only for blocks with later keys of its own head. Therefore blocks take their work tiles from a counter, later keys first,
// and finish them in this order. So the work tile that a block waits for has a lower number, and the lowest unfinished number never waits.
// Under a causal mask with seqlen_q == seqlen_k, no block waits at its first tile of queries either: it starts on its own diagonal, and a
// tile of queries is not longer than the keys of a block. With other lengths the first tile can reach into later keys, and then a block
// waits there.
struct DqSemaphores {
    uint32_t* counters;  // one for each tile of queries

    // Number of blocks of `block_n` keys that add to the queries `rows` before block `n_block`. The order starts with the block of the last
    // keys that any of them sees.
    __device__ __forceinline__ static int blocks_before(const Visibility& sees, Range rows, int n_block, int block_n) {
        return (sees.keys_of(rows).end - 1) / block_n - n_block;
    }

    // One thread. Waits until `count` additions to the tile are done.
    __device__ __forceinline__ void poll(int64_t tile, uint32_t count) const {
        uint32_t added;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(added) : "l"(counters + tile) : "memory");
        } while (added < count);
    }

    // One thread. Says that an addition is done. The release also covers what other threads added before a barrier.
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
