// The forward's walk with warps that split the keys: each has all queries of the tile and a quarter of the keys of each tile,
// as in FlashAttention-1. The maxima of rows and the parts of P v then cross warps in every step, through shared memory.
//
// Tile       64 queries, for S of all of them and the parts of P v live in the registers of each warp: of 128 queries, they do
//            not fit beside o. 128 keys, twice ours at head_dim 128: what crosses warps does so once for each tile of keys.
// Rows       of o, and their statistics, are kept by one warp each: 16 of them. It adds up the parts of all four.
// Pipeline   wait k | start v | S = q k^T of own keys | mask | own maxima | wait v, maxima | start next k | P | for some
//            columns at a time: P v of own keys | hand it out | barrier | o += parts. The next columns are multiplied while the
//            barrier is waited for: there are two buffers of parts.
// Shared     as sm80/fwd.cuh; the maxima and sums of 64 rows by warp; two buffers of parts.
#pragma once

#include "sm80/fwd.cuh"
#include "softmax.cuh"

namespace fa2::ablations {

template <typename T, int kHeadDim>
struct SplitKTraits : FwdTraits<T, kHeadDim, 64, 128, 4, false> {
    using Base = FwdTraits<T, kHeadDim, 64, 128, 4, false>;
    static constexpr int kRowTiles = Base::kBlockM / 16;            // S, parts: m16 tiles, the same in all warps
    static constexpr int kWarpKeys = Base::kBlockN / Base::kWarps;
    static constexpr int kKeyTiles = kWarpKeys / 8;                 // S: n8 tiles of a warp
    // n8 tiles of o that are handed out at once: as many as leave room for two blocks on a multiprocessor.
    static constexpr int kPartTiles = 256 / kHeadDim;
    static constexpr int kExchanges = Base::kDTiles / kPartTiles;
    static constexpr int kPartsBytes = kRowTiles * (Base::kWarps - 1) * kPartTiles * kWarpSize * 16;
    static constexpr int kStatisticsBytes = Base::kBlockM * Base::kWarps * 4;
    static constexpr uint32_t sMax = Base::kSharedBytes, sSum = sMax + kStatisticsBytes, sParts = sSum + kStatisticsBytes;
    static constexpr int kSharedBytes = sParts + 2 * kPartsBytes;
    static_assert(Base::kWarps == 4, "a row's maxima of all warps are read as a float4");
    static_assert(kRowTiles == Base::kWarps && Base::kMTiles == 1, "each warp keeps the o of one m16 tile");
    static_assert(Base::kDTiles % kPartTiles == 0 && kPartTiles % 2 == 0, "v is loaded two n8 tiles at a time");
};

// One number for each row and warp, (kBlockM, kWarps) in shared memory.
template <typename Traits>
struct ByWarp {
    float* of_rows;

    __device__ __forceinline__ void set(int row, int warp, float x) const { of_rows[row * Traits::kWarps + warp] = x; }
    __device__ __forceinline__ float4 all(int row) const {
        return *reinterpret_cast<const float4*>(of_rows + row * Traits::kWarps);
    }
    __device__ __forceinline__ float max(int row) const {
        const float4 x = all(row);
        return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    }
    __device__ __forceinline__ float sum(int row) const {
        const float4 x = all(row);
        return (x.x + x.y) + (x.z + x.w);
    }
};

// P of all rows and a warp's own keys, as the A operand.
template <typename Traits>
struct OwnP {
    static constexpr int kSteps = Traits::kWarpKeys / 16;
    uint32_t a[Traits::kRowTiles][kSteps][4];

    __device__ __forceinline__ explicit OwnP(const Accumulator<Traits::kRowTiles, Traits::kKeyTiles>& p) {
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
            for (int k_step = 0; k_step < kSteps; ++k_step) to_a_operand<typename Traits::T>(a[i][k_step], p.x[i], k_step);
    }
    __device__ __forceinline__ void load(uint32_t (&to)[4], int i, int k_step) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) to[e] = a[i][k_step][e];
    }
};

// The B operand from its 16 columns number `first` on.
template <typename B>
struct ColumnsFrom {
    const B& b;
    int first;

    __device__ __forceinline__ void load(uint32_t (&to)[4], int j, int k_step) const { b.load(to, first + j, k_step); }
};

// The parts of P v that warps hand to each other: of each warp, the m16 tiles of the other three, as threads hold them.
template <typename Traits>
struct Parts {
    using Part = Accumulator<Traits::kRowTiles, Traits::kPartTiles>;
    static constexpr int kOthers = Traits::kWarps - 1;

    float4* buffers;  // two of (receiver, sender among the others, n8 tile, lane)
    int warp, lane;

    __device__ __forceinline__ float4& at(int exchange, int receiver, int sender, int j) const {
        float4* buffer = buffers + exchange % 2 * (Traits::kPartsBytes / 16);
        return buffer[((receiver * kOthers + sender) * Traits::kPartTiles + j) * kWarpSize + lane];
    }

    // Hands out the tiles of others, and adds the own one to o.
    __device__ __forceinline__ void send(Accumulator<1, Traits::kDTiles>& o, const Part& part, int exchange) const {
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kPartTiles; ++j) {
                const float (&x)[4] = part.x[i][j];
                if (i == warp) {
                    add(o.x[0][exchange * Traits::kPartTiles + j], {x[0], x[1], x[2], x[3]});
                } else {
                    at(exchange, i, warp - (warp > i), j) = {x[0], x[1], x[2], x[3]};
                }
            }
    }

    __device__ __forceinline__ void receive(Accumulator<1, Traits::kDTiles>& o, int exchange) const {
#pragma unroll
        for (int sender = 0; sender < kOthers; ++sender)
#pragma unroll
            for (int j = 0; j < Traits::kPartTiles; ++j)
                add(o.x[0][exchange * Traits::kPartTiles + j], at(exchange, warp, sender, j));
    }

    __device__ __forceinline__ static void add(float (&to)[4], const float4& x) {
        to[0] += x.x;
        to[1] += x.y;
        to[2] += x.z;
        to[3] += x.w;
    }
};

// o and the statistics of each warp's 16 rows, over every tile of keys. softmax.sum is that of whole rows; o is normalised with
// Rescale::kEveryStep alone.
template <typename Traits, Rescale kRescale>
__device__ __forceinline__ void walk_split_k(const FwdParams& params, const FwdContext<Traits>& block,
                                             const Scoring<false>& scoring, Accumulator<1, Traits::kDTiles>& o,
                                             Softmax<kRescale, 1>& softmax) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    using CopyK = TileCopy<TileK, Traits::kThreads, T>;
    constexpr bool kEveryStep = kRescale == Rescale::kEveryStep;
    constexpr uint32_t sQ = Traits::sQ, sK = Traits::sK, sV = Traits::sV;
    const uint32_t base = block.base;
    const int thread = block.thread, lane = block.lane, seqlen_k = block.sequence.seqlen_k;
    const int warp = thread / kWarpSize, first_key = warp * Traits::kWarpKeys;  // of a tile
    const Visibility& sees = block.sees;
    const Range rows = block.rows, common = sees.common_keys(rows);
    const CopyK k_copy(block.gK, params.k_strides.row, block.shape.head_dim, thread);
    const CopyK v_copy(block.gV, params.v_strides.row, block.shape.head_dim, thread);
    const ByWarp<Traits> maxima{reinterpret_cast<float*>(block.shared + Traits::sMax)};
    const ByWarp<Traits> sums{reinterpret_cast<float*>(block.shared + Traits::sSum)};
    const Parts<Traits> parts{reinterpret_cast<float4*>(block.shared + Traits::sParts), warp, lane};
    // Of all rows: the maximum, which all warps know, and until the end the sum over this thread's columns.
    OnlineSoftmax<Traits::kRowTiles> all;
    all.clear();
    const int n_first = block.keys.begin / Traits::kBlockN;
    int n_block = (block.keys.end - 1) / Traits::kBlockN;
    TileCopy<TileQ, Traits::kThreads, T>(block.gQ, params.q_strides.row, block.shape.head_dim, thread)
        .start(base + sQ, 0, rows.end - rows.begin);
    k_copy.start(base + sK, n_block * Traits::kBlockN, seqlen_k);
    cp_async_commit();
    for (; n_block >= n_first; --n_block) {
        cp_async_wait<0>();
        __syncthreads();  // k has arrived, and every warp is done with the v, the maxima and the parts before
        const int first_col = n_block * Traits::kBlockN;
        v_copy.start(base + sV, first_col, seqlen_k);
        cp_async_commit();
        Accumulator<Traits::kRowTiles, Traits::kKeyTiles> s;
        s.clear();
        multiply_ahead<T, Traits::kHeadDim / 16>(
            s, OperandA<TileQ, Order::kContiguousK>(base, sQ, 0, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kWarpKeys>(base, sK, first_key, lane));
        if (first_col < common.begin || first_col + Traits::kBlockN > common.end) {
#pragma unroll
            for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
                for (int j = 0; j < Traits::kKeyTiles; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int row = rows.begin + 16 * i + fragment_row(lane, e / 2);
                        const int col = first_col + first_key + fragment_col(lane, j) + e % 2;
                        if (!sees.visible(row, col)) s.x[i][j][e] = -INFINITY;
                    }
        }
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float largest = row_max(s.x[i], half);
                if (lane % 4 == 0) maxima.set(16 * i + fragment_row(lane, half), warp, largest);
            }
        cp_async_wait<0>();
        __syncthreads();  // v has arrived, and so have the maxima; every warp is done with k
        if (n_block > n_first) k_copy.start(base + sK, first_col - Traits::kBlockN, seqlen_k);
        cp_async_commit();

        float kept[2] = {1.f, 1.f};  // of o, in this warp's own rows
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * i + fragment_row(lane, half);
                const float largest = fmaxf(all.max[i][half], maxima.max(row));
                const float reference = reference_of(largest, scoring.factor);
                const float rescale = exp2_approx(all.max[i][half] * scoring.factor - reference);
                all.max[i][half] = largest;
                const float sum = exponentials(s.x[i], half, scoring.factor, reference);
                if constexpr (kEveryStep) {
                    const float of_warp = quad_sum(sum);
                    if (lane % 4 == 0) sums.set(row, warp, of_warp);
                } else {
                    all.sum[i][half] = fmaf(all.sum[i][half], rescale, sum);
                }
                if (i == warp) kept[half] = rescale;
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (kEveryStep) {
                softmax.sum[0][half] *= kept[half];
                scale_row(o.x[0], half, softmax.sum[0][half]);
            } else {
                scale_row(o.x[0], half, kept[half]);
            }
        }

        // S: 64 x 32 of this warp -> A operand, 2 steps
        const OwnP<Traits> p(s);
        // The rows of v that are this warp's keys.
        const OperandB<TileK, Order::kTransposed, Traits::kHeadDim> v(base + TileK::row_step(first_key), sV, 0, lane);
        const auto multiply_v = [&](typename Parts<Traits>::Part& part, int exchange) {
            part.clear();
            multiply_ahead<T, OwnP<Traits>::kSteps>(
                part, p, ColumnsFrom<decltype(v)>{v, exchange * Traits::kPartTiles / 2});
        };
        typename Parts<Traits>::Part part[2];
        multiply_v(part[0], 0);
#pragma unroll
        for (int exchange = 0; exchange < Traits::kExchanges; ++exchange) {
            parts.send(o, part[exchange % 2], exchange);
            if (exchange + 1 < Traits::kExchanges) multiply_v(part[(exchange + 1) % 2], exchange + 1);
            __syncthreads();  // these parts are there, and every warp is done with those before, whose buffer is the next
            parts.receive(o, exchange);
        }
        if constexpr (kEveryStep) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // Their sums came with the parts.
                softmax.sum[0][half] += sums.sum(16 * warp + fragment_row(lane, half));
                scale_row(o.x[0], half, inverse(softmax.sum[0][half]));
            }
        }
    }

#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (i == warp) softmax.max[0][half] = all.max[i][half];
            if constexpr (!kEveryStep) {
                const float of_warp = quad_sum(all.sum[i][half]);
                if (lane % 4 == 0) sums.set(16 * i + fragment_row(lane, half), warp, of_warp);
            }
        }
    __syncthreads();  // the sums are there, and every warp is done with the rest of shared memory
    if constexpr (!kEveryStep) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            softmax.sum[0][half] = sums.sum(16 * warp + fragment_row(lane, half));
    }
}

}  // namespace fa2::ablations
