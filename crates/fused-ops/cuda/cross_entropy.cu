// Cross-entropy: NAME_TYPE, and NAME_TYPE_options with a softcap or label smoothing.
#include "cross_entropy.cuh"

using namespace fused_ops;

#define LOSS(name, type, pass)                                                                                      \
    extern "C" __global__ void __launch_bounds__(kLossThreads, 2) cross_entropy_##name##_##type(                    \
        const __grid_constant__ CrossEntropyParams params) {                                                        \
        cross_entropy<type, LossPass::pass, false>(params);                                                         \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(kLossThreads, 2) cross_entropy_##name##_##type##_options(          \
        const __grid_constant__ CrossEntropyParams params) {                                                        \
        cross_entropy<type, LossPass::pass, true>(params);                                                          \
    }

#define KERNELS(type)                                                                                               \
    LOSS(losses, type, kLosses) LOSS(gradients, type, kGradients) LOSS(in_place, type, kInPlace)                    \
    extern "C" __global__ void __launch_bounds__(kScaleThreads) scale_##type(const __grid_constant__ ScaleParams params) { \
        scale<type>(params);                                                                                        \
    }

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)

extern "C" __global__ void __launch_bounds__(kMeanThreads) cross_entropy_mean_of_rows(
    const __grid_constant__ CrossEntropyMeanParams params) {
    cross_entropy_mean(params);
}
