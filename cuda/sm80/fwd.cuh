// o = softmax(mask(softmax_scale * q k^T)) v on mma.sync. One thread block, one (batch, head, m_block, part).
//
// Work       kBlockM query rows against every key tile that the mask leaves visible, last tile first: the ragged and diagonal
//            tiles come first and pay for masking, the full ones skip it.
//            Above head_dim 256, kParts blocks share this work: each computes S, and kWidth columns of o.
// Warps      each owns kBlockM / kWarps rows and all keys (split Q): no sum crosses warps.
// Pipeline   wait k | start v | S = q k^T | mask | wait v | start next k | softmax | o += P v
// Shared     sQ kBlockM x kHeadDim, sK kBlockN x kHeadDim, sV kBlockN x kWidth.
// Registers  o and S in f32; P is packed from S as it is used.
// Numerics   scores, row_max, row_sum, o in f32; P is rounded to the input type before P v.
// Nonfinite  A NaN or infinity of v must not reach a row that does not see them: see core/nonfinite.cuh.
// Expects    head_dim and head_dim_v <= kHeadDim; rows of whole 16 bytes that begin at multiples of 16 bytes. The host has checked them.
#pragma once

#include "../core/epilogue.cuh"
#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/nonfinite.cuh"
#include "../core/score_mod.cuh"
#include "../core/sequence.cuh"
#include "../core/softmax.cuh"
#include "../core/tile.cuh"
#include "../params.h"
#include "copy.cuh"
#include "matmul.cuh"

namespace fa2::sm80 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kMinBlocks_, typename ScoreMod_>
struct FwdTraits {
    using T = T_;
    using ScoreMod = ScoreMod_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kMinBlocks = kMinBlocks_;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kWarpRows = kBlockM / kWarps;
    static constexpr int kMTiles = kWarpRows / 16;
    static constexpr int kNTiles = kBlockN / 8;
    static constexpr int kParts = ceil_div(kHeadDim, kMaxWidth);  // thread blocks that share the columns of o
    static constexpr int kWidth = kHeadDim / kParts;              // columns of o of a thread block
    static constexpr int kDTiles = kWidth / 8;
    using TileQ = TileOf<T, kBlockM, kHeadDim>;
    using TileK = TileOf<T, kBlockN, kHeadDim>;
    using TileV = TileOf<T, kBlockN, kWidth>;
    static constexpr int kSharedBytes = TileQ::kBytes + TileK::kBytes + TileV::kBytes;
    static constexpr uint32_t sQ = 0, sK = TileQ::kBytes, sV = sK + TileK::kBytes;  // byte offsets in shared memory
    static_assert(kBlockM % kWarps == 0 && kWarpRows % 16 == 0, "a warp owns whole m16 tiles");
    static_assert(kBlockN % 16 == 0, "P is the A operand in steps of 16 keys");
};

// The work of one thread block, as each thread knows it.
template <typename Traits>
struct FwdBlock {
    using T = typename Traits::T;
    using CopyQ = TileCopy<typename Traits::TileQ, Traits::kThreads, T>;
    using CopyK = TileCopy<typename Traits::TileK, Traits::kThreads, T>;
    using CopyV = TileCopy<typename Traits::TileV, Traits::kThreads, T>;

    const FwdParams& params;
    uint8_t* bytes;   // shared memory ..
    uint32_t shared;  // .. and its address
    int thread, lane;
    int warp_row;  // first row of this warp in the tile
    int head;
    int first_col;  // of v and o
    Sequence sequence;
    Visibility sees;
    Range rows;  // queries of this block
    Range keys;  // keys that any of them sees

    __device__ __forceinline__ FwdBlock(const FwdParams& params, uint8_t* bytes, int m_block, int head, int batch, int part = 0)
        : params(params), bytes(bytes), shared(uint32_t(__cvta_generic_to_shared(bytes))), thread(opaque(threadIdx.x)),
          lane(thread % kWarpSize), warp_row(thread / kWarpSize * Traits::kWarpRows), head(head), first_col(part * Traits::kWidth),
          sequence(params.shape, batch), sees(params.shape, sequence),
          rows(tile_range(m_block * Traits::kBlockM, Traits::kBlockM, sequence.seqlen_q)), keys(sees.keys_of(rows)) {}

    __device__ __forceinline__ void start_q() const {
        const T* q = row_of<const T>(params.q, params.q_strides, sequence.batch, sequence.first_q + rows.begin, head);
        CopyQ(q, params.q_strides.row, params.shape.head_dim, thread).start(shared + Traits::sQ, 0, rows.end - rows.begin);
    }
    __device__ __forceinline__ CopyK copy_k() const {
        return CopyK(keys_of(params.k, params.k_strides), params.k_strides.row, params.shape.head_dim, thread);
    }
    __device__ __forceinline__ CopyV copy_v() const {
        const T* v = keys_of(params.v, params.v_strides) + first_col;
        return CopyV(v, params.v_strides.row, params.shape.head_dim_v - first_col, thread);
    }
    // The sequence and head of k, or v, that this block reads.
    __device__ __forceinline__ const T* keys_of(const void* tensor, const Strides& strides) const {
        return row_of<const T>(tensor, strides, sequence.batch, sequence.first_k, key_head(params.shape, head));
    }
};

// o before the division by its row sums, and row statistics, over every key tile that `block` sees.
template <typename Traits, typename Softmax>
__device__ __forceinline__ void walk_keys(const FwdBlock<Traits>& block, Accumulator<Traits::kMTiles, Traits::kDTiles>& o,
                                          Softmax& softmax) {
    using T = typename Traits::T;
    using TileK = typename Traits::TileK;
    using ScoreMod = typename Traits::ScoreMod;
    const Shape& shape = block.params.shape;
    const uint32_t shared = block.shared;
    const int lane = block.lane, seqlen_k = block.sequence.seqlen_k, first_row = block.rows.begin + block.warp_row;
    const Range common = block.sees.common_keys(block.rows);
    const auto k_copy = block.copy_k();
    const auto v_copy = block.copy_v();
    const ScoreMod score_mod(shape, block.sequence, block.head);
    const int n_first = block.keys.begin / Traits::kBlockN;
    int n_block = (block.keys.end - 1) / Traits::kBlockN;
    block.start_q();
    k_copy.start(shared + Traits::sK, n_block * Traits::kBlockN, seqlen_k);
    cp_async_commit();
    for (; n_block >= n_first; --n_block) {
        const int first_key = n_block * Traits::kBlockN;
        cp_async_wait<0>();
        __syncthreads();  // k has arrived, and every warp is done with the v of the step before
        v_copy.start(shared + Traits::sV, first_key, seqlen_k);
        cp_async_commit();
        Accumulator<Traits::kMTiles, Traits::kNTiles> s;
        s.clear();
        multiply_ahead<T, Traits::kHeadDim / kStepK<T>>(
            s, OperandA<typename Traits::TileQ, Order::kContiguousK>(shared, Traits::sQ, block.warp_row, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kBlockN>(shared, Traits::sK, 0, lane));
        if constexpr (!ScoreMod::kIdentity) apply(score_mod, s, first_row, first_key, lane);
        if (!common.contains({first_key, first_key + Traits::kBlockN}))
            hide(s, block.sees, first_row, first_key, lane, -INFINITY);
        cp_async_wait<0>();
        __syncthreads();  // v has arrived, and every warp is done with k
        if (n_block > n_first) k_copy.start(shared + Traits::sK, first_key - Traits::kBlockN, seqlen_k);
        cp_async_commit();
        softmax.step(s, o, ScoreMod::scale_log2(shape));
        // S: 16 x kBlockN per m16 tile -> A operand, kBlockN / 16 steps
        multiply_ahead<T, Traits::kBlockN / kStepK<T>>(
            o, AccumulatorA<T, Traits::kMTiles, Traits::kNTiles>{s},
            OperandB<typename Traits::TileV, Order::kTransposed, Traits::kWidth>(shared, Traits::sV, 0, lane));
    }
}

template <typename Traits>
__device__ __forceinline__ void forward(const FwdParams& params) {
    extern __shared__ __align__(kSharedAlignment) uint8_t bytes[];
    // The last rows see the most keys under a causal mask, so they start first. opaque(): otherwise ptxas reads the special registers again
    // in every step and recomputes addresses from them (2% more instructions at head_dim 64 and 128, nvcc 13.0, sm_90).
    const int index = opaque(gridDim.x - 1 - blockIdx.x), head = opaque(blockIdx.y);
    const int batch = opaque(params.shape.first_batch + blockIdx.z);
    const FwdBlock<Traits> block(params, bytes, index / Traits::kParts, head, batch, index % Traits::kParts);
    if (block.rows.empty()) return;
    if (Traits::kParts > 1 && block.first_col >= params.shape.head_dim_v) return;
    Accumulator<Traits::kMTiles, Traits::kDTiles> o;
    OnlineSoftmax<Traits::kMTiles> softmax;
    o.clear();
    softmax.clear();
    if (!block.keys.empty()) walk_keys(block, o, softmax);
    const bool nonfinite = __any_sync(~0u, !o.finite());
    const int first_row = block.rows.begin + block.warp_row;
    write_rows<typename Traits::T>(params, block.sequence, head, first_row, block.lane, o, softmax,
                                   Traits::ScoreMod::scale_log2(params.shape), block.first_col);
    if (nonfinite) recompute_rows<Traits>(params, {first_row, head, batch}, block.first_col);
}

}  // namespace fa2::sm80
