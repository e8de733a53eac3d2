// Layer norm and RMS norm: NAME_TYPE_wN_SHARE has N warps per row. SHARE is what a thread has of it: kNormElements (32), kNormLessElements
// (24) or kNormLeastElements (16) in 16-byte vectors, or kNormElements as single elements. The host forms the names from these numbers.
#include "norm.cuh"

using namespace fused_ops;

#define FORWARD(type, warps, share, elements, per_thread)                                                                    \
    KERNEL((Rows<type, warps, elements, per_thread>::kThreads), norm_forward_##type##_w##warps##_##share, NormForwardParams, \
           norm_forward<Rows<type, warps, elements, per_thread>>(params))

#define BACKWARD(type, warps, share, elements, per_thread)                                                                     \
    KERNEL((Rows<type, warps, elements, per_thread>::kThreads), norm_backward_##type##_w##warps##_##share, NormBackwardParams, \
           norm_backward<Rows<type, warps, elements, per_thread>>(params))

#define NORM(type, warps)                                                                                 \
    FORWARD(type, warps, 32, kVector<type>, kNormElements) FORWARD(type, warps, single, 1, kNormElements) \
    BACKWARD(type, warps, single, 1, kNormElements)

#define KERNELS(type)                                       \
    NORM(type, 1) NORM(type, 2) NORM(type, 4) NORM(type, 8) \
    BACKWARD(type, 1, 24, kVector<type>, kNormLessElements) \
    BACKWARD(type, 2, 24, kVector<type>, kNormLessElements) \
    BACKWARD(type, 4, 24, kVector<type>, kNormLessElements) \
    KERNEL((kFinishColumns * kFinishParts), norm_finish_##type, NormFinishParams, norm_finish<type>(params))

#define BACKWARD_OF_16_BITS(type)                                                                                     \
    BACKWARD(type, 1, 16, kVector<type>, kNormLeastElements) BACKWARD(type, 2, 16, kVector<type>, kNormLeastElements) \
    BACKWARD(type, 4, 16, kVector<type>, kNormLeastElements) BACKWARD(type, 8, 16, kVector<type>, kNormLeastElements) \
    BACKWARD(type, 16, 16, kVector<type>, kNormLeastElements)

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)
BACKWARD(f32, 1, 32, kVector<f32>, kNormElements)
BACKWARD(f32, 2, 32, kVector<f32>, kNormElements)
BACKWARD(f32, 4, 32, kVector<f32>, kNormElements)
BACKWARD(f32, 8, 32, kVector<f32>, kNormElements)
BACKWARD_OF_16_BITS(f16)
BACKWARD_OF_16_BITS(bf16)
