// mbarriers in shared memory (PTX ISA, "mbarrier").
#pragma once

#include <cstdint>

namespace fa2::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// The barriers of all stages of a ring.
template <int kStages>
__device__ __forceinline__ void mbarriers_init(uint64_t (&barriers)[kStages], int arrivals) {
    for (int i = 0; i < kStages; ++i) mbarrier_init(shared_address(&barriers[i]), arrivals);
}

// After the inits and before a barrier of the block: makes them visible to TMA.
__device__ __forceinline__ void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival. The phase also waits for `size_bytes` of TMA.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int size_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(size_bytes) : "memory");
}

// Waits for the end of the phase of parity `parity`. For a new barrier, the phase of parity 1 has ended already.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ended;\n"
        "bra again;\n"
        "ended:\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// Orders writes to shared memory before a wgmma or TMA that reads them. A barrier separates the writers from the threads that start the
// wgmma or TMA. Either the writers call this before that barrier, or the others after it (PTX ISA, "causality order": a proxy fence along
// the path).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Position of a reader or writer in a ring of pipeline stages.
template <int kStages>
struct Ring {
    uint32_t passed = 0;  // number of stages passed

    __device__ __forceinline__ uint32_t stage() const { return passed % kStages; }
    __device__ __forceinline__ uint32_t parity() const { return passed / kStages % 2; }
    __device__ __forceinline__ void advance() { ++passed; }
    // The position before this one. Before the first position, that is the last stage.
    __device__ __forceinline__ Ring before() const {
        static_assert((kStages & (kStages - 1)) == 0, "the count wraps around at 2^32");
        return {passed - 1};
    }
};

// Waits until the stage at `at` of a ring is full, as a reader.
template <int kStages>
__device__ __forceinline__ void wait_full(uint64_t* full, const Ring<kStages>& at) {
    mbarrier_wait(shared_address(&full[at.stage()]), at.parity());
}

// Waits until the stage at `at` of a ring is empty, as a writer.
template <int kStages>
__device__ __forceinline__ void wait_empty(uint64_t* empty, const Ring<kStages>& at) {
    mbarrier_wait(shared_address(&empty[at.stage()]), at.parity() ^ 1);
}

// One lane arrives for all lanes of its warp, after what they have read or written.
__device__ __forceinline__ void arrive_warp(uint64_t& barrier, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&barrier));
}

}  // namespace fa2::sm90
