// The keys that a query sees, and the ranges that a tile sees. src/mask.rs does the same on the CPU.
#pragma once

#include "fragment.cuh"
#include "sequence.cuh"

namespace fa2 {

// Half-open range of rows, keys or tiles.
struct Range {
    int begin;
    int end;

    __device__ __forceinline__ bool empty() const { return end <= begin; }
    __device__ __forceinline__ int size() const { return max(end - begin, 0); }
    __device__ __forceinline__ bool contains(const Range& other) const { return other.begin >= begin && other.end <= end; }

    // The tiles of `size` that the range touches.
    __device__ __forceinline__ Range tiles(int size) const {
        if (empty()) return {0, 0};
        return {begin / size, ceil_div(end, size)};
    }
};

// The rows, or keys, of a tile: `size` of them from `first` on, cut to a sequence of `seqlen`.
__device__ __forceinline__ Range tile_range(int first, int size, int seqlen) { return {first, min(first + size, seqlen)}; }

// The mask over one sequence. Both bounds grow with the row, so each row sees one range of keys.
struct Visibility {
    int left;   // the first visible key of row r is r - left ..
    int right;  // .. and one past the last is r + right + 1, both cut to the sequence
    int seqlen_q;
    int seqlen_k;

    __device__ __forceinline__ Visibility(const Shape& shape, const Sequence& sequence)
        : left(shape.window_left - sequence.shift()), right(shape.window_right + sequence.shift()),
          seqlen_q(sequence.seqlen_q), seqlen_k(sequence.seqlen_k) {}

    __device__ __forceinline__ Range keys(int row) const { return {max(row - left, 0), min(row + right + 1, seqlen_k)}; }

    __device__ __forceinline__ bool visible(int row, int col) const {
        return col >= row - left && col <= row + right && col < seqlen_k;
    }

    // Keys that at least one row of a tile sees.
    __device__ __forceinline__ Range keys_of(Range rows) const {
        return {max(rows.begin - left, 0), min(rows.end + right, seqlen_k)};
    }

    // Keys that every row of a tile sees. Nothing is hidden from `rows` in `cols` if common_keys(rows).contains(cols).
    __device__ __forceinline__ Range common_keys(Range rows) const {
        return {max(rows.end - 1 - left, 0), min(rows.begin + right + 1, seqlen_k)};
    }

    // Queries that see every key of a tile, whose keys all exist.
    __device__ __forceinline__ Range common_queries(Range cols) const {
        return {max(cols.end - 1 - right, 0), min(cols.begin + left + 1, seqlen_q)};
    }

    // Queries that see at least one key of a tile.
    __device__ __forceinline__ Range queries_of(Range cols) const {
        return {max(cols.begin - right, 0), min(cols.end + left, seqlen_q)};
    }
};

// One bit for each column that a thread holds of a tile's row: bit 2j + e for column 8j + e, counted from the thread's first column.
// The bits of columns below `col` are set. `col` may be negative.
__device__ __forceinline__ uint32_t columns_below(int col) {
    const int count = 2 * (col >> 3) + min(col & 7, 2);
    return count >= 32 ? ~0u : (1u << max(count, 0)) - 1;
}

// The bits of the columns in `cols`, for a thread whose first column is `lane_col`.
__device__ __forceinline__ uint32_t columns_in(Range cols, int lane_col) {
    return columns_below(cols.end - lane_col) & ~columns_below(cols.begin - lane_col);
}

// Writes `value` over every element that the mask hides. The block begins at (first_row, first_col) of the sequence.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void hide(Accumulator<kMTiles, kNTiles>& block, const Visibility& sees, int first_row,
                                     int first_col, int lane, float value) {
    visit_elements(block, first_row, first_col, lane, [&](float& x, int row, int col) {
        if (!sees.visible(row, col)) x = value;
    });
}

// Turns the products of one m16 tile into scores, and with kMasked hides by -inf what the mask hides. The thread's first element is at
// (lane_row, lane_col). One word of bits per row costs fewer instructions than the comparisons of hide(): ptxas loads seven predicates
// at a time from it (docs/design/hopper.md).
template <bool kMasked, typename ScoreMod, int kNTiles>
__device__ __forceinline__ void apply_and_hide(const ScoreMod& score_mod, Accumulator<1, kNTiles>& block, const Visibility& sees,
                                               int lane_row, int lane_col) {
    static_assert(2 * kNTiles <= 32, "a thread has one word of bits for the visible keys of a row");
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane_row + 8 * half;
        const uint32_t seen = columns_in(sees.keys(row), lane_col);
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = block.x[0][j][2 * half + e];
                if (!ScoreMod::kIdentity) x = score_mod.apply(x, row, lane_col + 8 * j + e);
                if (kMasked && (seen & 1u << (2 * j + e)) == 0) x = -INFINITY;
            }
    }
}

}  // namespace fa2
