// Products of tiles in shared memory on mma.sync: a warp multiplies its block of rows and columns.
#pragma once

#include "../core/fragment.cuh"
#include "../core/tile.cuh"
#include "mma.cuh"

namespace fa2::sm80 {

// Addresses of one warp's A operand: 16 x 16 fragments at (row 16 i, k-step).
//
// `base` is the address that the lane would read if the tile began at `shared`. The tile's own offset is added last, as a constant in
// the instruction. Operands of the same shape then share one register.
template <typename Tile, Order kOrder>
struct OperandA {
    uint32_t base;
    uint32_t tile;

    // shared: a multiple of 128. tile: offset from it in bytes. first_row: of the A matrix, a multiple of 16.
    __device__ __forceinline__ OperandA(uint32_t shared, uint32_t tile, int first_row, int lane) : tile(tile) {
        if constexpr (kOrder == Order::kContiguousK) {
            base = shared + Tile::offset(first_row + lane % 16, lane / 16);
        } else {
            // Stored rows are k. first_row may reach into any panel, so it is part of the base.
            base = shared + Tile::offset(lane % 8 + 8 * (lane / 16), first_row / 8 + lane / 8 % 2);
        }
    }

    __device__ __forceinline__ void load(uint32_t (&a)[4], int i, int k_step) const {
        if constexpr (kOrder == Order::kContiguousK) {
            ldmatrix_x4(a, Tile::advance(base, 2 * k_step) + (Tile::row_step(16 * i) + tile));
        } else {
            ldmatrix_x4_trans(a, Tile::advance(base, 2 * i) + (Tile::row_step(16 * k_step) + tile));
        }
    }
};

// Addresses of one warp's B operand, kWidth columns: 16 x 16 fragments (two n8 tiles) at (column 16 j, k-step).
template <typename Tile, Order kOrder, int kWidth>
struct OperandB {
    uint32_t base;
    uint32_t tile;
    int chunk;  // of the first column; 0 unless kAcrossPanels

    // The columns of a warp may begin inside a panel and run into the next one.
    static constexpr bool kAcrossPanels =
        kOrder == Order::kTransposed && kWidth % Tile::kPanel != 0 && Tile::kPanel % kWidth != 0;

    // As OperandA. first_col: of the B matrix, a multiple of 16.
    __device__ __forceinline__ OperandB(uint32_t shared, uint32_t tile, int first_col, int lane)
        : tile(tile), chunk(kAcrossPanels ? first_col / 8 : 0) {
        if constexpr (kOrder == Order::kContiguousK) {
            base = shared + Tile::offset(first_col + lane % 8 + 8 * (lane / 16), lane / 8 % 2);
        } else {
            base = shared + Tile::offset(lane % 16, (kAcrossPanels ? 0 : first_col / 8) + lane / 16);
        }
    }

    __device__ __forceinline__ void load(uint32_t (&b)[4], int j, int k_step) const {
        if constexpr (kOrder == Order::kContiguousK) {
            ldmatrix_x4(b, Tile::advance(base, 2 * k_step) + (Tile::row_step(16 * j) + tile));
        } else {
            ldmatrix_x4_trans(b, Tile::advance(base, 2 * j + chunk) + (Tile::row_step(16 * k_step) + tile));
        }
    }
};

// acc += a b over kSteps of 16.
//
// Fragments are loaded one pair of n8 tiles ahead. With two warps to a scheduler, nothing else hides the latency of ldmatrix.
// (bench mha/d128/full/s4096 fwd, H200: 331 TFLOP/s without, 363 with.)
template <typename T, int kSteps, int kMTiles, int kNTiles, typename A, typename B>
__device__ __forceinline__ void multiply_ahead(Accumulator<kMTiles, kNTiles>& acc, const A& a, const B& b) {
    static_assert(kNTiles % 2 == 0, "B is loaded two n8 tiles at a time");
    constexpr int kPairs = kNTiles / 2;
    uint32_t ra[2][kMTiles][4], rb[2][4];
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) a.load(ra[0][i], i, 0);
    b.load(rb[0], 0, 0);
#pragma unroll
    for (int k_step = 0; k_step < kSteps; ++k_step) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            const int pair = k_step * kPairs + j;
            if (j + 1 < kPairs) {
                b.load(rb[(pair + 1) % 2], j + 1, k_step);
            } else if (k_step + 1 < kSteps) {
                b.load(rb[(pair + 1) % 2], 0, k_step + 1);
            }
            if (j == (kPairs > 1 ? kPairs - 2 : 0) && k_step + 1 < kSteps) {
#pragma unroll
                for (int i = 0; i < kMTiles; ++i) a.load(ra[(k_step + 1) % 2][i], i, k_step + 1);
            }
#pragma unroll
            for (int i = 0; i < kMTiles; ++i) {
                mma_m16n8k16<T>(acc.x[i][2 * j], ra[k_step % 2][i], rb[pair % 2][0], rb[pair % 2][1]);
                mma_m16n8k16<T>(acc.x[i][2 * j + 1], ra[k_step % 2][i], rb[pair % 2][2], rb[pair % 2][3]);
            }
        }
    }
}

// The same without loading ahead. It needs fewer registers, for products that run while other accumulators are live.
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

// Accumulators as the A operand of the next product. They are rounded as they are used.
template <typename T, int kMTiles, int kNTiles>
struct AccumulatorA {
    const Accumulator<kMTiles, kNTiles>& acc;

    __device__ __forceinline__ void load(uint32_t (&a)[4], int i, int k_step) const {
        to_a_operand<T>(a, acc.x[i], k_step);
    }
};

}  // namespace fa2::sm80
