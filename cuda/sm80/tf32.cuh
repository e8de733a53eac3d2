// Products of f32 on mma.sync, by TF32 (PTX ISA, "Warp-level matrix instructions"): three products of split operands, or one.
//
// A TF32 is an f32 of which mma.sync ignores the last 13 bits. An operand x becomes big + small, two TF32 with 22 bits together, and three
// products replace one:
//     a b = small_a big_b + big_a big_b + big_a small_b
// The product of the two small parts is 2^-22 of the result or less, and left out.
//
// mma.sync cuts off the bits of a sum that f32 cannot hold (H200: 1 + 0.75 steps of f32 gives 1). These errors all have the sign of the
// sum, so they grow with its length. Hence the small products have accumulators of their own, and longer sums are added up from parts of 8
// k-steps, by FADD, which rounds to nearest. Error of o, head_dim 128, full mask, H200, relative to o: 3.7e-7 at 1k tokens; with 16 k-steps
// for S 5.8e-7; with P v in one sum 2.9e-6, and 1.9e-5 at 8k tokens.
#pragma once

#include "../core/fragment.cuh"
#include "../core/tile.cuh"
#include "../core/types.cuh"
#include "load_ahead.cuh"
#include "mma.cuh"

namespace fa2::sm80 {

// The k-steps of a part of a sum. With 4, errors fall by a third, and kernels are 8% slower (head_dim 128, docs/log/sm80.md).
constexpr int kPartialSteps = 8;
// The n8 tiles of a part of o, dq, dk and dv. More need more registers; with fewer, A is loaded more often. Other numbers: not measured.
constexpr int kPartialTiles = 4;

// d += a b, m16n8k8, f32 accumulators.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Adds 0.35 to 0.71 of a TF32 step to x. mma.sync then cuts off the last 13 bits, so x is rounded. Over many x the mean of what is added is
// half a step, so products have no bias. The root mean square error is 1.06 times that of rounding to nearest. A TF32, a NaN and an
// infinity stay what they are. This is one instruction, where cvt.rna takes three.
__device__ __forceinline__ uint32_t to_tf32(uint32_t x) {
    constexpr float kMeanHalfStep = 0x1.6ap-12f;  // sqrt(1/2) * 2^-11: adds 0.35 to 0.71 of a step of x; the mean is half a step
    return __float_as_uint(fmaf(__uint_as_float(x), kMeanHalfStep, __uint_as_float(x)));
}

template <>
__device__ __forceinline__ void mma_step<tf32>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t rounded[4] = {to_tf32(a[0]), to_tf32(a[1]), to_tf32(a[2]), to_tf32(a[3])};
    mma_m16n8k8_tf32(d, rounded, to_tf32(b0), to_tf32(b1));
}

// Four registers of an operand, split.
struct Split {
    uint32_t big[4], small[4];

    Split() = default;

    // Rounds the big parts to nearest. The small parts then have either sign, so the products that are left out do not add up. An infinity,
    // or a number within 2^-11 of the largest f32, becomes a NaN. The forward recomputes such rows.
    __device__ __forceinline__ explicit Split(const uint32_t (&x)[4]) {
        constexpr uint32_t kHalfStep = 0x1000u, kMask = 0xffffe000u;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            big[i] = (x[i] + kHalfStep) & kMask;
            small[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(big[i]));
        }
    }
};

// A part of a sum of products.
template <int kMTiles, int kNTiles>
struct PartialSum {
    Accumulator<kMTiles, kNTiles> big, small;

    __device__ __forceinline__ void clear() {
        big.clear();
        small.clear();
    }

    // Adds the products of n8 tiles `tile` and `tile + 1`.
    __device__ __forceinline__ void multiply(const Split (&a)[kMTiles], const Split& b, int tile) {
        multiply(small, &Split::small, a, b.big, tile);
        multiply(big, &Split::big, a, b.big, tile);
        multiply(small, &Split::big, a, b.small, tile);
    }

    // Adds the part to n8 tiles first_tile .. of a sum.
    template <int kSumTiles>
    __device__ __forceinline__ void add_to(Accumulator<kMTiles, kSumTiles>& sum, int first_tile) const {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) sum.x[i][first_tile + j][e] += big.x[i][j][e] + small.x[i][j][e];
    }

private:
    __device__ __forceinline__ static void multiply(Accumulator<kMTiles, kNTiles>& to, uint32_t (Split::*part_of_a)[4],
                                                    const Split (&a)[kMTiles], const uint32_t (&b)[4], int tile) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int n = 0; n < 2; ++n) mma_m16n8k8_tf32(to.x[i][tile + n], a[i].*part_of_a, b[2 * n], b[2 * n + 1]);
    }
};

// n8 tiles first_tile .. first_tile + kTiles of acc += a b, over kSteps of 8, with fragments loaded ahead (load_ahead()).
template <int kSteps, int kTiles, int kMTiles, int kNTiles, typename A, typename B>
__device__ __forceinline__ void multiply_columns(Accumulator<kMTiles, kNTiles>& acc, const A& a, const B& b, int first_tile) {
    static_assert(kTiles % 2 == 0, "B is loaded two n8 tiles at a time");
    constexpr int kPairs = kTiles / 2;
    PartialSum<kMTiles, kTiles> part;
    part.clear();
    Split split_a[kMTiles];
    const auto start = [&](const uint32_t (&ra)[kMTiles][4]) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) split_a[i] = Split(ra[i]);
    };
    const auto step = [&](int k_step, int j, const uint32_t (&)[kMTiles][4], const uint32_t (&rb)[4]) {
        part.multiply(split_a, Split(rb), 2 * j);
        if (j + 1 == kPairs && ((k_step + 1) % kPartialSteps == 0 || k_step + 1 == kSteps)) {
            part.add_to(acc, first_tile);
            part.clear();
        }
    };
    load_ahead<kSteps, kMTiles, kPairs>(a, b, first_tile / 2, start, step);
}

// acc += a b over kSteps of 8.
template <int kSteps, int kMTiles, int kNTiles, typename A, typename B>
__device__ __forceinline__ void multiply_split(Accumulator<kMTiles, kNTiles>& acc, const A& a, const B& b) {
    constexpr bool kWide = B::kOrder == Order::kTransposed;  // o, dq, dk and dv, whose accumulators fill the registers
    constexpr int kTiles = !kWide ? kNTiles : kNTiles % kPartialTiles == 0 ? kPartialTiles : kPartialTiles / 2;
    static_assert(kNTiles % kTiles == 0, "parts divide the columns");
#pragma unroll
    for (int first_tile = 0; first_tile < kNTiles; first_tile += kTiles)
        multiply_columns<kSteps, kTiles>(acc, a, b, first_tile);
}

}  // namespace fa2::sm80
