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

// The row statistics of one thread. Its warp has S of all rows and of a quarter of the keys, and o of 16 rows.
template <typename Traits, Rescale kRescale>
struct SplitSoftmax {
    ByWarp<Traits> maxima, sums;
    float scale_log2;
    int warp, lane;
    Softmax<kRescale, 1>& own;             // of this warp's 16 rows
    OnlineSoftmax<Traits::kRowTiles> all;  // row_max of all rows, which all warps know, and row_sum of this thread's columns

    __device__ __forceinline__ SplitSoftmax(const FwdBlock<Traits>& block, int warp, Softmax<kRescale, 1>& own)
        : maxima{reinterpret_cast<float*>(block.bytes + Traits::sMax)}, sums{reinterpret_cast<float*>(block.bytes + Traits::sSum)},
          scale_log2(NoScoreMod::scale_log2(block.params.shape)), warp(warp), lane(block.lane), own(own) {
        all.clear();
    }

    __device__ __forceinline__ int row(int i, int half) const { return 16 * i + fragment_row(lane, half); }

    template <typename S>
    __device__ __forceinline__ void share_maxima(const S& s) const {
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float largest = quad_max(all.max_of(s, i, half));
                if (lane % 4 == 0) maxima.set(row(i, half), warp, largest);
            }
    }

    __device__ __forceinline__ void share_sum(int i, int half) const {
        const float of_warp = quad_sum(all.row_sum[i][half]);
        if (lane % 4 == 0) sums.set(row(i, half), warp, of_warp);
    }

    // The sum over all warps, of a row of this warp.
    __device__ __forceinline__ float shared_sum(int half) const { return sums.sum(row(warp, half)); }
};

// FlashAttention-2: a thread adds up its columns over all key tiles, and the warps share these sums once, at the end.
template <typename Traits>
struct SumOnce : SplitSoftmax<Traits, Rescale::kAtTheEnd> {
    using Base = SplitSoftmax<Traits, Rescale::kAtTheEnd>;
    using Base::Base, Base::all, Base::own;

    template <typename S>
    __device__ __forceinline__ void exponentiate(S& s, int i, int half, float factor) {
        all.exponentiate(s, i, half, Base::scale_log2, factor);
    }
    template <typename O>
    __device__ __forceinline__ void rescale(O& o, int half, float factor) const { own.rescale(o, 0, half, factor); }
    __device__ __forceinline__ void add_sums() const {}

    __device__ __forceinline__ void finish_sums() const {
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) Base::share_sum(i, half);
        __syncthreads();  // the sums have arrived
        // finish() adds up four threads of a row: one of them gets the sum of the whole row.
#pragma unroll
        for (int half = 0; half < 2; ++half) own.row_sum[0][half] = Base::lane % 4 == 0 ? Base::shared_sum(half) : 0.f;
    }
};

// FlashAttention-1: the warps share the sums of every key tile, and o is divided by them, as in NormalisedSoftmax.
template <typename Traits>
struct SumEveryStep : SplitSoftmax<Traits, Rescale::kEveryStep> {
    using Base = SplitSoftmax<Traits, Rescale::kEveryStep>;
    using Base::Base, Base::all, Base::own;

    template <typename S>
    __device__ __forceinline__ void exponentiate(S& s, int i, int half, float factor) {
        all.row_sum[i][half] = 0.f;
        all.exponentiate(s, i, half, Base::scale_log2, factor);
        Base::share_sum(i, half);
    }
    template <typename O>
    __device__ __forceinline__ void rescale(O& o, int half, float factor) const {
        own.rescale(o, 0, half, inverse(own.row_sum[0][half]));
        own.row_sum[0][half] *= factor;
        own.rescale(o, 0, half, own.row_sum[0][half]);
    }
    // The sums came with the parts.
    __device__ __forceinline__ void add_sums() const {
#pragma unroll
        for (int half = 0; half < 2; ++half) own.row_sum[0][half] += Base::shared_sum(half);
    }
    __device__ __forceinline__ void finish_sums() const {}
};

// Turns S into P with the maxima of all warps, and rescales o of this warp's rows.
template <typename Rows, int kRowTiles, int kKeyTiles, int kDTiles>
__device__ __forceinline__ void to_p(Rows& rows, Accumulator<kRowTiles, kKeyTiles>& s, Accumulator<1, kDTiles>& o) {
    float kept[2] = {1.f, 1.f};  // factors of o, for this warp's own rows
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float factor = rows.all.raise_max(i, half, rows.maxima.max(rows.row(i, half)), rows.scale_log2);
            if (i == rows.warp) kept[half] = factor;
            rows.exponentiate(s, i, half, factor);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.rescale(o, half, kept[half]);
}

// o += P v, some columns of v at a time. A warp multiplies all rows of P by its own keys, and gets the parts of its own rows of o.
template <typename Traits, typename V>
__device__ __forceinline__ void multiply_and_exchange(const OwnP<Traits>& p, const V& v, const Parts<Traits>& parts,
                                                      Accumulator<1, Traits::kDTiles>& o) {
    const auto multiply_v = [&](typename Parts<Traits>::Part& part, int exchange) {
        part.clear();
        multiply_ahead<typename Traits::T, OwnP<Traits>::kSteps>(part, p, ColumnsFrom<V>{v, exchange * Traits::kPartTiles / 2});
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
}

// Computes o and the row statistics of each warp's 16 rows, over every key tile. row_sum is the sum of the whole row.
template <typename Traits, Rescale kRescale>
__device__ __forceinline__ void walk_split_k(const FwdBlock<Traits>& block, Accumulator<1, Traits::kDTiles>& o,
                                             Softmax<kRescale, 1>& softmax) {
    using T = typename Traits::T;
    using TileQ = typename Traits::TileQ;
    using TileK = typename Traits::TileK;
    constexpr uint32_t sQ = Traits::sQ, sK = Traits::sK, sV = Traits::sV;
    const uint32_t shared = block.shared;
    const int lane = block.lane, seqlen_k = block.sequence.seqlen_k;
    const int warp = block.thread / kWarpSize, first_key = warp * Traits::kWarpKeys;  // of a tile
    const Range common = block.sees.common_keys(block.rows);
    const auto k_copy = block.copy_k();
    const auto v_copy = block.copy_v();
    std::conditional_t<kRescale == Rescale::kEveryStep, SumEveryStep<Traits>, SumOnce<Traits>> rows(block, warp, softmax);
    const Parts<Traits> parts{reinterpret_cast<float4*>(block.bytes + Traits::sParts), warp, lane};
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
        rows.share_maxima(s);
        cp_async_wait<0>();
        __syncthreads();  // v has arrived, and so have the maxima; every warp is done with k
        if (n_block > n_first) k_copy.start(shared + sK, first_col - Traits::kBlockN, seqlen_k);
        cp_async_commit();
        to_p(rows, s, o);
        // S: 64 x 32 of this warp -> A operand, 2 steps. The rows of v are this warp's keys.
        const OwnP<Traits> p(s);
        const OperandB<TileK, Order::kTransposed, Traits::kHeadDim> v(shared + TileK::row_step(first_key), sV, 0, lane);
        multiply_and_exchange(p, v, parts, o);
        rows.add_sums();
    }
    rows.finish_sums();
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (i == warp) softmax.row_max[0][half] = rows.all.row_max[i][half];
}

}  // namespace fa2::ablations
