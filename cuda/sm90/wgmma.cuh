// wgmma (PTX ISA, "Asynchronous warpgroup level matrix instructions"): the four warps of a warpgroup multiply 64 rows with a tile in
// shared memory. The instruction runs asynchronously.
//
// The accumulator of one warp is Accumulator<1, N / 8> of core/fragment.cuh. Between wgmma_commit() and its wait, nothing may touch the
// accumulators or the A operands in registers. Otherwise ptxas runs the wgmmas one by one and says so, and the build fails.
#pragma once

#include "../core/fragment.cuh"
#include "../core/tile.cuh"
#include "../core/types.cuh"

namespace fa2::sm90 {

// Call this before a wgmma if its accumulators or A operands have changed since the last wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes one wgmma-group (PTX ISA) of the wgmmas since the last call.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending wgmma-groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of an accumulator before the wait for it.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void wgmma_arrived(Accumulator<kMTiles, kNTiles>& acc) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(acc.x[i][j][e])::"memory");
}

// The descriptor of a tile as an operand (PTX ISA, "matrix descriptor"), for tiles as TMA writes them. Its fields are in units of 16 bytes.
template <typename Tile>
struct Descriptor {
    static constexpr uint64_t kSwizzle = Tile::kPanel == 64 ? 1 : 2;  // 128 or 64 bytes
    static constexpr int kRowBytes = Tile::kPanel * 2;
    static constexpr int kPanelBytes = Tile::kRows * kRowBytes;
    static constexpr uint64_t kFields =
        kSwizzle << 62 | uint64_t(8 * kRowBytes / 16) << 32 | uint64_t(kPanelBytes / 16) << 16;

    // shared: a multiple of 1024, below 256 KB.
    __device__ __forceinline__ static uint64_t of(uint32_t shared) { return kFields | (shared >> 4); }

    // Added to a descriptor: moves to the 16 columns of step `step`. For operands whose rows run along k.
    __device__ __forceinline__ static constexpr uint64_t columns(int step) {
        constexpr int kSteps = Tile::kPanel / 16;
        return uint64_t((step / kSteps * kPanelBytes + step % kSteps * 32) / 16);
    }

    // Added to a descriptor: moves to the 16 rows of step `step`. For operands whose rows run along the outer axis ("transposed").
    __device__ __forceinline__ static constexpr uint64_t rows(int step) { return uint64_t(step * 16 * kRowBytes / 16); }
};

// One step of 16: d = a b, or d += a b if `accumulate` is not 0. d is 64 x kN, for kN = 8, 16, .. 256. Both operands are in shared memory.
// Their rows run along k, or along the outer axis if transposed.
template <typename T, int kN, bool kTransposedA, bool kTransposedB>
struct WgmmaShared;

// The same with a in registers.
template <typename T, int kN, bool kTransposedB>
struct WgmmaRegisters;

}  // namespace fa2::sm90

// The specializations for each kN. An asm statement lists every register of d, so crates/kernel-build generates them (wgmma.rs).
#include "generated/wgmma.cuh"
