// The backward without some contributions of FlashAttention-2: sm80/bwd.cuh, or code that differs from it in one point. The rules of
// forward.cuh apply here too. Blocks add to dq_accum in any order.
#pragma once

#include "forward.cuh"
#include "sm80/bwd.cuh"
#include "softmax.cuh"

namespace fa2::ablations {

// P = exp(score - max) / sum, of a forward with Rescale::kEveryStep. The maxima take the place of lse, in shared memory and in BwdParams.
// The sums lie after delta.
template <typename Base>
struct MaxAndSumTraits : Base {
    static constexpr int kStageBytes = Base::kStageBytes + Base::kRowValuesBytes;
    static constexpr int kSharedBytes = Base::kSharedBytes + Base::kStages * Base::kRowValuesBytes;
    static constexpr uint32_t sSum = Base::sDelta + Base::kRowValuesBytes;
    static_assert(kStageBytes % 128 == 0, "every stage starts at a whole swizzle pattern");
};

// A block whose P comes from lse.
template <typename Traits>
struct LseBlock : BwdBlock<Traits> {
    __device__ __forceinline__ LseBlock(const BwdParams& params, const Statistics&, uint8_t* bytes, const BlockIndex& index)
        : BwdBlock<Traits>(params, bytes, index) {}
};

// A block whose P comes from max and sum.
template <typename Traits>
struct MaxAndSumBlock : BwdBlock<Traits> {
    const float* sum;

    __device__ __forceinline__ MaxAndSumBlock(const BwdParams& params, const Statistics& statistics, uint8_t* bytes,
                                              const BlockIndex& index)
        : BwdBlock<Traits>(params, bytes, index), sum(statistics.sum) {}

    __device__ __forceinline__ void start_queries(uint32_t stage_offset, int head, int m_block) const {
        const int row = m_block * Traits::kBlockM + this->thread;
        if (this->thread < Traits::kBlockM) {
            const bool valid = row < this->sequence.seqlen_q;
            const int64_t at = this->sequence.lse_offset(this->params.shape, head) + (valid ? row : 0);
            cp_async_4(this->shared + Traits::sSum + stage_offset + this->thread * 4, sum + at, valid);
        }
        BwdBlock<Traits>::start_queries(stage_offset, head, m_block);
    }
};

template <typename Traits>
__device__ __forceinline__ void to_p(WarpP<Traits>& warp_p, const MaxAndSumBlock<Traits>& block, const QueryTile& tile,
                                     uint32_t stage_offset) {
    sm80::to_p(warp_p, static_cast<const BwdBlock<Traits>&>(block), tile, stage_offset);
    const float* sums = block.row_values(Traits::sSum + stage_offset);
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float factor = inverse(sums[block.warp.s_row + 16 * i + fragment_row(block.lane, half)]);
            OnlineSoftmax<Traits::kMTiles>::rescale(warp_p.p, i, half, factor);
        }
}

// Computes dk and dv of one tile of keys, and adds its part of dq to dq_accum.
template <typename Block>
__device__ __forceinline__ void backward_tile(const BwdParams& params, const Statistics& statistics, uint8_t* bytes, int n_block) {
    using Traits = typename Block::Traits;
    const Block block(params, statistics, bytes, {n_block, int(blockIdx.y), int(blockIdx.z)});
    Accumulator<Traits::kKvMTiles, Traits::kKvDTiles> dk, dv;
    dk.clear();
    dv.clear();
    block.start_keys();
    walk_queries<false>(block, dk, dv);
    write_keys(static_cast<const BwdBlock<Traits>&>(block), dk, dv);
}

template <typename Block, Grid kGrid>
__device__ __forceinline__ void backward(const BwdParams& params, const Statistics& statistics) {
    extern __shared__ __align__(kSharedAlignment) uint8_t bytes[];
    if constexpr (kGrid == Grid::kTiles) {
        backward_tile<Block>(params, statistics, bytes, blockIdx.x);
    } else {
        const int tiles = ceil_div(params.shape.seqlen_k, Block::Traits::kBlockN);
#pragma unroll 1
        for (int n_block = 0; n_block < tiles; ++n_block) {
            backward_tile<Block>(params, statistics, bytes, n_block);
            __syncthreads();  // dk and dv have left shared memory
        }
    }
}

}  // namespace fa2::ablations
