// Writes accumulators, rounded, to a tensor or to a tile in shared memory, and a tile to a tensor.
#pragma once

#include "fragment.cuh"
#include "tile.cuh"
#include "types.cuh"

namespace fa2 {

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float4 value) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
                 : "memory");
}

// Writes accumulators, rounded, into a tile: the block of kMTiles x kNTiles that begins at (first_row, first_col).
template <typename T, typename Tile, int kMTiles, int kNTiles>
__device__ __forceinline__ void store_fragment(uint32_t shared, uint32_t tile, const Accumulator<kMTiles, kNTiles>& acc,
                                               int first_row, int first_col, int lane) {
    const ColumnBase<Tile, 8 * kNTiles> columns(first_col);
    const uint32_t chunk_base = Tile::offset(first_row + fragment_row(lane, 0), columns.base);
    const uint32_t base = shared + chunk_base + fragment_col(lane, 0) * int(sizeof(T));
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_shared(Tile::advance(base, j + columns.chunk) + (Tile::row_step(16 * i + 8 * half) + tile),
                             pack2<T>(acc.x[i][j][2 * half], acc.x[i][j][2 * half + 1]));
}

// Writes P or dS into a tile, as the operand of later products. In f32 the columns of each 8 get the order 0 2 4 6 1 3 5 7, which the
// transposed OperandA expects, and which the rows of a transposed OperandB have.
template <typename T, typename Tile, int kMTiles, int kNTiles>
__device__ __forceinline__ void store_operand(uint32_t shared, uint32_t tile, const Accumulator<kMTiles, kNTiles>& acc, int first_row,
                                              int first_col, int lane) {
    if constexpr (sizeof(T) == 4) {
        const uint32_t base = shared + Tile::offset(first_row + fragment_row(lane, 0), first_col / 4) + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    store_shared(Tile::advance(base, 2 * j + e % 2) + (Tile::row_step(16 * i + 8 * (e / 2)) + tile),
                                 __float_as_uint(acc.x[i][j][e]));
    } else {
        store_fragment<T, Tile>(shared, tile, acc, first_row, first_col, lane);
    }
}

// Writes dk or dv, rounded, into a tile.
template <typename T, typename Tile, int kMTiles, int kNTiles>
__device__ __forceinline__ void store_product(uint32_t shared, uint32_t tile, const Accumulator<kMTiles, kNTiles>& acc, int first_row,
                                              int first_col, int lane) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int pair = 0; pair < kNTiles / 2; ++pair)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    store_shared(shared + tile + Tile::offset(first_row + 16 * i + fragment_row(lane, half),
                                                              (first_col + product_col(lane, pair)) / 4),
                                 product_columns(acc.x[i], pair, half));
    } else {
        store_fragment<T, Tile>(shared, tile, acc, first_row, first_col, lane);
    }
}

// Writes the first `rows` rows and head_dim columns of a tile to global memory, 16 bytes at a time, all threads together.
template <typename Tile, int kThreads, typename T>
__device__ __forceinline__ void store_tile(T* to, int64_t row_stride, const uint8_t* tile, int rows, int head_dim, int thread) {
    for (int index = thread; index < Tile::kRows * Tile::kChunksPerRow; index += kThreads) {
        const int row = index / Tile::kChunksPerRow, chunk = index % Tile::kChunksPerRow;
        if (row < rows && chunk * Tile::kChunk < head_dim)
            *reinterpret_cast<uint4*>(to + row * row_stride + chunk * Tile::kChunk) =
                *reinterpret_cast<const uint4*>(tile + Tile::offset(row, chunk));
    }
}

// Writes one row of a warp's accumulators of o, rounded, if it `exists`: row `half` of a thread's two. Each thread writes 16 bytes at once.
// For that, four neighbouring threads exchange their parts of a row of 16-bit elements. With kLead, columns before `first` are not written.
template <typename T, bool kLead = false, int kDTiles>
__device__ __forceinline__ void store_row(T* to, const float (&x)[kDTiles][4], int half, int head_dim, bool exists, int lane,
                                          int first = 0) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int pair = 0; pair < kDTiles / 2; ++pair) {
            const int col = product_col(lane, pair);
            if (exists && (!kLead || col >= first) && col < head_dim) *reinterpret_cast<float4*>(to + col) = product_columns(x, pair, half);
        }
    } else {
        static_assert(kDTiles % 4 == 0, "four threads exchange four n8 tiles");
#pragma unroll
        for (int j = 0; j < kDTiles; j += 4) {
            uint32_t chunks[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) chunks[c] = pack2<T>(x[j + c][2 * half], x[j + c][2 * half + 1]);
            gather_chunks(chunks, lane);
            const int col = 8 * (j + lane % 4);
            if (exists && (!kLead || col >= first) && col < head_dim)
                *reinterpret_cast<uint4*>(to + col) = make_uint4(chunks[0], chunks[1], chunks[2], chunks[3]);
        }
    }
}

}  // namespace fa2
