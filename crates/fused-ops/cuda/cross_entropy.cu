// Cross-entropy: NAME_TYPE, and NAME_TYPE_options with a softcap or label smoothing.
#include "cross_entropy.cuh"

using namespace fused_ops;

#define LOSS(name, type, pass)                                                             \
    KERNEL((kLossThreads, 2), cross_entropy_##name##_##type, CrossEntropyParams,           \
           cross_entropy<type, LossPass::pass, false>(params))                             \
    KERNEL((kLossThreads, 2), cross_entropy_##name##_##type##_options, CrossEntropyParams, \
           cross_entropy<type, LossPass::pass, true>(params))

#define KERNELS(type)                                                                            \
    LOSS(losses, type, kLosses) LOSS(gradients, type, kGradients) LOSS(in_place, type, kInPlace) \
    KERNEL((kScaleThreads), scale_##type, ScaleParams, scale<type>(params))

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)

KERNEL((kMeanThreads), cross_entropy_mean_of_rows, CrossEntropyMeanParams, cross_entropy_mean(params))
