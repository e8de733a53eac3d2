// The work tiles of a persistent kernel, their order, and the counter from which thread blocks take them.
#pragma once

#include "../core/sequence.cuh"
#include "../core/types.cuh"
#include "../params.h"

namespace fa2::sm90 {

enum class Axis { kQueries, kKeys };
enum class First { kFirst, kLast };  // the block of a head that comes first

// A block of queries, or of keys, of one head of one sequence.
struct WorkTile {
    Sequence sequence;
    int head;
    int block;   // -1: there is no further tile
    int number;  // counts the tiles of this thread block

    __device__ __forceinline__ bool exists() const { return block >= 0; }
};

// Tile `index` of the schedule. A tile is kBlock queries or keys. All lanes of a warp call it together. If a packed batch has fewer tiles than
// the upper bound in the schedule, the other tiles do not exist.
template <Axis kAxis, int kBlock>
__device__ __forceinline__ WorkTile work_tile(const Shape& shape, const Schedule& schedule, First order, int index, int lane) {
    const bool packed = is_packed(shape);
    const int num_heads = kAxis == Axis::kQueries ? shape.num_heads : shape.num_heads_k;
    const int heads = packed ? num_heads : num_heads * shape.batch;
    const int section = index / (schedule.section_heads * schedule.head_tiles);
    const int first_head = section * schedule.section_heads;
    const int in_section = min(schedule.section_heads, heads - first_head);
    const int rest = index - first_head * schedule.head_tiles;
    const int head = first_head + rest % in_section;
    int block = rest / in_section;
    if (order == First::kLast) block = schedule.head_tiles - 1 - block;
    WorkTile tile;
    tile.number = 0;
    tile.head = packed ? head : head % num_heads;
    tile.block = block;
    if (!packed) {
        tile.sequence = Sequence(shape, head / num_heads);
        return tile;
    }
    // `block` counts over all sequences. Search 32 sequences at a time for the one that contains it.
    const uint32_t* cu_seqlens = kAxis == Axis::kQueries ? shape.cu_seqlens_q : shape.cu_seqlens_k;
    for (int first = 0; first < shape.batch; first += kWarpSize) {
        const int batch = min(first + lane, shape.batch - 1);
        const int begin = cu_seqlens[batch], length = int(cu_seqlens[batch + 1]) - begin;
        const int blocks = first + lane < shape.batch ? ceil_div(length, kBlock) : 0;
        int end = blocks;  // blocks of this sequence and of those before it
#pragma unroll
        for (int step = 1; step < kWarpSize; step *= 2) {
            const int before = __shfl_up_sync(~0u, end, step);
            if (lane >= step) end += before;
        }
        const uint32_t found = __ballot_sync(~0u, block < end);
        if (found != 0) {
            const int owner = __ffs(found) - 1;
            tile.block = __shfl_sync(~0u, block - (end - blocks), owner);
            tile.sequence = Sequence(shape, first + owner);
            return tile;
        }
        block -= __shfl_sync(~0u, end, kWarpSize - 1);
    }
    tile.block = -1;
    return tile;
}

// One thread of each block or cluster that takes tiles, after its last one. The last of them resets the counters to zero.
__device__ __forceinline__ void finish_tiles(const Schedule& schedule, uint32_t takers) {
    uint32_t* counters = schedule.counters;
    __threadfence();
    if (atomicAdd(&counters[1], 1u) == takers - 1) {
        __threadfence();
        counters[0] = 0;
        counters[1] = 0;
    }
}

}  // namespace fa2::sm90
