// sum_TYPE
#include "sum.cuh"

using namespace fused_ops;

#define SUM(type) \
    KERNEL((kSumThreads), sum_##type, SumParams, sum<type>(params))

SUM(f32)
SUM(f16)
SUM(bf16)
