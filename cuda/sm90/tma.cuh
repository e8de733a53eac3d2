// TMA loads (PTX ISA, "cp.async.bulk.tensor"). One thread copies a box of a tensor into shared memory, swizzled. Elements outside the
// tensor become zeros. An mbarrier counts the bytes.
#pragma once

#include <cstdint>

#include "../params.h"
#include "barrier.cuh"

namespace fa2::sm90 {

__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the box that begins at column `col`, row `row` of one head of one sequence.
__device__ __forceinline__ void tma_load(uint32_t shared, const TensorMap& map, uint32_t barrier, int col, int row, int head,
                                         int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            shared),
        "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// Loads a whole tile, one box for each of its panels.
template <typename Tile>
__device__ __forceinline__ void tma_load_tile(uint32_t shared, const TensorMap& map, uint32_t barrier, int row, int head, int batch) {
#pragma unroll
    for (int col = 0; col < Tile::kCols; col += Tile::kPanel)
        tma_load(shared + col * Tile::kRows * 2, map, barrier, col, row, head, batch);
}

// The same. Also arrives at the barrier and makes it wait for the tile.
template <typename Tile>
__device__ __forceinline__ void tma_fill(uint32_t shared, const TensorMap& map, uint32_t barrier, int row, int head, int batch) {
    mbarrier_arrive_expect(barrier, Tile::kBytes);
    tma_load_tile<Tile>(shared, map, barrier, row, head, batch);
}

}  // namespace fa2::sm90
