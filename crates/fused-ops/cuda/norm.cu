// Layer norm and RMS norm: NAME_TYPE_wN_SHARE has N warps per row. SHARE is what a thread has of it: 24 or 32 elements in 16-byte
// vectors, or 32 single elements.
#include "norm.cuh"

using namespace fused_ops;

#define FORWARD(type, warps, share, elements, per_thread)                                                               \
    extern "C" __global__ void __launch_bounds__(Rows<type, warps, elements, per_thread>::kThreads)                     \
        norm_forward_##type##_w##warps##_##share(const __grid_constant__ NormForwardParams params) {                    \
        norm_forward<Rows<type, warps, elements, per_thread>>(params);                                                  \
    }

#define BACKWARD(type, warps, share, elements, per_thread)                                                              \
    extern "C" __global__ void __launch_bounds__(Rows<type, warps, elements, per_thread>::kThreads)                     \
        norm_backward_##type##_w##warps##_##share(const __grid_constant__ NormBackwardParams params) {                  \
        norm_backward<Rows<type, warps, elements, per_thread>>(params);                                                 \
    }

#define NORM(type, warps)                                                                                               \
    FORWARD(type, warps, 32, kVector<type>, 32) FORWARD(type, warps, single, 1, 32)                                     \
    BACKWARD(type, warps, 32, kVector<type>, 32) BACKWARD(type, warps, single, 1, 32)

#define KERNELS(type)                                                                                                   \
    NORM(type, 1) NORM(type, 2) NORM(type, 4) NORM(type, 8)                                                             \
    BACKWARD(type, 1, 24, kVector<type>, 24) BACKWARD(type, 2, 24, kVector<type>, 24)                                   \
    BACKWARD(type, 4, 24, kVector<type>, 24)                                                                            \
    extern "C" __global__ void __launch_bounds__(kFinishColumns * kFinishParts) norm_finish_##type(                     \
        const __grid_constant__ NormFinishParams params) {                                                              \
        norm_finish<type>(params);                                                                                      \
    }

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)
