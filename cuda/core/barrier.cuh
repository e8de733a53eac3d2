// Named barriers (PTX ISA, "bar"): some of the warps of a block wait for each other.
#pragma once

namespace fa2 {

// Barrier 0 is __syncthreads(). A kernel numbers its own barriers from here. A block has 16 barriers.
constexpr int kFirstNamedBarrier = 1;

// Waits until kThreads threads have reached named barrier `id`.
template <int kThreads>
__device__ __forceinline__ void bar_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Reaches named barrier `id`, and does not wait.
template <int kThreads>
__device__ __forceinline__ void bar_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

}  // namespace fa2
