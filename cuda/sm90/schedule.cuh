// The work tiles of a persistent kernel, their order, and the counter from which thread blocks take them.
#pragma once

#include "../core/sequence.cuh"
#include "../core/types.cuh"
#include "../params.h"

namespace fa2::sm90 {

enum class Axis { kQueries, kKeys };
enum class BlockOrder { kAscending, kDescending };  // of the blocks of a head

// A block of queries, or of keys, of one head of one sequence.
struct WorkTile {
    Sequence sequence;
    int head;
    int block;  // -1: there is no further tile

    __device__ __forceinline__ bool exists() const { return block >= 0; }
};

// The first block of sequence b of a packed call, counted over all sequences. The blocks from there up to the first one of sequence b + 1
// are enough for any lengths, and the last one may be empty.
template <int kBlock>
__device__ __forceinline__ int first_block(const uint32_t* cu_seqlens, int b) {
    return int(cu_seqlens[b] / kBlock) + b;
}

// The sequence of a packed call that owns block `block`. All lanes of a warp call it together and search among 32 sequences at a time.
template <int kBlock>
__device__ __forceinline__ int sequence_of_block(const uint32_t* cu_seqlens, int batch, int block, int lane) {
    int first = 0, count = batch;  // it is one of these
#pragma unroll 1
    while (count > 1) {
        const int step = ceil_div(count, kWarpSize), ahead = lane * step;
        const bool begins_before = ahead < count && first_block<kBlock>(cu_seqlens, first + ahead) <= block;
        const int owner = kWarpSize - 1 - __clz(__ballot_sync(~0u, begins_before || lane == 0));
        first += owner * step;
        count = min(step, count - owner * step);
    }
    return first;
}

// Tile `index` of the schedule. A tile is kBlock queries or keys. All lanes of a warp call it together. Some tiles of a packed call are
// empty: they begin after the end of their sequence.
template <Axis kAxis, int kBlock>
__device__ __forceinline__ WorkTile work_tile(const Shape& shape, const Schedule& schedule, BlockOrder order, int index, int lane) {
    const bool packed = is_packed(shape);
    const int num_heads = kAxis == Axis::kQueries ? shape.num_heads : shape.num_heads_k;
    const int heads = packed ? num_heads : num_heads * shape.batch;
    const int section = index / (schedule.section_heads * schedule.head_tiles);
    const int first_head = section * schedule.section_heads;
    const int in_section = min(schedule.section_heads, heads - first_head);
    const int rest = index - first_head * schedule.head_tiles;
    const int head = first_head + rest % in_section;
    WorkTile tile;
    tile.head = packed ? head : head % num_heads;
    tile.block = order == BlockOrder::kDescending ? schedule.head_tiles - 1 - rest / in_section : rest / in_section;
    int batch = head / num_heads;
    if (packed) {
        const uint32_t* cu_seqlens = kAxis == Axis::kQueries ? shape.cu_seqlens_q : shape.cu_seqlens_k;
        batch = sequence_of_block<kBlock>(cu_seqlens, shape.batch, tile.block, lane);
        tile.block -= first_block<kBlock>(cu_seqlens, batch);
    }
    tile.sequence = Sequence(shape, batch);
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
