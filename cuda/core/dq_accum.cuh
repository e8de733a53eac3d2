// dq_accum: dq in f32, as it is summed up. Where its rows lie, and in which order thread blocks add to them.
//
// The rows of a head follow each other in row groups of 8, and every sequence starts at a row group of its own. A row group has
// kHeadDim / 8 cells of 8 x 8. From registers, a warp adds a whole cell at once, 256 contiguous bytes (before compute capability 9.0 twice
// 128: the even columns, the odd ones). On Hopper up to head_dim 128, TMA adds the columns of one consumer in a row group. The layout does
// not depend on tiles and warps, so all backwards share one conversion.
#pragma once

#include "../params.h"
#include "fragment.cuh"
#include "mask.cuh"
#include "sequence.cuh"
#include "types.cuh"

namespace fa2 {

constexpr int kDqGroupRows = 8;
constexpr int kDqCellElements = kDqGroupRows * 8;

// Index of the first row block of one head of a sequence. Row blocks have `rows` rows: 8 for a row group, kBlockM for a tile of queries.
// Packed sequences start at a row block of their own: all of a sequence lie before the first one of the next sequence.
__device__ __forceinline__ int64_t first_row_block(const RowBlocks& blocks, int rows, const Shape& shape, const Sequence& sequence,
                                                   int head) {
    const int first = is_packed(shape) ? sequence.first_q / rows + sequence.batch : 0;
    return sequence.batch * blocks.batch + head * blocks.head + first;
}

// From 9.0 on a cell is row-major; before, its even columns come first. All kernels of a GPU are compiled for the same side of 9.0, so the
// backward and the conversion agree.

// Adds row `half` of an accumulator to a cell: lane l has row l / 4 and columns 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ void add_to_dq_cell(float* cell, const float (&x)[4], int half, int lane) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(cell + 2 * lane), "f"(x[2 * half]), "f"(x[2 * half + 1]) : "memory");
#else
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(cell + lane), "f"(x[2 * half]) : "memory");
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(cell + kWarpSize + lane), "f"(x[2 * half + 1]) : "memory");
#endif
}

// Adds four neighbouring columns of a row, from `col` on, to a cell.
__device__ __forceinline__ void add_to_dq_cell(float* cell, float4 x, int row, int col) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(cell + 8 * row + col), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                 : "memory");
#else
    float* even = cell + 4 * row + col / 2;
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(even), "f"(x.x) : "memory");
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(even + kWarpSize), "f"(x.y) : "memory");
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(even + 1), "f"(x.z) : "memory");
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(even + kWarpSize + 1), "f"(x.w) : "memory");
#endif
}

// Reads the eight columns of one row of a cell.
__device__ __forceinline__ void load_dq_cell(float (&x)[8], const float* cell, int row) {
#if __CUDA_ARCH__ >= 900
    const float4* from = reinterpret_cast<const float4*>(cell) + 2 * row;
    const float4 a = from[0], b = from[1];
    const float columns[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#else
    const float4* from = reinterpret_cast<const float4*>(cell) + row;
    const float4 even = from[0], odd = from[kWarpSize / 4];
    const float columns[8] = {even.x, odd.x, even.y, odd.y, even.z, odd.z, even.w, odd.w};
#endif
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = columns[i];
}

// Adds a warp's accumulators, which begin at (row, col), to dq_accum of a head.
//
// A row group after the end of the sequence does not exist. Its accumulators are zeros (or NaN, which may spread within the sequence), and
// they go to the last row group that exists. There is no condition on `red`, because ptxas makes a branch of it, and then no longer
// overlaps the additions with products.
template <int kHeadDim, typename T = bf16, int kMTiles, int kNTiles>
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
        // Both halves of an accumulator follow each other, so that its registers are free early.
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if constexpr (sizeof(T) == 4) {
                    if (j % 2) continue;
                    const int in_pair = product_col(lane, 0);
                    add_to_dq_cell(to[half] + (j + in_pair / 8) * kDqCellElements, product_columns(dq.x[i], j / 2, half), lane / 4,
                                   in_pair % 8);
                } else {
                    add_to_dq_cell(to[half] + j * kDqCellElements, dq.x[i][j], half, lane);
                }
            }
    }
}

// Writes a warp's accumulators, which begin at (row, col), to a tile in shared memory with the layout of row groups. Compute capability 9.0
// only.
template <int kHeadDim, int kNTiles>
__device__ __forceinline__ void store_dq(float* tile, int row, int col, const Accumulator<1, kNTiles>& dq, int lane) {
    float* to = tile + row * kHeadDim + col * kDqGroupRows + 2 * lane;
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float2*>(to + half * kDqGroupRows * kHeadDim + j * kDqCellElements) =
                make_float2(dq.x[0][j][2 * half], dq.x[0][j][2 * half + 1]);
}

// The work of a thread block: a tile of keys of one key head of one sequence, which is counted from Shape::first_batch.
struct BlockIndex {
    int n_block, head_k, batch;
};

// Index of a tile of queries, for its semaphore.
template <int kBlockM>
__device__ __forceinline__ int64_t dq_tile_index(const BwdParams& params, const Sequence& sequence, int head, int m_block) {
    return first_row_block(params.dq_tiles, kBlockM, params.shape, sequence, head) + m_block;
}

// The order in which blocks add to the rows of a tile of queries: the block with the last keys first. The sums then have the same bits each
// time.
//
// A block waits only for blocks with later keys of its own head. So blocks take their work in the order in which they start, later keys
// first: the block that another one waits for has always started before it, on any GPU. Under a causal mask with seqlen_q == seqlen_k, no
// block waits at its first tile either: it starts on its own diagonal, and a tile of queries is not longer than the keys of a block. With
// other lengths the first tile can reach into later keys, and then a block waits there.
struct DqSemaphores {
    uint32_t* counters;  // one for each tile, then one that counts started blocks

    // One thread. The number of this block, or cluster, in the order in which they start.
    __device__ __forceinline__ uint32_t take_number(int64_t tiles) const { return atomicAdd(counters + tiles, 1u); }

    // The same for a block, with its number for each thread. All threads call it together, before anything else is in shared memory.
    __device__ __forceinline__ uint32_t take_block_number(int64_t tiles, uint8_t* bytes) const {
        if (threadIdx.x == 0) *word_for_all(bytes) = take_number(tiles);
        __syncthreads();
        return read_for_all(bytes);
    }

    // One thread writes the number to this word, and after a barrier all threads of the block read it. Then shared memory is free again.
    __device__ __forceinline__ static volatile uint32_t* word_for_all(uint8_t* bytes) {
        return reinterpret_cast<volatile uint32_t*>(bytes);
    }
    __device__ __forceinline__ static uint32_t read_for_all(uint8_t* bytes) {
        const uint32_t number = *word_for_all(bytes);
        __syncthreads();
        return number;
    }

    // The work of block `number`. Blocks of short sequences are interleaved with those of other heads. So the block that another one waits
    // for starts some time before it (docs/log/hopper-backward.md, "Deterministic"). If a call needs several launches, the numbers go on,
    // and `first_batch` is the sequence where this launch starts.
    __device__ __forceinline__ static BlockIndex block_index(uint32_t number, uint32_t n_blocks, uint32_t first_batch) {
        constexpr uint32_t kBlocksTogether = 128;  // about one for each of an H200's 132 multiprocessors; others were not tried
        const uint32_t heads = gridDim.y * gridDim.z, section_heads = max(kBlocksTogether / n_blocks, 1u);
        number -= first_batch * gridDim.y * n_blocks;
        const uint32_t first_head = number / (section_heads * n_blocks) * section_heads, width = min(section_heads, heads - first_head);
        const uint32_t in_section = number - first_head * n_blocks, head = first_head + in_section % width;
        return {int(n_blocks - 1 - in_section / width), int(head % gridDim.y), int(head / gridDim.y)};
    }

    // Number of key blocks that add to a tile of queries before block `n_block`. The order starts with the block of the last keys that the
    // tile sees.
    __device__ __forceinline__ static int blocks_before(const Visibility& sees, Range rows, int n_block, int block_n) {
        return (sees.keys_of(rows).end - 1) / block_n - n_block;
    }

    // The same for tile `m_block` of kBlockM queries, and blocks of kBlockN keys.
    template <int kBlockM, int kBlockN>
    __device__ __forceinline__ static int blocks_before(const Shape& shape, const Sequence& sequence, int m_block, int n_block) {
        const Range rows = tile_range(m_block * kBlockM, kBlockM, sequence.seqlen_q);
        return blocks_before(Visibility(shape, sequence), rows, n_block, kBlockN);
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
