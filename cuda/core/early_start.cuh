// Programmatic dependent launch (PTX ISA, "griddepcontrol"). From Hopper on, the host lets a kernel start while the kernel before it ends, so
// that its launch costs no time of the GPU. Every generated kernel calls wait_for_kernel_before() first.
#pragma once

namespace fa2 {

// Waits until the kernel before this one has ended and its writes are visible. Then lets the next kernel start, which waits here too.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fa2
