// The forward's walk with warps that split the keys, as in FlashAttention-1: each warp has all queries of the tile and a quarter of the
// keys. The row maxima and the parts of P v then cross warps in every step, through shared memory.
//
// Tile       64 queries, because each warp holds S of all of them and its part of P v in registers; with 128 queries they do not fit
//            together with o. 128 keys, twice ours at head_dim 128, because the exchange happens once for each key tile.
// Rows       each warp keeps o and the row statistics of 16 rows, and adds up the parts of all four warps for them.
// Pipeline   wait k | start v | S = q k^T of own keys | mask | own maxima | wait v, maxima | start next k | P | for some
//            columns at a time: P v of own keys | send it to the other warps | barrier | o += parts. With two buffers of parts, a warp
//            multiplies the next columns while it waits for the barrier.
// Shared     as sm80/fwd.cuh; row maxima and sums of 64 rows by warp; two buffers of parts.
#pragma once

#include "sm80/fwd.cuh"
#include "softmax.cuh"

namespace fa2::ablations {

using namespace fa2::sm80;

struct SplitK {};

template <typename T, int kHeadDim>
struct SplitKTraits : FwdTraits<T, kHeadDim, 64, 128, 4, 1, NoScoreMod>, SplitK {
    using Base = FwdTraits<T, kHeadDim, 64, 128, 4, 1, NoScoreMod>;
    static constexpr int kRowTiles = Base::kBlockM / 16;            // S, parts: m16 tiles, the same in all warps
    static constexpr int kWarpKeys = Base::kBlockN / Base::kWarps;
    static constexpr int kKeyTiles = kWarpKeys / 8;                 // S: n8 tiles of a warp
    // n8 tiles of o in one exchange: as many as leave room for two blocks on a multiprocessor.
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

// The parts of P v that warps send to each other. Each warp sends the m16 tiles of the other three, in the layout of its registers.
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

    // Sends the tiles of the other warps, and adds this warp's own tile to o.
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

// Computes o and the row statistics of each warp's 16 rows, over every key tile. row_sum is the sum of the whole row.
template <typename Traits, Rescale kRescale>
__device__ __forceinline__ void walk_split_k(const FwdBlock<Traits>& block, Accumulator<1, Traits::kDTiles>& o,
                                             Softmax<kRescale, 1>& softmax) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    constexpr bool kEveryStep = kRescale == Rescale::kEveryStep;
    constexpr uint32_t sQ = Traits::sQ, sK = Traits::sK, sV = Traits::sV;
    const uint32_t shared = block.shared;
    const float scale_log2 = NoScoreMod::scale_log2(block.params.shape);
    const int lane = block.lane, seqlen_k = block.sequence.seqlen_k;
    const int warp = block.thread / kWarpSize, first_key = warp * Traits::kWarpKeys;  // of a tile
    const Range common = block.sees.common_keys(block.rows);
    const auto k_copy = block.copy_k();
    const auto v_copy = block.copy_v();
    const ByWarp<Traits> maxima{reinterpret_cast<float*>(block.bytes + Traits::sMax)};
    const ByWarp<Traits> sums{reinterpret_cast<float*>(block.bytes + Traits::sSum)};
    const Parts<Traits> parts{reinterpret_cast<float4*>(block.bytes + Traits::sParts), warp, lane};
    // The row_max of all rows, which all warps know, and the row_sum of this thread's columns.
    OnlineSoftmax<Traits::kRowTiles> all;
    all.clear();
    const int n_first = block.keys.begin / Traits::kBlockN;
    int n_block = (block.keys.end - 1) / Traits::kBlockN;
    block.start_q();
    k_copy.start(shared + sK, n_block * Traits::kBlockN, seqlen_k);
    cp_async_commit();
    for (; n_block >= n_first; --n_block) {
        cp_async_wait<0>();
        __syncthreads();  // k has arrived, and every warp is done with the v, the maxima and the parts of the step before
        const int first_col = n_block * Traits::kBlockN;
        v_copy.start(shared + sV, first_col, seqlen_k);
        cp_async_commit();
        Accumulator<Traits::kRowTiles, Traits::kKeyTiles> s;
        s.clear();
        multiply_ahead<T, Traits::kHeadDim / 16>(
            s, OperandA<TileQ, Order::kContiguousK>(shared, sQ, 0, lane),
            OperandB<TileK, Order::kContiguousK, Traits::kWarpKeys>(shared, sK, first_key, lane));
        if (first_col < common.begin || first_col + Traits::kBlockN > common.end)
            hide(s, block.sees, block.rows.begin, first_col + first_key, lane, -INFINITY);
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float largest = quad_max(all.max_of(s, i, half));
                if (lane % 4 == 0) maxima.set(16 * i + fragment_row(lane, half), warp, largest);
            }
        cp_async_wait<0>();
        __syncthreads();  // v has arrived, and so have the maxima; every warp is done with k
        if (n_block > n_first) k_copy.start(shared + sK, first_col - Traits::kBlockN, seqlen_k);
        cp_async_commit();

        float kept[2] = {1.f, 1.f};  // factors of o, for this warp's own rows
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * i + fragment_row(lane, half);
                const float factor = all.raise_max(i, half, maxima.max(row), scale_log2);
                if (i == warp) kept[half] = factor;
                if constexpr (kEveryStep) all.row_sum[i][half] = 0.f;
                all.exponentiate(s, i, half, scale_log2, factor);
                if constexpr (kEveryStep) {
                    const float of_warp = quad_sum(all.row_sum[i][half]);
                    if (lane % 4 == 0) sums.set(row, warp, of_warp);
                }
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (kEveryStep) {
                softmax.rescale(o, 0, half, inverse(softmax.row_sum[0][half]));
                softmax.row_sum[0][half] *= kept[half];
                softmax.rescale(o, 0, half, softmax.row_sum[0][half]);
            } else {
                softmax.rescale(o, 0, half, kept[half]);
            }
        }

        // S: 64 x 32 of this warp -> A operand, 2 steps
        const OwnP<Traits> p(s);
        // The rows of v that are this warp's keys.
        const OperandB<TileK, Order::kTransposed, Traits::kHeadDim> v(shared + TileK::row_step(first_key), sV, 0, lane);
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
            __syncthreads();  // these parts have arrived, and every warp is done with the buffer of the next ones
            parts.receive(o, exchange);
        }
        if constexpr (kEveryStep) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                softmax.row_sum[0][half] += sums.sum(16 * warp + fragment_row(lane, half));  // they came with the parts
        }
    }

#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (i == warp) softmax.row_max[0][half] = all.row_max[i][half];
            if constexpr (!kEveryStep) {
                const float of_warp = quad_sum(all.row_sum[i][half]);
                if (lane % 4 == 0) sums.set(16 * i + fragment_row(lane, half), warp, of_warp);
            }
        }
    __syncthreads();  // the sums have arrived
    if constexpr (!kEveryStep) {
        // finish() adds up four threads of a row: one of them gets the sum of the whole row.
#pragma unroll
        for (int half = 0; half < 2; ++half)
            softmax.row_sum[0][half] = lane % 4 == 0 ? sums.sum(16 * warp + fragment_row(lane, half)) : 0.f;
    }
}

}  // namespace fa2::ablations
