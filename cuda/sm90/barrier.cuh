// mbarriers in shared memory (PTX ISA, "mbarrier") and the registers of a warpgroup ("setmaxnreg").
#pragma once

#include <cstdint>

namespace fa2::sm90 {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Behind the inits, before a barrier of the block: TMA sees them.
__device__ __forceinline__ void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival, and the phase also waits for `bytes` of TMA.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of parity `parity`. A new barrier counts as one whose phase of parity 1 has ended.
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

// What all warps of the warpgroup call together, each side of a kernel with its share of the registers.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Buffers in a ring, each with a barrier: where a reader or writer stands.
template <int kStages>
struct Ring {
    uint32_t passed = 0;  // buffers so far

    __device__ __forceinline__ uint32_t stage() const { return passed % kStages; }
    __device__ __forceinline__ uint32_t parity() const { return passed / kStages % 2; }
    __device__ __forceinline__ void advance() { ++passed; }
};

}  // namespace fa2::sm90
