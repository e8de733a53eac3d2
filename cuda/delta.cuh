// delta = rowsum(do * o) - dlse, one f32 per query and head. With it, dS = P (dP - delta) holds for the gradients of o and lse together.
//
// Grid       (any, num_heads, batch); blocks stride over the rows.
// Work       8 elements per thread, 16 above head_dim 256. The threads of a row are neighbours, and their number is a power of two.
#pragma once

#include "core/sequence.cuh"
#include "core/types.cuh"
#include "params.h"

namespace fa2 {

constexpr int kDeltaThreads = 256;

template <typename T>
__device__ __forceinline__ void delta(const DeltaParams& params) {
    const Shape& shape = params.shape;
    const int head = blockIdx.y, batch = shape.first_batch + blockIdx.z;
    const Sequence sequence(shape, batch);
    int lanes = kDeltaMinLanes;  // per row
    while (lanes * kDeltaChunk < shape.head_dim_v && lanes < kWarpSize) lanes *= 2;
    const int rows_per_block = kDeltaThreads / lanes;
    const int chunk = threadIdx.x % lanes;
    const T* gO = row_of<const T>(params.o, params.o_strides, batch, sequence.first_q, head);
    const T* gDo = row_of<const T>(params.do_, params.do_strides, batch, sequence.first_q, head);
    const int64_t lse_offset = sequence.lse_offset(shape, head);

    const int first = blockIdx.x * rows_per_block + threadIdx.x / lanes;
    for (int row = first; row - threadIdx.x / lanes < sequence.seqlen_q; row += gridDim.x * rows_per_block) {
        float sum = 0.f;
        for (int col = chunk * kDeltaChunk; row < sequence.seqlen_q && col < shape.head_dim_v; col += lanes * kDeltaChunk) {
            if constexpr (sizeof(T) == 2) {
                const uint4 o = *reinterpret_cast<const uint4*>(gO + row * params.o_strides.row + col);
                const uint4 do_ = *reinterpret_cast<const uint4*>(gDo + row * params.do_strides.row + col);
                const uint32_t a[4] = {o.x, o.y, o.z, o.w}, b[4] = {do_.x, do_.y, do_.z, do_.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 x = unpack2<T>(a[i]), y = unpack2<T>(b[i]);
                    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
                }
            } else {
                const float4* o = reinterpret_cast<const float4*>(gO + row * params.o_strides.row + col);
                const float4* do_ = reinterpret_cast<const float4*>(gDo + row * params.do_strides.row + col);
#pragma unroll
                for (int i = 0; i < kDeltaChunk / 4; ++i) {
                    if (col + 4 * i >= shape.head_dim_v) break;
                    const float4 x = o[i], y = do_[i];
                    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum))));
                }
            }
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (chunk == 0 && row < sequence.seqlen_q) {
            const float dlse = params.dlse == nullptr ? 0.f : params.dlse[lse_offset + row];
            params.delta[lse_offset + row] = sum - dlse;
        }
    }
}

}  // namespace fa2
