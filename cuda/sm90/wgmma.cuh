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

// A tile as TMA writes it, as an operand: its matrix descriptor (PTX ISA, "matrix descriptor"), with fields in units of 16 bytes.
template <typename Tile, Order kOrder>
struct Operand {
    static constexpr bool kTransposed = kOrder == Order::kTransposed;
    static constexpr uint64_t kSwizzle = Tile::kPanel == 64 ? 1 : 2;  // 128 or 64 bytes
    static constexpr int kPanelBytes = Tile::row_step(Tile::kRows);
    static constexpr uint64_t kFields =
        kSwizzle << 62 | uint64_t(Tile::row_step(8) / 16) << 32 | uint64_t(kPanelBytes / 16) << 16;

    uint64_t descriptor;

    // tile: its address in shared memory, a multiple of kSharedAlignment below 256 KB. first: where the operand begins on the outer axis, a
    // multiple of 8, or of a panel if transposed. opaque(): the compiler computes a descriptor again for each product and keeps none in
    // registers.
    __device__ __forceinline__ explicit Operand(uint32_t tile, int first = 0) {
        const uint32_t address = opaque(tile + (kTransposed ? first / Tile::kPanel * kPanelBytes : Tile::row_step(first)));
        descriptor = kFields | address >> 4;
    }

    // The descriptor of step `step`: of 16 columns of the tile, or of 16 rows if transposed.
    __device__ __forceinline__ uint64_t at(int step) const {
        constexpr int kPanelSteps = Tile::kPanel / 16;
        constexpr int kStepBytes = 16 * Tile::kElementBytes;
        const int offset_bytes = kTransposed ? Tile::row_step(16 * step)
                                             : step / kPanelSteps * kPanelBytes + step % kPanelSteps * kStepBytes;
        return descriptor + uint64_t(offset_bytes / 16);
    }
};

// One step of 16: d = a b, or d += a b if `accumulate` is not 0. d is 64 x kN, for kN = 8, 16, .. 256. Both operands are in shared memory.
// Their rows run along k, or along the outer axis if transposed.
template <typename T, int kN, bool kTransposedA, bool kTransposedB>
struct WgmmaShared;

// The same, with the A operand in registers.
template <typename T, int kN, bool kTransposedB>
struct WgmmaRegisters;

// Starts d = a b over kSteps of 16, as one wgmma-group. Both operands are in shared memory.
template <typename T, int kSteps, int kNTiles, typename A, typename B>
__device__ __forceinline__ void start_multiply(Accumulator<1, kNTiles>& d, const A& a, const B& b) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
        WgmmaShared<T, 8 * kNTiles, A::kTransposed, B::kTransposed>::step(d.x[0], a.at(step), b.at(step), step > 0);
    wgmma_commit();
}

// Starts d += a b, or d = a b if `fresh`, as one wgmma-group. a is in registers.
template <typename T, int kSteps, int kNTiles, typename B>
__device__ __forceinline__ void start_multiply_add(Accumulator<1, kNTiles>& d, const uint32_t (&a)[kSteps][4], const B& b,
                                                   bool fresh = false) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
        WgmmaRegisters<T, 8 * kNTiles, B::kTransposed>::step(d.x[0], a[step], b.at(step), step > 0 || !fresh);
    wgmma_commit();
}

}  // namespace fa2::sm90

// The specializations for each kN. An asm statement lists every register of d, so crates/kernel-build generates them (wgmma.rs).
#include "generated/wgmma.cuh"
