// The sequences of a call, and the rows of its tensors.
#pragma once

#include "../params.h"

namespace fa2 {

// Whether the call is packed: its sequences follow each other in tensors without a batch axis.
__device__ __forceinline__ bool is_packed(const Shape& shape) { return shape.cu_seqlens_q != nullptr; }

// One sequence of the call. With shift = seqlen_k - seqlen_q, query i is aligned with key i + shift.
struct Sequence {
    int batch;
    int first_q;  // rows of q before the sequence: 0 unless packed
    int first_k;  // rows of k and v before the sequence: 0 unless packed or padded on the left
    int seqlen_q;
    int seqlen_k;

    Sequence() = default;

    __device__ __forceinline__ Sequence(const Shape& shape, int batch)
        : batch(batch), first_q(0), first_k(0), seqlen_q(shape.seqlen_q), seqlen_k(shape.seqlen_k) {
        if (is_packed(shape)) {
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

    // Index of the lse, or delta, of the first query of one head.
    __device__ __forceinline__ int64_t lse_offset(const Shape& shape, int head) const {
        return batch * shape.lse_batch + head * shape.lse_head + first_q;
    }
};

// Row `row` of one head of one sequence of a tensor.
template <typename T, typename Pointer>
__device__ __forceinline__ T* row_of(Pointer* tensor, const Strides& strides, int batch, int row, int head) {
    return static_cast<T*>(tensor) + batch * strides.batch + row * strides.row + head * strides.head;
}

// Query heads of a key head.
__device__ __forceinline__ int group_size(const Shape& shape) { return shape.num_heads / shape.num_heads_k; }

// The head of k and v that a head of q reads.
__device__ __forceinline__ int key_head(const Shape& shape, int head) { return head / group_size(shape); }

// The entry of a sequence on the batch axis of a tensor. The tensors of a packed call have one entry.
__device__ __forceinline__ int batch_entry(const Shape& shape, const Sequence& sequence) {
    return is_packed(shape) ? 0 : sequence.batch;
}

}  // namespace fa2
