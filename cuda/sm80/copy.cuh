// cp.async: 16 bytes from global to shared memory, past L1, and the copy of a tile made of them; sums in global memory.
#pragma once

#include "../core/tile.cuh"
#include "../core/types.cuh"

namespace fa2 {

// Copies `bytes` (16, or 0) and fills the rest of the 16 with zeros.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Copies 4 bytes, or fills them with zeros.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Adds two f32 to global memory if `valid`; a predicate, so that no branch comes of it. `to` is a multiple of 8 bytes.
__device__ __forceinline__ void red_add_2(float* to, float x, float y, bool valid) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p red.global.add.v2.f32 [%0], {%1, %2}; }" ::"l"(to), "f"(x),
                 "f"(y), "r"(int(valid))
                 : "memory");
#else
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p red.global.add.f32 [%0], %1; @p red.global.add.f32 [%0 + 4], %2; }" ::"l"(
            to),
        "f"(x), "f"(y), "r"(int(valid))
        : "memory");
#endif
}

// Copies tiles of one tensor into one buffer, all threads together. What a thread needs to know is worked out once: it
// always copies the same columns, and its rows lie a fixed number apart, so that a step costs one add and one compare.
template <typename Tile, int kThreads, typename T>
struct TileCopy {
    static constexpr int kRowsPerStep = kThreads / Tile::kChunksPerRow;
    static constexpr int kActive = kRowsPerStep * Tile::kChunksPerRow;
    static constexpr int kSteps = ceil_div(Tile::kRows, kRowsPerStep);

    const T* first;       // this thread's chunk of row 0 of the sequence
    int row_stride;       // elements
    int row;              // this thread's first row in a tile
    int chunk;
    bool active;          // false: columns past head_dim become zeros
    bool idle;            // no chunk at all

    __device__ __forceinline__ TileCopy(const T* rows, int64_t row_stride, int head_dim, int thread)
        : row_stride(int(row_stride)), row(thread / Tile::kChunksPerRow), chunk(thread % Tile::kChunksPerRow),
          active(chunk * Tile::kChunk < head_dim), idle(thread >= kActive) {
        // An address that is not read must still be one of the tensor's.
        first = rows + (active ? chunk * Tile::kChunk : 0);
    }

    // Starts the copy of rows first_row .. first_row + kRows. Rows from `seqlen` on become zeros: hidden values then
    // multiply to 0, never to NaN.
    __device__ __forceinline__ void start(uint32_t shared, int first_row, int seqlen) const {
        if (kActive < kThreads && idle) return;
        const T* from = first + int64_t(first_row + row) * row_stride;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int tile_row = row + step * kRowsPerStep;
            if (Tile::kRows % kRowsPerStep == 0 || tile_row < Tile::kRows) {
                const bool valid = active && first_row + tile_row < seqlen;
                cp_async_16(shared + Tile::offset(tile_row, chunk), valid ? from : first, valid ? 16 : 0);
            }
            from += kRowsPerStep * row_stride;
        }
    }
};

}  // namespace fa2
