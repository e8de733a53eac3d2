// Which tiles a block of a persistent kernel takes, and in what order: the longest of a section of heads first.
#pragma once

#include "../core/mask.cuh"
#include "../params.h"

namespace fa2::sm90 {

// kBlockM queries of one head of one sequence.
struct Work {
    int m_block;  // -1: nothing more
    int head;
    int batch;
    int first_q, first_k, seqlen_q, seqlen_k;
    int number;  // of this block's tiles

    __device__ __forceinline__ Sequence sequence(const Shape& shape) const {
        Sequence sequence;
        sequence.first_q = first_q;
        sequence.first_k = first_k;
        sequence.seqlen_q = seqlen_q;
        sequence.seqlen_k = seqlen_k;
        sequence.batch = batch;
        sequence.packed = shape.cu_seqlens_q != nullptr;
        return sequence;
    }
};

// Tile `index`; all lanes of a warp call it together. m_block is -1 where a packed batch has fewer tiles than `schedule` allows for.
template <int kBlockM>
__device__ __forceinline__ Work tile_at(const Shape& shape, const Schedule& schedule, int index, int lane) {
    const bool packed = shape.cu_seqlens_q != nullptr;
    const int heads = packed ? shape.num_heads : shape.num_heads * shape.batch;
    const int section = index / (schedule.section_heads * schedule.m_blocks);
    const int first_head = section * schedule.section_heads;
    const int in_section = min(schedule.section_heads, heads - first_head);
    const int rest = index - first_head * schedule.m_blocks;
    const int head = first_head + rest % in_section;
    int m_block = schedule.m_blocks - 1 - rest / in_section;
    Work work;
    work.number = 0;
    if (!packed) {
        work.head = head % shape.num_heads;
        work.batch = head / shape.num_heads;
        work.m_block = m_block;
        const Sequence sequence(shape, work.batch);
        work.first_q = 0;
        work.first_k = sequence.first_k;
        work.seqlen_q = shape.seqlen_q;
        work.seqlen_k = sequence.seqlen_k;
        return work;
    }
    work.head = head;
    // Blocks of rows are numbered through the sequences: 32 of them are looked through at a time.
    for (int first = 0; first < shape.batch; first += kWarpSize) {
        const int batch = min(first + lane, shape.batch - 1);
        const int begin = shape.cu_seqlens_q[batch], length = int(shape.cu_seqlens_q[batch + 1]) - begin;
        const int blocks = first + lane < shape.batch ? ceil_div(length, kBlockM) : 0;
        int end = blocks;  // blocks of this sequence and those before it
#pragma unroll
        for (int step = 1; step < kWarpSize; step *= 2) {
            const int before = __shfl_up_sync(~0u, end, step);
            if (lane >= step) end += before;
        }
        const uint32_t found = __ballot_sync(~0u, m_block < end);
        if (found != 0) {
            const int owner = __ffs(found) - 1;
            work.batch = first + owner;
            work.m_block = __shfl_sync(~0u, m_block - (end - blocks), owner);
            work.first_q = __shfl_sync(~0u, begin, owner);
            work.seqlen_q = __shfl_sync(~0u, length, owner);
            work.first_k = shape.cu_seqlens_k[work.batch];
            work.seqlen_k = int(shape.cu_seqlens_k[work.batch + 1]) - work.first_k;
            return work;
        }
        m_block -= __shfl_sync(~0u, end, kWarpSize - 1);
    }
    work.m_block = -1;
    return work;
}

}  // namespace fa2::sm90
