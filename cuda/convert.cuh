// The sums of dq, times softmax_scale, rounded to the input type: 8 elements a thread.
#pragma once

#include "core/types.cuh"
#include "params.h"

namespace fa2 {

constexpr int kConvertThreads = 256;

template <typename T>
__device__ __forceinline__ void convert(const ConvertParams& params) {
    const int64_t first = (int64_t(blockIdx.x) * kConvertThreads + threadIdx.x) * 8;
    if (first >= params.elements) return;
    const float4 low = *reinterpret_cast<const float4*>(params.from + first);
    const float4 high = *reinterpret_cast<const float4*>(params.from + first + 4);
    const float c = params.factor;
    *reinterpret_cast<uint4*>(static_cast<T*>(params.to) + first) =
        uint4{pack2<T>(low.x * c, low.y * c), pack2<T>(low.z * c, low.w * c), pack2<T>(high.x * c, high.y * c),
              pack2<T>(high.z * c, high.w * c)};
}

}  // namespace fa2
