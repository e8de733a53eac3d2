// Cross-entropy: NAME_TYPE.
#include "cross_entropy.cuh"

using namespace fused_ops;

#define LOSS(name, type, pass)                                                                     \
    extern "C" __global__ void __launch_bounds__(kLossThreads) cross_entropy_##name##_##type(      \
        const __grid_constant__ CrossEntropyParams params) {                                       \
        cross_entropy<type, LossPass::pass>(params);                                               \
    }

#define KERNELS(type) LOSS(losses, type, kLosses) LOSS(gradients, type, kGradients) LOSS(in_place, type, kInPlace)

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)
