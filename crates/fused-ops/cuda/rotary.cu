// Rotary: rotary_ORDER_TYPE for shapes that allow vectors, rotary_ORDER_TYPE_any for all others.
#include "rotary.cuh"

using namespace fused_ops;

#define ROTARY(name, type, interleaved, pairs) \
    KERNEL((kRotaryThreads), rotary_##name, RotaryParams, rotary<type, interleaved, pairs>(params))

#define KERNELS(type)                                                  \
    ROTARY(halves_##type, type, false, (kRotaryPairs<type, false>))    \
    ROTARY(halves_##type##_any, type, false, 1)                        \
    ROTARY(interleaved_##type, type, true, (kRotaryPairs<type, true>)) \
    ROTARY(interleaved_##type##_any, type, true, 1)

KERNELS(f32)
KERNELS(f16)
KERNELS(bf16)
