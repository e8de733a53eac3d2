// The forward without some contributions of FlashAttention-2. All variants share the start and the epilogue. The walk over the keys is
// that of sm80/fwd.cuh, or one that differs from it in one point.
//
// All variants leave out core/nonfinite.cuh. The variant `none` shows the time that this saves.
// Expects the same as sm80/fwd.cuh. In addition: no mask or a causal one, and seqlen_q == seqlen_k.
#pragma once

#include "sm80/fwd.cuh"
#include "softmax.cuh"
#include "split_k.cuh"

namespace fa2::ablations {

// The work of a thread block.
enum class Grid {
    kTiles,  // one tile, grid (tiles, heads, batch), as FlashAttention-2: tiles of queries in the forward, of keys in the backward
    kHeads,  // all tiles of one head, one after the other, grid (1, heads, batch), as FlashAttention-1
};

// Warps that split the queries.
template <typename Traits, Rescale kRescale>
struct SplitQWalk {
    __device__ __forceinline__ static void run(const FwdBlock<Traits>& block, Accumulator<Traits::kMTiles, Traits::kDTiles>& o,
                                               Softmax<kRescale, Traits::kMTiles>& softmax) {
        walk_keys(block, o, softmax);
    }
};

// Warps that split the keys.
template <typename Traits, Rescale kRescale>
struct SplitKWalk {
    __device__ __forceinline__ static void run(const FwdBlock<Traits>& block, Accumulator<1, Traits::kDTiles>& o,
                                               Softmax<kRescale, 1>& softmax) {
        walk_split_k<Traits, kRescale>(block, o, softmax);
    }
};

template <typename Traits>
constexpr bool kSplitsKeys = std::is_base_of_v<SplitK, Traits>;

// Computes o of one tile of queries, and lse or the row statistics.
template <typename Traits, Rescale kRescale>
__device__ __forceinline__ void forward_tile(const FwdParams& params, const Statistics& statistics, uint8_t* bytes, int m_block) {
    using T = typename Traits::T;
    const int head = blockIdx.y;
    const FwdBlock<Traits> block(params, bytes, m_block, head, blockIdx.z);
    const float scale_log2 = NoScoreMod::scale_log2(params.shape);
    const int first_row = block.rows.begin + block.warp_row;
    Accumulator<Traits::kMTiles, Traits::kDTiles> o;
    Softmax<kRescale, Traits::kMTiles> softmax;
    o.clear();
    softmax.clear();
    std::conditional_t<kSplitsKeys<Traits>, SplitKWalk<Traits, kRescale>, SplitQWalk<Traits, kRescale>>::run(block, o, softmax);
    if constexpr (kRescale == Rescale::kAtTheEnd) {
        write_rows<T>(params, block.sequence, head, first_row, block.lane, o, softmax, scale_log2);
    } else {
        const int64_t first = block.sequence.lse_offset(params.shape, head);
        softmax.finish(o);
#pragma unroll
        for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + 16 * i + fragment_row(block.lane, half);
                if (block.lane % 4 == 0 && row < block.rows.end) {
                    statistics.max[first + row] = softmax.row_max[i][half] * scale_log2 * kLn2;
                    statistics.sum[first + row] = softmax.row_sum[i][half];
                }
            }
        write_o<T, false>(params, block.sequence, head, first_row, block.lane, o);
    }
}

template <typename Traits, Rescale kRescale, Grid kGrid>
__device__ __forceinline__ void forward(const FwdParams& params, const Statistics& statistics) {
    extern __shared__ __align__(kSharedAlignment) uint8_t bytes[];
    if constexpr (kGrid == Grid::kTiles) {
        // As sm80/fwd.cuh: the last rows start first.
        forward_tile<Traits, kRescale>(params, statistics, bytes, gridDim.x - 1 - blockIdx.x);
    } else {
        const int tiles = ceil_div(params.shape.seqlen_q, Traits::kBlockM);
#pragma unroll 1
        for (int m_block = 0; m_block < tiles; ++m_block) {
            forward_tile<Traits, kRescale>(params, statistics, bytes, m_block);
            __syncthreads();  // every warp is done with shared memory
        }
    }
}

}  // namespace fa2::ablations
