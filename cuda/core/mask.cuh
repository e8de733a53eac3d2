// Which keys a query sees, and which tiles that leaves: the device's twin of src/mask.rs.
#pragma once

#include "../params.h"
#include "types.cuh"

namespace fa2 {

// One sequence of the call. With shift = seqlen_k - seqlen_q, query row is aligned with key row + shift.
struct Sequence {
    int first_q;  // rows of q before its first one, 0 if padded
    int first_k;  // rows of k and v before its first one, 0 if padded, unless on the left
    int seqlen_q;
    int seqlen_k;
    int batch;
    bool packed;

    Sequence() = default;

    __device__ __forceinline__ Sequence(const Shape& shape, int batch)
        : first_q(0), first_k(0), seqlen_q(shape.seqlen_q), seqlen_k(shape.seqlen_k), batch(batch),
          packed(shape.cu_seqlens_q != nullptr) {
        if (packed) {
            first_q = shape.cu_seqlens_q[batch];
            first_k = shape.cu_seqlens_k[batch];
            seqlen_q = int(shape.cu_seqlens_q[batch + 1]) - first_q;
            seqlen_k = int(shape.cu_seqlens_k[batch + 1]) - first_k;
        } else if (shape.key_lengths != nullptr) {
            seqlen_k = shape.key_lengths[batch];
            first_k = shape.keys_at_end ? shape.seqlen_k - seqlen_k : 0;
        }
    }

    __device__ __forceinline__ int shift() const { return seqlen_k - seqlen_q; }

    // Index of the first lse, or delta, of one head.
    __device__ __forceinline__ int64_t statistics(const Shape& shape, int head) const {
        return batch * shape.lse_batch + head * shape.lse_head + first_q;
    }
};

// Row `row` of one head of one sequence of a tensor.
template <typename T, typename Pointer>
__device__ __forceinline__ T* row_of(Pointer* tensor, const Strides& strides, int batch, int row, int head) {
    return static_cast<T*>(tensor) + batch * strides.batch + row * strides.row + head * strides.head;
}

// Half-open range of rows, keys or tiles.
struct Range {
    int begin;
    int end;

    __device__ __forceinline__ bool empty() const { return end <= begin; }
};

// The mask over one sequence. Both bounds grow with the row, so what a row sees is one range.
struct Visibility {
    int left;   // first visible key of row r is r - left ..
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

    // Keys that every row of a tile sees.
    __device__ __forceinline__ Range common_keys(Range rows) const {
        return {max(rows.end - 1 - left, 0), min(rows.begin + right + 1, seqlen_k)};
    }

    // Queries that see at least one key of a tile.
    __device__ __forceinline__ Range queries_of(Range cols) const {
        return {max(cols.begin - right, 0), min(cols.end + left, seqlen_q)};
    }
};

}  // namespace fa2
