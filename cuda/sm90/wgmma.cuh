// wgmma (PTX ISA, "Asynchronous warpgroup level matrix instructions"): the four warps of a warpgroup multiply 64 rows with a tile in
// shared memory. The instruction runs asynchronously.
//
// The accumulator of one warp is Accumulator<1, N / 8> of core/fragment.cuh. Between wgmma_commit() and its wait, nothing may touch the
// accumulators or the A operands in registers. Otherwise ptxas runs the wgmmas one by one and says so, and the build fails.
#pragma once

#include <type_traits>

#include "../core/fragment.cuh"
#include "../core/tile.cuh"
#include "../core/types.cuh"

namespace fa2::sm90 {

// Call this before a wgmma if its accumulators or A operands have changed since the last wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes one group of the wgmmas since the last call.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups are still running.
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

// The registers of an accumulator as operands of an instruction, in order.
#define FA2_REGISTERS_0_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FA2_REGISTERS_32_40 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FA2_REGISTERS_40_48 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FA2_REGISTERS_48_64 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FA2_REGISTERS_64_96 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
    "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FA2_REGISTERS_96_128 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
    "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FA2_REGISTERS_32 FA2_REGISTERS_0_32
#define FA2_REGISTERS_40 FA2_REGISTERS_32 FA2_REGISTERS_32_40
#define FA2_REGISTERS_48 FA2_REGISTERS_40 FA2_REGISTERS_40_48
#define FA2_REGISTERS_64 FA2_REGISTERS_48 FA2_REGISTERS_48_64
#define FA2_REGISTERS_96 FA2_REGISTERS_64 FA2_REGISTERS_64_96
#define FA2_REGISTERS_128 FA2_REGISTERS_96 FA2_REGISTERS_96_128

#define FA2_TILE(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FA2_TILES_8 FA2_TILE(0), FA2_TILE(1), FA2_TILE(2), FA2_TILE(3), FA2_TILE(4), FA2_TILE(5), FA2_TILE(6), FA2_TILE(7)
#define FA2_TILES_10 FA2_TILES_8, FA2_TILE(8), FA2_TILE(9)
#define FA2_TILES_12 FA2_TILES_10, FA2_TILE(10), FA2_TILE(11)
#define FA2_TILES_16 FA2_TILES_12, FA2_TILE(12), FA2_TILE(13), FA2_TILE(14), FA2_TILE(15)
#define FA2_TILES_24 FA2_TILES_16, \
    FA2_TILE(16), FA2_TILE(17), FA2_TILE(18), FA2_TILE(19), FA2_TILE(20), FA2_TILE(21), FA2_TILE(22), FA2_TILE(23)
#define FA2_TILES_32 FA2_TILES_24, \
    FA2_TILE(24), FA2_TILE(25), FA2_TILE(26), FA2_TILE(27), FA2_TILE(28), FA2_TILE(29), FA2_TILE(30), FA2_TILE(31)

#define FA2_WGMMA(type, n, count, operands, scale) \
    "{\n.reg .pred add;\nsetp.ne.b32 add, %" scale ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
    " {" FA2_REGISTERS_##count "}, " operands ";\n}\n"

// One step of 16: d = rows * columns, or d += rows * columns. d is 64 x kN.
template <typename T, int kN>
struct WgmmaShared;

// Both operands are in shared memory, with rows along k.
#define FA2_WGMMA_SHARED(n, count, tiles, a, b, add) \
    template <typename T> \
    struct WgmmaShared<T, n> { \
        __device__ __forceinline__ static void step(float (&d)[tiles][4], uint64_t rows, uint64_t columns, int accumulate) { \
            if constexpr (std::is_same_v<T, f16>) \
                asm volatile(FA2_WGMMA("f16", n, count, "%" a ", %" b ", add, 1, 1, 0, 0", add) \
                             : FA2_TILES_##tiles : "l"(rows), "l"(columns), "r"(accumulate)); \
            else \
                asm volatile(FA2_WGMMA("bf16", n, count, "%" a ", %" b ", add, 1, 1, 0, 0", add) \
                             : FA2_TILES_##tiles : "l"(rows), "l"(columns), "r"(accumulate)); \
        } \
    };
FA2_WGMMA_SHARED(80, 40, 10, "40", "41", "42")
FA2_WGMMA_SHARED(128, 64, 16, "64", "65", "66")

// The same with `rows` in registers, and with `columns` in shared memory along the outer axis ("transposed").
template <typename T, int kN>
struct WgmmaRegisters;

#define FA2_WGMMA_REGISTERS(n, count, tiles, a0, a1, a2, a3, b, add) \
    template <typename T> \
    struct WgmmaRegisters<T, n> { \
        __device__ __forceinline__ static void step(float (&d)[tiles][4], const uint32_t (&rows)[4], uint64_t columns, \
                                                    int accumulate) { \
            if constexpr (std::is_same_v<T, f16>) \
                asm volatile(FA2_WGMMA("f16", n, count, "{%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b ", add, 1, 1, 1", add) \
                             : FA2_TILES_##tiles \
                             : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(columns), "r"(accumulate)); \
            else \
                asm volatile(FA2_WGMMA("bf16", n, count, "{%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b ", add, 1, 1, 1", add) \
                             : FA2_TILES_##tiles \
                             : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(columns), "r"(accumulate)); \
        } \
    };
FA2_WGMMA_REGISTERS(64, 32, 8, "32", "33", "34", "35", "36", "37")
FA2_WGMMA_REGISTERS(96, 48, 12, "48", "49", "50", "51", "52", "53")
FA2_WGMMA_REGISTERS(128, 64, 16, "64", "65", "66", "67", "68", "69")
FA2_WGMMA_REGISTERS(192, 96, 24, "96", "97", "98", "99", "100", "101")
FA2_WGMMA_REGISTERS(256, 128, 32, "128", "129", "130", "131", "132", "133")

}  // namespace fa2::sm90
