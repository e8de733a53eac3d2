// A tile in shared memory: rows in panels of 128 (or 64) bytes, 16-byte chunks swizzled.
//
// A panel holds all rows of its columns: 64 (32) columns of 16-bit elements, 32 of f32. The eight rows of an ldmatrix then differ only in
// the swizzled chunk, and each bank is read once.
#pragma once

#include "types.cuh"

namespace fa2 {

// Alignment of shared memory: a swizzle pattern has 8 rows of 128 bytes.
constexpr int kSharedAlignment = 1024;

template <int kRows_, int kCols_, int kPanel_ = kCols_ % 64 == 0 ? 64 : 32, int kElementBytes_ = 2>
struct Tile {
    static constexpr int kRows = kRows_;
    static constexpr int kCols = kCols_;
    static constexpr int kPanel = kPanel_;
    static constexpr int kElementBytes = kElementBytes_;
    static constexpr int kPanelBytes = kPanel * kElementBytes;
    static constexpr int kChunk = 16 / kElementBytes;  // elements in 16 bytes
    static constexpr int kChunksPerRow = kCols / kChunk;
    static constexpr int kBytes = kRows * kCols * kElementBytes;
    static_assert((kPanelBytes == 64 || kPanelBytes == 128) && kCols % kPanel == 0, "panels are 64 or 128 bytes");
    static_assert(kRows % 8 == 0, "the swizzle repeats every 8 rows");

    // Byte offset of chunk `chunk` of row `row`.
    __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
        constexpr int kPanelChunks = kPanel / kChunk;
        const int panel = chunk / kPanelChunks;
        const int in_panel = chunk % kPanelChunks;
        const int swizzled = in_panel ^ (kPanelBytes == 128 ? row % 8 : (row / 2) % 4);
        return uint32_t(panel * kRows * kPanelBytes + row * kPanelBytes + swizzled * 16);
    }

    // From `offset(row, chunk)` to `offset(row, chunk + step)`. XOR replaces the addition within a panel, so `chunk` and `step` must not
    // have a bit in common there. The base keeps the row's swizzle, so a loop over columns needs one register and one instruction a step.
    __device__ __forceinline__ static uint32_t advance(uint32_t base, int step) {
        constexpr int kPanelChunks = kPanel / kChunk;
        return (base ^ uint32_t(step % kPanelChunks * 16)) + uint32_t(step / kPanelChunks * kRows * kPanelBytes);
    }

    // From `offset(row, chunk)` to `offset(row + 1, chunk)` for an even row.
    __device__ __forceinline__ static uint32_t next_row(uint32_t base) {
        static_assert(kPanelBytes == 128, "neighbouring rows have neighbouring swizzles");
        return (base ^ 16u) + kPanelBytes;
    }

    // From `offset(row, chunk)` to `offset(row + rows, chunk)` for a multiple of 8 rows.
    __device__ __forceinline__ static constexpr uint32_t row_step(int rows) { return rows * kPanelBytes; }
};

// A tile of elements of type T.
template <typename T, int kRows, int kCols>
using TileOf = Tile<kRows, kCols, sizeof(T) == 2 && kCols % 64 == 0 ? 64 : 32, sizeof(T)>;

// The columns of a tile that begin at `first_col`, kWidth of them, for loops over columns by Tile::advance(). If the columns may begin
// inside a panel and run into the next one, the base is that of column 0, and every step adds `chunk`.
template <typename Tile, int kWidth>
struct ColumnBase {
    static constexpr bool kAcrossPanels = kWidth % Tile::kPanel != 0 && Tile::kPanel % kWidth != 0;

    int base;   // the chunk of the base
    int chunk;  // what a step adds: 0 unless kAcrossPanels

    __device__ __forceinline__ explicit ColumnBase(int first_col)
        : base(kAcrossPanels ? 0 : first_col / Tile::kChunk), chunk(kAcrossPanels ? first_col / Tile::kChunk : 0) {}
};

// How a tile lies as an operand of a product: its rows run along k, or along the outer axis ("transposed").
enum class Order { kContiguousK, kTransposed };

}  // namespace fa2
