// The work tiles of a persistent kernel and their order: within a section of heads, those with the most keys come first.
#pragma once

#include "../core/sequence.cuh"
#include "../core/types.cuh"
#include "../params.h"

namespace fa2::sm90 {

// kBlockM queries of one head of one sequence.
struct WorkTile {
    Sequence sequence;
    int head;
    int m_block;  // -1: there is no further tile
    int number;   // counts the tiles of this block

    __device__ __forceinline__ bool exists() const { return m_block >= 0; }
};

// Tile `index` of the schedule. All lanes of a warp call it together. If a packed batch has fewer tiles than the upper bound in the
// schedule, the last tiles do not exist.
template <int kBlockM>
__device__ __forceinline__ WorkTile work_tile(const Shape& shape, const Schedule& schedule, int index, int lane) {
    const bool packed = is_packed(shape);
    const int heads = packed ? shape.num_heads : shape.num_heads * shape.batch;
    const int section = index / (schedule.section_heads * schedule.m_blocks);
    const int first_head = section * schedule.section_heads;
    const int in_section = min(schedule.section_heads, heads - first_head);
    const int rest = index - first_head * schedule.m_blocks;
    const int head = first_head + rest % in_section;
    int m_block = schedule.m_blocks - 1 - rest / in_section;
    WorkTile tile;
    tile.number = 0;
    tile.head = packed ? head : head % shape.num_heads;
    tile.m_block = m_block;
    if (!packed) {
        tile.sequence = Sequence(shape, head / shape.num_heads);
        return tile;
    }
    // m_block counts over all sequences. Search 32 sequences at a time for the one that contains it.
    for (int first = 0; first < shape.batch; first += kWarpSize) {
        const int batch = min(first + lane, shape.batch - 1);
        const int begin = shape.cu_seqlens_q[batch], length = int(shape.cu_seqlens_q[batch + 1]) - begin;
        const int blocks = first + lane < shape.batch ? ceil_div(length, kBlockM) : 0;
        int end = blocks;  // blocks of this sequence and of those before it
#pragma unroll
        for (int step = 1; step < kWarpSize; step *= 2) {
            const int before = __shfl_up_sync(~0u, end, step);
            if (lane >= step) end += before;
        }
        const uint32_t found = __ballot_sync(~0u, m_block < end);
        if (found != 0) {
            const int owner = __ffs(found) - 1;
            tile.m_block = __shfl_sync(~0u, m_block - (end - blocks), owner);
            tile.sequence = Sequence(shape, first + owner);
            return tile;
        }
        m_block -= __shfl_sync(~0u, end, kWarpSize - 1);
    }
    tile.m_block = -1;
    return tile;
}

}  // namespace fa2::sm90
