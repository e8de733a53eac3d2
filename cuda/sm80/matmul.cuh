// Products of tiles in shared memory on mma.sync: a warp multiplies its block of rows and columns.
//
// A k-step is 32 bytes of an operand with contiguous k: 16 columns of 16-bit elements, 8 of f32. If ldmatrix could transpose f32, the f32
// operands whose rows run along k would look like the 16-bit ones. It cannot, so they have loads of their own, below.
#pragma once

#include "../core/fragment.cuh"
#include "../core/tile.cuh"
#include "load_ahead.cuh"
#include "mma.cuh"
#include "tf32.cuh"

namespace fa2::sm80 {

// Columns of a k-step.
template <typename T>
constexpr int kStepK = 32 / int(sizeof(T));

// Addresses of one warp's A operand: fragments of 16 rows at (row 16 i, k-step).
//
// `base` is the address that the lane would read if the tile began at `shared`. The tile's own offset is added last, as a constant in
// the instruction. Operands of the same shape then share one register.
template <typename Tile, Order kOrder, int kElementBytes = Tile::kElementBytes>
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

// Addresses of one warp's B operand, kWidth columns: fragments of 16 columns (two n8 tiles) at (column 16 j, k-step).
template <typename Tile, Order kOrder_, int kWidth, int kElementBytes = Tile::kElementBytes>
struct OperandB {
    static constexpr Order kOrder = kOrder_;
    ColumnBase<Tile, kWidth> columns;  // transposed only
    uint32_t base;
    uint32_t tile;

    // As OperandA. first_col: of the B matrix, a multiple of 16.
    __device__ __forceinline__ OperandB(uint32_t shared, uint32_t tile, int first_col, int lane) : columns(first_col), tile(tile) {
        if constexpr (kOrder == Order::kContiguousK) {
            base = shared + Tile::offset(first_col + lane % 8 + 8 * (lane / 16), lane / 8 % 2);
        } else {
            base = shared + Tile::offset(lane % 16, columns.base + lane / 16);
        }
    }

    __device__ __forceinline__ void load(uint32_t (&b)[4], int j, int k_step) const {
        if constexpr (kOrder == Order::kContiguousK) {
            ldmatrix_x4(b, Tile::advance(base, 2 * k_step) + (Tile::row_step(16 * j) + tile));
        } else {
            ldmatrix_x4_trans(b, Tile::advance(base, 2 * j + columns.chunk) + (Tile::row_step(16 * k_step) + tile));
        }
    }
};

// The f32 operands whose stored rows are k. Fragment columns t and t + 4 of a k-step are its rows 2t and 2t + 1, in A and in B alike: so
// the accumulators of S become an A operand (to_a_operand), and the swizzle keeps the banks of a load apart.

// The columns of the stored tile are rows of A. In each 8 they lie in the order 0 2 4 6 1 3 5 7, as store_operand() writes them.
template <typename Tile>
struct OperandA<Tile, Order::kTransposed, 4> {
    uint32_t base;
    uint32_t tile;

    __device__ __forceinline__ OperandA(uint32_t shared, uint32_t tile, int first_row, int lane) : tile(tile) {
        base = shared + Tile::offset(2 * (lane % 4), first_row / 4 + lane / 4 % 2) + lane / 8 * 4;
    }

    __device__ __forceinline__ void load(uint32_t (&a)[4], int i, int k_step) const {
        const uint32_t step = Tile::row_step(8 * k_step) + tile;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t address = Tile::advance(base, 4 * i + 2 * half);
            load_shared(a[half], address + step);
            load_shared(a[2 + half], Tile::next_row(address) + step);
        }
    }
};

// The columns of each 16 are those of the pair of n8 tiles in turn: column 2g + n is column g of tile n. So a thread loads two at once, and
// the accumulators of a pair hold four neighbouring columns of a row: 4t .. 4t + 3 (product_columns).
template <typename Tile, int kWidth>
struct OperandB<Tile, Order::kTransposed, kWidth, 4> {
    static constexpr Order kOrder = Order::kTransposed;
    ColumnBase<Tile, kWidth> columns;
    uint32_t base;
    uint32_t tile;

    __device__ __forceinline__ OperandB(uint32_t shared, uint32_t tile, int first_col, int lane) : columns(first_col), tile(tile) {
        base = shared + Tile::offset(2 * (lane % 4), columns.base + lane / 8) + lane / 4 % 2 * 8;
    }

    __device__ __forceinline__ void load(uint32_t (&b)[4], int j, int k_step) const {
        const uint32_t address = Tile::advance(base, 4 * j + columns.chunk), step = Tile::row_step(8 * k_step) + tile;
        load_shared(b[0], b[2], address + step);
        load_shared(b[1], b[3], Tile::next_row(address) + step);
    }
};

// acc += a b over kSteps, with fragments loaded ahead (load_ahead()).
template <typename T, int kSteps, int kMTiles, int kNTiles, typename A, typename B>
__device__ __forceinline__ void multiply_ahead(Accumulator<kMTiles, kNTiles>& acc, const A& a, const B& b) {
    if constexpr (kIsSplit<T>) {
        multiply_split<kSteps>(acc, a, b);
    } else {
        static_assert(kNTiles % 2 == 0, "B is loaded two n8 tiles at a time");
        const auto step = [&](int, int j, const uint32_t (&ra)[kMTiles][4], const uint32_t (&rb)[4]) {
#pragma unroll
            for (int i = 0; i < kMTiles; ++i) {
                mma_step<T>(acc.x[i][2 * j], ra[i], rb[0], rb[1]);
                mma_step<T>(acc.x[i][2 * j + 1], ra[i], rb[2], rb[3]);
            }
        };
        load_ahead<kSteps, kMTiles, kNTiles / 2>(a, b, 0, [](const auto&) {}, step);
    }
}

// The same without loading ahead. It needs fewer registers, for products that run while other accumulators are live.
template <typename T, int kSteps, int kMTiles, int kNTiles, typename A, typename B>
__device__ __forceinline__ void multiply(Accumulator<kMTiles, kNTiles>& acc, const A& a, const B& b) {
    if constexpr (kIsSplit<T>) {
        multiply_split<kSteps>(acc, a, b);
    } else {
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
                    mma_step<T>(acc.x[i][2 * j], ra[i], rb[0], rb[1]);
                    mma_step<T>(acc.x[i][2 * j + 1], ra[i], rb[2], rb[3]);
                }
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
