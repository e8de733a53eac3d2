// Products of tiles in shared memory on mma.sync: a warp multiplies its block of rows and columns.
#pragma once

#include "../core/fragment.cuh"
#include "../core/tile.cuh"
#include "mma.cuh"

namespace fa2 {

// Which way an operand lies in shared memory: rows of k contiguous, or rows of its outer axis contiguous ("transposed").
enum class Order { kContiguousK, kTransposed };

// Addresses of one warp's A operand: 16 x 16 fragments at (row 16 i, k-step).
template <typename Tile, Order kOrder>
struct OperandA {
    uint32_t base;

    // first_row: of the A matrix, a multiple of 16.
    __device__ __forceinline__ OperandA(uint32_t tile, int first_row, int lane) {
        if constexpr (kOrder == Order::kContiguousK) {
            base = tile + Tile::offset(first_row + lane % 16, lane / 16);
        } else {
            // Stored rows are k. first_row may reach into any panel, so it is part of the base.
            base = tile + Tile::offset(lane % 8 + 8 * (lane / 16), first_row / 8 + lane / 8 % 2);
        }
    }

    __device__ __forceinline__ void load(uint32_t (&a)[4], int i, int k_step) const {
        if constexpr (kOrder == Order::kContiguousK) {
            ldmatrix_x4(a, Tile::advance(base, 2 * k_step) + Tile::row_step(16 * i));
        } else {
            ldmatrix_x4_trans(a, Tile::advance(base, 2 * i) + Tile::row_step(16 * k_step));
        }
    }
};

// Addresses of one warp's B operand: 16 x 16 fragments (two n8 tiles) at (column 16 j, k-step).
template <typename Tile, Order kOrder>
struct OperandB {
    uint32_t base;

    // first_col: of the B matrix, a multiple of 16.
    __device__ __forceinline__ OperandB(uint32_t tile, int first_col, int lane) {
        if constexpr (kOrder == Order::kContiguousK) {
            base = tile + Tile::offset(first_col + lane % 8 + 8 * (lane / 16), lane / 8 % 2);
        } else {
            base = tile + Tile::offset(lane % 16, first_col / 8 + lane / 16);
        }
    }

    __device__ __forceinline__ void load(uint32_t (&b)[4], int j, int k_step) const {
        if constexpr (kOrder == Order::kContiguousK) {
            ldmatrix_x4(b, Tile::advance(base, 2 * k_step) + Tile::row_step(16 * j));
        } else {
            ldmatrix_x4_trans(b, Tile::advance(base, 2 * j) + Tile::row_step(16 * k_step));
        }
    }
};

// acc += a b over kSteps of 16.
template <typename T, int kSteps, int kMTiles, int kNTiles, typename A, typename B>
__device__ __forceinline__ void multiply(Accumulator<kMTiles, kNTiles>& acc, const A& a, const B& b) {
    static_assert(kNTiles % 2 == 0, "B is loaded two n8 tiles at a time");
#pragma unroll
    for (int k_step = 0; k_step < kSteps; ++k_step) {
        uint32_t ra[kMTiles][4];
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) a.load(ra[i], i, k_step);
#pragma unroll
        for (int j = 0; j < kNTiles / 2; ++j) {
            uint32_t rb[4];
            b.load(rb, j, k_step);
#pragma unroll
            for (int i = 0; i < kMTiles; ++i) {
                mma_m16n8k16<T>(acc.x[i][2 * j], ra[i], rb[0], rb[1]);
                mma_m16n8k16<T>(acc.x[i][2 * j + 1], ra[i], rb[2], rb[3]);
            }
        }
    }
}

}  // namespace fa2
