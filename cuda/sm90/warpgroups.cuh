// The warpgroups of a block: one producer, then the consumers. They share the registers of a multiprocessor (PTX ISA, "setmaxnreg").
#pragma once

#include "../core/types.cuh"

namespace fa2::sm90 {

constexpr int kWarpgroupWarps = 4;
constexpr int kWarpgroupRows = 64;  // the M of wgmma
constexpr int kWarpRows = kWarpgroupRows / kWarpgroupWarps;
constexpr int kWarpgroupThreads = kWarpgroupWarps * kWarpSize;

// A thread of a consumer.
struct ConsumerThread {
    int consumer;  // 0 .. kConsumers - 1
    int warp;      // in the warpgroup
    int lane;
};

// kProducerMinRegisters: what a thread of the producer needs without local memory (docs/kernels.md), 24 at least (setmaxnreg).
template <int kConsumers_, int kProducerMinRegisters>
struct Warpgroups {
    static constexpr int kConsumers = kConsumers_;

    // Registers of a thread (setmaxnreg takes multiples of 8). A launch gives every warpgroup the same number; the producer keeps
    // at least kProducerMinRegisters, and the consumers share the others in multiples of 8.
    static constexpr int kLaunchRegisters = kRegistersPerSm / (kWarpgroupThreads * (kConsumers + 1)) / 8 * 8;
    static constexpr int kConsumerRegisters = (kLaunchRegisters * (kConsumers + 1) - kProducerMinRegisters) / kConsumers / 8 * 8;
    static constexpr int kProducerRegisters = kLaunchRegisters * (kConsumers + 1) - kConsumerRegisters * kConsumers;

    // warp: in the block, after those of the producer.
    __device__ __forceinline__ static ConsumerThread consumer_thread(int warp, int lane) {
        ConsumerThread thread;
        thread.consumer = warp / kWarpgroupWarps - 1;
        thread.warp = warp % kWarpgroupWarps;
        thread.lane = lane;
        return thread;
    }
};

// Sets the number of registers of a thread. All warps of the warpgroup call it together.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fa2::sm90
