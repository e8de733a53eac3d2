// o = softmax(mask(softmax_scale * q k^T)) v on mma.sync. One thread block, one (batch, head, m_block).
//
// Work       kBlockM query rows against every tile of keys that the mask leaves visible, last tile first: the ragged and
//            diagonal tiles come first and pay for masking, the full ones skip it.
// Warps      each owns kBlockM / kWarps rows and all keys (split Q): no sum crosses warps.
// Pipeline   wait k | start v | S = q k^T | mask | wait v | start next k | softmax | o += P v
// Shared     sQ kBlockM x kHeadDim, sK and sV kBlockN x kHeadDim each; the epilogue reuses sQ for o.
// Registers  o and S in f32; P is packed from S as it is used.
// Numerics   scores, maximum, sum, o in f32; P is rounded to the input type before P v.
// Numbers    of v that are not finite must not reach a row that they are hidden from, and 0 times NaN is NaN. The first walk over
//            the keys does not care; where its o is not finite, a careful one takes its place.
// Expects    head_dim <= kHeadDim, a multiple of 8; rows that begin at multiples of 16 bytes. The host has checked them.
#pragma once

#include "../core/fragment.cuh"
#include "../core/mask.cuh"
#include "../core/scores.cuh"
#include "../core/softmax.cuh"
#include "../core/tile.cuh"
#include "../params.h"
#include "copy.cuh"
#include "matmul.cuh"
#include "mma.cuh"

namespace fa2 {

template <typename T_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, bool kModified_>
struct FwdTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kBlockM = kBlockM_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr int kWarps = kWarps_;
    static constexpr bool kModified = kModified_;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kWarpRows = kBlockM / kWarps;
    static constexpr int kMTiles = kWarpRows / 16;
    static constexpr int kNTiles = kBlockN / 8;
    static constexpr int kDTiles = kHeadDim / 8;
    using TileQ = Tile<kBlockM, kHeadDim>;
    using TileK = Tile<kBlockN, kHeadDim>;
    // Blocks to a multiprocessor that the registers must allow. (full mask, 4k tokens, H100: 220 TFLOP/s with two.)
    static constexpr int kMinBlocks = kHeadDim <= 32 ? 3 : 1;
    static constexpr int kSharedBytes = TileQ::kBytes + 2 * TileK::kBytes;
    static constexpr uint32_t sQ = 0, sK = TileQ::kBytes, sV = sK + TileK::kBytes;  // offsets in shared memory
    static_assert(kBlockM % kWarps == 0 && kWarpRows % 16 == 0, "a warp owns whole m16 tiles");
    static_assert(kBlockN % 16 == 0, "P is the A operand in steps of 16 keys");
};

// What one thread block works on, as each thread knows it.
template <typename Traits>
struct FwdContext {
    using T = typename Traits::T;

    const Shape& shape;
    uint8_t* shared;
    uint32_t base;  // of shared memory
    int thread, lane;
    int warp_row;   // first row of this warp in the tile
    int m_block, head, batch;
    Sequence sequence;
    Visibility sees;
    Range rows;  // queries of this block
    Range keys;  // that any of them sees
    const T *gQ, *gK, *gV;  // q at the block's first row, k and v at the sequence's first key

    __device__ __forceinline__ FwdContext(const FwdParams& params, uint8_t* shared, const Place& place)
        : shape(params.shape), shared(shared), base(uint32_t(__cvta_generic_to_shared(shared))), thread(place.thread),
          lane(thread % kWarpSize), warp_row(thread / kWarpSize * Traits::kWarpRows),
          // The last rows see the most keys under a causal mask: they are started first.
          m_block(gridDim.x - 1 - place.x), head(place.y), batch(shape.first_batch + place.z), sequence(shape, batch), sees(shape, sequence),
          rows{m_block * Traits::kBlockM, min((m_block + 1) * Traits::kBlockM, sequence.seqlen_q)}, keys(sees.keys_of(rows)) {
        const int head_k = head / (shape.num_heads / shape.num_heads_k);
        gQ = row_of<const T>(params.q, params.q_strides, batch, sequence.first_q + rows.begin, head);
        gK = row_of<const T>(params.k, params.k_strides, batch, sequence.first_k, head_k);
        gV = row_of<const T>(params.v, params.v_strides, batch, sequence.first_k, head_k);
    }
};

// o, unnormalised, and the statistics of its rows, over every tile of keys.
//
// kCareful: what is not finite in v does not reach a row that it is hidden from, where 0 times NaN would be NaN. It is left out of
// the tiles that are only partly visible.
template <typename Traits, bool kCareful>
__device__ __forceinline__ void walk(const FwdParams& params, const FwdContext<Traits>& block,
                                     const Scoring<Traits::kModified>& scoring,
                                     Accumulator<Traits::kMTiles, Traits::kDTiles>& o, OnlineSoftmax<Traits::kMTiles>& softmax) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using CopyK = TileCopy<TileK, Traits::kThreads, T>;
    constexpr uint32_t sQ = Traits::sQ, sK = Traits::sK, sV = Traits::sV;
    const uint32_t base = block.base;
    const int thread = block.thread, lane = block.lane, seqlen_k = block.sequence.seqlen_k;
    const Visibility& sees = block.sees;
    const Range rows = block.rows, common = sees.common_keys(rows);
    const CopyK k_copy(block.gK, params.k_strides.row, block.shape.head_dim, thread);
    const CopyK v_copy(block.gV, params.v_strides.row, block.shape.head_dim, thread);
    const int n_first = block.keys.begin / Traits::kBlockN;
    int n_block = (block.keys.end - 1) / Traits::kBlockN;
    TileCopy<TileQ, Traits::kThreads, T>(block.gQ, params.q_strides.row, block.shape.head_dim, thread)
        .start(base + sQ, 0, rows.end - rows.begin);
    k_copy.start(base + sK, n_block * Traits::kBlockN, seqlen_k);
    cp_async_commit();
    for (; n_block >= n_first; --n_block) {
        cp_async_wait<0>();
        __syncthreads();  // k has arrived, and every warp is done with the v before
        const int first_col = n_block * Traits::kBlockN;
        const bool partial = first_col < common.begin || first_col + Traits::kBlockN > common.end;
        if (kCareful && partial) {
            v_copy.copy_finite(block.shared + sV, first_col, seqlen_k);
        } else {
            v_copy.start(base + sV, first_col, seqlen_k);
        }
        cp_async_commit();
        Accumulator<Traits::kMTiles, Traits::kNTiles> s;
        s.clear();
        multiply_ahead<T, Traits::kHeadDim / 16>(
            s, OperandA<TileQ, Order::kContiguousK>(base, sQ, block.warp_row, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kBlockN>(base, sK, 0, lane));

        if (Traits::kModified || partial) {
#pragma unroll
            for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
                for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = rows.begin + block.warp_row + 16 * i + fragment_row(lane, e / 2);
                        const int col = first_col + fragment_col(lane, j) + e % 2;
                        float& x = s.x[i][j][e];
                        x = !partial || sees.visible(row, col) ? scoring.apply(x, row, col) : -INFINITY;
                    }
        }
        cp_async_wait<0>();
        __syncthreads();  // v has arrived, and every warp is done with k
        if (n_block > n_first) k_copy.start(base + sK, first_col - Traits::kBlockN, seqlen_k);
        cp_async_commit();
        softmax.step(s, o, scoring.factor);
        // S: 16 x kBlockN per m16 tile -> A operand, kBlockN / 16 steps
        multiply_ahead<T, Traits::kBlockN / 16>(
            o, AccumulatorA<T, Traits::kMTiles, Traits::kNTiles>{s},
            OperandB<TileK, Order::kTransposed, Traits::kHeadDim>(base, sV, 0, lane));
    }
    __syncthreads();  // every warp is done with shared memory
}

// All of the block's work. Returns false, with nothing written, if a careful pass has to take its place.
template <typename Traits, bool kCareful>
__device__ __forceinline__ bool forward_pass(const FwdParams& params, uint8_t* shared) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    Accumulator<Traits::kMTiles, Traits::kDTiles> o;
    OnlineSoftmax<Traits::kMTiles> softmax;
    o.clear();
    softmax.clear();
    {
        const FwdContext<Traits> block(params, shared, Place());
        if (block.rows.empty()) return true;
        const Scoring<Traits::kModified> scoring(block.shape, block.sequence, block.batch, block.head);
        if (!block.keys.empty()) walk<Traits, kCareful>(params, block, scoring, o, softmax);
    }
    if (!kCareful && __syncthreads_or(!o.finite())) return false;

    const FwdContext<Traits> block(params, shared, Place());
    const Scoring<Traits::kModified> scoring(block.shape, block.sequence, block.batch, block.head);
    const Range rows = block.rows;
    const Visibility& sees = block.sees;

    // Epilogue: o / sum through shared memory, so that global memory is written in 16-byte pieces.
    softmax.finish();
    float* gLse = params.lse + block.sequence.statistics(block.shape, block.head);
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = rows.begin + block.warp_row + 16 * i + fragment_row(block.lane, half);
            const bool blind = sees.keys(row).empty();
            const float scale = blind ? 0.f : 1.f / softmax.sum[i][half];
            if (block.lane % 4 == 0 && row < rows.end)
                gLse[row] = blind ? -INFINITY : softmax.lse(i, half, scoring.factor);
#pragma unroll
            for (int j = 0; j < Traits::kDTiles; ++j) {
                o.x[i][j][2 * half] *= scale;
                o.x[i][j][2 * half + 1] *= scale;
            }
        }
    store_fragment<T, TileQ>(block.base, Traits::sQ, o, block.warp_row, 0, block.lane);
    __syncthreads();
    if (kCareful) {
        add_special<TileQ, Traits::kThreads, false>(shared + Traits::sQ, rows.end - rows.begin, block.gV, params.v_strides.row,
                                             block.keys, block.shape.head_dim, block.thread,
                                             [&](int row, int key) { return sees.visible(rows.begin + row, key); });
    }
    if (params.unrounded) {
        if (kCareful) __syncthreads();  // a thread reads here what others have added
        float* gO = row_of<float>(params.o, params.o_strides, block.batch, block.sequence.first_q + rows.begin, block.head);
#pragma unroll
        for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int j = 0; j < Traits::kDTiles; ++j) {
                    const int row = block.warp_row + 16 * i + fragment_row(block.lane, half), col = fragment_col(block.lane, j);
                    float2 x = {o.x[i][j][2 * half], o.x[i][j][2 * half + 1]};
                    if (kCareful) {
                        // What add_special() has added shows in the rounded tile alone.
                        const uint32_t pair = *reinterpret_cast<const uint32_t*>(
                            shared + Traits::sQ + TileQ::offset(row, col / TileQ::kChunk) + col % TileQ::kChunk * sizeof(T));
                        const uint32_t carry = carry_of_special<T>(pair);
                        if (carry & 0x8000u) x.x = unpack2<T>(pair).x;
                        if (carry & 0x80000000u) x.y = unpack2<T>(pair).y;
                    }
                    if (row < rows.end - rows.begin && col < block.shape.head_dim)
                        *reinterpret_cast<float2*>(gO + row * params.o_strides.row + col) = x;
                }
        return true;
    }
    T* gO = row_of<T>(params.o, params.o_strides, block.batch, block.sequence.first_q + rows.begin, block.head);
    store_tile<TileQ, Traits::kThreads>(gO, params.o_strides.row, shared + Traits::sQ, rows.end - rows.begin,
                                        block.shape.head_dim, block.thread);
    return true;
}

// A function of its own: the usual pass then has the registers to itself. (bench mha/d128/full/s4096 fwd, H100: 374 TFLOP/s,
// 349 in one body.)
template <typename Traits>
__device__ __noinline__ void careful_forward(const FwdParams& params) {
    extern __shared__ __align__(1024) uint8_t shared[];
    forward_pass<Traits, true>(params, shared);
}

template <typename Traits>
__device__ __forceinline__ void forward(const FwdParams& params) {
    extern __shared__ __align__(1024) uint8_t shared[];
    // A hidden NaN or infinity shows in o: where o is finite, none has reached it.
    if (!forward_pass<Traits, false>(params, shared)) careful_forward<Traits>(params);
}

}  // namespace fa2
