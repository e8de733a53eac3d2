// delta = rowsum(do * o) - dlse, one f32 per query and head. With it, dS = P (dP - delta) holds for the gradients of o and lse together.
//
// Grid       (any, num_heads, batch); blocks stride over the rows.
// Work       8 elements per thread. The threads of a row are neighbours, and their number is a power of two.
#pragma once

#include "core/sequence.cuh"
#include "core/types.cuh"
#include "params.h"

namespace fa2 {

constexpr int kDeltaThreads = 256;
constexpr int kDeltaChunk = 8;      // elements of a thread: 16 bytes, or 32 of f32
constexpr int kDeltaMinLanes = 4;  // threads per row at least: as many as read one row of head_dim 32

// Reads eight neighbouring elements, 16 bytes at a time.
template <typename T>
__device__ __forceinline__ void load8(float2 (&x)[4], const T* from) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 chunk = reinterpret_cast<const float4*>(from)[i];
            x[2 * i] = {chunk.x, chunk.y};
            x[2 * i + 1] = {chunk.z, chunk.w};
        }
    } else {
        const uint4 chunk = *reinterpret_cast<const uint4*>(from);
        const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = unpack2<T>(pairs[i]);
    }
}

template <typename T>
__device__ __forceinline__ void delta(const DeltaParams& params) {
    const Shape& shape = params.shape;
    const int head = blockIdx.y, batch = shape.first_batch + blockIdx.z;
    const Sequence sequence(shape, batch);
    int lanes = kDeltaMinLanes;  // per row
    while (lanes * kDeltaChunk < shape.head_dim) lanes *= 2;
    const int rows_per_block = kDeltaThreads / lanes;
    const int chunk = threadIdx.x % lanes;
    const T* gO = row_of<const T>(params.o, params.o_strides, batch, sequence.first_q, head);
    const T* gDo = row_of<const T>(params.do_, params.do_strides, batch, sequence.first_q, head);
    const int64_t lse_offset = sequence.lse_offset(shape, head);

    const int first = blockIdx.x * rows_per_block + threadIdx.x / lanes;
    for (int row = first; row - threadIdx.x / lanes < sequence.seqlen_q; row += gridDim.x * rows_per_block) {
        float sum = 0.f;
        if (row < sequence.seqlen_q && chunk * kDeltaChunk < shape.head_dim) {
            float2 o[4], do_[4];
            load8(o, gO + row * params.o_strides.row + chunk * kDeltaChunk);
            load8(do_, gDo + row * params.do_strides.row + chunk * kDeltaChunk);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum = fmaf(o[i].x, do_[i].x, fmaf(o[i].y, do_[i].y, sum));
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (chunk == 0 && row < sequence.seqlen_q) {
            const float dlse = params.dlse == nullptr ? 0.f : params.dlse[lse_offset + row];
            params.delta[lse_offset + row] = sum - dlse;
        }
    }
}

}  // namespace fa2
