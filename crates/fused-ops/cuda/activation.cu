// Activations: NAME_forward_TYPE and NAME_backward_TYPE.
#include "activation.cuh"

using namespace fused_ops;

#define ACTIVATION(name, type, function, gated)                                    \
    KERNEL((kActivationThreads), name##_forward_##type, ActivationForwardParams,   \
           activation_forward<type, function, gated>(params))                      \
    KERNEL((kActivationThreads), name##_backward_##type, ActivationBackwardParams, \
           activation_backward<type, function, gated>(params))

#define KERNELS(type)                          \
    ACTIVATION(gelu, type, Gelu, false)        \
    ACTIVATION(gelu_erf, type, GeluErf, false) \
    ACTIVATION(swiglu, type, Silu, true)       \
    ACTIVATION(geglu, type, Gelu, true)

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)
