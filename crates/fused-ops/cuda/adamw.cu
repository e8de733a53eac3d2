// AdamW: adamw_norm_TYPE and adamw_update_TYPE for the parameters of one type, global_norm for all.
#include "adamw.cuh"

using namespace fused_ops;

#define KERNELS(type)                                                                              \
    extern "C" __global__ void __launch_bounds__(kAdamWThreads) adamw_norm_##type(                 \
        const __grid_constant__ AdamWParams params) {                                              \
        adamw_norm<type>(params);                                                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(kAdamWThreads) adamw_update_##type(               \
        const __grid_constant__ AdamWParams params) {                                              \
        adamw_update<type>(params);                                                                \
    }

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)

extern "C" __global__ void __launch_bounds__(kGlobalNormThreads) global_norm(const __grid_constant__ GlobalNormParams params) {
    finish_norm(params);
}
