// TMA (PTX ISA, "cp.async.bulk.tensor" and "cp.reduce.async.bulk"). One thread copies a box of a tensor into shared memory, swizzled.
// Elements outside the tensor become zeros. An mbarrier counts the bytes. TMA also adds contiguous floats of shared memory to
// global memory.
#pragma once

#include <cstdint>

#include "../params.h"
#include "barrier.cuh"

namespace fa2::sm90 {

__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The first row of a box.
struct BoxAt {
    int row, head, batch;  // of the tensor map
};

// Loads the box that begins at column `col` of row `at`.
__device__ __forceinline__ void tma_load(uint32_t shared, const TensorMap& map, uint32_t barrier, int col, const BoxAt& at) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            shared),
        "l"(&map), "r"(barrier), "r"(col), "r"(at.row), "r"(at.head), "r"(at.batch)
        : "memory");
}

// Loads a whole tile, whose first row is `at`, from column `first_col` on: one box for each of its panels.
template <typename Tile>
__device__ __forceinline__ void tma_load_tile(uint32_t shared, const TensorMap& map, uint32_t barrier, const BoxAt& at, int first_col = 0) {
#pragma unroll
    for (int col = 0; col < Tile::kCols; col += Tile::kPanel)
        tma_load(shared + col * Tile::kRows * Tile::kElementBytes, map, barrier, first_col + col, at);
}

// The same. Also arrives at the barrier and makes it wait for the tile.
template <typename Tile>
__device__ __forceinline__ void tma_fill(uint32_t shared, const TensorMap& map, uint32_t barrier, const BoxAt& at, int first_col = 0) {
    mbarrier_arrive_expect(barrier, Tile::kBytes);
    tma_load_tile<Tile>(shared, map, barrier, at, first_col);
}

// Starts to add `size_bytes` of floats to global memory, as one bulk group.
__device__ __forceinline__ void bulk_add(float* to, uint32_t from, int size_bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(size_bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the bulk groups of this thread have read shared memory.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Waits until the bulk groups of this thread have written to global memory.
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace fa2::sm90
