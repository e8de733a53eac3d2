// Layer norm and RMS norm: NAME_TYPE_wN has N warps per row.
#include "norm.cuh"

using namespace fused_ops;

#define NORM(type, warps)                                                                          \
    extern "C" __global__ void __launch_bounds__(kNormThreads) norm_forward_##type##_w##warps(     \
        const __grid_constant__ NormForwardParams params) {                                        \
        norm_forward<type, warps>(params);                                                         \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(kNormThreads) norm_backward_##type##_w##warps(    \
        const __grid_constant__ NormBackwardParams params) {                                       \
        norm_backward<type, warps>(params);                                                        \
    }

#define KERNELS(type)                                                                              \
    NORM(type, 1) NORM(type, 2) NORM(type, 4) NORM(type, 8)                                        \
    extern "C" __global__ void __launch_bounds__(kFinishColumns * kFinishParts) norm_finish_##type( \
        const __grid_constant__ NormFinishParams params) {                                         \
        norm_finish<type>(params);                                                                 \
    }

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)
