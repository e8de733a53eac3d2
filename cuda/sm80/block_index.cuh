// Which keys a thread block of the backward computes. By default its grid position says it. In a deterministic backward, blocks take their
// keys from a counter, last keys first.
#pragma once

#include "../core/types.cuh"
#include "../params.h"

namespace fa2::sm80 {

// A block of keys of one key head of one sequence, and the part of the columns. `batch` counts from Shape::first_batch.
struct BlockIndex {
    int n_block, head_k, batch, part;
};

// The block of keys of this thread block, in the order in which blocks start. Blocks of short sequences are interleaved with those of other
// heads. So the block that another one waits for starts some time before it (docs/log/hopper-backward.md, "Deterministic"). If a call needs
// several launches, the count goes on, and Shape::first_batch is the sequence where this launch starts. All threads call it together,
// before anything else is in shared memory.
template <int kParts>
__device__ __forceinline__ BlockIndex ordered_block_index(const BwdParams& params, uint8_t* bytes) {
    constexpr uint32_t kBlocksTogether = 128;  // about one for each of an H200's 132 multiprocessors; others were not tried
    volatile uint32_t* word = reinterpret_cast<volatile uint32_t*>(bytes);
    if (threadIdx.x == 0) *word = atomicAdd(params.semaphores + params.dq_tiles.count * kParts, 1u);
    __syncthreads();
    const uint32_t started = *word;
    __syncthreads();
    // Each part of a head counts as a head.
    const uint32_t n_blocks = gridDim.x / kParts, heads = gridDim.y * gridDim.z * kParts;
    const uint32_t section_heads = max(kBlocksTogether / n_blocks, 1u);
    const uint32_t number = started - params.shape.first_batch * gridDim.y * gridDim.x;
    const uint32_t first_head = number / (section_heads * n_blocks) * section_heads, width = min(section_heads, heads - first_head);
    const uint32_t in_section = number - first_head * n_blocks, head = first_head + in_section % width;
    const uint32_t head_k = head / kParts;
    return {int(n_blocks - 1 - in_section / width), int(head_k % gridDim.y), int(head_k / gridDim.y), int(head % kParts)};
}

}  // namespace fa2::sm80
