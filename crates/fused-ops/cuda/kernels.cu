// Every kernel under its name: NAME_TYPE, and for the norms NAME_TYPE_wN with N warps per row.
#include "cross_entropy.cuh"
#include "norm.cuh"

using namespace fused_ops;

#define NORM(type, warps)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kNormThreads) norm_forward_##type##_w##warps(             \
        const __grid_constant__ NormForwardParams params) {                                                     \
        norm_forward<type, warps>(params);                                                                      \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(kNormThreads) norm_backward_##type##_w##warps(            \
        const __grid_constant__ NormBackwardParams params) {                                                    \
        norm_backward<type, warps>(params);                                                                     \
    }

#define LOSS(name, type, pass)                                                                                  \
    extern "C" __global__ void __launch_bounds__(kLossThreads) cross_entropy_##name##_##type(                   \
        const __grid_constant__ CrossEntropyParams params) {                                                    \
        cross_entropy<type, LossPass::pass>(params);                                                            \
    }

#define KERNELS(type)                                                                                           \
    NORM(type, 1) NORM(type, 2) NORM(type, 4) NORM(type, 8)                                      \
    extern "C" __global__ void __launch_bounds__(kFinishColumns * kFinishParts) norm_finish_##type(             \
        const __grid_constant__ NormFinishParams params) {                                                      \
        norm_finish<type>(params);                                                                              \
    }                                                                                                           \
    LOSS(losses, type, kLosses) LOSS(gradients, type, kGradients) LOSS(in_place, type, kInPlace)

KERNELS(float)
KERNELS(f16)
KERNELS(bf16)
