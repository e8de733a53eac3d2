// The f32 accumulator of mma.sync m16n8 (and, for one warp, of wgmma m64nN), and how it becomes the next A operand.
//
// Element e of n-tile j is row lane / 4 + 8 (e / 2), column 8j + 2 (lane % 4) + e % 2. So a thread holds two rows of each 16.
#pragma once

#include "types.cuh"

namespace fa2 {

template <int kMTiles, int kNTiles>
struct Accumulator {
    float x[kMTiles][kNTiles][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) x[i][j][e] = 0.f;
    }

    // Whether no element is infinite or NaN.
    __device__ __forceinline__ bool finite() const {
        constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) largest = max(largest, __float_as_uint(x[i][j][e]) & kMagnitude);
        return largest < kInfinity;
    }

    __device__ __forceinline__ void scale(float factor) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) x[i][j][e] *= factor;
    }
};

__device__ __forceinline__ int fragment_row(int lane, int half) { return lane / 4 + 8 * half; }
__device__ __forceinline__ int fragment_col(int lane, int n_tile) { return 8 * n_tile + 2 * (lane % 4); }

// A thread's elements of row `half` of its two, in a pair of neighbouring n8 tiles.
template <int kNTiles>
__device__ __forceinline__ float4 row_of_pair(const float (&x)[kNTiles][4], int pair, int half) {
    const float(&a)[4] = x[2 * pair], (&b)[4] = x[2 * pair + 1];
    return {a[2 * half], a[2 * half + 1], b[2 * half], b[2 * half + 1]};
}

// The f32 kernels load the B operand of o, dq, dk and dv in another column order (OperandB of sm80/matmul.cuh). So a thread's accumulators
// of a pair of n8 tiles hold four neighbouring columns in each of its two rows: 4 (lane % 4) .. + 3.
template <int kNTiles>
__device__ __forceinline__ float4 product_columns(const float (&x)[kNTiles][4], int pair, int half) {
    const float4 row = row_of_pair(x, pair, half);
    return {row.x, row.z, row.y, row.w};
}
__device__ __forceinline__ int product_col(int lane, int pair) { return 16 * pair + 4 * (lane % 4); }

// Calls `visit` with each element of a block of accumulators that begins at (first_row, first_col), and with its row and column.
template <int kMTiles, int kNTiles, typename Visit>
__device__ __forceinline__ void visit_elements(Accumulator<kMTiles, kNTiles>& block, int first_row, int first_col, int lane,
                                               const Visit& visit) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                visit(block.x[i][j][e], first_row + 16 * i + fragment_row(lane, e / 2), first_col + fragment_col(lane, j) + e % 2);
}

// The A operand of k-step `k_step` (16 columns, or 8 of f32), from accumulators of the same rows. It needs rounding, but no shuffle. In
// f32 the columns of each 8 are in the order 0 2 4 6 1 3 5 7, and the rows of B must be too.
template <typename T, int kNTiles>
__device__ __forceinline__ void to_a_operand(uint32_t (&a)[4], const float (&x)[kNTiles][4], int k_step) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = __float_as_uint(x[k_step][e / 2 + e % 2 * 2]);
    } else {
        a[0] = pack2<T>(x[2 * k_step][0], x[2 * k_step][1]);
        a[1] = pack2<T>(x[2 * k_step][2], x[2 * k_step][3]);
        a[2] = pack2<T>(x[2 * k_step + 1][0], x[2 * k_step + 1][1]);
        a[3] = pack2<T>(x[2 * k_step + 1][2], x[2 * k_step + 1][3]);
    }
}

// Four neighbouring lanes hold 4 bytes of each of four 16-byte chunks of their row. Afterwards lane i of the four holds chunk i.
__device__ __forceinline__ void gather_chunks(uint32_t (&x)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    // Lanes 1 apart exchange first: the even lane takes the first chunk of each pair. Then lanes 2 apart exchange pairs.
    const uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
    const uint32_t low0 = odd ? a : x[0], low1 = odd ? x[1] : a;    // chunk `odd`, from lanes 0, 1 (or 2, 3)
    const uint32_t high0 = odd ? b : x[2], high1 = odd ? x[3] : b;  // chunk 2 + odd, from the same lanes
    const uint32_t c = __shfl_xor_sync(~0u, upper ? low0 : high0, 2), d = __shfl_xor_sync(~0u, upper ? low1 : high1, 2);
    x[0] = upper ? c : low0;
    x[1] = upper ? d : low1;
    x[2] = upper ? high0 : c;
    x[3] = upper ? high1 : d;
}

}  // namespace fa2
