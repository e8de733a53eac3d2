// AdamW: adamw_norm_TYPE and adamw_update_TYPE for the parameters of one type, global_norm for all.
#include "adamw.cuh"

using namespace fused_ops;

#define KERNELS(type)                                                                 \
    KERNEL((kAdamWThreads), adamw_norm_##type, AdamWParams, adamw_norm<type>(params)) \
    KERNEL((kAdamWThreads), adamw_update_##type, AdamWParams, adamw_update<type>(params))

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)

KERNEL((kGlobalNormThreads), global_norm, GlobalNormParams, finish_norm(params))
