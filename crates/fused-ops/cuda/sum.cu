// sum_TYPE
#include "sum.cuh"

using namespace fused_ops;

#define SUM(type)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(kSumThreads) sum_##type(const __grid_constant__ SumParams params) {     \
        sum<type>(params);                                                                                               \
    }

SUM(f32)
SUM(f16)
SUM(bf16)
