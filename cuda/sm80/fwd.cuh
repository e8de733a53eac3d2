// o = softmax(mask(softmax_scale * q k^T)) v on mma.sync. One thread block, one (batch, head, m_block).
//
// Work       kBlockM query rows against every tile of keys that the mask leaves visible, last tile first: the ragged and
//            diagonal tiles come first and pay for masking, the full ones skip it.
// Warps      each owns kBlockM / kWarps rows and all keys (split Q): no sum crosses warps.
// Pipeline   wait k | start v | S = q k^T | mask | wait v | start next k | softmax | o += P v
// Shared     sQ kBlockM x kHeadDim, sK and sV kBlockN x kHeadDim each; the epilogue reuses sQ for o.
// Registers  rO and rS in f32; P is packed from rS as it is used.
// Numerics   scores, maximum, sum, o in f32; P is rounded to the input type before P v.
// Expects    head_dim <= kHeadDim, a multiple of 8; rows of 16-byte multiples. The host has checked them.
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
    static constexpr int kSharedBytes = TileQ::kBytes + 2 * TileK::kBytes;
    static_assert(kWarpRows % 16 == 0, "a warp owns whole m16 tiles");
    static_assert(kBlockN % 16 == 0, "P is the A operand in steps of 16 keys");
};

template <typename Traits>
__device__ __forceinline__ void forward(const FwdParams& params) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = uint32_t(__cvta_generic_to_shared(shared));
    constexpr uint32_t sQ = 0, sK = TileQ::kBytes, sV = sK + TileK::kBytes;

    const Shape& shape = params.shape;
    const int thread = threadIdx.x, lane = thread % kWarpSize;
    const int warp_row = thread / kWarpSize * Traits::kWarpRows;
    // The last rows see the most keys under a causal mask: they are started first.
    const int m_block = gridDim.x - 1 - blockIdx.x;
    const int head = blockIdx.y, batch = blockIdx.z;
    const int head_k = head / (shape.num_heads / shape.num_heads_k);
    const Sequence sequence(shape, batch);
    const Range rows{m_block * Traits::kBlockM, min((m_block + 1) * Traits::kBlockM, sequence.seqlen_q)};
    if (rows.empty()) return;
    const Visibility sees(shape, sequence);
    const Range keys = sees.keys_of(rows), common = sees.common_keys(rows);

    const auto start = [&](const void* tensor, const Strides& strides, int first_row, int head) {
        return static_cast<const T*>(tensor) + batch * strides.batch + first_row * strides.row + head * strides.head;
    };
    const T* gQ = start(params.q, params.q_strides, sequence.first_q + rows.begin, head);
    const T* gK = start(params.k, params.k_strides, sequence.first_k, head_k);
    const T* gV = start(params.v, params.v_strides, sequence.first_k, head_k);
    const TileCopy<TileK, Traits::kThreads, T> k_copy(gK, params.k_strides.row, shape.head_dim, thread);
    const TileCopy<TileK, Traits::kThreads, T> v_copy(gV, params.v_strides.row, shape.head_dim, thread);

    Accumulator<Traits::kMTiles, Traits::kDTiles> o;
    o.clear();
    OnlineSoftmax<Traits::kMTiles> softmax;
    const Scoring<Traits::kModified> scoring(shape, sequence, batch, head);

    if (!keys.empty()) {
        const int n_first = keys.begin / Traits::kBlockN;
        int n_block = (keys.end - 1) / Traits::kBlockN;
        TileCopy<TileQ, Traits::kThreads, T>(gQ, params.q_strides.row, shape.head_dim, thread)
            .start(base + sQ, 0, rows.end - rows.begin);
        k_copy.start(base + sK, n_block * Traits::kBlockN, sequence.seqlen_k);
        cp_async_commit();
        for (; n_block >= n_first; --n_block) {
            cp_async_wait<0>();
            __syncthreads();  // k has arrived, and every warp is done with the v before
            const int first_col = n_block * Traits::kBlockN;
            v_copy.start(base + sV, first_col, sequence.seqlen_k);
            cp_async_commit();
            Accumulator<Traits::kMTiles, Traits::kNTiles> s;
            s.clear();
            multiply_ahead<T, Traits::kHeadDim / 16>(s, OperandA<TileQ, Order::kContiguousK>(base, sQ, warp_row, lane),
                                               OperandB<TileK, Order::kContiguousK, Traits::kBlockN>(base, sK, 0, lane));

            const bool partial = first_col < common.begin || first_col + Traits::kBlockN > common.end;
            if (Traits::kModified || partial) {
#pragma unroll
                for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
                    for (int j = 0; j < Traits::kNTiles; ++j)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int row = rows.begin + warp_row + 16 * i + fragment_row(lane, e / 2);
                            const int col = first_col + fragment_col(lane, j) + e % 2;
                            float& x = s.x[i][j][e];
                            x = !partial || sees.visible(row, col) ? scoring.apply(x, row, col) : -INFINITY;
                        }
            }
            cp_async_wait<0>();
            __syncthreads();  // v has arrived, and every warp is done with k
            if (n_block > n_first) k_copy.start(base + sK, first_col - Traits::kBlockN, sequence.seqlen_k);
            cp_async_commit();
            softmax.step(s, o, scoring.factor);
            // rS: 16 x kBlockN per m16 tile -> A operand, kBlockN / 16 steps
            multiply_ahead<T, Traits::kBlockN / 16>(o, AccumulatorA<T, Traits::kMTiles, Traits::kNTiles>{s},
                                              OperandB<TileK, Order::kTransposed, Traits::kHeadDim>(base, sV, 0, lane));
        }
    }

    // Epilogue: o / sum through shared memory, so that global memory is written in 16-byte pieces.
    softmax.finish();
    float* gLse = params.lse + batch * shape.lse_batch + head * shape.lse_head + sequence.first_q;
    __syncthreads();  // every warp is done with q
#pragma unroll
    for (int i = 0; i < Traits::kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = rows.begin + warp_row + 16 * i + fragment_row(lane, half);
            const bool blind = sees.keys(row).empty();
            const float scale = blind ? 0.f : 1.f / softmax.sum[i][half];
            if (lane % 4 == 0 && row < rows.end)
                gLse[row] = blind ? -INFINITY : softmax.lse(i, half, scoring.factor);
#pragma unroll
            for (int j = 0; j < Traits::kDTiles; ++j) {
                o.x[i][j][2 * half] *= scale;
                o.x[i][j][2 * half + 1] *= scale;
            }
        }
    store_fragment<T, TileQ>(base, sQ, o, warp_row, 0, lane);
    __syncthreads();
    T* gO = static_cast<T*>(params.o) + batch * params.o_strides.batch +
            (sequence.first_q + rows.begin) * params.o_strides.row + head * params.o_strides.head;
    for (int index = thread; index < TileQ::kRows * TileQ::kChunksPerRow; index += Traits::kThreads) {
        const int row = index / TileQ::kChunksPerRow, chunk = index % TileQ::kChunksPerRow;
        if (row < rows.end - rows.begin && chunk * TileQ::kChunk < shape.head_dim) {
            *reinterpret_cast<uint4*>(gO + row * params.o_strides.row + chunk * TileQ::kChunk) =
                *reinterpret_cast<const uint4*>(shared + sQ + TileQ::offset(row, chunk));
        }
    }
}

}  // namespace fa2
