// Copies of tiles from global to shared memory, by cp.async (PTX ISA, "Data movement and conversion instructions").
#pragma once

#include "../core/tile.cuh"
#include "../core/types.cuh"

namespace fa2::sm80 {

// Copies 16 bytes past L1, or fills them with zeros.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// Copies 4 bytes through L1, or fills them with zeros.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's cp.async-groups (PTX ISA) are still being copied.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Copies tiles of one tensor, all threads together. A thread always copies the same columns, and its rows lie a fixed number apart.
// So it computes its addresses once, and each further row costs one add and one compare.
template <typename Tile, int kThreads, typename T>
struct TileCopy {
    static constexpr int kRowsPerStep = kThreads / Tile::kChunksPerRow;
    static constexpr int kActive = kRowsPerStep * Tile::kChunksPerRow;
    static constexpr int kSteps = ceil_div(Tile::kRows, kRowsPerStep);
    static_assert(kRowsPerStep <= 32, "the host limits row strides so that 32 rows fit a 32-bit offset (MAX_ROW_STRIDE)");

    const T* first;  // this thread's chunk of row 0 of the sequence
    int row_stride;  // elements
    int row;         // this thread's first row in a tile
    int chunk;
    uint32_t offset;  // of this thread's first chunk in a tile
    bool active;     // false: the columns lie past head_dim and become zeros
    bool idle;       // true: this thread has no chunk at all

    __device__ __forceinline__ TileCopy(const T* rows, int64_t row_stride, int head_dim, int thread)
        : row_stride(int(row_stride)), row(thread / Tile::kChunksPerRow), chunk(thread % Tile::kChunksPerRow),
          offset(Tile::offset(row, chunk)), active(chunk * Tile::kChunk < head_dim), idle(thread >= kActive) {
        // cp.async of 0 bytes still needs an address inside the tensor.
        first = rows + (active ? chunk * Tile::kChunk : 0);
    }

    // Offset of this thread's chunk of step `step`. The swizzle repeats every 8 rows.
    __device__ __forceinline__ uint32_t step_offset(int step) const {
        constexpr bool kRepeats = kRowsPerStep % 8 == 0;
        return kRepeats ? offset + Tile::row_step(step * kRowsPerStep) : Tile::offset(row + step * kRowsPerStep, chunk);
    }

    // Starts the copy of rows first_row .. first_row + kRows. Rows from `seqlen` on become zeros, so that hidden values multiply to 0
    // and not to NaN.
    __device__ __forceinline__ void start(uint32_t shared, int first_row, int seqlen) const {
        if (kActive < kThreads && idle) return;
        const T* from = first + int64_t(first_row + row) * row_stride;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int tile_row = row + step * kRowsPerStep;
            if (Tile::kRows % kRowsPerStep == 0 || tile_row < Tile::kRows) {
                const bool valid = active && first_row + tile_row < seqlen;
                cp_async_16(shared + step_offset(step), valid ? from : first, valid);
            }
            from += kRowsPerStep * row_stride;
        }
    }
};

}  // namespace fa2::sm80
